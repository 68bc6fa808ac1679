"""HTML pages that open anywhere by themselves: style, pictures and script are in them, nothing is fetched."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5c6b7a;--back:#f4f6f8;--box:#fff;--line:#dde3e9;--thin:#edf0f3;
--good:#2d7d4f;--bad:#b3372f;--warn:#8a5a00;--warn-back:#fff6e0}
@media (prefers-color-scheme:dark){:root{--ink:#dfe5ec;--soft:#93a1b0;--back:#14191f;--box:#1c232b;--line:#303a45;
--thin:#28313b;--good:#3f9a66;--bad:#cf5a50;--warn:#e3b75c;--warn-back:#2e2717}}
body{font:15px/1.5 system-ui,"Noto Sans KR","Noto Sans CJK KR","Malgun Gothic","Apple SD Gothic Neo",sans-serif;
color:var(--ink);background:var(--back);margin:0}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px;overflow-wrap:anywhere}
h1{font-size:24px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 10px}
.verdict{display:inline-block;padding:2px 12px;border-radius:12px;font-weight:600;color:#fff;background:var(--bad)}
.verdict.good{background:var(--good)}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0}
.card{background:var(--box);border:1px solid var(--line);border-radius:8px;padding:10px 18px;min-width:110px}
.card b{display:block;font-size:22px}
.card span,.note{color:var(--soft)}
.box{background:var(--box);border:1px solid var(--line);border-radius:8px;padding:6px 14px;margin:10px 0;
overflow-x:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--thin);vertical-align:top;
overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td:not(.n){min-width:5.5em}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;overflow-wrap:normal}
code{font:13px ui-monospace,monospace}
details{margin:6px 0}
summary{cursor:pointer}
summary b{margin-right:8px}
@media (max-width:640px){main{padding:20px 12px 40px}}
img{max-width:100%;height:auto;display:block;background:#fff;border-radius:4px}
"""


@dataclass(frozen=True)
class Cell:
    """A cell whose text is not what it is sorted by, or that stands out.

    Attributes:
        text: What is shown.
        order: Number to sort by.
        kind: CSS class.
    """

    text: str
    order: float | None = None
    kind: str = ""


def asset(name: str) -> str:
    """Text of a style or script file that a report embeds, such as ``report.css``."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def escaped(value: Any) -> str:
    """A value as text that is safe anywhere in a page."""
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))


def table(names: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "", identity: str = "") -> str:
    """A table in a box; columns that hold nothing but numbers stand to the right.

    Args:
        rows: Values or ``Cell``s.
        kind: CSS class of the table.
        identity: Its id.
    """
    cells = [[value if isinstance(value, Cell) else Cell(_plain(value)) for value in row] for row in rows]
    kinds = [
        ' class="n"' if all(cell.order is not None or _is_number(cell.text) for cell in column) else ""
        for column in zip(*cells, strict=True)
    ] or [""] * len(names)
    head = "".join(f"<th{kind}>{escaped(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)) + "</tr>" for row in cells
    )
    mark = f' id="{escaped(identity)}"' if identity else ""
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="box"><table class="{kind}"{mark}>{inner}</table></div>'


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(cell: Cell, kind: str) -> str:
    classes = " ".join(filter(None, ["n" if kind else "", cell.kind]))
    mark = f' class="{classes}"' if classes else ""
    order = "" if cell.order is None else f' data-order="{cell.order!r}"'
    return f"<td{mark}{order}>{html.escape(cell.text)}</td>"


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").isdecimal()


def picture(title: str, png: bytes) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def page(title: str, body: str, *, style: str = "", script: str = "") -> bytes:
    """A whole page.

    A page with a script says itself that no other may run and that nothing may be fetched, should a text ever get past
    the escaping.
    """
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}{style}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        rules = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; media-src data: file:"
        head = f'<meta http-equiv="Content-Security-Policy" content="{rules}">{head}'
        body += f"</main><script>{script}</script>"
    else:
        body += "</main>"
    text = f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</body></html>\n'
    # What no font and no UTF-8 could show (half of a surrogate pair in a name) is shown as its number.
    return text.encode("utf-8", "xmlcharrefreplace")
