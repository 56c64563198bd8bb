"""Marks the cells of tables that hold more than a few words, for the stylesheet to give
them room. Else a browser makes them as narrow as their longest word.
"""

import re


_cell = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL)
_many = 45  # characters


def _mark(cell: re.Match) -> str:
    text = re.sub(r"<[^>]*>", "", cell[2])
    return cell[0] if len(text) < _many else f'<td class="long"{cell[1]}>{cell[2]}</td>'


def on_page_content(html, **kwargs):
    """Called by mkdocs; see `hooks` in `mkdocs.yml`."""
    return _cell.sub(_mark, html)
