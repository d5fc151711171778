"""batch_augment.py and batch_ops.py, against Pillow, timm and torchvision."""

import random
from dataclasses import replace

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import torch
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

import batch_ops
from augment import Preprocessing, ThreeAugment, TrainTransform, build_policy
from batch_augment import KINDS, BatchAugment, Normalise, kind_of, supports, uniforms
from config import AugmentOptions
from utils import seed_all

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(64, 0.875, "bicubic", MEAN, STD)
PLAIN = AugmentOptions(aa=None, color_jitter=None, hflip=0.0, reprob=0.0)
FILL = (124, 116, 104)
SAMPLES = 6000  # pictures whose draws are compared
# How improbable a difference must be before it counts; each comparison has a fixed seed.
LEVEL = 1e-3


def pixels(height=60, width=48, seed=0):
    """Smooth patches with noise over them, (H, W, 3) uint8."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (6, 5, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=int)
    return np.clip(smooth + rng.randint(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def batch(count=3, **size):
    arrays = [pixels(seed=i, **size) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def augment(options=PLAIN, preprocessing=PREPROCESSING, seed=0):
    return BatchAugment(preprocessing, options, seed)


# --- operations ---------------------------------------------------------------------------------


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
    ours = batch_ops.LEVELS[kind](x, arguments)
    for i, value in enumerate(values):
        image = Image.fromarray(pixels(seed=i))
        expected = as_tensor(theirs(image, *(() if value is None else (value,))))
        assert (ours[i].int() - expected.int()).abs().max() <= 1, value


def test_flat_pictures_stay_as_they_are():
    x = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    for kind in ("autocontrast", "equalize"):
        assert torch.equal(batch_ops.LEVELS[kind](x, torch.zeros(2)), x)


@pytest.mark.parametrize("deviation", [0.1, 0.8, 2.0])
def test_blur_is_near_pillows(deviation):
    ours = batch_ops.blur(batch(1), torch.tensor([deviation]))[0].int()
    expected = as_tensor(timm_ops.gaussian_blur(Image.fromarray(pixels()), deviation)).int()
    # Pillow's is three box filters.
    assert (ours - expected).abs().float().mean() <= 0.5
    assert (ours - expected).abs().max() <= 12


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
    ours = batch_ops.GEOMETRY[kind](batch(3), torch.tensor(values), cubic, fill)
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


# --- draws --------------------------------------------------------------------------------------


def test_numbers_depend_on_seed_and_position_alone():
    together = uniforms(7, np.arange(100), 8)
    assert np.array_equal(together[41:43], uniforms(7, np.array([41, 42]), 8))
    assert not np.array_equal(together, uniforms(8, np.arange(100), 8))
    many = uniforms(3, np.arange(4000), 10)
    assert stats.kstest(many.ravel(), "uniform").pvalue > LEVEL
    # Neighbours in either direction are not alike.
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.05
    assert abs(np.corrcoef(many[:, 0], many[:, 1])[0, 1]) < 0.05


class Recorder:
    """Stands in for timm's operations: remembers what is asked for, in place of doing it."""

    def __init__(self, policy):
        self.calls = []
        ops = policy.ops if hasattr(policy, "ops") else [o for row in policy.policy for o in row]
        for op in ops:
            op.aug_fn = self.note(op.name)

    def note(self, name):
        def record(image, *arguments, **_):
            if name == "GaussianBlurRand":
                # Drawn by the operation itself.
                arguments = [random.uniform(0.1, 2.0 * arguments[0])]
            self.calls.append((name, arguments[0] if arguments else 0.0))
            return image

        return record


@pytest.mark.parametrize(
    "name",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m5-n3-mstd101-p0.7",
        "rand-m20-mmax30-mstd2",
        "rand-m7-tweights",
        "rand-m8-t3a",
        "original-mstd0.5",
        "originalr",
        "v0",
        "3a",
    ],
)
def test_policy_draws_from_timms_distribution(name):
    theirs = build_policy(name, PREPROCESSING, "bicubic")
    recorder = Recorder(theirs)
    seed_all(0)
    for _ in range(SAMPLES):
        theirs(None)
    options = AugmentOptions(aa=name, color_jitter=None, reprob=0.0)
    plan = augment(options).plan(0, np.arange(SAMPLES))
    ours = list(zip(plan.kinds.ravel(), plan.arguments.ravel(), strict=True))
    values = {}
    for called, argument in recorder.calls:
        kind = kind_of(called)
        if called == "Desaturate":
            argument = 1 - argument
        if called.endswith("Rel"):
            argument *= PREPROCESSING.input_size
        values.setdefault(kind, []).append(round(float(argument), 4))
    # How often each operation comes: a table of counts from one distribution.
    kinds = sorted(set(values) | {int(k) for k, _ in ours if k})
    expected = [len(values.get(k, ())) for k in kinds]
    found = [sum(k == kind for k, _ in ours) for kind in kinds]
    assert min(expected) > 0
    total = plan.kinds.size
    table = [[*expected, total - sum(expected)], [*found, total - sum(found)]]
    table = np.array(table)[:, np.array(table).sum(0) > 0]
    assert stats.chi2_contingency(table).pvalue > LEVEL
    for kind in kinds:
        mine = [round(float(a), 4) for k, a in ours if k == kind]
        if len(set(values[kind])) <= 12:
            # Whole numbers and fixed magnitudes: the same values, as often.
            levels = sorted({round(v, 4) for v in (*values[kind], *mine)})
            counts = [[sum(abs(x - v) < 1e-3 for x in side) for v in levels]
                      for side in (values[kind], mine)]  # fmt: skip
            seen = np.array(counts)[:, np.array(counts).sum(0) > 0]
            p = stats.chi2_contingency(seen).pvalue if seen.shape[1] > 1 else 1.0
            assert p > LEVEL, KINDS[kind]
        else:
            assert stats.ks_2samp(values[kind], mine).pvalue > LEVEL, KINDS[kind]


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 2.0)])
def test_random_resized_crop_draws_from_timms_distribution(ratio):
    theirs = RandomResizedCropAndInterpolation(64, ratio=ratio)
    image = Image.new("RGB", (100, 75))
    seed_all(0)
    expected = np.array(
        [theirs.get_params(image, theirs.scale, theirs.ratio) for _ in range(SAMPLES)]
    )
    ours = augment(replace(PLAIN, ratio=ratio))
    draws = [ours._draws(0, 0, np.array([p]), 23) for p in range(SAMPLES)]
    found = np.array([ours._rectangle(d, 75, 100) for d in draws])
    for column in range(4):
        assert stats.ks_2samp(expected[:, column], found[:, column]).pvalue > LEVEL
    assert (found[:, 0] + found[:, 2] <= 75).all() and (found[:, 1] + found[:, 3] <= 100).all()


def test_picture_that_no_rectangle_fits_gives_its_middle():
    image = torch.zeros(3, 10, 400, dtype=torch.uint8)
    image[:, :, 194:206] = 200
    options = replace(PLAIN, scale=(0.9, 1.0))
    assert (augment(options).crop(image, 0, 0) > 150).float().mean() > 0.8


@pytest.mark.parametrize("count", [1, 3])
def test_erasing_draws_from_timms_distribution(count):
    theirs = RandomErasing(0.4, mode="const", max_count=count, device="cpu")
    seed_all(0)
    expected = [1 - float(theirs(torch.ones(1, 32, 32)).mean()) for _ in range(SAMPLES)]
    options = replace(PLAIN, reprob=0.4, recount=count, remode="const")
    preprocessing = Preprocessing(32, 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3)
    ours = BatchAugment(preprocessing, options, 0)
    ones = torch.full((SAMPLES, 3, 32, 32), 255, dtype=torch.uint8)
    found = (1 - ours(ones, ours.plan(0, np.arange(SAMPLES)))[:, 0].mean((1, 2))).tolist()
    erased = [sum(x > 0 for x in side) for side in (expected, found)]
    assert stats.chi2_contingency([erased, [SAMPLES - e for e in erased]]).pvalue > LEVEL
    assert stats.ks_2samp([x for x in expected if x], [x for x in found if x]).pvalue > LEVEL


def test_erased_boxes_hold_normal_noise_of_their_own():
    options = replace(PLAIN, reprob=1.0)
    grey = torch.full((40, 3, 64, 64), 128, dtype=torch.uint8)
    ours = augment(options)
    plain = Normalise(PREPROCESSING)(grey)
    result = ours(grey, ours.plan(0, np.arange(40)))
    noise = result[result != plain]
    assert stats.kstest(noise[:20000].numpy(), "norm").pvalue > LEVEL
    # Where two boxes overlap, each has noise of its own.
    both = (result[:-1] != plain[:-1]) & (result[1:] != plain[1:])
    assert both.sum() > 1000
    assert (result[:-1] != result[1:])[both].float().mean() > 0.99
    rand = augment(replace(options, remode="rand"))
    result = rand(grey, rand.plan(0, np.arange(40)))
    changed = [set(r[0][r[0] != p[0]].tolist()) for r, p in zip(result, plain, strict=True)]
    assert all(len(values) == 1 for values in changed)


def test_resplit_spares_the_first_copy():
    ours = augment(replace(PLAIN, reprob=1.0, resplit=True))
    erased = ours.plan(0, np.arange(300)).boxes[:, 0, 1] > 0
    assert not erased[::3].any()
    assert erased[1::3].mean() > 0.95


def test_jitter_and_three_augment_draw_as_torchvision_and_deit():
    options = AugmentOptions(aa=None, ThreeAugment=True, color_jitter=0.3, reprob=0.0)
    plan = augment(options).plan(0, np.arange(SAMPLES))
    first = [KINDS[k] for k in plan.kinds[:, 0]]
    assert set(first) == {"grey", "solarize", "blur"}
    assert stats.chisquare([first.count(k) for k in set(first)]).pvalue > LEVEL
    jitter = plan.kinds[:, 1:]
    assert {tuple(sorted(KINDS[k] for k in row)) for row in jitter} == {
        ("brightness", "contrast", "saturation")
    }
    assert len({tuple(row) for row in jitter}) == 6
    assert stats.kstest(plan.arguments[:, 1:].ravel(), "uniform", (0.7, 0.6)).pvalue > LEVEL
    radius = plan.arguments[[k == "blur" for k in first], 0]
    assert stats.kstest(radius, "uniform", (0.1, 1.9)).pvalue > LEVEL


def test_kernel_is_drawn_where_interpolation_is_random():
    options = AugmentOptions(train_interpolation="random")
    cubic = augment(options).plan(0, np.arange(SAMPLES)).cubic
    assert 0.47 < cubic.mean() < 0.53
    assert (
        not augment(replace(options, train_interpolation="bilinear"))
        .plan(0, np.arange(9))
        .cubic.any()
    )


# --- a batch ------------------------------------------------------------------------------------


def test_plan_of_a_picture_depends_on_its_place_alone():
    ours = augment(AugmentOptions(recount=2, reprob=0.9))
    whole = ours.plan(3, np.arange(64))
    part = ours.plan(3, np.array([50, 7]))
    for left, right in zip(whole, part, strict=True):
        assert np.array_equal(left[[50, 7]], right)
    other = ours.plan(4, np.arange(64))
    assert not np.array_equal(whole.kinds, other.kinds)
    x = batch(64, height=64, width=64)
    assert torch.equal(ours(x, whole)[[50, 7]], ours(x[[50, 7]], part))


def test_batch_leaves_its_input_alone():
    x = batch(8, height=64, width=64)
    before = x.clone()
    ours = augment(AugmentOptions(reprob=1.0))
    ours(x, ours.plan(0, np.arange(8)))
    assert torch.equal(x, before)


def test_without_augmentation_only_normalises():
    x = batch(4, height=64, width=64)
    expected = torch.stack(
        [
            transforms.Normalize(MEAN, STD)(transforms.ToTensor()(pixels(64, 64, seed=i)))
            for i in range(4)
        ]
    )
    ours = augment()
    assert torch.equal(ours(x, ours.plan(0, np.arange(4))), expected)
    assert torch.equal(Normalise(PREPROCESSING)(x), expected)


def test_flips():
    x = batch(200, height=64, width=64)
    ours = augment(replace(PLAIN, hflip=0.5, vflip=0.25))
    plan = ours.plan(0, np.arange(200))
    result = ours._turn(x, plan.flips)
    for i, (across, down) in enumerate(plan.flips):
        expected = x[i].flip(2) if across else x[i]
        assert torch.equal(result[i], expected.flip(1) if down else expected)
    assert 0.4 < plan.flips[:, 0].mean() < 0.6
    assert 0.15 < plan.flips[:, 1].mean() < 0.35


def test_whole_recipe_has_the_statistics_of_the_pillow_chain():
    """Mean and deviation of augmented pixels, over many draws of one picture."""
    options = AugmentOptions()
    image = Image.fromarray(pixels(90, 110))
    theirs = TrainTransform(PREPROCESSING, options)
    seed_all(0)
    expected = torch.stack([theirs(image) for _ in range(600)])
    ours = augment(options)
    crops = torch.stack([ours.crop(as_tensor(image), 0, i) for i in range(600)])
    found = ours(crops, ours.plan(0, np.arange(600)))
    for side in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3))):
        assert stats.ks_2samp(side(expected), side(found)).pvalue > LEVEL


# --- crops --------------------------------------------------------------------------------------


def test_crop_resizes_as_pillow():
    image = pixels(75, 100)
    ours = augment()
    for position in range(5):
        draws = ours._draws(0, 0, np.array([position]), 23)
        top, left, height, width = ours._rectangle(draws, 75, 100)
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(image).crop(box).resize((64, 64), Image.Resampling.BICUBIC)
        found = ours.crop(as_tensor(image), 0, position)
        assert (found.int() - as_tensor(expected).int()).abs().max() <= 1


@pytest.mark.parametrize(("size", "src"), [(32, False), (16, False), (48, True)])
def test_whole_pixel_crops_are_the_same_by_the_batch(size, src):
    ours = augment(replace(PLAIN, src=src), replace(PREPROCESSING, input_size=size))
    x = batch(20, height=size, width=size + 6)
    together = ours.take(ours.padded(x), np.arange(20), 5, np.arange(100, 120))
    for i in range(20):
        assert torch.equal(together[i], ours.crop(x[i], 5, 100 + i))
    # Some crop reaches into the margin, and what lies there is black or a reflection.
    shifts = {tuple(row) for row in together[:, 0, 0].tolist()}
    assert len(shifts) > 5
    corner = torch.stack([c[:, 0, 0] for c in together]).float().sum(1) == 0
    assert corner.any() == (not src)


def test_unsupported_policies():
    assert not supports(AugmentOptions(aa="augmix-m5-w4-d2"))
    assert not supports(AugmentOptions(aa="trivial"))
    assert supports(AugmentOptions(aa="trivial", ThreeAugment=True))
    assert supports(AugmentOptions()) and supports(PLAIN)


def test_global_generators_are_not_drawn_from():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    ours = augment(AugmentOptions(reprob=1.0))
    x = ours.crop(batch(1)[0], 0, 0)[None]
    ours(x, ours.plan(0, np.arange(1)))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
