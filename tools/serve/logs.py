"""The service's log: what strangers cause over and over is told once, then counted."""

import logging
import time

INTERVAL = 10.0  # seconds
AT_FIRST = 5  # lines of a kind in an interval

Kind = tuple[str, int]  # where in the source it is logged


class Sparing(logging.Filter):
    """Lets the first lines of a kind pass; the first one after the interval tells of the others.

    A kind is a place in the source.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun: dict[Kind, float] = {}
        self._seen: dict[Kind, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write ``record``."""
        kind, now = (record.pathname, record.lineno), time.monotonic()
        seen = self._seen.get(kind, 0) + 1
        if now - self._begun.get(kind, -INTERVAL) >= INTERVAL:
            left_out = seen - 1 - AT_FIRST
            if left_out > 0:
                record.msg = f"{record.getMessage()} (and {left_out:,} like it before)"
                record.args = ()
            self._begun[kind], seen = now, 1
        self._seen[kind] = seen
        return seen <= AT_FIRST


def set_up() -> None:
    """Write what is logged to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(Sparing())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
