"""What a release says of itself: each fact is in one place."""

import re
import tomllib
from pathlib import Path


root = Path(__file__).parent.parent
pyproject = tomllib.loads((root / "pyproject.toml").read_text())


def test_changelog_starts_with_the_version():
    changelog = (root / "CHANGELOG.md").read_text()
    entries = re.findall(r"^## \[(.*)\]", changelog, re.MULTILINE)
    assert entries[:2] == ["Unreleased", pyproject["project"]["version"]]
    # Each has its link.
    assert entries == re.findall(r"^\[(.*)\]: ", changelog, re.MULTILINE)
    citation = (root / "CITATION.cff").read_text()
    (date,) = re.findall(r"^date-released: (.*)$", citation, re.MULTILINE)
    assert f"## [{entries[1]}] - {date}\n" in changelog


def test_account_is_in_one_file():
    """What else names the repository is derived by `docs/metadata.py`, or relative."""
    url = pyproject["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    account, name = url.split("/")[-2:]
    named = re.compile(rf"\b{account}(/{name}|\.github\.io)".encode())
    folders = (".ci", ".github", "diffrax_sde_adjoint", "docs", "examples", "tests")
    paths = [*root.iterdir(), *(x for y in folders for x in (root / y).rglob("*"))]
    files = {x.name for x in paths if x.is_file() and named.search(x.read_bytes())}
    # An sdist has what was derived.
    assert files - {"PKG-INFO"} == {"pyproject.toml"}
