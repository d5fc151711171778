"""The order in which images are seen, as a function of seed and epoch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from utils import derive_seed

LANES = 64  # sequences of groups that an order takes from in turn
WINDOW = 2  # groups of a lane that are shuffled together
NUM_REPEATS = 3  # copies of an image in repeated augmentation


class SampleKey(NamedTuple):
    """What a data set needs to know to make a sample; its augmentation depends on nothing else."""

    index: int
    """Of the image in the data set."""
    epoch: int
    position: int
    """Place in the epoch's global sequence, all processes together."""


class EpochSampler(Sampler[SampleKey]):
    """A global sequence of ``num_samples`` positions per epoch, dealt out to the processes in turn.

    Every process gets the same number of samples: the last ``num_samples % num_replicas`` positions
    of an epoch are left out. The sequence doesn't depend on the number of processes.

    Args:
        num_samples: images of the data set.
        num_replicas: processes.
        rank: number of this process.
        seed: of the order.
        groups: (num_samples,) integers, the shard of each image; None where images are files.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        groups: np.ndarray | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.groups = groups
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the first global position that is still to come."""
        self.epoch = epoch
        self.start = start

    def order(self, epoch: int) -> torch.Tensor:
        """The data set indices of the epoch, (num_samples,) int64."""
        raise NotImplementedError

    def permutation(self, epoch: int) -> torch.Tensor:
        """All images in random order; those of a group (a shard) not far from each other."""
        return _shuffled(self.num_samples, self.groups, self.generator(epoch))

    def generator(self, epoch: int) -> torch.Generator:
        """The generator that ``order`` draws from; each epoch has its own."""
        return torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))

    def __len__(self) -> int:
        return max(0, self.num_samples - self.start) // self.num_replicas

    def share(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and positions of this process, in order, (len,) int64 each."""
        positions = self.start + self.rank + self.num_replicas * np.arange(len(self))
        return self.order(self.epoch).numpy()[positions], positions

    def __iter__(self) -> Iterator[SampleKey]:
        indices, positions = self.share()
        for index, position in zip(indices.tolist(), positions.tolist(), strict=True):
            yield SampleKey(index, self.epoch, position)


def _shuffled(count: int, groups: np.ndarray | None, generator: torch.Generator) -> torch.Tensor:
    """A random order of ``count`` images, (count,) int64, by their groups if they have such."""
    if groups is None:
        return torch.randperm(count, generator=generator)
    return by_groups(groups, generator)


def by_groups(groups: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """A random order of all images, (N,) int64, that reads groups (shards) one after another.

    The groups are dealt out in random order to LANES lanes; a lane goes through its groups WINDOW
    at a time, shuffled, and the order takes from the lanes in turn. So a batch comes from many
    shards, a few are in use at any time, and where the number of processes divides that of the
    lanes, each process reads shards of its own.
    """
    count = int(groups.max()) + 1
    lanes = min(LANES, count)
    members = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=count))
    parts = np.split(members, ends[:-1])
    turns = torch.randperm(count, generator=generator).numpy()
    sequences = []
    for lane in range(lanes):
        mine, windows = turns[lane::lanes], []
        for start in range(0, len(mine), WINDOW):
            window = np.concatenate([parts[group] for group in mine[start : start + WINDOW]])
            windows.append(window[torch.randperm(len(window), generator=generator).numpy()])
        sequences.append(np.concatenate(windows))
    return torch.from_numpy(_in_turn(sequences))


def _in_turn(sequences: list[np.ndarray]) -> np.ndarray:
    """One element of each sequence, then the next of each; the longer ones go on alone."""
    lengths = [len(sequence) for sequence in sequences]
    places = np.arange(max(lengths))
    alive = sum((places < length).astype(np.int64) for length in lengths)  # sequences that go on
    # Where the next sequence's element of each place goes.
    slot = np.cumsum(alive) - alive
    result = np.empty(sum(lengths), dtype=np.int64)
    for sequence in sequences:
        result[slot[: len(sequence)]] = sequence
        slot[: len(sequence)] += 1
    return result


class ShuffleSampler(EpochSampler):
    """Every image once, in a new order each epoch."""

    def order(self, epoch: int) -> torch.Tensor:
        return self.permutation(epoch)


class RASampler(EpochSampler):
    """Repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335; DeiT, section 6).

    Each image of a permutation ``num_repeats`` times in a row, cut to ``num_samples`` positions:
    an epoch has the usual length and shows a third of the images. Copies of an image fall on
    neighbouring processes, or on neighbouring places of the batch on a single process.
    """

    def __init__(self, num_samples: int, *, num_repeats: int = NUM_REPEATS, **kwargs: int) -> None:
        super().__init__(num_samples, **kwargs)
        self.num_repeats = num_repeats

    def order(self, epoch: int) -> torch.Tensor:
        permutation = self.permutation(epoch)
        return permutation.repeat_interleave(self.num_repeats)[: self.num_samples]


class BalancedSampler(EpochSampler):
    """Drawn with replacement: first a class, all that have images equally likely, then an image.

    Args:
        targets: class of each image, (num_samples,) integers.
    """

    def __init__(self, targets: Sequence[int], **kwargs: int) -> None:
        super().__init__(len(targets), **kwargs)
        targets = torch.as_tensor(targets)
        self.by_class = torch.argsort(targets, stable=True)
        _, self.counts = torch.unique(targets, return_counts=True)
        self.first = self.counts.cumsum(0) - self.counts

    def order(self, epoch: int) -> torch.Tensor:
        generator = self.generator(epoch)
        size = (self.num_samples,)
        classes = torch.randint(len(self.counts), size, generator=generator)
        share = torch.rand(size, generator=generator, dtype=torch.float64)
        within = (share * self.counts[classes]).long()
        return self.by_class[self.first[classes] + within]


class UndersampleSampler(EpochSampler):
    """As many images of each class as the rarest one has; of the others a new choice each epoch.

    An epoch has K × n positions, of the K classes that have images and the n images of the rarest.
    Nothing is drawn twice within an epoch.

    Args:
        targets: class of each image, (N,) integers.
    """

    def __init__(self, targets: Sequence[int], **kwargs: Any) -> None:
        self.targets = torch.as_tensor(targets)
        _, counts = torch.unique(self.targets, return_counts=True)
        self.least = int(counts.min()) if len(counts) else 0
        """Images of each class in an epoch, n."""
        super().__init__(self.least * len(counts), **kwargs)

    def order(self, epoch: int) -> torch.Tensor:
        generator = self.generator(epoch)
        mixed = torch.randperm(len(self.targets), generator=generator)
        by_class = mixed[torch.argsort(self.targets[mixed], stable=True)]
        _, counts = torch.unique(self.targets, return_counts=True)
        first = counts.cumsum(0) - counts
        chosen = by_class[(first[:, None] + torch.arange(self.least)).flatten()].sort().values
        groups = None if self.groups is None else self.groups[chosen.numpy()]
        return chosen[_shuffled(len(chosen), groups, generator)]


class EvalSampler(Sampler[SampleKey]):
    """This process's share in order: ``rank``, ``rank + num_replicas``, … without padding."""

    epoch = 0

    def __init__(self, num_samples: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        self.indices = range(rank, num_samples, num_replicas)

    def __len__(self) -> int:
        return len(self.indices)

    def share(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and positions of this process, which are the same."""
        indices = np.array(self.indices, dtype=np.int64)
        return indices, indices

    def __iter__(self) -> Iterator[SampleKey]:
        for index in self.indices:
            yield SampleKey(index, 0, index)
