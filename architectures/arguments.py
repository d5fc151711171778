"""Which keyword arguments a model takes, read from signatures.

timm's entry functions take ``**kwargs`` and hand them on, so the model's class has to be asked.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from errors import OptionError


def takes_argument(name: str, argument: str, num_classes: int = 1000) -> bool:
    """Whether timm's model ``name`` takes the keyword ``argument``.

    Its entry function, its class, or the configuration that the class is built from has to name
    it. A plug-in's function that hands its ``**kwargs`` on to something else is given ``img_size``
    if it can be built with it.

    Raises:
        OptionError: the entry function doesn't take what timm gives to all of them.
    """
    if ":" in name:  # a source of timm's: which entry function it leads to is in its configuration
        cls = _class_of(name, None, num_classes)
        return cls is None or argument in names_of_class(cls)
    entry = timm.model_entrypoint(name)
    _check_entry(name, entry)
    # Models registered by this project name what they are built by.
    build = getattr(entry, "model_cls", entry)
    if isinstance(build, type):
        return argument in names_of_class(build)
    parameters = inspect.signature(build).parameters
    if argument in parameters or argument in inspect.signature(entry).parameters:
        return True
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        return False
    cls = _class_of(name, entry, num_classes)
    if cls is None or argument in names_of_class(cls):
        return True
    of_timm = entry.__module__.startswith("timm.")
    return not of_timm and argument == "img_size" and _builds_with_size(name, num_classes)


def argument_names(name: str, num_classes: int = 1000) -> list[str]:
    """The keywords of timm's model ``name`` that its functions and classes name, in order."""
    entry = None if ":" in name else timm.model_entrypoint(name)
    build = getattr(entry, "model_cls", entry)
    cls = build if isinstance(build, type) else _class_of(name, entry, num_classes)
    names = set() if cls is None else set(names_of_class(cls))
    if entry is not None and not isinstance(build, type):
        names |= set(inspect.signature(entry).parameters)
    return sorted(names - {"self", "args", "kwargs", "pretrained", "num_classes"})


def _check_entry(name: str, entry: Callable[..., nn.Module]) -> None:
    """Raise OptionError unless ``entry`` takes what ``timm.create_model`` gives to every model."""
    given = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "num_classes")
    try:
        inspect.signature(entry).bind(**dict.fromkeys(given))
    except TypeError as error:
        message = f"{name} can't be built by timm ({error}): let it take **kwargs"
        raise OptionError("model", message) from error


@functools.cache
def _class_of(
    name: str, entry: Callable[..., nn.Module] | None, num_classes: int
) -> type[nn.Module] | None:
    """The class that ``name`` builds; None if it can't be built without further arguments.

    ``entry`` is its function, which a plug-in may replace.
    """
    with torch.random.fork_rng(devices=[]):
        # Shapes alone need no memory and no random numbers; some constructions need real values.
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    return type(timm.create_model(name, num_classes=num_classes))
            except OSError:
                raise
            except Exception:  # of any kind: building it with all options shows the reason
                continue
    return None


def _builds_with_size(name: str, num_classes: int) -> bool:
    """Whether a plug-in's model can be built with ``img_size``."""
    with torch.random.fork_rng(devices=[]):
        try:
            timm.create_model(name, num_classes=num_classes, img_size=224)
        except TypeError:
            return False
        except Exception:  # of any kind: the size is taken, this one may not fit
            return True
    return True


@functools.cache
def names_of_class(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the arguments of ``cls``; its ``**kwargs`` go to its configuration and bases."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        for parameter in parameters:
            names |= {parameter.name} | _fields(parameter.annotation)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return frozenset(names)


def _fields(annotation: Any) -> set[str]:
    """Names of the fields of a dataclass, which may be optional."""
    kinds = (annotation, *typing.get_args(annotation))
    return {
        f.name for kind in kinds if dataclasses.is_dataclass(kind) for f in dataclasses.fields(kind)
    }
