"""Metadata of the distribution that follow from others: its URLs, and the README with
links that work outside of the repository.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    """See `[tool.hatch.metadata.hooks.custom]` in `pyproject.toml`."""

    def update(self, metadata):
        repository = self.config["repository"]
        owner, name = repository.split("/")[-2:]
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"https://{owner}.github.io/{name}",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }

        def absolute(match):
            text, path = match.groups()
            view = "raw" if text.startswith("!") else "blob"
            return f"{text}({repository}/{view}/v{metadata['version']}/{path})"

        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": re.sub(r"(!?\[[^]]*\])\((docs/[^)]*)\)", absolute, readme),
        }
