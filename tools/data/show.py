"""A sheet of training images as the model sees them: N images, each as K epochs show it.

    python -m tools.data show --config configs/deit_small.yaml --data-path pets --images 8 --draws 6

The images are the first ones of the run's first epoch. Each is made by the run's own loader and
transform for its place in that epoch, on the run's device: what is drawn is what training will
draw. Where an epoch leaves an image out, as repeated augmentation does, its place of the first
epoch stands in. With --mix the images of a column are mixed among themselves as a batch is; with
--aug-splits each draw has a column for every split.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from augmentation.bands import composite
from augmentation.preprocessing import Preprocessing
from errors import UserError, shortened
from outputs.console import say
from samplers import EpochSampler, SampleKey
from tools.common import command

FILE = "augmented.png"
LEAST_TILE = 96  # pixels; smaller images are shown larger, each pixel as a square
MOST_PIXELS = 100_000_000  # of a sheet
TEXT = 14  # pixels
GAP = 6


class Tile(NamedTuple):
    """An image of the sheet."""

    pixels: np.ndarray
    """uint8 (H, W, 3)."""
    caption: str


class Keys(Sampler[SampleKey]):
    """The same images in each of several epochs."""

    def __init__(self, order: EpochSampler, images: int, draws: int) -> None:
        first = order.order(0).numpy()
        places = np.sort(np.unique(first, return_index=True)[1])[:images]
        self.keys = [
            SampleKey(int(first[place]), epoch, _place(order.order(epoch).numpy(), first, place))
            for epoch in range(draws)
            for place in places
        ]
        self.images = len(places)

    def __iter__(self) -> Iterator[SampleKey]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _place(order: np.ndarray, first: np.ndarray, place: int) -> int:
    """Where an epoch shows the image that the first one shows at ``place``, or else that place."""
    found = np.flatnonzero(order == first[place])
    return int(found[0]) if len(found) else int(place)


# --- what training sees ---------------------------------------------------------------------------


def columns(arguments: argparse.Namespace) -> tuple[list[str], list[list[Tile]]]:
    """Titles and tiles of the sheet's columns. Raises UserError."""
    from augmentation.mixing import build_mixer
    from pipeline.loader import Loader
    from tools.common.stage import single_process
    from training.build import build_model
    from training.data import build_data, build_sets
    from utils import derive_seed

    # One batch of the images each epoch; the weights have no part in it.
    changes = {"batch_size": 1, "accum_steps": 1, "pretrained": False, "finetune": ""}
    if arguments.config.data.cache != "disk":
        changes["cache"] = "none"
    with single_process(arguments.config, finds_batch=True) as (config, processes, device):
        config = config.replace("tools.data show", **changes)
        sets = build_sets(config, processes)
        _, preprocessing = build_model(config, len(sets.class_names), torch.device("cpu"))
        data = build_data(config, processes, sets, preprocessing, device)
        mixer = build_mixer(config.augment, len(data.class_names)) if arguments.mix else None
        if arguments.mix and mixer is None:
            raise UserError("--mix: these options mix nothing: add --mixup or --cutmix")
        rows = min(arguments.images, len(data.train))
        _check_size(rows, arguments.draws * max(1, config.augment.aug_splits), config)
        keys = Keys(data.sampler, rows, arguments.draws)
        settings = replace(
            data.train_loader.settings, batch_size=keys.images, num_workers=0, drop_last=False
        )
        titles, found = [], []
        for epoch, batch in enumerate(Loader(data.train, keys, settings)):
            images, targets = batch.images.to(device), batch.targets.to(device)
            if images.dtype != torch.float32:
                images = data.prepare(images, batch.plan)
            now = mixer and mixer.in_epoch(epoch)
            if now:
                first = int(batch.positions[0])
                seed = derive_seed(config.run.seed, "mix", epoch, first)
                images, targets = now(images, targets, seed)
            captions = [caption(target, data.class_names) for target in targets.cpu()]
            splits = len(images) // len(targets)
            for split, part in enumerate(images.cpu().chunk(splits)):
                title = f"epoch {epoch + 1}" + (f", split {split + 1}" if splits > 1 else "")
                titles.append(title)
                shown = pixels(part, preprocessing)
                found.append([Tile(*tile) for tile in zip(shown, captions, strict=True)])
    return titles, found


def _check_size(rows: int, across: int, config) -> None:
    height, width = (max(side, LEAST_TILE) for side in config.model.size)
    if rows * across * height * width > MOST_PIXELS:
        raise UserError(
            f"{rows} × {across} images of {height} × {width} pixels are too many for one sheet: "
            "lower --images or --draws"
        )


def pixels(images: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """Normalised images (B, C, H, W) as they look, uint8 (B, H, W, 3).

    Greys and three colours of 8 bits as they are, others as ``augmentation.bands.composite`` has
    them.
    """
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    form = preprocessing.form
    levels = ((images.float() * std + mean).clamp(0, 1) * form.levels).round().numpy()
    kind = np.uint8 if form.bit_depth == 8 else np.uint16
    return np.stack([np.array(composite(image.astype(kind))) for image in levels])


def caption(target: torch.Tensor, names: Sequence[str]) -> str:
    """The label of an image, the shares of a mixed one, or its several labels."""
    if target.ndim == 0:
        return shortened(names[int(target)])
    parts = [(share, names[i]) for i, share in enumerate(target.tolist()) if share > 0]
    parts.sort(key=lambda part: -part[0])
    each = [
        shortened(name) if share == 1 else f"{shortened(name)} {share:.0%}" for share, name in parts
    ]
    return " + ".join(each) or "no label"


# --- the sheet ------------------------------------------------------------------------------------


def sheet(titles: Sequence[str], found: Sequence[Sequence[Tile]]):
    """The PIL image of the columns, each with its title, each tile with its caption below."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    height, width = found[0][0].pixels.shape[:2]
    scale = max(1, -(-LEAST_TILE // min(height, width)))
    height, width = scale * height, scale * width
    across, down = width + GAP, height + TEXT + 2 * GAP
    size = across * len(found) + GAP, TEXT + 2 * GAP + down * len(found[0])
    result = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(result)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", TEXT - 3)
    for column, (title, tiles) in enumerate(zip(titles, found, strict=True)):
        left = GAP + column * across
        draw.text((left, GAP), fitted(title, font, width), "black", font)
        for row, tile in enumerate(tiles):
            top = TEXT + 2 * GAP + row * down
            image = Image.fromarray(tile.pixels).resize((width, height), Image.Resampling.NEAREST)
            result.paste(image, (left, top))
            draw.text((left, top + height + 2), fitted(tile.caption, font, width), "black", font)
    return result


def fitted(text: str, font, width: int) -> str:
    """``text``, cut to so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def show(arguments: argparse.Namespace) -> None:
    """Write the sheet."""
    titles, found = columns(arguments)
    path = arguments.output or Path(arguments.config.run.output_dir or "") / FILE
    image = sheet(titles, found)
    with command.written(path) as temporary:
        image.save(temporary, "PNG")
    say(f"{path}: {len(found[0])} images in {len(found)} columns, as training sees them")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = command.run_parser("data show", __doc__)
    arguments.add_argument("--images", type=command.positive, default=8, help="rows (default: 8)")
    arguments.add_argument("--draws", type=command.positive, default=6, help="epochs (default: 6)")
    arguments.add_argument("--mix", action="store_true", help="with mixup and cutmix")
    arguments.add_argument(
        "--output", type=Path, help=f"PNG (default: {FILE} in --output-dir, else here)"
    )
    return command.run(show, arguments, argv)


if __name__ == "__main__":
    sys.exit(main())
