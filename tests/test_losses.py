"""Losses against their formulas, written out with loops in float64, and against timm and torch."""

import logging
import math

import pytest
import timm.loss
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import losses
from config import LossOptions

BATCH, CLASSES = 6, 4
COUNTS = torch.tensor([10, 30, 5, 0])
IMAGES = torch.zeros(BATCH, 3, 2, 2)


def logits(seed: int = 0, rows: int = BATCH) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


HARD = torch.tensor([0, 1, 2, 2, 1, 0])
SOFT = torch.tensor(
    [[0.7, 0.3, 0, 0], [0, 1, 0, 0], [0.1, 0, 0.9, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0]]
)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_jsd_is_timms(smoothing):
    x = logits(rows=3 * BATCH).requires_grad_()
    options = LossOptions(jsd_loss=True, smoothing=smoothing)
    criterion = losses.build_criterion(options, num_classes=CLASSES, splits=3)
    found = criterion(IMAGES, x, HARD.repeat(3))
    expected = timm.loss.JsdCrossEntropy(3, smoothing=smoothing)(x, HARD.repeat(3))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def build(**options) -> nn.Module:
    options = {"smoothing": 0.0} | options
    weighted = options.get("class_weights", "none") == "balanced"
    weight = losses.balanced_weights(COUNTS) if weighted else None
    return losses.build_criterion(LossOptions(**options), num_classes=CLASSES, weight=weight)


def shares(target, smoothing: float) -> list[float]:
    row = [float(target == c) for c in range(CLASSES)] if target.ndim == 0 else target.tolist()
    return [(1 - smoothing) * share + smoothing / CLASSES for share in row]


def log_softmax(row: Tensor) -> list[float]:
    values = row.double().tolist()
    norm = math.log(sum(math.exp(v) for v in values))
    return [v - norm for v in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(x: float, t: float) -> float:
    return -t * math.log(sigmoid(x)) - (1 - t) * math.log(1 - sigmoid(x))


def written_out(kind: str, x: Tensor, targets: Tensor, *, smoothing=0.0, gamma=2.0, weighted=False):
    """The losses by their definitions."""
    total = weight_sum = 0.0
    weights = [45 / (3 * 10), 45 / (3 * 30), 45 / (3 * 5), 1.0] if weighted else [1.0] * CLASSES
    for row, target in zip(x, targets, strict=True):
        t, plain = shares(target, smoothing), shares(target, 0.0)
        heavy = sum(p * w for p, w in zip(plain, weights, strict=True))
        weight_sum += heavy
        if kind in ("ce", "focal"):
            for share, log_p, weight in zip(t, log_softmax(row), weights, strict=True):
                factor = (1 - math.exp(log_p)) ** gamma if kind == "focal" else 1.0
                total -= weight * share * factor * log_p
        else:
            for share, value in zip(t, row.double().tolist(), strict=True):
                factor = abs(share - sigmoid(value)) ** gamma if kind == "quality-focal" else 1.0
                total += heavy * factor * bce(value, share) / CLASSES
    return total / weight_sum


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", ["ce", "bce", "focal", "quality-focal"])
def test_loss_equals_its_definition(kind, targets, smoothing, weighted):
    options = {"loss": kind, "smoothing": smoothing, "focal_gamma": 1.5}
    options["class_weights"] = "balanced" if weighted else "none"
    loss = build(**options)(IMAGES, logits(), targets)
    expected = written_out(
        kind, logits(), targets, smoothing=smoothing, gamma=1.5, weighted=weighted
    )
    assert loss.dtype is torch.float32 and loss.ndim == 0
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_defaults_are_cross_entropy_with_smoothing():
    criterion = losses.build_criterion(LossOptions(), num_classes=CLASSES)
    assert criterion.copies == 1
    theirs = timm.loss.LabelSmoothingCrossEntropy(0.1)(logits(), HARD)
    assert criterion(IMAGES, logits(), HARD).item() == pytest.approx(theirs.item(), rel=1e-6)
    soft = timm.loss.SoftTargetCrossEntropy()(logits(), SOFT * 0.9 + 0.1 / CLASSES)
    assert criterion(IMAGES, logits(), SOFT).item() == pytest.approx(soft.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_weighted_cross_entropy_equals_torch(smoothing):
    weight = losses.balanced_weights(COUNTS)
    criterion = build(class_weights="balanced", smoothing=smoothing)
    theirs = F.cross_entropy(logits(), HARD, weight, label_smoothing=smoothing)
    assert criterion(IMAGES, logits(), HARD).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("kind", ["ce", "bce", "focal", "quality-focal"])
def test_hard_targets_equal_one_hot_ones(kind, weights):
    criterion = build(loss=kind, class_weights=weights, smoothing=0.2)
    hard = criterion(IMAGES, logits(), HARD)
    soft = criterion(IMAGES, logits(), F.one_hot(HARD, CLASSES).float())
    assert hard.item() == pytest.approx(soft.item(), rel=1e-6)


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("focal, plain", [("focal", "ce"), ("quality-focal", "bce")])
def test_focal_losses_without_focus_are_their_plain_ones(focal, plain, targets, weights):
    options = {"smoothing": 0.1, "class_weights": weights}
    focused = build(loss=focal, focal_gamma=0.0, **options)(IMAGES, logits(), targets)
    other = build(loss=plain, **options)(IMAGES, logits(), targets)
    assert focused.item() == pytest.approx(other.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["focal", "quality-focal"])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradients_are_finite_where_the_prediction_is_perfect(kind, gamma):
    x = torch.tensor([[200.0, -200, -200, -200], [-200.0, 200, -200, -200]], requires_grad=True)
    build(loss=kind, focal_gamma=gamma)(IMAGES[:2], x, torch.tensor([0, 0])).backward()
    assert torch.isfinite(x.grad).all()


def test_binary_cross_entropy_equals_timm():
    ours = build(loss="bce", smoothing=0.1)
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.1)(logits(), HARD)
    assert ours(IMAGES, logits(), HARD).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_bce_loss_makes_every_share_a_full_one():
    criterion = build(bce_loss=True)
    theirs = timm.loss.BinaryCrossEntropy(target_threshold=0.0)(logits(), SOFT)
    assert criterion(IMAGES, logits(), SOFT).item() == pytest.approx(theirs.item(), rel=1e-6)
    soft = build(loss="bce")(IMAGES, logits(), SOFT)
    assert criterion(IMAGES, logits(), SOFT).item() != pytest.approx(soft.item(), rel=1e-3)
    hard = criterion(IMAGES, logits(), HARD)
    assert hard.item() == pytest.approx(build(loss="bce")(IMAGES, logits(), HARD).item())


def test_balanced_weights_give_classes_equal_weight():
    weights = losses.balanced_weights(COUNTS)
    assert weights.tolist() == pytest.approx([1.5, 0.5, 3.0, 1.0])
    assert (weights * COUNTS)[:3].tolist() == pytest.approx([15.0] * 3)


def test_effective_weights_are_those_of_the_paper():
    """Equation 2 as numbers, by the sum 1 + β + … + β^(n-1) of equation 1's proof."""
    beta = 0.99
    effective = [sum(beta**i for i in range(n)) for n in COUNTS.tolist() if n]
    inverse = [1 / e for e in effective]
    expected = [w * len(inverse) / sum(inverse) for w in inverse]
    weights = losses.effective_weights(COUNTS, beta)
    assert weights[COUNTS > 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert weights[COUNTS == 0].tolist() == [1.0]
    assert losses.effective_weights(COUNTS, 0.0).tolist() == [1.0] * CLASSES
    # Towards 1 they are those of the inverse frequency, by another scale.
    ratio = losses.effective_weights(COUNTS, 1 - 1e-9) / losses.balanced_weights(COUNTS)
    assert ratio[COUNTS > 0].tolist() == pytest.approx([ratio[0].item()] * 3, rel=1e-5)


def test_a_factor_of_all_class_weights_changes_no_loss():
    for kind in ("ce", "bce", "focal", "quality-focal"):
        options = LossOptions(loss=kind, smoothing=0.1)
        one, ten = (
            losses.build_criterion(
                options, num_classes=CLASSES, weight=factor * losses.balanced_weights(COUNTS)
            )
            for factor in (1, 10)
        )
        found = one(IMAGES, logits(), SOFT).item()
        assert ten(IMAGES, logits(), SOFT).item() == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("binary", [False, True])
def test_cosub_equals_its_definition(binary):
    x = logits(3, rows=2 * BATCH)
    criterion = build(cosub=True, bce_loss=binary)
    assert criterion.copies == 2
    total = 0.0
    for i, target in enumerate(SOFT):
        for c, share in enumerate(target.tolist()):
            share = float(share > 0) if binary else share
            a, b = x[i, c].item(), x[BATCH + i, c].item()
            total += bce(a, share) + bce(b, share) + bce(a, sigmoid(b)) + bce(b, sigmoid(a))
    loss = criterion(IMAGES.repeat(2, 1, 1, 1), x, SOFT)
    assert loss.item() == pytest.approx(0.25 * total / (BATCH * CLASSES), rel=1e-5)


def test_cosub_does_not_teach_through_the_teaching_half():
    x = logits(3, rows=2 * BATCH).requires_grad_()
    build(cosub=True)(IMAGES, x, SOFT).backward()
    first, second = x.detach().chunk(2)
    # dBCE(x, t)/dx = sigmoid(x) - t, for the targets and for the other half's predictions.
    for half, other, gradient in zip(
        (first, second), (second, first), x.grad.chunk(2), strict=True
    ):
        pulls = (half.sigmoid() - SOFT) + (half.sigmoid() - other.sigmoid())
        torch.testing.assert_close(gradient, 0.25 * pulls / (BATCH * CLASSES))


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, {"loss": "focal"}, {"cosub": True}])
def test_two_heads_count_equally(options):
    criterion = build(**options)
    rows = BATCH * criterion.copies
    one, two = logits(1, rows), logits(2, rows)
    both = criterion(IMAGES, (one, two), SOFT)
    mean = (criterion(IMAGES, one, SOFT) + criterion(IMAGES, two, SOFT)) / 2
    assert both.item() == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "ce", "class_weights": "balanced"},
        {"loss": "bce", "class_weights": "balanced"},
        {"loss": "focal"},
        {"loss": "quality-focal"},
        {"bce_loss": True},
    ],
)
def test_losses_of_half_precision_outputs_are_float32(options):
    criterion = build(**options)
    x = logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(IMAGES, x, SOFT)
    assert loss.dtype is torch.float32
    assert loss.item() == criterion(IMAGES, x.float(), SOFT).item()


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["ce", "bce", "focal", "quality-focal"]),
    weights=st.sampled_from(["none", "balanced"]),
    smoothing=st.floats(0, 0.9),
    scale=st.floats(0, 60),
    seed=st.integers(0, 1000),
)
def test_losses_are_finite_and_not_negative(kind, weights, smoothing, scale, seed):
    criterion = build(loss=kind, class_weights=weights, smoothing=smoothing)
    x = (logits(seed) * scale).requires_grad_()
    loss = criterion(IMAGES, x, SOFT)
    loss.backward()
    assert loss.item() >= 0 and math.isfinite(loss.item())
    assert torch.isfinite(x.grad).all()


def test_criterion_has_no_state_to_save():
    criterion = build(class_weights="balanced")
    assert criterion.state_dict() == {}
    assert criterion.to(torch.float64).weight.dtype is torch.float64


# --- distillation ---------------------------------------------------------------------------------


class Teacher(nn.Module):
    """Gives logits that don't depend on the images; dropout would show in training mode."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = nn.Parameter(answers)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.answers)


def distilled(kind: str, alpha: float = 0.3, tau: float = 1.0, smoothing: float = 0.1) -> nn.Module:
    options = LossOptions(
        distillation_type=kind,
        distillation_alpha=alpha,
        distillation_tau=tau,
        teacher_path="t.pth",
        smoothing=smoothing,
    )
    return losses.build_criterion(options, num_classes=CLASSES, teacher=Teacher(logits(9)))


def deits_formula(kind: str, student: Tensor, tau: float) -> float:
    total = 0.0
    for row, answer in zip(student, logits(9), strict=True):
        if kind == "hard":
            total -= log_softmax(row)[int(answer.argmax())] / BATCH
        else:
            for ours, theirs in zip(log_softmax(row / tau), log_softmax(answer / tau), strict=True):
                total += math.exp(theirs) * (theirs - ours) * tau**2 / (BATCH * CLASSES)
    return total


@pytest.mark.parametrize("kind, tau", [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_distillation_of_two_heads(kind, tau):
    one, two = logits(1), logits(2)
    loss = distilled(kind, 0.3, tau)(IMAGES, (one, two), SOFT)
    base = written_out("ce", one, SOFT, smoothing=0.1)
    expected = 0.7 * base + 0.3 * deits_formula(kind, two, tau)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_of_one_head_says_so_once(caplog):
    caplog.set_level(logging.INFO)
    criterion = distilled("hard", 0.5)
    for _ in range(2):
        loss = criterion(IMAGES, logits(1), SOFT)
    base = written_out("ce", logits(1), SOFT, smoothing=0.1)
    expected = 0.5 * base + 0.5 * deits_formula("hard", logits(1), 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert caplog.text.count("no distillation head") == 1


def test_teacher_is_fixed_and_kept_out():
    criterion = distilled("soft")
    criterion.train()
    assert not criterion.teacher.training
    assert list(criterion.parameters()) == [] and criterion.state_dict() == {}
    assert not criterion.teacher.answers.requires_grad
    student = logits(1).requires_grad_()
    criterion(IMAGES, student, HARD).backward()
    assert criterion.teacher.answers.grad is None and student.grad.abs().sum() > 0
    criterion.to(torch.float64)
    assert criterion.teacher.answers.dtype is torch.float64


def test_distillation_in_half_precision():
    criterion = distilled("soft", tau=2.0)
    rounded = logits(9).bfloat16().float()
    criterion.teacher.answers.data = rounded.bfloat16()
    x = logits(1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(IMAGES, (x, x), SOFT)
    assert loss.dtype is torch.float32
    criterion.teacher.answers.data = rounded
    assert loss.item() == criterion(IMAGES, (x.float(), x.float()), SOFT).item()


# --- several labels per image ---------------------------------------------------------------------


def several(count: int = 6, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, (torch.rand(count, classes, generator=generator) < 0.4).float()


@pytest.mark.parametrize("smoothing, factor", [(0.0, None), (0.2, 3.0)])
def test_bce_of_several_labels(smoothing, factor):
    logits, targets = several()
    weight = None if factor is None else torch.full((5,), factor)
    criterion = losses.build_criterion(
        LossOptions(smoothing=smoothing), num_classes=5, multilabel=True, pos_weight=weight
    )
    p, t = logits.double().sigmoid(), targets.double() * (1 - smoothing) + smoothing / 2
    wanted = -((factor or 1.0) * t * p.log() + (1 - t) * (1 - p).log()).mean()
    torch.testing.assert_close(criterion(None, logits, targets).double(), wanted)
    both = criterion(None, (logits, logits + 1), targets)
    second = criterion(None, logits + 1, targets)
    torch.testing.assert_close(both, (criterion(None, logits, targets) + second) / 2)


def test_asymmetric_loss_is_that_of_its_paper():
    """Equations 5 to 7 of arXiv:2009.14119, and with no focus and no margin plain BCE."""
    logits, targets = several()
    options = {"loss": "asl", "smoothing": 0.0}
    criterion = losses.build_criterion(LossOptions(**options), num_classes=5, multilabel=True)
    p = logits.double().sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    positive, negative = (1 - p) * p.log(), shifted**4 * (1 - shifted).log()
    wanted = -torch.where(targets > 0, positive, negative).sum(1).mean()
    torch.testing.assert_close(criterion(None, logits, targets).double(), wanted)
    plain = LossOptions(**options, asl_gamma_neg=0, asl_gamma_pos=0, asl_clip=0)
    criterion = losses.build_criterion(plain, num_classes=5, multilabel=True)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(criterion(None, logits, targets), 5 * bce)


def test_distillation_of_several_labels():
    logits, targets = several()
    teacher = torch.nn.Identity()
    for kind, tau in (("hard", 1.0), ("soft", 2.0)):
        options = LossOptions(
            smoothing=0, distillation_type=kind, distillation_alpha=1.0, distillation_tau=tau
        )
        criterion = losses.build_criterion(options, num_classes=5, multilabel=True, teacher=teacher)
        found = criterion(logits + 1, logits, targets)
        p, q = (logits.double() / tau).sigmoid(), ((logits + 1).double() / tau).sigmoid()
        q = (q >= 0.5).double() if kind == "hard" else q
        wanted = -(tau**2) * (q * p.log() + (1 - q) * (1 - p).log()).mean()
        torch.testing.assert_close(found, wanted.float())
