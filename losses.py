"""Training losses: what the engine calls as ``criterion(images, outputs, targets)``.

``outputs`` are logits (B, C), or the pair of both heads of a distilled model. ``targets`` are
classes (B,) int64, or shares of classes (B, C) after mixing. The result is a float32 scalar,
whatever the precision of the outputs. ``criterion.copies`` is how often the engine puts the batch
through the model at once: with 2 the outputs have 2B rows, the first B of the first copy.
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augmentation.mixing import one_hot
from config import LossOptions
from errors import OptionError

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
        teacher: what ``teachers.build_teacher`` returned.

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
