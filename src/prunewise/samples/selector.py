"""A front for those who think in scikit-learn's estimators; scikit-learn itself is not needed."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt

from prunewise.core.errors import DataError
from prunewise.samples.checking import kind_of
from prunewise.samples.scores import Floats, Ints, SampleScores
from prunewise.samples.selection import select_subset
from prunewise.samples.suspecting import suspects


class SampleSelector:
    """Which samples to train on, as an estimator: `fit(scores, targets)`, then `get_support()`.

    `select_subset` with the habits of scikit-learn's selectors: parameters that can be cloned, set and searched, fitted names
    with `_`. It is fitted to the table of scores, not to features, so it stands before a training and is no step inside a pipeline.
    With labels, likely mislabelled samples go first (`drop_suspects`), then a share `fraction` of all samples is chosen among
    the others by `select_subset`; all of them, where fewer are left.

    Args:
        fraction, strategy, by, keep, drop_hardest, strata, seed: as in `select_subset`.
        drop_suspects: leave out what `suspects` finds, where labels are given.

    Attributes:
        support_: (N,) bool; True = stays.
        suspects_: the numbers of the samples that were left out as suspects, ascending.
        difficulty_: (N,) float64, the score that was used; higher = harder.
        n_samples_: N.

    Example:
        >>> import torch
        >>> from prunewise import LearnabilityRecorder
        >>> recorder = LearnabilityRecorder(4)
        >>> recorder.update(torch.arange(4), torch.tensor([3.0, -1.0, 2.0, 1.0]), torch.ones(4))
        >>> SampleSelector(fraction=0.5, strategy="difficulty").fit(recorder.scores()).get_support(indices=True)
        array([1, 3])
    """

    def __init__(
        self,
        fraction: float = 0.5,
        *,
        strategy: str = "coverage",
        by: str = "aum",
        keep: str = "hard",
        drop_hardest: float = 0.1,
        strata: int = 50,
        drop_suspects: bool = True,
        seed: int = 0,
    ) -> None:
        self.fraction, self.strategy, self.by = fraction, strategy, by
        self.keep, self.drop_hardest, self.strata = keep, drop_hardest, strata
        self.drop_suspects, self.seed = drop_suspects, seed

    def fit(self, scores: SampleScores, targets: Any = None, *, y: Any = None) -> SampleSelector:
        """Choose; `DataError` as in `select_subset` and `suspects`.

        Args:
            scores: of the N samples.
            targets: their labels, in the order of the sample numbers.
            y: the targets by the name that scikit-learn has for them; one of the two is enough.
        """
        if not isinstance(scores, SampleScores):
            raise DataError(f"fit takes SampleScores, as recorder.scores() gives them; got {kind_of(scores)}")
        if targets is not None and y is not None:
            raise DataError("fit got the labels twice, as targets and as y: give them once")
        targets = y if targets is None else targets
        wrong: Ints = np.empty(0, np.int64)
        if targets is not None and self.drop_suspects:
            wrong = np.sort(suspects(scores, targets).number)
        if len(wrong) == len(scores):
            raise DataError("all samples are suspects: use drop_suspects=False")
        chosen = select_subset(
            scores, self.fraction, strategy=self.strategy, by=self.by, keep=self.keep, drop_hardest=self.drop_hardest,
            strata=self.strata, without=wrong, seed=self.seed,
        )  # fmt: skip
        self.support_: npt.NDArray[np.bool_] = np.zeros(len(scores), bool)
        self.support_[chosen] = True
        self.suspects_: Ints = wrong
        self.difficulty_: Floats = scores.difficulty(self.by)
        self.n_samples_ = len(scores)
        return self

    def get_support(self, indices: bool = False) -> npt.NDArray[Any]:
        """(N,) bool, or the numbers of the samples that stay; `DataError` before `fit`."""
        if not self.__sklearn_is_fitted__():
            raise DataError("this SampleSelector is not fitted: call fit(scores, targets) first")
        return np.flatnonzero(self.support_) if indices else self.support_

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings, by name; `deep` makes no difference."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> SampleSelector:
        """Change settings; takes effect at the next `fit`."""
        known = self.get_params()
        for name in params:
            if name not in known:
                raise DataError(f"{name!r} is no setting of SampleSelector: choose one of {', '.join(known)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "support_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags  # it is scikit-learn that asks

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            input_tags=InputTags(two_d_array=False),
        )

    def __repr__(self) -> str:
        return f"SampleSelector({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"
