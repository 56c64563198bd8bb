"""Programs in the README and in the pages of the site run as they are printed.

Those of one page run in order, in one namespace. A block after the line

    <!-- fragment -->

is a part of a program, and is left out.
"""

import re
from pathlib import Path

import jax
import pytest


_root = Path(__file__).parents[2]
_block = re.compile(
    r"^(?P<fragment>[ ]*<!-- fragment -->\n+)?(?P<indent>[ ]*)```python[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


def _programs(page: Path) -> list[str]:
    """With empty lines in front, so that errors name the line of the page."""
    text = page.read_text()
    return [
        "\n" * text.count("\n", 0, x.start("code"))
        + re.sub(rf"^{x['indent']}", "", x["code"], flags=re.MULTILINE)
        for x in _block.finditer(text)
        if x["fragment"] is None
    ]


_pages = [_root / "README.md", *sorted((_root / "docs").rglob("*.md"))]
_programs_of = {str(x.relative_to(_root)): _programs(x) for x in _pages}


@pytest.fixture
def as_users_have_it():
    """JAX's defaults, and not those of the tests."""
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.slow
@pytest.mark.parametrize("page", [x for x, y in _programs_of.items() if y])
def test_programs_of_page_run(page, as_users_have_it):
    namespace = {"__name__": "__main__"}
    for program in _programs_of[page]:
        exec(compile(program, page, "exec"), namespace)


def test_programs_are_found():
    assert len(_programs_of["README.md"]) == 1
    assert len(_programs_of["docs/getting_started.md"]) > 5
