"""augmentation/pixel_ops.py, against Pillow.

Also of augmentation/host.py, augmentation/sampling.py and augmentation/warp.py.
"""

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import torch
from PIL import Image
from pixels import as_tensor, batch, pixels
from torchvision.transforms import GaussianBlur, InterpolationMode, functional

from augmentation import pixel_ops
from augmentation.pixel_ops import GEOMETRY, LEVELS, blur
from augmentation.steps import ThreeAugment
from augmentation.warp import perspective_coefficients

FILL = (124, 116, 104)


@pytest.fixture(params=["host", "device"])
def each_path(request, monkeypatch):
    """Each operation as on a CPU, and as on any other device."""
    if request.param == "device":
        monkeypatch.setattr(pixel_ops, "on_host", lambda x: False)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize(
    ("kind", "theirs", "values"),
    [
        ("autocontrast", timm_ops.auto_contrast, [None]),
        ("equalize", timm_ops.equalize, [None]),
        ("invert", timm_ops.invert, [None]),
        ("posterize", timm_ops.posterize, [0, 1, 3, 4, 8]),
        ("solarize", timm_ops.solarize, [0, 26, 128, 256]),
        ("solarize_add", timm_ops.solarize_add, [0, 55, 128]),
        ("saturation", timm_ops.color, [0.1, 0.7, 1.9]),
        ("contrast", timm_ops.contrast, [0.1, 0.7, 1.9]),
        ("brightness", timm_ops.brightness, [0.1, 0.7, 1.9]),
        ("sharpness", timm_ops.sharpness, [0.1, 0.7, 1.9]),
        ("grey", lambda image: ThreeAugment.grey(image), [None]),
    ],
)
def test_levels_are_pillows(kind, theirs, values):
    x = batch(len(values))
    arguments = torch.tensor([0.0 if v is None else v for v in values])
    ours = LEVELS[kind](x, arguments)
    for i, value in enumerate(values):
        image = Image.fromarray(pixels(seed=i))
        expected = as_tensor(theirs(image, *(() if value is None else (value,))))
        assert (ours[i].int() - expected.int()).abs().max() <= 1, value


@pytest.mark.usefixtures("each_path")
def test_flat_images_stay_as_they_are():
    x = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    for kind in ("autocontrast", "equalize"):
        assert torch.equal(LEVELS[kind](x, torch.zeros(2)), x)


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("std", [0.1, 0.8, 2.0])
def test_blur_is_near_pillows(std):
    ours = blur(batch(1), torch.tensor([std]))[0].int()
    expected = as_tensor(timm_ops.gaussian_blur(Image.fromarray(pixels()), std)).int()
    # Pillow's is three box filters.
    assert (ours - expected).abs().float().mean() <= 0.5
    assert (ours - expected).abs().max() <= 12


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize(
    ("kind", "theirs", "values"),
    [
        ("shear_x", timm_ops.shear_x, [0.27, -0.11, 0.0]),
        ("shear_y", timm_ops.shear_y, [0.27, -0.11, 0.0]),
        ("translate_x", timm_ops.translate_x_abs, [7.3, -20.6, 0.0]),
        ("translate_y", timm_ops.translate_y_abs, [7.3, -20.6, 0.0]),
        ("rotate", timm_ops.rotate, [27.5, -4.2, 0.0]),
    ],
)
def test_geometry_is_pillows(kind, theirs, values, cubic):
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    fill = torch.tensor(FILL, dtype=torch.uint8)
    ours = GEOMETRY[kind](batch(3), torch.tensor(values), cubic, fill)
    for i, value in enumerate(values):
        image = Image.fromarray(pixels(seed=i))
        expected = as_tensor(theirs(image, value, resample=resample, fillcolor=FILL))
        difference = (ours[i].int() - expected.int()).abs().float()
        if kind == "rotate" and cubic:
            # torch's cubic kernel has a = −0.75, Pillow's −1.
            assert difference.mean() <= 1.5
        else:
            # A place on the very border may fall to the other side.
            assert (difference > 1).float().mean() <= 0.005, value


@pytest.mark.usefixtures("each_path")
def test_hue_is_pillows():
    turns = [-0.5, -0.13, 0.0, 0.002, 0.31, 0.5]
    ours = LEVELS["hue"](batch(len(turns)), torch.tensor(turns)).int()
    for i, turn in enumerate(turns):
        expected = as_tensor(functional.adjust_hue(Image.fromarray(pixels(seed=i)), turn)).int()
        differs = (ours[i] - expected).abs().amax(0)
        # A hue that is nearly a whole step may be cut off to the one below.
        assert differs.max() <= 6 and (differs > 0).float().mean() <= 0.006, turn


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("side", [60, 8])
def test_gaussian_blur_is_torchvisions(side):
    stds = [0.1, 0.8, 2.0]
    ours = LEVELS["gaussian"](batch(3, height=side, width=side), torch.tensor(stds)).int()
    for i, std in enumerate(stds):
        blurred = GaussianBlur(min(23, 2 * side - 1), (std, std))
        expected = as_tensor(blurred(Image.fromarray(pixels(side, side, seed=i)))).int()
        assert (ours[i] - expected).abs().max() <= 1, std


@pytest.mark.usefixtures("each_path")
@pytest.mark.parametrize("cubic", [True, False])
def test_perspective_is_torchvisions(cubic):
    shifts = np.array([[[3, 7], [0, 11], [12, 2], [6, 9]], [[0, 0]] * 4])
    fill = torch.tensor(FILL, dtype=torch.uint8)
    coefficients = torch.from_numpy(perspective_coefficients(shifts, (60, 48)))
    ours = GEOMETRY["perspective"](batch(2), coefficients, cubic, fill).int()
    start = [[0, 0], [47, 0], [47, 59], [0, 59]]
    mode = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    for i in range(2):
        end = [
            [x + dx if x == 0 else x - dx, y + dy if y == 0 else y - dy]
            for (x, y), (dx, dy) in zip(start, shifts[i].tolist(), strict=True)
        ]
        image = Image.fromarray(pixels(seed=i))
        expected = as_tensor(functional.perspective(image, start, end, mode, list(FILL)))
        difference = (ours[i] - expected.int()).abs().float()
        if cubic:
            assert difference.mean() <= 1.5
        else:
            assert (difference > 1).float().mean() <= 0.005


ARGUMENTS = {
    **{"posterize": 2.0, "solarize": 99.0, "solarize_add": 60.0, "blur": 1.1, "rotate": -17.0},
    **{name: 0.6 for name in ("saturation", "contrast", "brightness", "sharpness")},
    **{"shear_x": -0.2, "shear_y": 0.3, "translate_x": 61.5, "translate_y": -70.0},
    **{"hue": 0.2, "gaussian": 1.1},
}


@pytest.mark.parametrize("kind", [*LEVELS, *GEOMETRY])
def test_a_cpu_gives_what_other_devices_give(kind, monkeypatch):
    x, arguments = batch(3), torch.full((3,), ARGUMENTS.get(kind, 0.0))
    x[1, 0] = 7  # a flat channel
    if kind in LEVELS:
        values = (x, arguments)
        operation = LEVELS[kind]
    else:
        arguments = arguments * torch.tensor([1.0, 0.3, -0.7])
        if kind == "perspective":
            arguments = torch.tensor([[1.1, 0.1, -4, 0.02, 0.9, 2, 1e-3, 2e-3]] * 3)
        values = (x, arguments, True, torch.tensor(FILL).byte())
        operation = GEOMETRY[kind]
    results = []
    for answer in (True, False):
        monkeypatch.setattr(pixel_ops, "on_host", lambda x, answer=answer: answer)
        results.append(operation(*values).int())
    # Sines and cosines may differ in their last bit.
    assert (results[0] - results[1]).abs().max() <= (kind == "rotate")
