"""The recorder against a slow, obvious reference, and what must make no difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import prunewise as pw
from prunewise.samples.scores import COLUMNS
from tests.oracle import samples as oracle

N, K, EPOCHS = 29, 4, 13
LABELS = torch.arange(N) % K


def logits_of(epoch: int) -> Tensor:
    """(N, K): sample i gets easier as i grows; each epoch has noise of its own."""
    generator = torch.Generator().manual_seed(epoch)
    z = torch.randn(N, K, generator=generator)
    z[torch.arange(N), LABELS] += torch.linspace(-4, 4, N)
    return z


def record(
    batch_size: int, *, shuffle: bool = True, epochs: range = range(EPOCHS), rec: Any = None, **given: Any
) -> pw.LearnabilityRecorder:
    rec = pw.LearnabilityRecorder(N, **given) if rec is None else rec
    for epoch in epochs:
        z = logits_of(epoch)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch + 99)) if shuffle else torch.arange(N)
        for ids in order.split(batch_size):
            rec.update(ids, z[ids], LABELS[ids])
    return rec


def reference(window: int = 10) -> list[dict[str, Any]]:
    return [
        oracle.scores([oracle.one_observation(logits_of(e)[i].tolist(), int(LABELS[i])) for e in range(EPOCHS)], window)
        for i in range(N)
    ]


def check(scores: pw.SampleScores, expected: list[dict[str, Any]], tolerance: float = 1e-6) -> None:
    assert set(expected[0]) == {*COLUMNS, "learnability"} - {"sample_id"}
    for name in expected[0]:
        found = getattr(scores, name)
        wanted = np.array([row[name] for row in expected], dtype=np.float64)
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance, err_msg=name)


def same(a: pw.SampleScores, b: pw.SampleScores) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# -- against the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, N])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_score_is_the_reference_s(batch_size: int, shuffle: bool) -> None:
    check(record(batch_size, shuffle=shuffle).scores(), reference())


def test_batch_size_and_order_change_no_bit() -> None:
    whole = record(N, shuffle=False).scores()
    for batch_size in (1, 7, 28):
        same(record(batch_size).scores(), whole)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_el2n_is_over_its_window(window: int) -> None:
    check(record(7, el2n_window=window).scores(), reference(window))


observation = st.tuples(st.integers(0, 4), st.lists(st.integers(-3, 3), min_size=3, max_size=3), st.integers(0, 2))


@settings(max_examples=60)
@given(st.lists(st.lists(observation, min_size=1, max_size=9), min_size=1, max_size=6))
def test_repeated_ids_in_a_batch_are_observed_in_order(batches: list[list[Any]]) -> None:
    """Any ids in any order, ties among the logits included."""
    rec = pw.LearnabilityRecorder(5, el2n_window=3)
    seen: list[list[Any]] = [[] for _ in range(5)]
    for batch in batches:
        ids, z, y = (torch.tensor(column) for column in zip(*batch, strict=True))
        rec.update(ids, z.float() / 2, y)
        for i, row, label in batch:
            seen[i].append(oracle.one_observation([v / 2 for v in row], label))
    check_ties(rec.scores(), [oracle.scores(s, 3) for s in seen], seen)


def check_ties(scores: pw.SampleScores, expected: list[dict[str, Any]], seen: list[list[Any]]) -> None:
    for row, observed in zip(expected, seen, strict=True):
        if not observed:
            row["last_wrong"] = -1
    check(scores, expected, 3e-6)


# -- traps --------------------------------------------------------------------------------------------------------


def test_never_learned_is_hardest_by_every_score() -> None:
    rec = pw.LearnabilityRecorder(3)
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    for epoch in range(10):
        flaky = right if epoch % 2 == 0 else wrong  # forgotten as often as can be
        rec.update(torch.tensor([0, 1, 2]), torch.tensor([wrong, flaky, right]), torch.tensor([0, 0, 0]))
    s = rec.scores()
    assert s.forgetting_events.tolist() == [0, 5, 0]
    assert s.forgetting.tolist() == [10, 5, 0]
    assert s.never_learned.tolist() == [True, False, False]
    for by in ("learnability", "forgetting", "aum", "aum_softmax", "el2n", "confidence", "loss"):
        difficulty = s.difficulty(by)
        assert difficulty[0] > difficulty[1] > difficulty[2], by
    assert s.first_learnt.tolist() == [-1, 0, 0] and s.last_missed.tolist() == [9, 9, -1]


def test_ids_are_not_positions() -> None:
    rec = pw.LearnabilityRecorder(100)
    rec.update(torch.tensor([90, 3]), torch.tensor([[1.0, 0], [1.0, 0]]), torch.tensor([0, 1]))
    s = rec.scores()
    assert s.observations.nonzero()[0].tolist() == [3, 90]
    assert s.learnability[90] == 1 and s.learnability[3] == 0 and np.isnan(s.learnability[0])


def test_unseen_samples_have_no_scores() -> None:
    rec = pw.LearnabilityRecorder(2)
    rec.update(torch.tensor([1]), torch.tensor([[0.5, -1]]), torch.tensor([0]))
    s = rec.scores()
    for name in ("learnability", "forgetting", "aum", "aum_softmax", "el2n", "confidence", "variability", "loss"):
        assert math.isnan(getattr(s, name)[0]) and math.isfinite(getattr(s, name)[1]), name
    assert s.observations[0] == s.hits[0] == 0 and s.first_learnt[0] == s.last_missed[0] == s.last_wrong[0] == -1


def test_a_tie_is_a_miss_whatever_the_class() -> None:
    rec = pw.LearnabilityRecorder(3)
    rec.update(torch.arange(3), torch.zeros(3, 3), torch.arange(3))
    s = rec.scores()
    assert s.hits.tolist() == [0, 0, 0] and s.aum.tolist() == [0, 0, 0]


def test_gradient_accumulation_is_updating_once_a_micro_batch() -> None:
    same(record(4).scores(), record(16).scores())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    z = logits_of(3).to(dtype)
    low, wide = pw.LearnabilityRecorder(N), pw.LearnabilityRecorder(N)
    low.update(torch.arange(N), z, LABELS)
    wide.update(torch.arange(N), z.double(), LABELS)
    for name in COLUMNS:
        np.testing.assert_allclose(getattr(low.scores(), name), getattr(wide.scores(), name), rtol=2e-6, atol=1e-6)


def test_under_autocast() -> None:
    layer = torch.nn.Linear(5, K)
    x = torch.randn(N, 5)
    rec, plain = pw.LearnabilityRecorder(N), pw.LearnabilityRecorder(N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.bfloat16
        rec.update(torch.arange(N), z, LABELS)
    plain.update(torch.arange(N), z, LABELS)
    same(rec.scores(), plain.scores())


def test_gradients_are_left_alone() -> None:
    z = logits_of(0).requires_grad_()
    version = z._version
    loss = torch.nn.functional.cross_entropy(z, LABELS)
    pw.LearnabilityRecorder(N).update(torch.arange(N), z, LABELS)
    loss.backward()
    assert z.grad is not None and z._version == version


def test_a_label_that_no_class_can_beat() -> None:
    """Classes ruled out by -inf, on either side: values stay finite."""
    rec = pw.LearnabilityRecorder(3)
    inf = math.inf
    z = torch.tensor([[1.0, -inf, -inf], [-inf, 1.0, 0.0], [-inf, -inf, -inf]])
    rec.update(torch.arange(3), z, torch.tensor([0, 0, 0]))
    s = rec.scores()
    assert s.hits.tolist() == [1, 0, 0] and s.observations.tolist() == [1, 1, 0]
    assert s.aum[:2].tolist() == [65504, -65504] and s.loss[:2].tolist() == [0, 65504]
    assert s.confidence[:2].tolist() == [1, 0] and rec.not_counted["not finite"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_observation(bad: float) -> None:
    z = logits_of(0)
    z[4, int(LABELS[4])] = bad  # argmax takes NaN for the highest: a hit, if one trusts it
    z[5, (int(LABELS[5]) + 1) % K] = bad
    rec = pw.LearnabilityRecorder(N)
    rec.update(torch.arange(N), z, LABELS)
    s = rec.scores()
    assert s.observations.tolist() == [int(i not in (4, 5)) for i in range(N)]
    assert rec.not_counted == {"not finite": 2, "ignored": 0, "mixed": 0, "no single class": 0}
    rest = pw.LearnabilityRecorder(N)
    keep = torch.tensor([i for i in range(N) if i not in (4, 5)])
    rest.update(keep, z[keep], LABELS[keep])
    same(s, rest.scores())


def test_ignored_labels_are_no_observation() -> None:
    rec = pw.LearnabilityRecorder(3)
    rec.update(torch.arange(3), torch.eye(3), torch.tensor([0, -100, 1]))
    assert rec.scores().observations.tolist() == [1, 0, 1] and rec.not_counted["ignored"] == 1


# -- long runs ----------------------------------------------------------------------------------------------------


def test_means_hold_over_a_hundred_million_observations() -> None:
    """10⁸ zeros and then 10⁶ eights; a float32 sum of observations would have stopped at 2²⁴."""
    rec = pw.LearnabilityRecorder(1, device="cpu")
    state = rec._state
    assert state is not None
    state.counts[0, 0] = 100_000_000  # in the middle of a long run, rather than wait for it
    many = torch.zeros(200_000, dtype=torch.long)
    for _ in range(5):
        rec.update(many, torch.tensor([[8.0, 0.0]]).expand(200_000, 2), many)
    s = rec.scores()
    assert state.counts[0].tolist() == [101_000_000, 1_000_000]
    assert s.aum[0] == pytest.approx(8 / 101, rel=1e-6)
    p = 1 / (1 + math.exp(-8))
    assert s.variability[0] == pytest.approx(p * math.sqrt(100) / 101, rel=1e-6)


def test_single_observations_late_in_a_run_are_not_lost() -> None:
    rec = pw.LearnabilityRecorder(64)
    ids = torch.arange(64)
    rec.update(ids, torch.zeros(64, 2), ids * 0)
    rec.to("cpu")  # nothing waits any more
    state, start, steps = rec._state, 20_000_000, 500
    assert state is not None
    state.counts[:, 0] = start + ids.int() * 1000
    state.means[:, 0] = 3.0
    z = torch.zeros(64, 2)
    z[:, 0] = 5.0  # each moves the mean by 1e-7, half of a last digit of 3.0: to rounding it is nothing or double
    for _ in range(steps):
        rec.update(ids, z, ids * 0)
    n = start + ids.numpy() * 1000
    expected = (3.0 * n + 5.0 * steps) / (n + steps) - 3.0
    assert rec.scores().aum - 3.0 == pytest.approx(expected, rel=0.02)


def test_counters_stop_where_they_say() -> None:
    rec = pw.LearnabilityRecorder(2)
    rec.update(torch.tensor([0, 1]), torch.tensor([[1.0, 0], [0, 1.0]]), torch.tensor([0, 0]))
    many = torch.zeros(70_000, dtype=torch.long)
    z = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(35_000, 1)
    rec.update(many, z, many)
    rec.update(many + 1, z[:1].expand(70_000, 2), many)
    s = rec.scores()
    assert s.observations.tolist() == [70_001, 70_001] and s.hits.tolist() == [35_001, 70_000]
    assert s.forgetting_events.tolist() == [32_767, 0]
    assert s.last_missed.tolist() == [70_000, 70_001 - 1 - 32_767]  # exact within the last 32,767


def test_forty_bytes_a_sample() -> None:
    n = 100_000
    rec = pw.LearnabilityRecorder(n)
    rec.update(torch.tensor([5]), torch.zeros(1, 3), torch.tensor([0]))
    assert rec.nbytes <= 40 * n
    saved = rec.state_dict()
    assert sum(t.nbytes for t in saved["tensors"].values()) == rec.nbytes
    traced = pw.LearnabilityRecorder(n, trace=80, trace_margins=True, device="cpu")
    assert traced.nbytes <= n * (40 + 80 / 8 + 2 * 80)


# -- the trace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 8, EPOCHS, 20])
def test_trace(length: int) -> None:
    hits, margins = record(7, trace=length, trace_margins=True).trace()
    assert hits.shape == (N, length) and margins is not None and margins.dtype == np.float16
    for i in range(N):
        for e in range(length):
            seen = oracle.one_observation(logits_of(e)[i].tolist(), int(LABELS[i])) if e < EPOCHS else None
            assert hits[i, e] == (seen["hit"] if seen else False)
            assert margins[i, e] == pytest.approx(seen["aum"] if seen else 0, rel=1e-3, abs=1e-6)
    same(record(7, trace=length).scores(), record(7).scores())


def test_trace_of_repeated_ids() -> None:
    rec = pw.LearnabilityRecorder(2, trace=4)
    z = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [1, 0]])
    rec.update(torch.tensor([1, 1, 0, 1, 1]), z, torch.zeros(5, dtype=torch.long))
    assert rec.trace()[0].tolist() == [[True, False, False, False], [True, False, True, True]]


def test_no_trace_unless_asked() -> None:
    with pytest.raises(pw.DataError, match="keeps no trace.*trace="):
        pw.LearnabilityRecorder(3).trace()


# -- resuming -----------------------------------------------------------------------------------------------------


def test_resuming_changes_no_bit(tmp_path: Any) -> None:
    settings = {"trace": 9, "trace_margins": True}
    straight = record(7, **settings)
    rec = record(7, epochs=range(5), **settings)
    torch.save(rec.state_dict(), tmp_path / "state.pt")
    rec.update(torch.arange(N), logits_of(0), LABELS)  # goes on, and must not change what was saved
    resumed = pw.LearnabilityRecorder(N, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    record(7, epochs=range(5, EPOCHS), rec=resumed)
    same(resumed.scores(), straight.scores())
    for name, tensor in straight.state_dict()["tensors"].items():
        assert torch.equal(resumed.state_dict()["tensors"][name], tensor), name
    assert np.array_equal(resumed.trace()[0], straight.trace()[0])


def test_looking_in_between_changes_no_bit() -> None:
    """Batches wait to be worked out together; when that happens must not matter."""
    looked_at = pw.LearnabilityRecorder(N)
    for epoch in range(EPOCHS):
        record(7, epochs=range(epoch, epoch + 1), rec=looked_at)
        looked_at.scores()
    same(looked_at.scores(), record(7).scores())
    twice = [pw.LearnabilityRecorder(3), pw.LearnabilityRecorder(3)]
    for step in range(50):  # ids that repeat within batches and between them
        ids = torch.randint(3, (5,), generator=torch.Generator().manual_seed(step))
        z = torch.randn(5, K, generator=torch.Generator().manual_seed(step))
        for rec in twice:
            rec.update(ids, z, ids)
        twice[0].scores()
    same(twice[0].scores(), twice[1].scores())


def test_tensors_may_be_written_over_after_an_update() -> None:
    rec, plain = pw.LearnabilityRecorder(N), pw.LearnabilityRecorder(N)
    ids, z, y = torch.arange(N), logits_of(0), LABELS.clone()
    plain.update(ids.clone(), z.clone(), y.clone())
    rec.update(ids, z, y)
    ids.zero_(), z.zero_(), y.zero_()
    same(rec.scores(), plain.scores())


def test_more_waits_than_there_is_room_for() -> None:
    n = 10_000
    z, y = torch.randn(n, K, generator=torch.Generator().manual_seed(0)), torch.arange(n) % K
    small, whole = pw.LearnabilityRecorder(n), pw.LearnabilityRecorder(n)
    for ids in torch.arange(n).split(999):
        small.update(ids, z[ids], y[ids])
        assert sum(len(row[0]) for row in small._window._rows) <= 4096
    whole.update(torch.arange(n), z, y)
    assert len(whole._window) == 0
    same(small.scores(), whole.scores())
    wide = pw.LearnabilityRecorder(4)
    for dtype in (torch.float32, torch.float16, torch.float32):  # kinds that cannot wait together
        wide.update(torch.arange(4), torch.eye(4, dtype=dtype), torch.arange(4))
    assert wide.scores().hits.tolist() == [3, 3, 3, 3]


def test_resuming_a_recorder_that_saw_nothing() -> None:
    rec = pw.LearnabilityRecorder(N)
    rec.load_state_dict(pw.LearnabilityRecorder(N).state_dict())
    same(record(N, rec=rec).scores(), record(N).scores())


def damaged() -> Iterator[tuple[Any, str]]:
    good = record(N).state_dict()
    tensors = good["tensors"]
    yield None, "no state of a LearnabilityRecorder"
    yield {}, "no state of a LearnabilityRecorder"
    yield {**good, "version": 99}, "version 99"
    yield {k: v for k, v in good.items() if k != "config"}, "settings are missing"
    yield {k: v for k, v in good.items() if k != "tensors"}, "not valid"
    yield {**good, "tally": [1]}, "not valid"
    yield {**good, "tensors": {k: v for k, v in tensors.items() if k != "means"}}, "should hold"
    yield {**good, "tensors": {**tensors, "means": tensors["means"][:-3]}}, "means is"
    yield {**good, "tensors": {**tensors, "small": tensors["small"].float()}}, "small is"
    yield {**good, "tensors": {**tensors, "counts": tensors["counts"].flip(1) + 1}}, "more hits than observations"
    yield pw.LearnabilityRecorder(N + 1).state_dict(), "n=30"
    yield pw.LearnabilityRecorder(N, mode="clean").state_dict(), "mode='clean'"
    yield pw.LearnabilityRecorder(N, el2n_window=3).state_dict(), "el2n_window=3"
    yield pw.LearnabilityRecorder(N, ids=[f"i{k}" for k in range(N)]).state_dict(), "ids="


@pytest.mark.parametrize(("state", "message"), list(damaged()), ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_states_change_nothing(state: Any, message: str) -> None:
    rec = record(7)
    before = rec.scores()
    with pytest.raises(pw.CheckpointError, match=message):
        rec.load_state_dict(state)
    same(rec.scores(), before)
    record(7, rec=rec, epochs=range(2))


def train_by(ids_of: Any, seed: int = 0) -> tuple[pw.LearnabilityRecorder, torch.Tensor]:
    """Ten epochs of shuffled batches, of logits that are mostly right; `ids_of` makes the ids of a batch."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (200,), generator=draw)
    rec = pw.LearnabilityRecorder(200)
    for _ in range(10):
        for place, chosen in enumerate(torch.randperm(200, generator=draw).split(50)):
            z = torch.randn(50, 5, generator=draw) + 2 * torch.nn.functional.one_hot(labels[chosen], 5)
            rec.update(ids_of(chosen, place), z, labels[chosen])
    return rec, labels


def test_labels_that_were_not_recorded_are_told_by_the_misses() -> None:
    rec, labels = train_by(lambda chosen, place: chosen)
    scores = rec.scores(labels)
    assert scores.check_targets(labels) is not None
    unknown = rec.scores()
    for wrong in (labels.roll(1), labels.flip(0), labels[torch.randperm(200)]):
        with pytest.raises(pw.DataError, match="were predicted as the label given here when they missed the one"):
            pw.suspects(unknown, wrong)
        with pytest.raises(pw.DataError, match="give the recorded labels, in the order of the sample numbers"):
            rec.scores(wrong)


def test_positions_for_ids_are_told_by_the_misses() -> None:
    rec, labels = train_by(lambda chosen, place: torch.arange(50) + 50 * place)
    with pytest.raises(pw.DataError, match="the ids were not the samples' own"):
        rec.scores(labels)


@pytest.mark.parametrize(("make", "warns"), [(torch.softmax, True), (torch.log_softmax, False)])
def test_probabilities_in_place_of_logits_are_warned_of(make: Any, warns: bool) -> None:
    rec = pw.LearnabilityRecorder(100)
    for epoch in range(11):
        logits = make(torch.randn(100, 5, generator=torch.Generator().manual_seed(epoch)), dim=1)
        if epoch == 5:
            logits[0] = float("nan")
        rec.update(torch.arange(100), logits, torch.arange(100) % 5)
        if epoch == 4:
            rec.scores()  # too few to tell
            state = rec.state_dict()
            rec = pw.LearnabilityRecorder(100)
            rec.load_state_dict(state)
    with pytest.warns(UserWarning, match="raw outputs, from before its sigmoid or softmax") if warns else nullcontext():
        rec.scores()


def test_a_state_of_before_does_not_know_the_range_of_its_logits() -> None:
    rec, _ = train_by(lambda chosen, place: chosen)
    state = rec.state_dict()
    low, high = state.pop("logit_range")
    assert low < 0 < 1 < high
    rec.load_state_dict(state)
    rec.scores()
    with pytest.raises(pw.CheckpointError, match="range of logits"):
        rec.load_state_dict({**state, "logit_range": [0.0, "a"]})
