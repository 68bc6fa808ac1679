"""HTML pages that open from disk on their own: style, script and images are embedded, nothing is fetched.

Pages are Jinja2 templates in ``templates/``. Every value is escaped there (autoescape).
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Cell:
    """A table cell that is sorted by a number, or that has a CSS class.

    Attributes:
        text: The text shown.
        order: Number to sort by.
        kind: CSS class.
        title: Text that the browser shows above the cell.
    """

    text: str
    order: float | None = None
    kind: str = ""
    title: str = ""

    @property
    def is_number(self) -> bool:
        return self.order is not None or self.text.replace(",", "").replace(".", "").isdecimal()


class Table:
    """A table; columns that hold only numbers are right-aligned.

    Args:
        heads: Column names.
        rows: Values or ``Cell``s.
        kind: CSS class of the table; the script makes tables of class ``sortable`` sortable.
        id: Its HTML id.
    """

    def __init__(self, heads: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "", id: str = "") -> None:
        cells = [[value if isinstance(value, Cell) else Cell(with_commas(value)) for value in row] for row in rows]
        columns = zip(*cells, strict=True) if cells else [()] * len(heads)
        kinds = ["n" if column and all(cell.is_number for cell in column) else "" for column in columns]
        self.heads = [Cell(name, kind=kind) for name, kind in zip(heads, kinds, strict=True)]
        self.rows = [
            [replace(cell, kind=f"{kind} {cell.kind}".strip()) for cell, kind in zip(row, kinds, strict=True)]
            for row in cells
        ]
        # on a narrow screen the cells of a wide table are below each other, with the column's name above each
        self.kind, self.id = f"{kind} stacks".strip() if len(heads) > 3 else kind, id


def path_cell(path: str, max_chars: int = 60) -> Cell:
    """A path, cut in the middle if it is long; the browser shows all of it above the cell."""
    if len(path) <= max_chars:
        return Cell(path)
    end = max_chars * 2 // 3
    return Cell(f"{path[: max_chars - end - 1]}\N{HORIZONTAL ELLIPSIS}{path[-end:]}", title=path)


def with_commas(value: Any) -> str:
    """A value as text, whole numbers with thousands separators."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def render_page(template: str, title: str, assets: Sequence[str] = (), **values: Any) -> bytes:
    """Render a page.

    The page's content security policy allows its own style and script by their hashes and forbids fetching anything,
    in case a text ever gets past the escaping.

    Args:
        template: File name in ``templates/``.
        title: Title of the page.
        assets: Style and script files in ``assets/``, added to ``page.css``.
        values: What the template shows.
    """
    files = [ASSETS / name for name in ("page.css", *assets)]
    embedded = {}
    for name, suffix in (("style", ".css"), ("script", ".js")):
        text = "".join(file.read_text(encoding="utf-8") for file in files if file.suffix == suffix)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
        embedded |= {name: text, f"{name}_hash": digest}
    text = _environment().get_template(template).render(title=title, **embedded, **values)
    # What UTF-8 cannot encode (half of a surrogate pair in a name) is shown as its number.
    return text.encode("utf-8", "xmlcharrefreplace")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("voxray.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_commas"] = with_commas
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment
