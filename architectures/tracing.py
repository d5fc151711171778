"""What each layer of a model gives for one image."""

from typing import Any

from torch import Tensor, nn

from architectures.sizes import ImageSize
from architectures.summary import ModelSummary, summarise

Shape = tuple[int, ...]


def traced(model: nn.Module, input_size: ImageSize) -> tuple[ModelSummary, dict[str, Shape]]:
    """The size of ``model``, and the shape of what each module gives for one image of
    ``input_size`` pixels, by its name, in the order in which they are first called.

    A module that answers with other things than one tensor has an empty shape; one whose weights
    are used without calling it isn't there. Raises OptionError as :func:`summarise`.
    """
    shapes: dict[str, Shape] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, answer: Any) -> None:
            shapes[name] = tuple(answer.shape) if isinstance(answer, Tensor) else ()

        return hook

    handles = [m.register_forward_hook(record(name)) for name, m in model.named_modules() if name]
    try:
        return summarise(model, input_size), shapes
    finally:
        for handle in handles:
            handle.remove()
