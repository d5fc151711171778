"""Trainings of a search: processes of main.py, each in a folder of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Config, to_yaml
from errors import OptionError
from training.lock import RunLock, holder_of

MAIN = Path(__file__).resolve().parent.parent.parent / "main.py"
PATIENCE = 120.0  # seconds in which a training must end after SIGTERM
OUTPUT_FILE = "output.txt"


@dataclass
class TrainingProcess:
    """A training that is under way, or has ended."""

    process: subprocess.Popen
    folder: Path
    read: int = field(default=0, init=False)
    """Bytes of log.txt that were read."""

    @classmethod
    def start(
        cls, config: Config, values: Mapping[str, Any], folder: Path, device: str
    ) -> "TrainingProcess":
        """Train in ``folder`` as ``config`` says but for ``values``; "" is its own device."""
        folder.mkdir(exist_ok=True)
        text = to_yaml(config.replace("tune", **values))
        (folder / "options.yaml").write_text(text, encoding="utf-8")
        argv = [sys.executable, str(MAIN), "--config", str(folder / "options.yaml")]
        argv += ["--output-dir", str(folder)]
        if device:
            argv += ["--device", device]
        # A job of several tasks runs several searches; to a training it would look like its peers.
        peers = ("RANK", "WORLD_SIZE", "SLURM_NTASKS")
        environment = {k: v for k, v in os.environ.items() if k not in peers}
        with open(folder / OUTPUT_FILE, "wb") as output:
            # Its own group: Ctrl-C in the terminal is passed on by this process, once.
            process = subprocess.Popen(
                argv,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        return cls(process, folder)

    def new_records(self) -> list[dict[str, Any]]:
        """The whole lines of log.txt that have come since the last call."""
        from loggers import LOG_FILE  # brings torch, which --help needn't wait for

        try:
            with open(self.folder / LOG_FILE, "rb") as file:
                file.seek(self.read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def last_line(self) -> str:
        """The last line that the training printed."""
        path = self.folder / OUTPUT_FILE
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"see {path}")

    def wait(self) -> None:
        """Wait for a training that got SIGTERM; kill it where that takes too long."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def remove_checkpoints(self, *, best_too: bool) -> None:
        """A search writes more of them than a disk may hold, and no trial is resumed."""
        best = self.folder.glob("best.pth") if best_too else ()
        for path in [*self.folder.glob("checkpoint-*.pth"), *best]:
            path.unlink()


def end_orphan(folder: Path) -> None:
    """End the training that a killed search has left in ``folder``, if it is on this machine."""
    if not folder.is_dir():
        return
    try:
        RunLock(folder).release()
    except OptionError:
        holder = holder_of(folder)
        if holder and holder["host"] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGTERM)
