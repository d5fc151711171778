"""Losses and flags that stay on the device between reads."""

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.processes import all_reduce_sum, world_size
from optimization.state import Progress


class Meter:
    """Sums of an epoch, on the device until :meth:`read_into` waits for them.

    Attributes:
        last_norm: gradient norm of the last update, as of the last read.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Loss, number of losses, bad updates, right answers; the last place is for all answers.
        self.sums = torch.zeros(5, dtype=dtype, device=device)
        self.answers = 0
        self._pending: list[tuple[Tensor, Tensor]] = []  # answers and labels not compared yet
        self.halted = torch.zeros((), dtype=torch.bool, device=device)
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=device)
        # Step and update of the first bad one.
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.last_norm = 0.0
        self.mark()

    def mark(self) -> None:
        """Remember the sums as they are now, for :meth:`drop`."""
        if len(self._pending) > 100:
            self._compare()
        self._marked = self.sums.clone(), self.answers, len(self._pending)

    def drop(self) -> None:
        """Forget the losses and answers added since :meth:`mark`."""
        self.sums, self.answers, pending = self._marked
        del self._pending[pending:]
        self.bad_loss = torch.zeros_like(self.bad_loss)

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a batch, and note whether it is finite."""
        finite = torch.isfinite(loss)
        self.sums[0] += torch.where(finite, loss, 0.0)
        self.sums[1] += finite
        self.bad_loss |= ~finite

    def add_answers(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Count the images whose greatest logit is that of the class with the greatest share.

        Args:
            outputs: logits (N, C), of which the first B are counted; or the pair of both heads of a
                distilled model, of which the mean is.
            targets: classes (B,), or shares of the classes (B, C).
        """
        logits = outputs[0] + outputs[1] if isinstance(outputs, tuple) else outputs
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        # One kernel a step, or two: they are compared many steps at a time.
        self._pending.append((logits[: len(labels)].detach().argmax(1), labels))
        self.answers += len(labels)

    def _compare(self) -> None:
        """Count the right ones of the answers that are pending."""
        if self._pending:
            answers, labels = map(torch.cat, zip(*self._pending, strict=True))
            self.sums[3] += (answers == labels).sum()
            self._pending = []

    def check(
        self, grad_norm: Tensor, step: int, update: int, *, sticky: bool, scaled: bool
    ) -> Tensor:
        """Whether to leave out the update, agreed on by all processes; a bool on the device.

        ``sticky`` leaves out all later ones too. With a loss scaler (``scaled``) an infinite
        gradient is the scaler's business.
        """
        bad = self.bad_loss if scaled else self.bad_loss | ~torch.isfinite(grad_norm)
        if dist.is_initialized():
            votes = bad.to(torch.int32)
            dist.all_reduce(votes, dist.ReduceOp.MAX)
            bad = votes.bool()
        here = torch.tensor([step, update]).to(self.first_bad.device, non_blocking=True)
        self.first_bad = torch.where(bad & (self.first_bad < 0), here, self.first_bad)
        self.sums[2] += bad
        self.bad_loss = torch.zeros_like(self.bad_loss)
        self.grad_norm = grad_norm.detach()
        if sticky:
            self.halted |= bad
            return self.halted
        return bad

    def read_into(self, progress: Progress) -> tuple[int, int, int]:
        """Wait for the device and move the sums into ``progress``.

        Returns the number of bad updates, and the first one's step and number.
        """
        self._compare()
        self.sums[4] = self.answers
        sums = all_reduce_sum(self.sums.clone())
        world = world_size()
        parts = [sums, self.first_bad.to(sums.dtype), self.grad_norm.to(sums.dtype)[None]]
        loss, count, bad, hits, answers, step, update, self.last_norm = torch.cat(parts).tolist()
        self.sums.zero_()
        self.answers = 0
        self.first_bad.fill_(-1)
        progress.loss_sum += loss
        progress.recent_sum += loss
        progress.loss_count += int(count)
        progress.recent_count += int(count)
        progress.hits += int(hits)
        progress.answers += int(answers)
        progress.skipped += int(bad) // world
        return int(bad) // world, int(step), int(update)
