"""Make a multi-label set: images of up to four items of Fashion-MNIST, and lists of what they show.

    python examples/fashion_scenes.py /usr/share/datasets/fashion-mnist scenes

writes scenes/train.csv and scenes/val.csv (path, labels between bars) and the images beside them,
of 56 × 56 pixels in four fields. A field is empty two times in five, so some images have no label.
Training images show items of the training part, validation images those of the test part. With
``-`` in place of the folder the digits that scikit-learn brings take the items' place.

Used by configs/fashion_scenes.yaml; see docs/multilabel.md.
"""

import argparse
import csv
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SIDE = 28  # pixels of an item
FILLED = 0.6  # share of the fields


def items(folder: str, part: str) -> tuple[np.ndarray, list[str]]:
    """Items (N, 28, 28) uint8 and the name of each, of the part "train" or "t10k"."""
    if folder == "-":
        return digits(part)
    images, labels = (
        gzip.decompress((Path(folder) / f"{part}-{kind}-ubyte.gz").read_bytes())
        for kind in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    return pixels, [CLASSES[i] for i in np.frombuffer(labels, np.uint8, offset=8)]


def digits(part: str) -> tuple[np.ndarray, list[str]]:
    """The first three quarters of scikit-learn's digits, or the rest, at three times their size."""
    from sklearn.datasets import load_digits

    found = load_digits()
    cut = len(found.images) * 3 // 4
    chosen = slice(None, cut) if part == "train" else slice(cut, None)
    pixels = (found.images[chosen] * 255 / 16).astype(np.uint8).repeat(3, 1).repeat(3, 2)
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return padded, [f"digit {i}" for i in found.target[chosen]]


def scene(
    pixels: np.ndarray, names: list[str], rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    """An image of 2 × 2 fields, (56, 56) uint8, and the names of what is on it, each once."""
    image = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    shown = set()
    for row in (0, SIDE):
        for column in (0, SIDE):
            if rng.random() < FILLED:
                number = int(rng.integers(len(pixels)))
                image[row : row + SIDE, column : column + SIDE] = pixels[number]
                shown.add(names[number])
    return image, sorted(shown)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="folder of Fashion-MNIST's four files *-ubyte.gz, or -")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=6000, help="training images")
    parser.add_argument("--val", type=int, default=2000, help="validation images")
    given = parser.parse_args()
    for number, (name, part, count) in enumerate(
        (("train", "train", given.train), ("val", "t10k", given.val))
    ):
        pixels, names = items(given.source, part)
        rng = np.random.default_rng(number)
        folder = given.output / name
        folder.mkdir(parents=True)
        with open(given.output / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "labels"))
            for index in range(count):
                image, shown = scene(pixels, names, rng)
                Image.fromarray(image).save(folder / f"{index:05d}.png")
                writer.writerow((f"{name}/{index:05d}.png", "|".join(shown)))
        print(f"{given.output / name}.csv: {count} images")


if __name__ == "__main__":
    main()
