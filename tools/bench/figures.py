"""Files of figures read without torch: their rows, and the limits of these in words."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_figures(path: Path) -> list[Row]:
    """The rows of a file of figures. What a file says once for all holds for each of its rows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    shared = {key: value for key, value in content.items() if key != "rows"}
    return [{**shared, **row} for row in content["rows"]]


def limit_share(row: Row) -> float | None:
    """How much of its limit a row reaches, 0 to 1; None where no limit was measured."""
    if "limit" not in row:
        return None
    limit = row["limit"]
    return row["ours"] / limit["value"] if limit["share"] is None else limit["share"]


def limit_text(row: Row) -> str:
    """The limit of a row and how much of it is reached, in words."""
    share = limit_share(row)
    if share is None:
        return "not measured"
    limit = row["limit"]
    digits = 0 if limit["value"] >= 100 else 1
    return f"{limit['what']}: {limit['value']:,.{digits}f} {limit['unit']} ({share:.0%})"
