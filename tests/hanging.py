"""A plug-in that has storage hang: whoever opens an image that is a pipe waits for its content.

Without it a pipe is no image, and refused at once. Once somebody has written to the pipe and closed
it, the file that lies in its place by then is opened.
"""

import os
import stat
from pathlib import Path
from typing import Any

SWITCH = "HANGING_STORAGE"
OPTIONS = ("--plugin", __file__)
ENVIRONMENT = {SWITCH: "1"}  # of a run with OPTIONS: the tests' own process imports this file too

_open = os.open


def held_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
    """As ``os.open``, which this takes the place of."""
    while _is_pipe(path):
        Path(path).read_bytes()  # waits in the kernel
    return _open(path, flags, *rest, **named)


def _is_pipe(path: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


if SWITCH in os.environ:
    os.open = held_open
