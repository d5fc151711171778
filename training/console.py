"""Which messages of a run go to standard output and into its folder, and how they look."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed.processes import Processes
from errors import Stopped, UserError
from outputs.console import show_messages
from outputs.message_log import RUN_LOG, MessageLog


def setup_messages(processes: Processes, least: str) -> None:
    """Messages from the level ``least`` up go to standard output; those of other processes than
    the main one only from warnings up, with the rank. The main one's are held for ``run.log``."""
    level = logging.getLevelNamesMapping()[least.upper()]
    if processes.is_main:
        show_messages(_Formatter(), level)
        logging.getLogger().addHandler(MessageLog())
    else:
        text = f"[rank {processes.rank}] %(levelname)s: %(message)s"
        show_messages(logging.Formatter(text), max(level, logging.WARNING))


@contextmanager
def message_log(folder: Path) -> Iterator[None]:
    """Inside, messages of the main process go to ``run.log`` in ``folder`` too; so does what ends
    the run, which the command line prints."""
    logs = [h for h in logging.getLogger().handlers if isinstance(h, MessageLog)]
    for log in logs:
        log.open(folder / RUN_LOG)
    try:
        yield
    except BaseException as error:
        foreseen = isinstance(error, UserError | Stopped)
        record = {"levelno": logging.ERROR, "levelname": "ERROR", "msg": str(error)}
        if not foreseen:
            record |= {"msg": "ended by", "exc_info": (type(error), error, error.__traceback__)}
        for log in logs:
            log.handle(logging.makeLogRecord(record))
        raise
    finally:
        for log in logs:
            log.close()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
