"""Images that could not be read: each is reported once, and all are listed in the run's folder."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from distributed.processes import gather
from outputs.files import Outputs
from pipeline.dataset import Batch
from utils import write_text

log = logging.getLogger(__name__)

BAD_IMAGES_FILE = "bad_images.txt"


class BadImages:
    """The unreadable images of a run, those of earlier sessions included.

    Attributes:
        listed: "path: reason" of all processes, as of the last :meth:`gather`.
    """

    def __init__(self, folder: Path, outputs: Outputs, before: Sequence[str] = ()) -> None:
        self.path = folder / BAD_IMAGES_FILE
        self.outputs = outputs
        self.listed = list(before)
        self._seen: dict[str, None] = {}  # by this process, an ordered set

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; what could not be read of them is reported and noted."""
        for batch in batches:
            self.note(batch.bad)
            yield batch

    def note(self, lines: Sequence[str]) -> None:
        """Report what this process has not met before."""
        for line in lines:
            if line not in self._seen:
                self._seen[line] = None
                log.warning("image skipped: %s", line)

    def gather(self, *, is_main: bool) -> None:
        """Bring together what all processes could not read; the main one writes the list."""
        before = len(self.listed)
        everything = dict.fromkeys(self.listed)
        for lines in gather(list(self._seen)):
            everything |= dict.fromkeys(lines)
        self.listed = list(everything)
        if not is_main or len(self.listed) == before:
            return
        text = "".join(f"{line}\n" for line in self.listed)
        self.outputs.write(self.path, lambda path: write_text(path, text))
