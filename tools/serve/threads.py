"""How many threads the model gets: as many cores as are left when the decoders do their part."""

import math
import threading

import torch

FORGETTING = 0.99  # of an image: what counts is the last hundred or so
ENOUGH = 32  # images of either kind, before anything is changed: the first ones are slow


class _Mean:
    """Seconds per image, the last ones above all."""

    def __init__(self) -> None:
        self.images, self._seconds, self._weight = 0, 0.0, 0.0

    def add(self, images: int, seconds: float) -> None:
        kept = FORGETTING**images
        self.images += images
        self._seconds = kept * self._seconds + (1 - kept) * seconds / images
        self._weight = kept * self._weight + (1 - kept)

    def value(self) -> float:
        return self._seconds / self._weight


class Threads:
    """Divides the cores between a model and the decoding of its images, by the work of each.

    A model with more threads than cores are free waits for its own threads: each part of its work
    ends with the slowest. So of C cores the model gets C·m / (m + d), rounded, at least one, where
    an image costs the model m and its decoder d seconds of a core.

    Args:
        cores: to be divided; the model begins with all of them.
        divide: False leaves it at that.
    """

    def __init__(self, cores: int, *, divide: bool) -> None:
        self.number = cores
        self._cores, self._divide = cores, divide
        self._model, self._decoders = _Mean(), _Mean()
        self._lock = threading.Lock()

    def count_decoded(self, seconds: float) -> None:
        """Count an image that took ``seconds`` of CPU time to decode; of any thread."""
        if not 0 <= seconds < math.inf:  # of a decoder that an image has made say so
            return
        with self._lock:
            self._decoders.add(1, seconds)

    def count_batch(self, images: int, seconds: float) -> None:
        """Count a batch that took ``seconds`` on ``number`` threads, and divide the cores anew."""
        with self._lock:
            self._model.add(images, seconds * self.number)
            if self._divide and min(self._model.images, self._decoders.images) >= ENOUGH:
                model, decoding = self._model.value(), self._decoders.value()
                self.number = max(1, round(self._cores * model / (model + decoding)))

    def apply(self) -> None:
        """Let torch use ``number`` threads; to be called by the thread that runs the model, as
        others keep the number that they began with."""
        if torch.get_num_threads() != self.number:
            torch.set_num_threads(self.number)
