"""Training losses: what the engine calls as ``criterion(images, outputs, targets)``.

``outputs`` are logits (B, C), or the pair of both heads of a distilled model. ``targets`` are
classes (B,) int64, or shares of classes (B, C) after mixing. The result is a float32 scalar,
whatever the precision of the outputs. ``criterion.copies`` is how often the engine puts the batch
through the model at once: with 2 the outputs have 2B rows, the first B of the first copy.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from architectures.weights import load_pretrained_weights
from augmentation.mixing import one_hot
from checkpointing.files import class_names_of, load_checkpoint, weights_of
from config import LossOptions
from errors import CheckpointError, OptionError

log = logging.getLogger(__name__)

Outputs = Tensor | tuple[Tensor, Tensor]


# --- targets and weights --------------------------------------------------------------------------


def soft_targets(targets: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Targets as shares of the classes, (B, C): (1 - smoothing) × target + smoothing / C."""
    if targets.ndim == 1:
        targets = one_hot(targets, num_classes)
    targets = targets.float()
    return targets * (1 - smoothing) + smoothing / num_classes if smoothing else targets


def balanced_weights(class_counts: Tensor) -> Tensor:
    """Weight of each class, n / (C × n_c) over the C classes with images; 1 for the others."""
    counts = class_counts.float()
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, 1.0)


# --- losses of one head ---------------------------------------------------------------------------


class ClassificationLoss(nn.Module):
    """A loss of logits and targets; two heads count equally, as their mean.

    Args:
        smoothing: label smoothing, in [0, 1).
        weight: weight of each class, (C,), or None. The loss is the mean over the batch weighed by
            the (expected) weight of each image's class.
    """

    copies = 1

    def __init__(self, smoothing: float = 0.0, weight: Tensor | None = None) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, images: Tensor, outputs: Outputs, targets: Tensor) -> Tensor:
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.stack([self.head_loss(head.float(), targets) for head in heads]).mean()

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of the logits (B, C) of one head."""
        raise NotImplementedError

    def mean(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Mean of ``losses`` (B,), each as heavy as its class in ``targets`` (B, C)."""
        if self.weight is None:
            return losses.mean()
        weights = self.sample_weights(targets)
        return (losses * weights).sum() / weights.sum()

    def sample_weights(self, targets: Tensor) -> Tensor:
        """Expected class weight of each image, (B,)."""
        return (targets * self.weight).sum(1) / targets.sum(1)


class FocalLoss(ClassificationLoss):
    """Focal loss over the softmax, -(1 - p)^γ log p (Lin et al. 2017, eq. 4).

    For soft targets it is the sum over the classes weighed by their shares. γ = 0 is cross-entropy;
    class weights weigh the terms as in ``F.cross_entropy``.
    """

    def __init__(self, gamma: float, smoothing: float = 0.0, weight: Tensor | None = None) -> None:
        super().__init__(smoothing, weight)
        self.gamma = gamma

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        log_p = F.log_softmax(logits, dim=1)
        terms = -soft_targets(targets, classes, self.smoothing) * log_p  # (B, C)
        if self.gamma:
            # 1 - p without cancellation for p near 1; its power has no gradient at 0.
            terms = terms * (-torch.expm1(log_p)).clamp(min=1e-12) ** self.gamma
        if self.weight is None:
            return terms.sum(1).mean()
        weights = self.sample_weights(soft_targets(targets, classes))
        return (terms * self.weight).sum() / weights.sum()


class CrossEntropy(ClassificationLoss):
    """Cross-entropy. With class weights, hard and one-hot targets give the same loss, which
    ``F.cross_entropy`` alone doesn't: it divides soft targets' loss by B and not by their
    weight."""

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(
            logits,
            targets,
            weight=self.weight,
            label_smoothing=self.smoothing,
        )
        if self.weight is None or targets.ndim == 1:
            return loss
        return loss * len(targets) / self.sample_weights(targets).sum()


class BinaryCrossEntropy(ClassificationLoss):
    """Binary cross-entropy of every class, mean over classes and batch.

    Args:
        binary: every class with a share in the target counts as a full 1 (DeiT III).
    """

    def __init__(
        self, smoothing: float = 0.0, weight: Tensor | None = None, binary: bool = False
    ) -> None:
        super().__init__(smoothing, weight)
        self.binary = binary

    def targets(self, targets: Tensor, num_classes: int) -> Tensor:
        """What the sigmoids are compared with, (B, C)."""
        if self.binary:
            return (soft_targets(targets, num_classes) > 0).float()
        return soft_targets(targets, num_classes, self.smoothing)

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        losses = self.losses(logits, self.targets(targets, classes))
        return self.mean(losses, soft_targets(targets, classes))

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, (B,)."""
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


class QualityFocalLoss(BinaryCrossEntropy):
    """Quality focal loss |t - σ|^β × BCE, mean over classes and batch (Li et al. 2020)."""

    def __init__(self, gamma: float, smoothing: float = 0.0, weight: Tensor | None = None) -> None:
        super().__init__(smoothing, weight)
        self.gamma = gamma

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        # A power below 1 has no finite gradient at 0.
        distance = (targets - logits.sigmoid()).abs().clamp(min=1e-12)
        return (distance**self.gamma * terms).mean(1)


class CosubLoss(BinaryCrossEntropy):
    """Co-training of two submodels (cosub, Touvron et al. 2022, arXiv 2212.04884).

    Two copies of the batch meet different stochastic depth; each learns from the targets and from
    the other's predictions.
    """

    copies = 2

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        first, second = logits.chunk(2)  # (2B, C) -> (B, C) each
        wanted = self.targets(targets, logits.shape[1])
        losses = (
            self.losses(first, wanted)
            + self.losses(second, wanted)
            + self.losses(first, second.detach().sigmoid())
            + self.losses(second, first.detach().sigmoid())
        )
        return 0.25 * self.mean(losses, soft_targets(targets, logits.shape[1]))


# --- distillation ---------------------------------------------------------------------------------


class DistillationLoss(nn.Module):
    """(1 - α) × loss of the targets + α × loss of the teacher (DeiT, §4).

    The teacher sees the same images. A distilled student's class head learns from the targets,
    its distillation head from the teacher; a student with one head learns both with it. The teacher
    is no submodule: it has no part in ``parameters()``, ``state_dict()`` and ``train()``, but moves
    with ``to()``.

    Args:
        base: loss of the targets.
        teacher: images (B, 3, H, W) -> logits (B, C); put into evaluation mode and fixed.
        kind: soft (KL divergence at temperature ``tau``, eq. 2) or hard (cross-entropy with the
            teacher's decision, eq. 3).
        alpha: share of the teacher, in [0, 1].
        tau: temperature, above 0.
    """

    copies = 1

    def __init__(
        self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float
    ) -> None:
        super().__init__()
        self.base = base
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._noted = False

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationLoss":
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, outputs: Outputs, targets: Tensor) -> Tensor:
        if not isinstance(outputs, tuple):
            if not self._noted:
                log.info("the student has no distillation head: its one head learns both losses")
                self._noted = True
            outputs = (outputs, outputs)
        class_head, distillation_head = outputs
        with torch.no_grad():
            teacher_logits = self.teacher(images).float()
        target_loss = self.base(images, class_head, targets)
        teacher_loss = self.teacher_loss(distillation_head.float(), teacher_logits)
        return (1 - self.alpha) * target_loss + self.alpha * teacher_loss

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Loss of the student's ``logits`` (B, C) against the teacher's."""
        if self.kind == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(1))
        divergence = F.kl_div(
            F.log_softmax(logits / self.tau, dim=1),
            F.log_softmax(teacher_logits / self.tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        # DeiT's code divides by B × C, not by B: the published alphas belong to this scale.
        return divergence * self.tau**2 / logits.numel()


# --- builders -------------------------------------------------------------------------------------


def build_criterion(
    options: LossOptions,
    *,
    num_classes: int,
    class_counts: Tensor | None = None,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """The training loss.

    Args:
        options: the loss and its parts.
        num_classes: C.
        class_counts: training images of each class, (C,), for balanced class weights.
        teacher: what :func:`build_teacher` returned.

    Raises:
        OptionError: class weights without known counts.
    """
    weight = None
    if options.class_weights == "balanced":
        if class_counts is None or len(class_counts) != num_classes:
            raise OptionError(
                "class_weights", "the data set doesn't know its class counts: leave balanced out"
            )
        weight = balanced_weights(class_counts)
    smoothing, gamma = options.smoothing, options.focal_gamma
    kind = options.loss
    if kind == "auto":
        kind = "bce" if options.bce_loss or options.cosub else "ce"
    criterion: nn.Module
    if options.cosub:
        criterion = CosubLoss(smoothing, weight, binary=options.bce_loss)
    elif kind == "bce":
        criterion = BinaryCrossEntropy(smoothing, weight, binary=options.bce_loss)
    elif kind == "focal":
        criterion = FocalLoss(gamma, smoothing, weight)
    elif kind == "quality-focal":
        criterion = QualityFocalLoss(gamma, smoothing, weight)
    else:
        criterion = CrossEntropy(smoothing, weight)
    if teacher is None:
        return criterion
    return DistillationLoss(
        criterion,
        teacher,
        options.distillation_type,
        options.distillation_alpha,
        options.distillation_tau,
    )


def build_teacher(
    options: LossOptions,
    *,
    num_classes: int,
    input_size: int,
    class_names: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> nn.Module | None:
    """The teacher with its weights, on the CPU, or None without distillation.

    Raises:
        OptionError: the weights are of another model, class count, list of classes or
            normalisation (the teacher sees the images as the student does).
    """
    if options.distillation_type == "none":
        return None
    with _blamed_on("teacher_model"):
        name = models.resolve_name(options.teacher_model)
        teacher = models.build_model(name, num_classes, input_size=input_size)
    with _blamed_on("teacher_path"):
        if options.teacher_path == "timm":
            return _published_teacher(name, num_classes, input_size)
        content = load_checkpoint(options.teacher_path)
        _check_classes(class_names_of(content), class_names)
        _check_normalization(content.get("preprocessing"), normalization)
        weights = weights_of(content)
        _check_class_count(teacher, weights, num_classes)
        report = load_pretrained_weights(teacher, weights)
    if report.missing or report.skipped:
        raise OptionError(
            "teacher_path",
            f"{options.teacher_path} doesn't hold a {options.teacher_model} ({report.summary()}): "
            "name its model with --teacher-model",
        )
    return teacher


@contextlib.contextmanager
def _blamed_on(option: str) -> Iterator[None]:
    """Errors about a model or checkpoint inside concern the teacher's ``option``."""
    try:
        yield
    except OptionError as error:
        if error.option == option:
            raise
        message = str(error).partition(": ")[2]
        raise OptionError(option, message) from error
    except CheckpointError as error:
        raise OptionError(option, str(error)) from error


def _published_teacher(name: str, num_classes: int, input_size: int) -> nn.Module:
    published = timm.get_pretrained_cfg(name)
    known = published.num_classes if published is not None else 0
    if known != num_classes:
        raise OptionError(
            "teacher_path",
            f"timm's weights of {name} know {known} classes, the data set has {num_classes}: "
            "give the checkpoint of a teacher trained on it",
        )
    return models.build_model(name, num_classes, input_size=input_size, pretrained=True)


def _check_classes(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> None:
    if theirs is None or ours is None or list(theirs) == list(ours):
        return
    if len(theirs) != len(ours):
        what = f"the teacher knows {len(theirs)} classes, the data set has {len(ours)}"
    else:
        index = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
        what = f"the teacher's class {index} is {theirs[index]!r}, the data set's {ours[index]!r}"
    raise OptionError("teacher_path", f"{what}: it must be trained on the same classes")


def _check_normalization(
    theirs: Mapping[str, Any] | None, ours: tuple[Sequence[float], Sequence[float]] | None
) -> None:
    if theirs is None or ours is None:
        return
    if any(list(theirs[k]) != list(v) for k, v in zip(("mean", "std"), ours, strict=True)):
        mean, std = (" ".join(f"{x:g}" for x in theirs[key]) for key in ("mean", "std"))
        raise OptionError(
            "teacher_path",
            f"the teacher was trained with another normalisation: add --mean {mean} --std {std}",
        )


def _check_class_count(teacher: nn.Module, weights: Mapping[str, Tensor], num_classes: int) -> None:
    """OptionError if a layer's weights differ from the model's in the class count alone."""
    for key, own in teacher.state_dict().items():
        known = weights[key].shape[0] if key in weights and weights[key].ndim else 0
        alike = known and weights[key].shape[1:] == own.shape[1:]
        if own.ndim == 2 and alike and own.shape[0] == num_classes != known:
            raise OptionError(
                "teacher_path",
                f"the teacher knows {known} classes, the data set has {num_classes}: "
                "it must be trained on the same classes",
            )
