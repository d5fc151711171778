"""Self-contained HTML pages: text, tables and images in one file."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from errors import printable
from outputs.names import any_glyphs
from tools.common import command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
.warning { color: #a33; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #1c1c1e; } th, td { border-color: #444; }
  figcaption { color: #aaa; } .warning { color: #f88; } img.chart { background: #fff; } }
"""


class Page:
    """An HTML page that is built from top to bottom and needs no other file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{_escaped(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{_escaped(text)}</h2>")

    def text(self, text: str, *, warning: bool = False) -> None:
        attribute = ' class="warning"' if warning else ""
        self._parts.append(f"<p{attribute}>{_escaped(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Floats are shown with three decimals, numbers to the right."""
        head = "".join(f"<th>{_escaped(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def image(self, image: Image.Image, caption: str = "", *, width: int | None = None) -> None:
        """An image (PNG), ``width`` pixels wide on the page."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        size = f' width="{width}"' if width else ""
        # A caption is at least readable below a small image, and no wider than a large one.
        style = f' style="max-width: {max(width, 150)}px"' if width else ""
        self._figure(buffer.getvalue(), "image/png", caption, size, style)

    def chart(self, figure: "Figure", caption: str = "") -> None:
        """A matplotlib figure (SVG, so that it stays sharp)."""
        buffer = io.BytesIO()
        with any_glyphs():
            figure.savefig(buffer, format="svg", bbox_inches="tight")
        self._figure(buffer.getvalue(), "image/svg+xml", caption, ' class="chart"')

    def _figure(
        self, content: bytes, kind: str, caption: str, attributes: str, style: str = ""
    ) -> None:
        data = base64.b64encode(content).decode()
        label = _escaped(caption)
        below = f"<figcaption>{label}</figcaption>" if caption else ""
        self._parts.append(
            f'<figure{style}><img{attributes} alt="{label}" src="data:{kind};base64,{data}">'
            f"{below}</figure>"
        )

    def write(self, path: Path) -> None:
        """Raises UserError where the file can't be written."""
        text = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escaped(self.title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(self._parts)}</body></html>"
        )
        command.write_text(path, text)


def _escaped(text: str) -> str:
    """``text`` as text of a page, an attribute too, however it is made."""
    return html.escape(printable(text))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.3f}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{_escaped(str(value))}</td>"
