"""Write the generated parts of the documents anew: ``python -m tools.docs``.

``docs/options.md`` is made from ``config/options.py``; the tables in docs/coming-from-deit.md and
docs/coming-from-timm.md, from ``config/peer_options/``; that in docs/resume.md, from
``config/resumed.py``.
"""

import re
from pathlib import Path

import config

DOCS = Path(__file__).resolve().parent.parent / "docs"
# A table stands between these two lines; its name is in the first.
TABLE = re.compile(r"(<!-- options: (\w+)( launcher)? -->\n).*?(<!-- end of options -->)", re.S)


def pages() -> dict[Path, str]:
    """Each page that is generated, or holds something generated, as it must be."""
    found = {DOCS / "options.md": config.options_table()}
    for name in (*(f"coming-from-{peer}" for peer in config.PEERS), "resume"):
        path = DOCS / f"{name}.md"
        found[path] = with_tables(path.read_text(encoding="utf-8"))
    return found


def with_tables(text: str) -> str:
    """``text`` with the tables that its comments name between them."""

    def filled(found: re.Match[str]) -> str:
        head, name, launcher, end = found.groups()
        if name == "resume":
            return f"{head}\n{config.resume_table()}\n{end}"
        return f"{head}\n{config.peer_table(name, launcher=bool(launcher))}\n{end}"

    return TABLE.sub(filled, text)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
