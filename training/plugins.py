"""The user's files that register models, data sets and transforms."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import OptionError

_loaded: set[str] = set()  # names of the modules that are plug-ins


def import_plugins(names: Sequence[str]) -> None:
    """Import the user's files or modules, which register models, data sets or transforms."""
    for name in names:
        try:
            if name.endswith(".py"):
                path = Path(name).expanduser().resolve()
                if not path.is_file():
                    raise OptionError("plugin", f"{name} does not exist")
                spec = importlib.util.spec_from_file_location(path.stem, path)
                module = importlib.util.module_from_spec(spec)
                _refuse_taken_name(name, path)
                # Workers find the plugin's classes by this name.
                sys.modules[path.stem] = module
                _loaded.add(path.stem)
                spec.loader.exec_module(module)
            else:
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise OptionError("plugin", f"{name}: no module named {error.name!r}") from None
        except ImportError as error:
            hint = ""
            if error.name == "datasets":
                hint = (
                    "; that is Hugging Face's package, which this process has imported: take it "
                    "from pipeline.sources.base or pipeline.sources.registry"
                )
            raise OptionError("plugin", f"{name}: {error}{hint}") from None


def _refuse_taken_name(name: str, path: Path) -> None:
    """Raise OptionError if the file would take the place of another module."""
    if path.stem in _loaded:
        return
    taken = sys.modules.get(path.stem) or importlib.util.find_spec(path.stem)
    place = getattr(taken, "__file__", None) or getattr(taken, "origin", None)
    if taken and (place is None or Path(place).resolve() != path):
        raise OptionError(
            "plugin", f"{name} has the name of a module, {place or path.stem}: rename the file"
        )
