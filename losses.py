"""Training losses: what the engine calls as ``criterion(images, outputs, targets)``.

``outputs`` are logits (B, C), or the pair of both heads of a distilled model. ``targets`` are
classes (B,) int64, or shares of classes (B, C) after mixing, or several labels (B, C). The result
is a float32 scalar, whatever the precision of the outputs. ``criterion.copies`` is how often the
engine puts the batch through the model at once: with 2 the outputs have 2B rows, the first B of the
first copy.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

from augmentation.mixing import one_hot
from config import LossOptions

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


def effective_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Weight of each class by its effective number of images, (1 - β) / (1 - β^n_c), scaled to a
    mean of 1 (Cui et al. 2019, arXiv:1901.05555, eq. 2 and section 3.3).

    The mean is that of the classes with images; the others get 1. ``beta`` is in [0, 1): 0 weighs
    all classes alike, near 1 the weights are those of the inverse frequency.
    """
    counts = class_counts.double()
    present = counts > 0
    if beta == 0:
        return torch.ones(len(counts))
    # Without cancellation where β^n is near 1.
    weights = (1 - beta) / -torch.expm1(counts.clamp(min=1) * math.log(beta))
    return torch.where(present, weights / weights[present].mean(), 1.0).float()


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


class JsdCrossEntropy(CrossEntropy):
    """Cross-entropy of clean images, and how far the predictions for their splits are apart
    (AugMix, Hendrycks et al. 2020, arXiv:1912.02781, section 3), as timm's loss of this name.

    The logits (S × B, C) are those of all clean images, then of each further split; so are the
    targets. The loss is CE + α × the mean KL divergence of the splits from their mean.
    """

    ALPHA = 12.0

    def __init__(self, splits: int, smoothing: float = 0.0, weight: Tensor | None = None) -> None:
        super().__init__(smoothing, weight)
        self.splits = splits

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        batch = len(logits) // self.splits
        loss = super().head_loss(logits[:batch], targets[:batch])
        shares = logits.softmax(1).unflatten(0, (self.splits, batch))  # (S, B, C)
        log_mean = shares.mean(0).clamp(1e-7, 1).log().expand_as(shares)
        divergence = F.kl_div(log_mean, shares, reduction="sum") / (batch * self.splits)
        return loss + self.ALPHA * divergence


class BinaryCrossEntropy(ClassificationLoss):
    """Binary cross-entropy of every class, mean over classes and batch.

    Args:
        binary: every class with a share in the target counts as a full 1 (DeiT III).
        multilabel: targets are (B, C), of any number of labels each; smoothing then moves each of
            them towards 0.5, for there is no one class to share with.
        pos_weight: factor of the loss where a label is there, (C,), or None.
    """

    def __init__(
        self,
        smoothing: float = 0.0,
        weight: Tensor | None = None,
        binary: bool = False,
        *,
        multilabel: bool = False,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(smoothing, weight)
        self.binary = binary
        self.multilabel = multilabel
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def targets(self, targets: Tensor, num_classes: int) -> Tensor:
        """What the sigmoids are compared with, (B, C)."""
        if self.binary:
            return (soft_targets(targets, num_classes) > 0).float()
        if self.multilabel:
            return targets.float() * (1 - self.smoothing) + 0.5 * self.smoothing
        return soft_targets(targets, num_classes, self.smoothing)

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        losses = self.losses(logits, self.targets(targets, classes))
        return self.mean(losses, soft_targets(targets, classes))

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each image, (B,)."""
        return self.terms(logits, targets).mean(1)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy of each class, (B, C)."""
        return F.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=self.pos_weight
        )


class QualityFocalLoss(BinaryCrossEntropy):
    """Quality focal loss |t - σ|^β × BCE, mean over classes and batch (Li et al. 2020)."""

    def __init__(
        self, gamma: float, smoothing: float = 0.0, weight: Tensor | None = None, **several: Any
    ) -> None:
        super().__init__(smoothing, weight, **several)
        self.gamma = gamma

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        terms = self.terms(logits, targets)
        # A power below 1 has no finite gradient at 0.
        distance = (targets - logits.sigmoid()).abs().clamp(min=1e-12)
        return (distance**self.gamma * terms).mean(1)


class AsymmetricLoss(BinaryCrossEntropy):
    """Asymmetric loss of several labels (Ridnik et al. 2021, arXiv:2009.14119, eq. 5 to 7) as timm
    has it: sum over the classes, mean over the batch.

    Args:
        gamma_neg: focusing exponent where a label is absent.
        gamma_pos: focusing exponent where it is there.
        clip: probability margin m of the absent ones.
        smoothing, pos_weight: as of ``BinaryCrossEntropy``.
    """

    def __init__(
        self,
        gamma_neg: float,
        gamma_pos: float,
        clip: float,
        smoothing: float = 0.0,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(smoothing, multilabel=True)
        self.loss = AsymmetricLossMultiLabel(
            gamma_neg, gamma_pos, clip, reduction="none", pos_weight=pos_weight
        )

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.loss(logits, targets).sum(1)


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


class MultiLabelDistillationLoss(DistillationLoss):
    """As :class:`DistillationLoss`, of several labels: each is a distribution of its own.

    soft compares the sigmoids at temperature ``tau``, τ² × binary cross-entropy, mean over classes
    and batch; hard takes a label that the teacher gives 0.5 or more for one that is there.
    """

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.binary_cross_entropy_with_logits(logits, (teacher_logits >= 0).float())
        wanted = (teacher_logits / self.tau).sigmoid()
        return self.tau**2 * F.binary_cross_entropy_with_logits(logits / self.tau, wanted)


# --- builders -------------------------------------------------------------------------------------


def build_criterion(
    options: LossOptions,
    *,
    num_classes: int,
    weight: Tensor | None = None,
    teacher: nn.Module | None = None,
    multilabel: bool = False,
    pos_weight: Tensor | None = None,
    splits: int = 0,
) -> nn.Module:
    """The training loss.

    Args:
        options: the loss and its parts.
        num_classes: C.
        weight: weight of each class, (C,), see ``training.class_weights``; None: all alike.
        teacher: what ``teachers.build_teacher`` returned.
        multilabel: targets are (B, C), of any number of labels each.
        pos_weight: factor of the loss where a label is there, (C,); None: 1.
        splits: augmentation splits, of ``options.jsd_loss``.
    """
    smoothing, gamma = options.smoothing, options.focal_gamma
    kind = options.loss
    if kind == "auto":
        kind = "bce" if options.bce_loss or options.cosub or multilabel else "ce"
    several = {"multilabel": multilabel, "pos_weight": pos_weight}
    criterion: nn.Module
    if options.cosub:
        criterion = CosubLoss(smoothing, weight, binary=options.bce_loss, **several)
    elif options.jsd_loss:
        criterion = JsdCrossEntropy(splits, smoothing, weight)
    elif kind == "bce":
        criterion = BinaryCrossEntropy(smoothing, weight, binary=options.bce_loss, **several)
    elif kind == "asl":
        criterion = AsymmetricLoss(
            options.asl_gamma_neg, options.asl_gamma_pos, options.asl_clip, smoothing, pos_weight
        )
    elif kind == "focal":
        criterion = FocalLoss(gamma, smoothing, weight)
    elif kind == "quality-focal":
        criterion = QualityFocalLoss(gamma, smoothing, weight, **several)
    else:
        criterion = CrossEntropy(smoothing, weight)
    if teacher is None:
        return criterion
    distillation = MultiLabelDistillationLoss if multilabel else DistillationLoss
    return distillation(
        criterion,
        teacher,
        options.distillation_type,
        options.distillation_alpha,
        options.distillation_tau,
    )
