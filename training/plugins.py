"""The user's files that register models, data sets and transforms."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import OptionError


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
                # Workers find the plugin's classes by this name.
                sys.modules[path.stem] = module
                spec.loader.exec_module(module)
            else:
                importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise OptionError("plugin", f"{name}: no module named {error.name!r}") from None
        except ImportError as error:
            raise OptionError("plugin", f"{name}: {error}") from None
