"""Write ``docs/options.md`` anew from ``config/options.py``: ``python -m tools.docs``."""

from pathlib import Path

import config

PATH = Path(__file__).resolve().parent.parent / "docs" / "options.md"

if __name__ == "__main__":
    PATH.write_text(config.options_table(), encoding="utf-8")
    print(f"wrote {PATH}")
