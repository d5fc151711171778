"""Messages on standard output."""

import logging
import sys

from distributed.processes import Processes


class _Console(logging.Handler):
    """Writes messages to standard output, above a progress bar if one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(self.format(record), flush=True)


def setup_messages(processes: Processes) -> None:
    """Messages go to standard output; other processes' only from warnings up, with the rank."""
    handler = _Console()
    if processes.is_main:
        handler.setFormatter(_Formatter())
    else:
        handler.setFormatter(
            logging.Formatter(f"[rank {processes.rank}] %(levelname)s: %(message)s")
        )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if processes.is_main else logging.WARNING)
    # Libraries speak up from warnings on.
    for name in ("timm", "matplotlib", "PIL", "torch", "submitit"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
