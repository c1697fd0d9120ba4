"""Samplers that follow the scores: weighted, from easy to hard, and skipping what is known."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from prunewise.core.checks import is_count, is_number
from prunewise.core.errors import CheckpointError
from prunewise.samples.checking import array_of, require
from prunewise.samples.ids import hash_array
from prunewise.samples.scores import Floats, Ints, SampleScores, require_difficulty, require_scores
from prunewise.samples.selection import observed_difficulty


class ScoreSampler(Sampler[int]):
    """What the samplers here share. For `DataLoader(tracked, sampler=...)`: yields sample numbers, this rank's share of them.

    All ranks draw the same order and take every R-th of it, the same count each; where it does not divide, some samples
    come twice, as with PyTorch's DistributedSampler. The order depends on the seed and the epoch alone: call `set_epoch`
    before each epoch.

    Attributes:
        weights: (N,) float32; by what a sample's loss is to be multiplied in this epoch (`losses * weights[sample_ids]`) so that
            the gradient is, in expectation, that of the whole data set; ones where that is not intended.
    """

    def __init__(self, n: int, seed: int, rank: int | None, num_replicas: int | None) -> None:
        up = dist.is_available() and dist.is_initialized()
        self.num_replicas = num_replicas if num_replicas is not None else dist.get_world_size() if up else 1
        self.rank = rank if rank is not None else dist.get_rank() if up else 0
        require(
            is_count(self.num_replicas, 1) and is_count(self.rank, 0) and self.rank < self.num_replicas,
            f"rank={self.rank!r} of num_replicas={self.num_replicas!r}: a rank is an int in [0, num_replicas)",
        )
        require(is_count(seed, 0), f"seed={seed!r} should be an int of at least 0")
        require(n > 0, "there are no samples to draw from: give the scores of one at least")
        self._n, self.seed, self.epoch = n, seed, 0
        self._settings: dict[str, Any] = {}  # by which the order is made, besides the scores
        self._begin = 0  # where the next pass begins: at 0, but for the first one after `load_state_dict`
        self._position = 0  # samples of this epoch that this rank has yielded
        self._cached: tuple[int, Ints] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next, from 0; another epoch begins at its start."""
        require(is_count(epoch, 0), f"epoch={epoch!r} should be an int of at least 0")
        if epoch != self.epoch:
            self.epoch, self._begin, self._position = epoch, 0, 0

    @property
    def weights(self) -> Tensor:
        """(N,) float32, on the CPU: see the class."""
        return torch.ones(self._n)

    def __len__(self) -> int:
        """Samples that this rank yields in this epoch."""
        return math.ceil(len(self._whole()) / self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        mine = self._share()
        begin, self._begin = self._begin, 0
        self._position = begin
        for at in range(begin, len(mine)):
            self._position = at + 1
            yield int(mine[at])
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is. A loader with workers asks ahead, so that its position is that of the next batch asked for."""
        return {**self._whose(), "epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            CheckpointError: a damaged state, or one of a sampler of another kind, data set or number of ranks, or with other
                settings; nothing is changed.
        """
        saved = state_dict if isinstance(state_dict, Mapping) else {}
        for name, value in self._whose().items():
            found = saved.get(name)
            if type(found) is not type(value) or found != value:
                raise CheckpointError(
                    f"the sampler's state has {name}={found!r:.80}, this sampler {value!r}: make it with the settings of the "
                    "run that is gone on with"
                )
        resumed = copy.copy(self)
        resumed._resume(saved)
        if resumed._position > len(resumed):  # at the end is sound: all were given, and nobody asked for more
            raise CheckpointError(
                f"the sampler's state is damaged: position {resumed._position}, in an epoch of {len(resumed):,}"
            )
        vars(self).update(vars(resumed))

    def _whose(self) -> dict[str, Any]:
        """What a state and the sampler that goes on with it have in common."""
        ours = {"kind": type(self).__name__, "n": self._n, "seed": self.seed, "num_replicas": self.num_replicas}
        return {**ours, **self._settings}

    def _resume(self, saved: Mapping[str, Any]) -> None:
        """Take up what a state says; `CheckpointError` where it is damaged, and then only a part is taken up."""
        epoch, position = saved.get("epoch"), saved.get("position")
        if not is_count(epoch) or not is_count(position):
            raise CheckpointError(f"the sampler's state is damaged: epoch {epoch!r:.80}, position {position!r:.80}")
        assert isinstance(epoch, int) and isinstance(position, int)
        self.epoch, self._begin, self._position, self._cached = epoch, position, position, None

    def _order(self, random: np.random.Generator) -> Ints:
        """The sample numbers of this epoch, for all ranks together."""
        raise NotImplementedError

    def _whole(self) -> Ints:
        if self._cached is None or self._cached[0] != self.epoch:
            self._cached = self.epoch, self._order(np.random.default_rng([self.seed, self.epoch]))
        return self._cached[1]

    def _share(self) -> Ints:
        whole = self._whole()
        count = math.ceil(len(whole) / self.num_replicas) * self.num_replicas
        return np.resize(whole, count)[self.rank :: self.num_replicas]


class WeightedSampler(ScoreSampler):
    """Draws samples with replacement, hard ones more often (or easy ones), and says how to weight their losses.

    Call `set_epoch(epoch)` before each epoch: otherwise every epoch is epoch 0, and draws the same samples in the same order.

    The chance of a sample is proportional to (1 + share of samples that are easier) to the power `strength`, so that it depends
    on the order of the scores and not on their scale: the hardest sample comes 2^strength times as often as the easiest.
    `weights` are 1 / (N · chance), which keeps the mean loss unbiased.

    With a recorder and several ranks: a sample that two ranks draw in one epoch is counted on one of them.

    Args:
        scores: of all N samples.
        by: the score of difficulty.
        strength: 0 draws uniformly, negative values prefer easy samples.
        chances: (N,) of one's own instead, positive; need not sum to 1.
        num_samples: drawn in an epoch, over all ranks; default N.
        seed, rank, num_replicas: default: those of the process group, if there is one.

    Raises:
        DataError: samples that were never observed; a setting out of range.

    Example:
        >>> from prunewise import LearnabilityRecorder
        >>> recorder = LearnabilityRecorder(3)
        >>> recorder.update(torch.arange(3), torch.tensor([2.0, -1.0, 1.0]), torch.ones(3))
        >>> sampler = WeightedSampler(recorder.scores(), by="aum", strength=2.0, num_samples=6)
        >>> len(list(sampler)), (sampler.weights[1] < sampler.weights[0]).item()
        (6, True)
    """

    def __init__(
        self,
        scores: SampleScores,
        *,
        by: str = "learnability",
        strength: float = 1.0,
        chances: Any = None,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        require_scores(scores)
        super().__init__(len(scores), seed, rank, num_replicas)
        require(
            is_number(strength) and abs(strength) <= 100, f"strength={strength!r} should be a number in [-100, 100]"
        )
        require(
            num_samples is None or is_count(num_samples, 1),
            f"num_samples={num_samples!r} should be a count of at least 1",
        )
        self._draws = num_samples or self._n
        self._settings = {"num_samples": self._draws}
        if chances is None:
            raw = (1 + _easier(observed_difficulty(scores, by))) ** float(strength)
            self._settings |= {"by": by, "strength": float(strength)}
        else:
            raw = _positive(chances, self._n)
            self._settings |= {"chances": hash_array(raw)}
        raw = raw / raw.max()  # or the sum of huge ones would be infinite
        self._chances = raw / raw.sum()
        require(
            float(self._n * self._chances.min()) > 1 / float(np.finfo(np.float32).max),
            "chances differ by so much that the weight of the rarest sample is infinite: give the rarest ones higher chances",
        )

    @property
    def weights(self) -> Tensor:
        """(N,) float32: 1 / (N · chance of a sample)."""
        return torch.as_tensor(1 / (self._n * self._chances), dtype=torch.float32)

    def _order(self, random: np.random.Generator) -> Ints:
        # as many as divide among the ranks, drawn: none needs to come twice
        count = math.ceil(self._draws / self.num_replicas) * self.num_replicas
        return random.choice(self._n, size=count, p=self._chances).astype(np.int64)


class CurriculumSampler(ScoreSampler):
    """From easy to hard: in each epoch the easiest share of the samples, shuffled; the share grows to all of them.

    Call `set_epoch(epoch)` before each epoch: otherwise every epoch is epoch 0, and the share stays at `start`.

    The share in epoch e is min(1, start + (1 − start) · (e / epochs)^power): Bengio et al. 2009 in the form of Platanios et al.
    2019 (arXiv 1903.09848). `order="random"` is the control: shares of the same sizes, of samples in random order. An
    epoch is shorter while the share is below 1: compare at equal steps. Samples are left out on purpose, so `weights` are ones.

    Args:
        scores: of all N samples.
        epochs: until all samples are in.
        start: the share in epoch 0, in (0, 1].
        power: 1 grows linearly, 0.5 sooner, 2 later.
        by: the score of difficulty.
        order: "easy_first", "hard_first" or "random".
        seed, rank, num_replicas: default: those of the process group, if there is one.

    Raises:
        DataError: samples that were never observed; a setting out of range.

    Example:
        >>> from prunewise import LearnabilityRecorder
        >>> recorder = LearnabilityRecorder(4)
        >>> recorder.update(torch.arange(4), torch.tensor([2.0, -1.0, 1.0, 4.0]), torch.ones(4))
        >>> sampler = CurriculumSampler(recorder.scores(), epochs=2, start=0.5, by="aum")
        >>> for epoch in range(3):
        ...     sampler.set_epoch(epoch)
        ...     print(sorted(sampler))
        [0, 3]
        [0, 2, 3]
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        scores: SampleScores,
        *,
        epochs: int,
        start: float = 0.3,
        power: float = 1.0,
        by: str = "learnability",
        order: str = "easy_first",
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        require_scores(scores)
        super().__init__(len(scores), seed, rank, num_replicas)
        require(is_count(epochs, 1), f"epochs={epochs!r} should be an int of at least 1")
        require(is_number(start) and 0 < start <= 1, f"start={start!r} should be a share in (0, 1]")
        require(is_number(power) and power > 0, f"power={power!r} should be a positive number")
        require(order in ("easy_first", "hard_first", "random"), f"order={order!r}: easy_first, hard_first or random")
        difficulty = observed_difficulty(scores, by)
        shuffled = np.random.default_rng([seed]).permutation(self._n)  # ties come in random order
        turned = {"easy_first": difficulty, "hard_first": -difficulty, "random": np.zeros(self._n)}[order]
        self._sorted: Ints = shuffled[np.argsort(turned[shuffled], kind="stable")]
        self._epochs, self._start, self._power = epochs, float(start), float(power)
        self._settings = {"epochs": epochs, "start": self._start, "power": self._power, "by": by, "order": order}

    @property
    def share(self) -> float:
        """Of the samples, in this epoch."""
        grown: float = (min(self.epoch, self._epochs) / self._epochs) ** self._power
        return min(1.0, self._start + (1 - self._start) * grown)

    def _order(self, random: np.random.Generator) -> Ints:
        return random.permutation(self._sorted[: max(1, round(self.share * self._n))])


class InfoBatchSampler(ScoreSampler):
    """Skips some of the samples that are known well, and weights the others up: InfoBatch (Qin et al. 2023, arXiv 2303.04947).

    Call `set_epoch(epoch)` before each epoch: otherwise every epoch is epoch 0, skips the same samples, and none trains on all.

    In each epoch a random share `ratio` of the samples with a score easier than the mean is left out, and `weights` has
    1 / (1 − ratio) for those easy ones that stay. Multiply the losses by it, `losses * sampler.weights[sample_ids]`, and the
    expected sum of the gradients is that of the whole data set. In the last epochs, from `anneal` of all, everything is
    trained on. The paper uses each sample's last loss; here it is any score, brought up to date by `refresh`, after
    `recorder.reduce()` say.

    Samples that were never observed are never left out, so it may start with nothing known.

    Args:
        scores: of all N samples, or their number N where nothing is known yet.
        epochs: of the whole training.
        ratio: share of the easy samples left out, in [0, 1).
        anneal: share of the epochs after which nothing is left out, in [0, 1].
        by: the score of difficulty.
        seed, rank, num_replicas: default: those of the process group, if there is one.

    Raises:
        DataError: a setting out of range.
    """

    def __init__(
        self,
        scores: SampleScores | int,
        *,
        epochs: int,
        ratio: float = 0.5,
        anneal: float = 0.875,
        by: str = "loss",
        seed: int = 0,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        require(isinstance(scores, SampleScores) or is_count(scores, 1), "give SampleScores, or the number of samples")
        super().__init__(scores if isinstance(scores, int) else len(scores), seed, rank, num_replicas)
        require(is_count(epochs, 1), f"epochs={epochs!r} should be an int of at least 1")
        require(is_number(ratio) and 0 <= ratio < 1, f"ratio={ratio!r} should be a share in [0, 1)")
        require(is_number(anneal) and 0 <= anneal <= 1, f"anneal={anneal!r} should be a share in [0, 1]")
        require_difficulty(by)
        self._epochs, self._ratio, self._anneal, self._by = epochs, float(ratio), float(anneal), by
        self._settings = {"epochs": epochs, "ratio": self._ratio, "anneal": self._anneal, "by": by}
        self._easy: npt.NDArray[np.bool_] = np.zeros(self._n, bool)
        if isinstance(scores, SampleScores):
            self.refresh(scores)

    def refresh(self, scores: SampleScores) -> None:
        """Take newer scores of the same samples, between two epochs; on all ranks the same."""
        require(
            isinstance(scores, SampleScores) and len(scores) == self._n,
            f"refresh takes the scores of {self._n:,} samples",
        )
        difficulty = scores.difficulty(self._by)
        seen = scores.observations > 0
        self._easy = np.zeros(self._n, bool)
        if seen.any():
            # the mean of equal scores may be rounded up, so that all lie below it; that of zeros is 0
            above = difficulty[seen] - difficulty[seen].min()
            self._easy[seen] = above < above.mean()
        self._cached = None

    @property
    def weights(self) -> Tensor:
        """(N,) float32: 1 / (1 − ratio) for the easy samples, while any are left out; 1 for the others."""
        factor = 1 / (1 - self._ratio) if self._prunes() else 1.0
        return torch.as_tensor(np.where(self._easy, factor, 1.0), dtype=torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is, with the samples that it takes for easy (packed bits)."""
        return {**super().state_dict(), "easy": torch.as_tensor(np.packbits(self._easy))}

    def _resume(self, saved: Mapping[str, Any]) -> None:
        super()._resume(saved)
        packed = saved.get("easy")
        wanted = (torch.uint8, (-(-self._n // 8),))
        if not isinstance(packed, Tensor) or packed.is_meta or (packed.dtype, tuple(packed.shape)) != wanted:
            raise CheckpointError("the sampler's state is damaged: it does not say which samples are easy")
        self._easy = np.unpackbits(packed.cpu().numpy(), count=self._n).astype(bool)
        if self._easy.all():
            raise CheckpointError("the sampler's state is damaged: all samples are easier than their mean")

    def _prunes(self) -> bool:
        return self._ratio > 0 and self.epoch < self._anneal * self._epochs

    def _order(self, random: np.random.Generator) -> Ints:
        # Each easy sample falls by a coin of its own: a fixed count would make them depend on each other, at the same mean.
        stays = ~self._easy | (random.random(self._n) >= self._ratio) if self._prunes() else np.ones(self._n, bool)
        return random.permutation(np.flatnonzero(stays))  # never none: the hardest sample is not easy


def _positive(chances: Any, n: int) -> Floats:
    """Chances as they were given, as an array of shape (N,); `DataError` where they are none."""
    wanted = f"{n:,} positive numbers, one a sample"
    given = array_of(chances, "the chances", f"give {wanted}")
    sound = given.shape == (n,) and given.dtype.kind in "iuf" and np.isfinite(given).all() and (given > 0).all()
    require(bool(sound), f"chances should be {wanted}")
    return given.astype(np.float64)


def _easier(difficulty: Floats) -> Floats:
    """For each sample the share of samples that are easier, in [0, 1]; equals share theirs."""
    from prunewise.samples.agreement import ranks

    return ranks(difficulty) / max(1, len(difficulty) - 1)
