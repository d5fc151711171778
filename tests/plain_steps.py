"""The steps in the metadata of an exported file, done with Pillow and NumPy alone, as
docs/export.md describes them."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def prepared(path: Path, steps: list[dict]) -> np.ndarray:
    """The image of a file as the model takes it, (1, 3, S, S) float32."""
    decode, resize, crop, scale, normalize, layout = steps
    assert [s["step"] for s in steps] == [
        *("decode", "resize", "crop", "scale", "normalize", "layout")
    ]
    image = Image.open(path)
    if decode["exif_orientation"]:
        image = ImageOps.exif_transpose(image)
    if decode["background"] is not None and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*decode["background"], 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    image = image.convert(decode["channels"])
    assert resize["antialias"] is True
    size = resized_size(resize, *image.size)
    image = image.resize(size, Image.Resampling[resize["interpolation"].upper()])
    image = centre(image, crop)
    low, high = scale["from"]
    assert (low, high, scale["to"], scale["dtype"]) == (0, 255, [0, 1], "float32")
    values = np.asarray(image, dtype=np.float32) / 255
    mean, std = (np.array(normalize[k], dtype=np.float32) for k in ("mean", "std"))
    assert layout["axes"] == "NCHW"
    return ((values - mean) / std).transpose(2, 0, 1)[None]


def resized_size(resize: dict, width: int, height: int) -> tuple[int, int]:
    if isinstance(resize.get("width"), int):
        return resize["width"], resize["height"]
    if "width" in resize:
        known = {"width": width, "height": height, "round": round, "min": min, "max": max}
        return eval(resize["width"], known), eval(resize["height"], known)
    short, long = sorted((width, height))
    if isinstance(resize["short_side"], int):
        assert resize["long_side"] == "floor(short_side * long / short)"
        sides = resize["short_side"], math.floor(resize["short_side"] * long / short)
    else:
        assert resize["short_side"] == "max(1, round(long_side * short / long))"
        sides = max(1, round(resize["long_side"] * short / long)), resize["long_side"]
    return sides if width <= height else sides[::-1]


def centre(image: Image.Image, crop: dict) -> Image.Image:
    """In the middle; where half a pixel is left, at the even place, or the smaller border."""
    assert crop["position"] == "center"
    result = Image.new("RGB", (crop["width"], crop["height"]), tuple(crop["fill"]))
    places = []
    for have, want in zip(image.size, result.size, strict=True):
        places.append((want - have) // 2 if have < want else -round((have - want) / 2))
    result.paste(image, tuple(places))
    return result
