"""Transforms from outside: those that plug-ins register, and albumentations' pipelines.

Each takes one RGB image after its crop and flips and gives back one of the same size. What it draws
from the global generators of Python, NumPy and torch follows from (seed, epoch, position), for
``TrainTransform.apply`` seeds them.
"""

import inspect
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from config.yaml_reader import read_values
from errors import OptionError, did_you_mean, first_line, first_names, shown

Registered = TypeVar("Registered", bound=Callable)
_TRANSFORMS: dict[str, Callable] = {}


def register_transform(name: str) -> Callable[[Registered], Registered]:
    """Decorator for plug-ins: ``transform(image) -> image`` as ``--transform NAME``.

    The image is an RGB PIL image of the input size, and so must be what comes back. A class is
    called without arguments first, and what that gives is the transform.
    """

    def register(transform: Registered) -> Registered:
        _TRANSFORMS[name] = transform
        return transform

    return register


class OwnTransform:
    """The transform that a plug-in has registered as ``name``.

    Raises OptionError of ``transform`` for a name that there isn't, and, called, for a transform
    that raises or gives back something else than an RGB image of the same size.
    """

    def __init__(self, name: str) -> None:
        if name not in _TRANSFORMS:
            registered = first_names(sorted(_TRANSFORMS))
            raise OptionError(
                "transform",
                f"no plug-in has registered {name!r}; "
                + did_you_mean(
                    name,
                    _TRANSFORMS,
                    otherwise=f"there are {registered}" if registered else "add --plugin FILE",
                ),
            )
        self.name = name
        found = _TRANSFORMS[name]
        self.transform = _called("transform", name, found) if inspect.isclass(found) else found

    def __call__(self, image: Image.Image) -> Image.Image:
        result = _called("transform", self.name, self.transform, image)
        if not isinstance(result, Image.Image):
            raise OptionError(
                "transform",
                f"{self.name} gave back {type(result).__name__}: it must be a PIL image",
            )
        if (result.mode, result.size) != (image.mode, image.size):
            raise OptionError(
                "transform",
                f"{self.name} gave back {_form(result)}: it must be {_form(image)}, as it came",
            )
        return result


def _form(image: Image.Image) -> str:
    return f"{image.mode} of {image.width} × {image.height} pixels"


def _called(option: str, name: str, function: Callable, *arguments: Any, **named: Any) -> Any:
    """What ``function`` returns. Raises OptionError for what it raises, but for want of memory."""
    try:
        return function(*arguments, **named)
    except MemoryError:
        raise
    except Exception as error:
        raise OptionError(
            option, f"{name} failed: {type(error).__name__}: {first_line(error)}"
        ) from error


# --- albumentations -------------------------------------------------------------------------------


class Albumentations:
    """The pipeline of a YAML file, as ``albumentations.save(…, data_format="yaml")`` writes it.

    Only transforms of albumentations' own registry are made of it. Seeded for each image anew.

    Raises OptionError of ``albumentations``: no such package, a file that is no pipeline, and,
    called, a pipeline that fails or changes the size or type of the image.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        library = _library()
        content = read_values(Path(path).expanduser(), "albumentations")
        if not isinstance(content, dict) or not isinstance(content.get("transform"), dict):
            raise OptionError(
                "albumentations",
                f"{path} is no pipeline: write it with albumentations.save(pipeline, FILE, "
                "data_format='yaml')",
            )
        for name in _class_names(content["transform"]):
            _check_class(library, path, name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.pipeline = _called("albumentations", path, library.from_dict, content)
        # It says so of arguments that it passes over, and goes on.
        for warning in caught:
            if "not valid for transform" in str(warning.message):
                raise OptionError("albumentations", f"{path}: {warning.message}: correct it")

    def __call__(self, image: Image.Image) -> Image.Image:
        self.pipeline.set_random_seed(random.getrandbits(32))
        pixels = np.array(image)
        result = _called("albumentations", self.path, self.pipeline, image=pixels)["image"]
        shape, kind = getattr(result, "shape", ()), getattr(result, "dtype", type(result).__name__)
        if not isinstance(result, np.ndarray) or (shape, kind) != (pixels.shape, pixels.dtype):
            raise OptionError(
                "albumentations",
                f"{self.path} gave back {kind} {tuple(shape)}: it must be uint8 {pixels.shape}, "
                "as it came; training crops, normalises and makes tensors itself",
            )
        return Image.fromarray(result)


def _library() -> ModuleType:
    # Or it asks the network for its newest version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
        import cv2
    except ImportError as error:
        raise OptionError(
            "albumentations",
            f"needs albumentations ({error}): pip install 'albumentations>=2.0.8,<2.1'",
        ) from None
    cv2.setNumThreads(0)  # workers share the cores already
    return albumentations


def _class_names(transform: Any) -> Iterator[str]:
    """The classes of a serialised transform and of those inside of it."""
    if isinstance(transform, dict):
        yield str(transform.get("__class_fullname__", ""))
        inner = transform.get("transforms")
        for each in inner if isinstance(inner, list) else ():
            yield from _class_names(each)


def _check_class(library: ModuleType, path: str, name: str) -> None:
    known = library.core.serialization.SERIALIZABLE_REGISTRY
    short = library.core.serialization.shorten_class_name(name)
    if short not in known:
        hint = did_you_mean(short, known, otherwise="albumentations has none of that name")
        raise OptionError("albumentations", f"{path}: unknown transform {shown(name)}; {hint}")
