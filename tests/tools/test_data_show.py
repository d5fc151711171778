"""tools.data show: the sheet holds what training sees."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation.bands import composite
from augmentation.preprocessing import Preprocessing
from config import load
from tools.common.stage import Trial, single_process
from tools.data import show
from tools.data.__main__ import main
from utils import derive_seed

SMALL = ("--model", "deit_nano_patch4_32", "--input-size", "32", "--device", "cpu")
SMALL += ("--num-workers", "0", "--no-repeated-aug")


def sheet_of(path, pets, *options):
    """The tiles of a sheet, (columns, rows, 96, 96, 3), and its whole."""
    argv = ["show", "--data-path", str(pets), "--output", str(path), *SMALL, *options]
    assert main(argv) == 0
    image = np.array(Image.open(path))
    step, gap, text = 96 + show.GAP, show.GAP, show.TEXT
    columns = (image.shape[1] - gap) // step
    rows = (image.shape[0] - text - 2 * gap) // (96 + text + 2 * gap)
    return np.array(
        [
            [
                image[top : top + 96, left : left + 96]
                for top in (text + 2 * gap + row * (96 + text + 2 * gap) for row in range(rows))
            ]
            for left in (gap + column * step for column in range(columns))
        ]
    )


@pytest.mark.parametrize("where", [("--augment-on", "cpu"), ("--rotate", "30")])
def test_tiles_are_the_batches_of_a_run(pets, tmp_path, where):
    """The first batch of the first epoch, mixed; a pixel of it is 3 × 3 of the sheet."""
    tiles = sheet_of(tmp_path / "a.png", pets, *where, "--images", "4", "--draws", "2", "--mix")
    assert tiles.shape == (2, 4, 96, 96, 3)
    argv = ["--data-path", str(pets), "--batch-size", "4", *SMALL, *where]
    with single_process(load(argv)) as (config, processes, device):
        trial = Trial(config, processes, device)
        (batch,) = islice(trial.data.batches(0), 1)
        images, targets = trial.settings.inputs(batch), batch.targets
        images, targets = trial.parts.mixer(images, targets, derive_seed(0, "mix", 0, 0))
    shape = (3, 1, 1)
    mean, std = (
        torch.tensor(getattr(trial.parts.preprocessing, name)).view(shape)
        for name in ("mean", "std")
    )
    expected = ((images * std + mean) * 255).round().clamp(0, 255).permute(0, 2, 3, 1)
    for number in range(3):
        found = tiles[0][:, number::3, (number + 1) % 3 :: 3]
        assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(tiles[0], tiles[1])


def test_an_image_keeps_its_row_and_splits_have_columns(pets, tmp_path):
    options = ("--aa", "none", "--color-jitter", "none", "--reprob", "0", "--scale", "1", "1")
    options += ("--hflip", "0", "--mixup", "0", "--cutmix", "0", "--aug-splits", "2")
    tiles = sheet_of(tmp_path / "a.png", pets, *options, "--images", "3", "--draws", "2")
    assert tiles.shape[:2] == (4, 3)
    means = tiles.mean((2, 3, 4))
    assert set(means.argmax(1)) == {means[0].argmax()}
    assert np.array_equal(tiles[0], tiles[1])  # nothing is augmented


def test_bands_are_shown_as_everywhere():
    """The first three of five, each over its own range."""
    band = (torch.arange(64.0) + 60).view(8, 8) / 255
    given = Preprocessing(8, 1.0, "bicubic", (0.1,) * 5, (0.5,) * 5)
    images = torch.stack([band, band.flip(1), band.T, band * 0, band * 0])[None]
    (found,) = show.pixels((images - 0.1) / 0.5, given)
    wanted = composite((images[0] * 255).round().byte().numpy())
    assert np.array_equal(found, np.array(wanted))
    assert found[..., 0].min() == 0 and found[..., 0].max() == 255


def test_without_a_name_the_sheet_goes_into_the_folder(pets, tmp_path):
    argv = ["show", "--data-path", str(pets), *SMALL, "--images", "1", "--draws", "1"]
    assert main([*argv, "--output-dir", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [show.FILE]


def test_captions():
    names = ["cat", "dog", "a bird with a very long name"]
    assert show.caption(torch.tensor(1), names) == "dog"
    assert show.caption(torch.tensor([0.75, 0.25, 0.0]), names) == "cat 75% + dog 25%"
    assert show.caption(torch.tensor([1.0, 0.0, 1.0]), names) == f"cat + {names[2]}"
    assert show.caption(torch.zeros(3), names) == "no label"


def test_places_follow_the_image_from_epoch_to_epoch():
    class Order:
        def order(self, epoch):
            return torch.tensor([[2, 0, 2, 1], [1, 2, 0, 0], [1, 1, 0, 0]][epoch])

    keys = show.Keys(Order(), 2, 3).keys
    assert keys == [(2, 0, 0), (0, 0, 1), (2, 1, 1), (0, 1, 2), (2, 2, 0), (0, 2, 2)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mix", "--mixup", "0", "--cutmix", "0"], "--mix: these options mix nothing"),
        (["--draws", "9999", "--images", "30"], "too many for one sheet: lower --images"),
        (["--images", "0"], "0 is not above zero"),
    ],
)
def test_what_cant_be_shown(pets, tmp_path, capsys, options, said):
    argv = ["show", "--data-path", str(pets), "--output", str(tmp_path / "a.png"), *SMALL]
    try:
        code = main([*argv, *options])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
