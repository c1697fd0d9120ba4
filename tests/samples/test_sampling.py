"""Samplers: what they draw, that their weights undo it, and that ranks and restarts change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import prunewise as pw
from tests.samples.test_suspects import scores_of

N = 60
SCORES = scores_of(np.linspace(0.02, 1, N))  # sample 0 is the hardest
UNSEEN = scores_of([0.5, 0.1], observations=np.array([1000, 0]), loss=np.array([0.5, np.nan]))


def every(**given: Any) -> list[Any]:
    return [
        pw.WeightedSampler(SCORES, **given),
        pw.CurriculumSampler(SCORES, epochs=4, **given),
        pw.InfoBatchSampler(SCORES, epochs=8, **given),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_the_epoch_and_the_seed_decide(kind: int) -> None:
    a, b = every()[kind], every()[kind]
    a.set_epoch(1)
    b.set_epoch(1)
    first = list(a)
    assert first == list(b) == list(a) and len(first) == len(a)
    a.set_epoch(2)
    assert list(a) != first
    c = every(seed=5)[kind]
    c.set_epoch(1)
    assert list(c) != first


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("ranks", [2, 7])
def test_ranks_share_an_epoch(kind: int, ranks: int) -> None:
    alone = every()[kind]
    parts = [every(rank=r, num_replicas=ranks)[kind] for r in range(ranks)]
    for s in (alone, *parts):
        s.set_epoch(1)
    drawn = [list(s) for s in parts]
    assert len({len(d) for d in drawn}) == 1 and len(drawn[0]) == len(parts[0])
    together = [i for row in zip(*drawn, strict=True) for i in row]
    whole = list(alone)
    if kind == 0:  # a multiple of the ranks is drawn
        assert len(together) == -(-N // ranks) * ranks
    else:
        assert together[: len(whole)] == whole and together[len(whole) :] == whole[: len(together) - len(whole)]


@pytest.mark.parametrize("kind", range(3))
def test_going_on_in_the_middle_of_an_epoch(kind: int) -> None:
    straight = every()[kind]
    straight.set_epoch(3)
    whole = list(straight)
    stopped = every()[kind]
    stopped.set_epoch(3)
    iterator = iter(stopped)
    begin = [next(iterator) for _ in range(7)]
    state = stopped.state_dict()
    resumed = every()[kind]
    resumed.load_state_dict(state)
    resumed.set_epoch(3)  # as a loop does that begins with it
    assert begin + list(resumed) == whole
    assert list(resumed) == whole  # the next time from the start
    resumed.set_epoch(4)
    assert resumed.state_dict()["position"] == 0


@pytest.mark.parametrize("kind", range(3))
def test_a_pass_that_was_left_is_not_gone_on_with(kind: int) -> None:
    """A look at the first batch, a break, an error: the next pass is a whole one, unless a state was loaded."""
    sampler, whole = every()[kind], list(every()[kind])
    next(iter(sampler))
    assert list(sampler) == whole
    next(iter(sampler))
    sampler.set_epoch(0)
    assert list(sampler) == whole


@pytest.mark.parametrize("kind", range(3))
def test_states_of_others_change_nothing(kind: int) -> None:
    sampler = every()[kind]
    before = list(sampler)
    good = sampler.state_dict()
    other = every()[(kind + 1) % 3].state_dict()
    for state in (
        None,
        {},
        other,
        {**good, "n": 3},
        {**good, "seed": 9},
        {**good, "epoch": -1},
        {**good, "position": "x"},
        {**good, "num_replicas": 2},
        {**good, "n": torch.tensor([1, 2])},
        {**good, "epoch": 1, "position": N + 1},
    ):
        with pytest.raises(pw.CheckpointError):
            sampler.load_state_dict(state)
    assert list(sampler) == before and sampler.state_dict()["epoch"] == 0


@pytest.mark.parametrize(
    ("sampler", "others"),
    [
        (
            pw.WeightedSampler(SCORES),
            [{"num_samples": 3}, {"strength": 2.0}, {"by": "loss"}, {"chances": np.ones(N)}],
        ),
        (pw.WeightedSampler(SCORES, chances=np.ones(N)), [{}, {"chances": np.arange(1, N + 1)}]),
        (
            pw.CurriculumSampler(SCORES, epochs=4),
            [{"order": "hard_first"}, {"epochs": 5}, {"start": 0.5}, {"power": 2.0}, {"by": "loss"}],
        ),
        (
            pw.InfoBatchSampler(SCORES, epochs=8),
            [{"epochs": 9}, {"ratio": 0.1}, {"anneal": 0.5}, {"by": "aum"}],
        ),
    ],
)
def test_states_of_other_settings_are_refused(sampler: Any, others: list[dict[str, Any]]) -> None:
    given = {} if isinstance(sampler, pw.WeightedSampler) else {"epochs": sampler.state_dict()["epochs"]}
    for changed in others:
        with pytest.raises(pw.CheckpointError, match="this sampler"):
            type(sampler)(SCORES, **{**given, **changed}).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize(
    "easy",
    [None, torch.tensor(3, dtype=torch.uint8), torch.zeros(8, 3).byte(), torch.zeros(8), torch.full((8,), 255).byte()],
)
def test_damaged_easy_samples_change_nothing(easy: Any) -> None:
    sampler = pw.InfoBatchSampler(SCORES, epochs=8)
    before = list(sampler)
    with pytest.raises(pw.CheckpointError, match="damaged"):
        sampler.load_state_dict({**sampler.state_dict(), "epoch": 3, "easy": easy})
    assert sampler.epoch == 0 and list(sampler) == before


def test_with_a_loader_and_a_recorder() -> None:
    tracked = pw.track([(torch.tensor([float(i), 0.0]), 0) for i in range(N)])
    sampler = pw.CurriculumSampler(SCORES, epochs=2)
    rec = pw.LearnabilityRecorder(N)
    sampler.set_epoch(0)
    for z, y, ids in DataLoader(tracked, batch_size=7, sampler=sampler):
        rec.update(ids, z, y)
    assert np.flatnonzero(rec.scores().observations).tolist() == list(range(N - 18, N))


# -- weighted -----------------------------------------------------------------------------------------------------


def test_chances_are_as_said() -> None:
    sampler = pw.WeightedSampler(SCORES, strength=2.0, num_samples=200_000)
    drawn = np.bincount(list(sampler), minlength=N) / 200_000
    expected = (1 + np.linspace(1, 0, N)) ** 2
    np.testing.assert_allclose(drawn, expected / expected.sum(), rtol=0.1)
    assert expected[0] / expected[-1] == 4


@pytest.mark.parametrize("given", [{}, {"strength": -3.0}, {"chances": np.arange(1, N + 1)}])
def test_weights_make_the_mean_unbiased(given: dict[str, Any]) -> None:
    values = np.sin(np.arange(N)) + 3
    sampler = pw.WeightedSampler(SCORES, num_samples=200_000, **given)
    drawn = np.array(list(sampler))
    weights = sampler.weights.numpy()
    assert weights.shape == (N,) and weights.dtype == np.float32
    assert (weights[drawn] * values[drawn]).mean() == pytest.approx(values.mean(), rel=0.01)
    # in expectation, exactly
    chances = 1 / (N * weights.astype(np.float64))
    assert (chances * weights * values).sum() == pytest.approx(values.mean(), rel=1e-6)


def test_ties_have_the_same_chance() -> None:
    sampler = pw.WeightedSampler(scores_of([0.5, 0.2, 0.5, 0.5]))
    assert sampler.weights[0] == sampler.weights[2] == sampler.weights[3] > sampler.weights[1]


def test_chances_of_any_size() -> None:
    ones = pw.WeightedSampler(SCORES, chances=np.ones(N))
    assert torch.equal(ones.weights, torch.ones(N))
    for chances in (np.full(N, 1e308), [2**62] * N, torch.ones(N, requires_grad=True), torch.ones(N).bfloat16()):
        assert list(pw.WeightedSampler(SCORES, chances=chances)) == list(ones)


# -- curriculum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_share_grows_from_easy_to_all(power: float) -> None:
    sampler = pw.CurriculumSampler(SCORES, epochs=4, start=0.2, power=power)
    for epoch in range(7):
        sampler.set_epoch(epoch)
        count = round(N * min(1, 0.2 + 0.8 * (min(epoch, 4) / 4) ** power))
        assert sorted(sampler) == list(range(N - count, N)), epoch
    assert torch.equal(sampler.weights, torch.ones(N))


def test_hard_first_and_the_control() -> None:
    hard = pw.CurriculumSampler(SCORES, epochs=4, start=0.2, order="hard_first")
    control = pw.CurriculumSampler(SCORES, epochs=4, start=0.2, order="random")
    assert sorted(hard) == list(range(12))
    first = set(control)
    assert len(first) == 12 and first != set(range(12)) and first != set(range(N - 12, N))
    control.set_epoch(2)
    assert first < set(control)  # what was in stays in


# -- InfoBatch ----------------------------------------------------------------------------------------------------


def test_easy_ones_are_skipped_and_weighted_up() -> None:
    sampler = pw.InfoBatchSampler(SCORES, epochs=400, ratio=0.6, anneal=0.9)
    easy = SCORES.loss < SCORES.loss.mean()
    counts = np.zeros(N)
    values, sums = np.cos(np.arange(N)) + 2, []
    for epoch in range(360):
        sampler.set_epoch(epoch)
        drawn = np.array(list(sampler))
        assert len(drawn) == len(set(drawn.tolist())) == len(sampler)
        counts[drawn] += 1
        sums.append((sampler.weights.numpy()[drawn] * values[drawn]).sum())
    assert (counts[~easy] == 360).all() and counts[easy].mean() / 360 == pytest.approx(0.4, abs=0.03)
    assert np.mean(sums) == pytest.approx(values.sum(), rel=0.02)
    np.testing.assert_allclose(sampler.weights, np.where(easy, 2.5, 1))
    sampler.set_epoch(360)
    assert sorted(sampler) == list(range(N)) and torch.equal(sampler.weights, torch.ones(N))


def test_infobatch_starts_with_nothing_known() -> None:
    sampler = pw.InfoBatchSampler(N, epochs=10)
    assert sorted(sampler) == list(range(N))
    sampler.refresh(SCORES)
    sampler.set_epoch(1)
    assert len(sampler) < N
    two = pw.InfoBatchSampler(UNSEEN, epochs=10, ratio=0.9)
    for epoch in range(8):
        two.set_epoch(epoch)
        assert 1 in list(two)  # never observed, so never skipped


@pytest.mark.parametrize("n", [3, 7, 1000])
def test_equal_samples_are_not_easy(n: int) -> None:
    for share in np.arange(1, 10) / 10:
        equal = scores_of(np.full(n, share))
        sampler = pw.InfoBatchSampler(equal, epochs=10, by="learnability")
        assert len(sampler) == n and torch.equal(sampler.weights, torch.ones(n)), share


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pw.WeightedSampler(UNSEEN), "1 of 2 samples were never observed"),
        (lambda: pw.CurriculumSampler(UNSEEN, epochs=2, by="loss"), "never observed, so they have no loss"),
        (lambda: pw.WeightedSampler(SCORES, by="size"), "no score of difficulty"),
        (lambda: pw.WeightedSampler(SCORES, strength=float("nan")), "strength=nan"),
        (lambda: pw.WeightedSampler(SCORES, strength="a"), "strength='a'"),  # type: ignore[arg-type]
        (lambda: pw.WeightedSampler(SCORES, strength=2000.0), "strength=2000.0"),
        (lambda: pw.WeightedSampler(SCORES, chances=np.zeros(N)), "60 positive numbers"),
        (lambda: pw.WeightedSampler(SCORES, chances=np.ones(3)), "60 positive numbers"),
        (lambda: pw.WeightedSampler(SCORES, num_samples=0), "num_samples=0"),
        (lambda: pw.WeightedSampler(SCORES, rank=2, num_replicas=2), "rank=2"),
        (lambda: pw.WeightedSampler(SCORES, seed=-1), "seed=-1"),
        (lambda: pw.WeightedSampler(SCORES).set_epoch(-1), "epoch=-1"),
        (lambda: pw.CurriculumSampler(SCORES, epochs=0), "epochs=0"),
        (lambda: pw.CurriculumSampler(SCORES, epochs=2, start=0), "start=0"),
        (lambda: pw.CurriculumSampler(SCORES, epochs=2, start="a"), "start='a'"),  # type: ignore[arg-type]
        (lambda: pw.InfoBatchSampler(SCORES, epochs=2, ratio="a"), "ratio='a'"),  # type: ignore[arg-type]
        (lambda: pw.CurriculumSampler(SCORES, epochs=2, power=0), "power=0"),
        (lambda: pw.CurriculumSampler(SCORES, epochs=2, order="up"), "order='up'"),
        (lambda: pw.InfoBatchSampler(SCORES, epochs=2, ratio=1), "ratio=1"),
        (lambda: pw.InfoBatchSampler(SCORES, epochs=2, anneal=2), "anneal=2"),
        (lambda: pw.InfoBatchSampler([1], epochs=2), "number of samples"),  # type: ignore[arg-type]
        (lambda: pw.InfoBatchSampler(5, epochs=2).refresh(SCORES), "scores of 5 samples"),
        (lambda: pw.InfoBatchSampler(5, epochs=2, by="lss"), "'lss' is no score of difficulty"),
        (lambda: pw.WeightedSampler(None), "expected SampleScores"),  # type: ignore[arg-type]
        (lambda: pw.WeightedSampler(5), "expected SampleScores"),  # type: ignore[arg-type]
        (lambda: pw.WeightedSampler([1, 2], chances=[1, 1]), "expected SampleScores"),  # type: ignore[arg-type]
        (lambda: pw.WeightedSampler(SCORES.take([])), "no samples to draw from"),
        (lambda: pw.CurriculumSampler(None, epochs=3), "expected SampleScores"),  # type: ignore[arg-type]
        (lambda: pw.WeightedSampler(SCORES, chances="abcdef"), "60 positive numbers"),
        (lambda: pw.WeightedSampler(SCORES, chances=[[1], [1, 2]]), "60 positive numbers"),
        (lambda: pw.WeightedSampler(SCORES, chances=[1e-300, *[1.0] * (N - 1)]), "differ by so much"),
        (lambda: pw.WeightedSampler(SCORES, chances=[1e-300, 1e200, *[1.0] * (N - 2)]), "differ by so much"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make()
