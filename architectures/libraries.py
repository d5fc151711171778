"""Models of other libraries behind timm's interface: ``torchvision/NAME``, ``transformers/NAME``.

A module for each library has ``resolve``, ``takes``, ``keyword_names``, ``build``,
``published_cfg``, ``published_weights`` and ``description``.
"""

from types import ModuleType
from typing import Any

from architectures import hub
from architectures.library_model import TORCHVISION, TRANSFORMERS


def library_of(name: str) -> ModuleType | None:
    """The module for the library that ``name`` begins with; None for timm's and our models."""
    if name.startswith(TORCHVISION):
        from architectures import torchvision_models

        return torchvision_models
    if name.startswith(TRANSFORMERS):
        from architectures import transformers_models

        return transformers_models
    return None


def description(name: str) -> dict[str, Any] | None:
    """What rebuilds the model ``name`` without the place that it came from, as of
    :func:`architectures.hub.description`."""
    if (library := library_of(name)) is not None:
        return library.description(name)
    return hub.description(name)
