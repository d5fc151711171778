"""pipeline/sources/registry.py: data sets by name, and those that plug-ins add."""

import numpy as np
import pytest
from tiny_sets import open_set, save

from config import DataOptions
from errors import OptionError
from pipeline.sources import registry
from pipeline.sources.base import ArraySource
from pipeline.sources.registry import default_normalization, register_dataset, validation_classes


def test_plugins_can_add_a_set(monkeypatch):
    monkeypatch.setattr(registry, "FACTORIES", dict(registry.FACTORIES))

    @register_dataset("Flags")
    def flags(is_train, data, seed):
        return ArraySource(
            np.zeros((3 if is_train else 2, 8, 8), np.uint8),
            [0, 1][:2] + [0] * is_train,
            ["x", "y"],
            "flags",
        )

    assert len(open_set("flags", "", True)) == 3 and len(open_set("FLAGS", "", False)) == 2


@pytest.mark.parametrize(
    ("name", "hint"), [("CIFAR01", "did you mean CIFAR10"), ("q", "one of IMNET")]
)
def test_unknown_sets_are_refused(name, hint):
    with pytest.raises(OptionError, match=f"--data-set: unknown data set '{name}'; {hint}"):
        open_set(name, "")


def test_classes_of_a_validation_part_that_stands_alone(tmp_path):
    """Its own, where there is no training part: of folders or a CSV file, in a folder or not."""

    def classes(path, name="IMNET", **options):
        return validation_classes(DataOptions(data_set=name, data_path=str(path), **options))

    (tmp_path / "list.csv").write_text("path,label\na.png,10\nb.png,9\n")
    save(tmp_path / "set" / "val" / "bee" / "0.png")
    save(tmp_path / "set" / "val" / "ant" / "0.png")
    assert classes(tmp_path / "set") == classes(tmp_path / "set" / "val") == ["ant", "bee"]
    assert classes(tmp_path / "set" / "val", val_fraction=0.5) is None
    (tmp_path / "set" / "train").mkdir()
    assert classes(tmp_path / "set") is None
    assert classes(tmp_path / "list.csv", "csv") == ["9", "10"]
    assert classes(tmp_path / "list.csv", "CSV", val_fraction=0.5) is None
    (tmp_path / "list.csv").rename(tmp_path / "test.csv")
    assert classes(tmp_path, "CSV") == ["9", "10"]
    (tmp_path / "train.csv").touch()
    assert classes(tmp_path, "CSV") is None and classes("", "DIGITS") is None


def test_normalization_of_small_sets():
    images = open_set("DIGITS", "").source.source.images.astype(np.float64) / 255
    mean, std = default_normalization("digits")
    assert mean == pytest.approx([images.mean()] * 3, abs=1e-4)
    assert std == pytest.approx([images.std()] * 3, abs=1e-4)
    assert default_normalization("CIFAR") == default_normalization("CIFAR100")
    assert default_normalization("CIFAR10")[0] == (0.4914, 0.4822, 0.4465)
    assert default_normalization("IMNET") is None
