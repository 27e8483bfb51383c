"""What mkdocs would show differently from GitHub, and flags that would be broken at their hyphens."""

from __future__ import annotations

import re

_CELL = re.compile(r"<td>.*?</td>", re.DOTALL)
_FLAG = re.compile(r"<code>(-[^<]{1,45})</code>")


def on_page_content(html: str, **_: object) -> str:
    """Called by mkdocs with the HTML of each page: in a table, GitHub shows `\\|` in code as `|`."""
    html = _CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)
    return _FLAG.sub(r'<code class="flag">\1</code>', html)
