"""Copies MathJax and its fonts into the site, from a package of the `docs` extra, so
that a page fetches nothing from elsewhere.
"""

import importlib.metadata
from pathlib import PurePosixPath

from mkdocs.structure.files import File


_source = PurePosixPath("mathjax/static/mathjax/es5")
_fonts = _source / "output/chtml/fonts/woff-v2"


def on_files(files, config):
    """Called by mkdocs; see `hooks` in `mkdocs.yml`."""
    script = _source / "tex-chtml.js"
    package = importlib.metadata.distribution("django-static-mathjax")
    paths = package.files or []
    if script not in paths:
        raise FileNotFoundError(f"`django-static-mathjax` has no `{script}`.")
    for path in paths:
        if path == script or path.parent == _fonts:
            place = f"javascripts/mathjax/{path.relative_to(_source)}"
            source = str(path.locate())
            files.append(File.generated(config, place, abs_src_path=source))
    return files
