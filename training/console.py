"""Which messages of a run go to standard output, and how they look."""

import logging

from distributed.processes import Processes
from outputs.console import show_messages


def setup_messages(processes: Processes) -> None:
    """Messages go to standard output; other processes' only from warnings up, with the rank."""
    if processes.is_main:
        show_messages(_Formatter(), logging.INFO)
    else:
        text = f"[rank {processes.rank}] %(levelname)s: %(message)s"
        show_messages(logging.Formatter(text), logging.WARNING)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
