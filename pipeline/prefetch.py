"""The next batch is copied to the device while this one is computed."""

from collections.abc import Callable, Iterable, Iterator

import torch

from pipeline.dataset import Batch


def prefetch(
    batches: Iterable[Batch],
    device: torch.device,
    place: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[Batch]:
    """The batches; on CUDA the next one is copied while this one is computed, on another stream.

    ``place`` copies a tensor to ``device`` in the memory layout that the model wants.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    coming: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            images, targets = place(batch.images), place(batch.targets)
        if coming is not None:
            yield coming
        coming = batch._replace(images=images, targets=targets)
        here = torch.cuda.current_stream(device)
        here.wait_stream(stream)
        for tensor in (images, targets):
            # The other stream must not use their memory again before this one is done.
            tensor.record_stream(here)
    if coming is not None:
        yield coming
