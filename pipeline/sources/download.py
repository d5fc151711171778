"""What the small sets that can be fetched share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import DataError, OptionError
from pipeline.sources.base import data_root

if TYPE_CHECKING:
    from config import DataOptions


def download_root(data: "DataOptions") -> Path:
    """``data_path``, which need not exist if the set is to be downloaded into it."""
    return (
        Path(data.data_path).expanduser() if data.download and data.data_path else data_root(data)
    )


def fetch(make: Callable[[], Any], name: str, data: "DataOptions") -> Any:
    """What ``make`` returns; its errors say whether to add --download."""
    try:
        return make()
    except (OSError, RuntimeError) as error:
        if data.download:
            raise DataError(f"{name} can't be downloaded: {error}") from None
        raise OptionError(
            "data_path", f"no {name}, or a damaged one, in {data.data_path}: add --download"
        ) from None
