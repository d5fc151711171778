"""Training and evaluation on a pretended CUDA device: nothing waits for it between log steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from optimizer_names import FAMILIES
from pretended import CUDA, HostWaitsError, PretendedCuda
from tiny_epochs import batches_of_bytes, in_batches, make_state
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import engine
from architectures.dynamic_size import take_other_sizes
from augmentation.batch import BatchAugment
from augmentation.mixing import build_mixer
from augmentation.preprocessing import Preprocessing
from augmentation.protocol import RGB, Form
from cait_models import CaiT
from config import AugmentOptions, LossOptions
from losses import balanced_weights, build_criterion
from optimization import guard
from optimization.counts import Counts, RealCounts
from optimization.ema import ModelEma
from optimization.meter import Meter
from optimization.multilabel import MultiLabelCounts
from teachers import ConvertedTeacher

CLASSES, SIDE = 5, 32
SHAPE = Preprocessing(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
WAITS = (DataDependentOutputException, DynamicOutputShapeException, HostWaitsError)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """The device; what the engine reads at the end of an epoch is left out."""
    monkeypatch.setattr(Meter, "read_into", lambda self, progress: (0, 0, 0))
    monkeypatch.setattr(guard.Guard, "settle", lambda self: self._pending.clear())
    with PretendedCuda() as device:
        yield device


def deit(distilled: bool = False) -> nn.Module:
    name = f"deit_tiny_{'distilled_' if distilled else ''}patch16_224"
    sizes = {"img_size": SIDE, "depth": 1, "embed_dim": 12, "num_heads": 2}
    return timm.create_model(name, num_classes=CLASSES, **sizes)


def cait() -> nn.Module:
    return CaiT(SIDE, num_classes=CLASSES, embed_dim=16, depth=1, num_heads=2, depth_token_only=1)


def resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=CLASSES, channels=(8, 8, 8, 8))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))


class Strict(engine.Hooks):
    """From the first update on, no copy may wait; constants are made in it."""

    def __init__(self, cuda: PretendedCuda) -> None:
        self.cuda, cuda.strict = cuda, False

    def request(self) -> engine.StepRequest:
        self.cuda.strict = True
        return engine.StepRequest.CONTINUE


def build_loss(cuda: PretendedCuda, multilabel: bool = False, **values: Any) -> nn.Module:
    options = LossOptions(**values)
    teacher = None
    if options.distillation_type != "none":
        own = Preprocessing(24, 1.0, "bicubic", (0.4,) * 3, (0.2,) * 3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, CLASSES))
        teacher = cuda.place(ConvertedTeacher(net, SHAPE, own))
    weight = None
    if options.class_weights == "balanced":
        weight = balanced_weights(torch.tensor([3, 1, 4, 1, 5]))
    several = {}
    if multilabel:
        several = {"multilabel": True, "pos_weight": torch.arange(1.0, 1 + CLASSES)}
    given = {"weight": weight, "teacher": teacher, "splits": 3, **several}
    return cuda.place(build_criterion(options, num_classes=CLASSES, **given))


def train(
    cuda: PretendedCuda,
    model: nn.Module,
    *,
    opt: str = "adamw",
    updates: int = 2,
    augment: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    mix: bool = True,
    multilabel: bool = False,
    form: Form = RGB,
    side: int = SIDE,
    average_on: str | None = None,
    **changes: Any,
) -> None:
    """``updates`` in the middle of an epoch; without ``augment`` the images are floats."""
    settings = engine.StepSettings(CUDA, batch_size=6, log_interval=1000, **changes)
    options = AugmentOptions(**(augment or {}))
    count = updates * settings.accum_steps
    if augment is None:
        images = torch.randn(6 * count, form.channels, side, side)
        targets = torch.arange(6 * count) % CLASSES
        if multilabel:
            targets = nn.functional.one_hot(targets, CLASSES).float()
        batches = in_batches(images, targets, 6)
    else:
        values = (0.5,) * form.channels
        shape = replace(SHAPE, input_size=side, mean=values, std=values, bit_depth=form.bit_depth)
        prepare = BatchAugment(shape, options, 0)
        settings = replace(settings, prepare=prepare)
        batches = batches_of_bytes(count, prepare, side=side, form=form)
    criterion = build_loss(cuda, multilabel, **(loss or {}))
    state = make_state(cuda.place(model), opt=opt, ema=True)
    if average_on:
        state.ema = ModelEma(state.model, 0.9, device=torch.device(average_on))
    state.scaler = torch.amp.GradScaler("cuda") if settings.amp == torch.float16 else None
    state.progress.update = 1  # the first update is reported
    engine.train_one_epoch(
        state,
        criterion,
        batches,
        settings,
        steps=1000,
        mixer=build_mixer(options, CLASSES) if mix else None,
        hooks=Strict(cuda),
    )
    assert state.progress.update == 1 + updates
    assert all(p.device == CUDA for p in model.parameters())


FP16, BF16 = torch.float16, torch.bfloat16
RUNS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "DeiT, recipe": (deit, {"amp": BF16, "augment": {}}),
    "DeiT, fp16, clipped": (deit, {"amp": FP16, "clip_grad": 1.0}),
    "distilled, soft": (
        lambda: deit(distilled=True),
        {"amp": BF16, "loss": {"distillation_type": "soft"}, "accum_steps": 2},
    ),
    "distilled, hard": (
        lambda: deit(distilled=True),
        {"amp": FP16, "loss": {"distillation_type": "hard"}, "on_nonfinite": "skip"},
    ),
    "CaiT, agc": (cait, {"amp": BF16, "clip_grad": 0.1, "clip_mode": "agc"}),
    "ResNet, skip": (
        resnet,
        {"amp": BF16, "on_nonfinite": "skip", "channels_last": True, "opt": "sgd"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_model(cuda, name):
    build, options = RUNS[name]
    train(cuda, build(), **options)


LOSSES = [
    {"class_weights": "balanced", "smoothing": 0.1},
    {"bce_loss": True},
    {"loss": "focal"},
    {"loss": "quality-focal"},
    {"cosub": True, "smoothing": 0.0},
]


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss(cuda, loss, mixed):
    train(cuda, linear(), loss=loss, mix=mixed, updates=1, amp=BF16)


OF_SEVERAL_LABELS = [
    {"smoothing": 0.1},
    {"loss": "asl", "smoothing": 0.0},
    {"loss": "quality-focal", "smoothing": 0.0},
    {"cosub": True, "smoothing": 0.0},
    {"smoothing": 0.0, "distillation_type": "soft"},
    {"smoothing": 0.0, "distillation_type": "hard"},
]


@pytest.mark.parametrize("loss", OF_SEVERAL_LABELS, ids=str)
def test_loss_of_several_labels(cuda, loss):
    model = deit(distilled=True) if "distillation_type" in loss else linear()
    train(cuda, model, loss=loss, multilabel=True, updates=1, amp=BF16)


def test_most_weights_are_fixed(cuda):
    """As with --lora, --freeze and --unfreeze-at."""
    model = deit()
    model.blocks.requires_grad_(False)
    train(cuda, model, amp=BF16, opt="lamb", clip_grad=1.0)


def test_images_of_another_size_than_the_models(cuda):
    """As with --train-sizes; positions are interpolated."""
    model = deit()
    take_other_sizes(model)
    train(cuda, model, amp=BF16, augment={}, side=48)


def test_each_update_waits_for_an_average_in_host_memory(cuda):
    with pytest.raises(HostWaitsError, match="between cpu and cuda"):
        train(cuda, linear(), average_on="cpu")


AUGMENTATIONS = [
    {"aa": "rand-m9-n4-mstd0.5-inc1", "mixup_mode": "elem", "recount": 3},
    {"aa": "rand-m9-n4-mstd0.5", "train_interpolation": "random", "remode": "rand"},
    {"aa": "3a", "mixup_mode": "pair", "remode": "const"},
    {"ThreeAugment": True, "src": True, "cutmix_minmax": (0.2, 0.8), "vflip": 0.5},
    {"aa": None, "color_jitter": 0.4, "mixup": 0.0},
    {
        **{"aa": None, "color_jitter": (0.4, 0.2, 0.3, 0.1), "color_jitter_prob": 0.8},
        **{"grayscale_prob": 0.3, "blur_prob": 0.5, "rotate": 30.0, "perspective": 0.4},
        "train_interpolation": "random",
    },
    {"aa": "cifar10", "aug_splits": 3, "mixup": 0.0, "cutmix": 0.0, "rotate": 10.0},
]


@pytest.mark.parametrize("augment", AUGMENTATIONS, ids=str)
def test_augmentation(cuda, augment):
    loss = {"jsd_loss": True, "smoothing": 0.1} if "aug_splits" in augment else {}
    train(cuda, linear(), augment=augment, loss=loss)


@pytest.mark.parametrize("form", [Form(5, 8), Form(2, 16), Form(1, 8)], ids=str)
def test_augmentation_of_other_images(cuda, form):
    options = {"aa": "rand-m9-n2-mstd0.5" if form == Form(1, 8) else None, "color_jitter": None}
    options |= {"rotate": 30.0, "perspective": 0.4, "blur_prob": 0.5, "vflip": 0.5}
    model = nn.Sequential(nn.Flatten(), nn.Linear(form.channels * SIDE * SIDE, CLASSES))
    train(cuda, model, augment=options, form=form, updates=1)


@pytest.mark.parametrize("mode", ["value", "agc"])
def test_clipping(cuda, mode):
    train(cuda, linear(), clip_grad=0.5, clip_mode=mode)


# They decide by each weight on the host (timm/optim/adamp.py: projection; nvnovograd.py: step).
READING = {"adamp", "csgdp", "novograd"}


@pytest.mark.parametrize("opt", sorted(set(FAMILIES) - READING))
def test_optimiser(cuda, opt):
    """With --on-nonfinite stop or rollback. Lookahead's slow weights come at the sixth step."""
    train(cuda, linear(), opt=opt, updates=7 if "lookahead" in opt else 2, mix=False)


@pytest.mark.parametrize("opt", sorted(READING))
def test_optimiser_that_reads_by_itself(cuda, opt):
    with pytest.raises(DataDependentOutputException):
        train(cuda, linear(), opt=opt, mix=False)


class Known:
    """A flag of a step that was good, in the place of one that is on its way."""

    waits = 0

    def __init__(self, flag: Tensor) -> None:
        assert flag.device == CUDA

    def arrived(self) -> bool:
        return False

    def __bool__(self) -> bool:
        Known.waits += 1
        return False


@pytest.mark.parametrize("changes", [{"amp": FP16}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("opt, waits", [("adamw", 0), ("sgd", 0), ("lion", 1), ("lamb", 3)])
def test_steps_that_are_left_out_one_by_one(cuda, monkeypatch, opt, waits, changes):
    """Where the next step needs counters of the host, it waits for the flag of the one before;
    without counters only until the state is made."""
    monkeypatch.setattr(guard, "HostFlag", Known)
    monkeypatch.setattr(Known, "waits", 0)
    train(cuda, linear(), opt=opt, updates=4, mix=False, **changes)
    assert Known.waits == waits


@pytest.mark.parametrize("amp", [BF16, FP16])
def test_evaluation(cuda, monkeypatch, amp):
    """With five right classes per image too, and a last batch that is filled up."""
    monkeypatch.setattr(Counts, "result", lambda self: self)
    cuda.strict = False
    real = RealCounts(torch.zeros(20, 2, dtype=torch.int64), CLASSES, CUDA)
    cuda.strict = True
    prepare = BatchAugment(SHAPE, AugmentOptions(), 0)
    settings = engine.StepSettings(CUDA, amp=amp, prepare=prepare)
    batches = in_batches(torch.randn(20, 3, SIDE, SIDE), torch.zeros(20, dtype=torch.int64), 6)
    counts = engine.evaluate(
        cuda.place(deit()), batches, settings, num_classes=CLASSES, batch_size=6, real=real
    )
    assert counts.sums.device == real.sums.device == CUDA


def test_evaluation_of_several_labels(cuda):
    """The scores stay on the device for many batches."""
    images = torch.randn(20, 3, SIDE, SIDE)
    targets = torch.zeros(20, CLASSES)
    cuda.strict = False
    counts = MultiLabelCounts(CLASSES, CUDA)
    counts.result = counts.add_up
    cuda.strict = True
    batches, settings = in_batches(images, targets, 6), engine.StepSettings(CUDA, amp=BF16)
    model = cuda.place(deit())
    engine.evaluate(model, batches, settings, num_classes=CLASSES, batch_size=6, counts=counts)
    assert counts.sums.device == CUDA and len(counts._waiting) == 4


class Faulty(nn.Module):
    """A model that does ``what`` with its first image."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what, self.net = what, linear()

    def forward(self, x: Tensor) -> Tensor:
        self.what(x[0])
        return self.net(x)


FAULTS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.max() > 0 else 0,
    "tolist": lambda x: x.flatten().tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(3, SIDE, SIDE).to(CUDA),
    "made of a list": lambda x: x + torch.tensor([1.0], device=CUDA),
    "two devices": lambda x: x + torch.ones(3, SIDE, SIDE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(cuda, name):
    failures = (*WAITS, RuntimeError) if name == "two devices" else WAITS
    with pytest.raises(failures, match="(?i)device" if name == "two devices" else None):
        train(cuda, Faulty(FAULTS[name]), mix=False)
