"""INAT and INAT19: iNaturalist's folders and JSON files."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import DataError, OptionError, first_names
from pipeline.sources.base import (
    Factory,
    FileSource,
    PartOf,
    ReadOnce,
    data_root,
    read_json,
    refuse_val_fraction,
)

if TYPE_CHECKING:
    from config import DataOptions


class INatDataset(FileSource):
    """iNaturalist 2018 or 2019, with any level of the taxonomy as the class.

    ``root`` holds ``train{year}.json``, ``val{year}.json``, ``categories.json`` and the images
    at the ``file_name`` of the JSON or, as DeiT has them, without its second folder. Classes are in
    the order in which the training annotations name them, as DeiT numbers them.

    ``read`` gives the content of a JSON file.
    """

    shareable = True

    def __init__(
        self,
        root: str | Path,
        train: bool = True,
        year: int = 2018,
        category: str = "name",
        *,
        read: Callable[[Path], Any] = read_json,
    ) -> None:
        root = Path(root)
        levels = read(root / "categories.json")
        part = read(root / f"{'train' if train else 'val'}{year}.json")
        reference = part if train else read(root / f"train{year}.json")
        try:
            level_of = {int(c.get("id", i)): c for i, c in enumerate(levels)}
            if category not in levels[0]:
                known = ", ".join(k for k in levels[0] if k != "id")
                message = f"{category!r} is not in {root / 'categories.json'}, only {known}"
                raise OptionError("inat_category", message)
            label_of: dict[str, int] = {}
            for annotation in reference["annotations"]:
                name = level_of[int(annotation["category_id"])][category]
                label_of.setdefault(name, len(label_of))
            names = {
                a["image_id"]: level_of[int(a["category_id"])][category]
                for a in part["annotations"]
            }
            paths = [image["file_name"] for image in part["images"]]
            unknown = sorted({n for n in names.values() if n not in label_of})
            if unknown:
                raise DataError(
                    f"{root}/val{year}.json: not in train{year}.json: {first_names(unknown)}"
                )
            targets = [label_of[names[image["id"]]] for image in part["images"]]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{root}: the JSON files don't have iNaturalist's form ({error!r})"
            ) from None
        if paths and not (root / paths[0]).exists():
            shortened = [_without_second_folder(path) for path in paths]
            paths = shortened if (root / shortened[0]).exists() else paths
        super().__init__(root, paths, targets, list(label_of))


def _without_second_folder(path: str) -> str:
    first, *rest = path.split("/")
    return "/".join([first, *rest[1:]])


def inat(year: int) -> Factory:
    """The factory of iNaturalist 2018 or 2019; ``inat_category`` is the level of the taxonomy."""

    def read(data: "DataOptions", seed: int) -> PartOf:
        refuse_val_fraction(data, "iNaturalist")
        root, level = data_root(data), data.inat_category
        once = functools.cache(read_json)
        return lambda is_train: INatDataset(root, is_train, year, level, read=once)

    return ReadOnce(read)
