"""Suspects, triage and subsets: on scores made by hand, and on a real training with flipped labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import prunewise as pw
from prunewise.samples.mirroring import mirrored_split, two_groups
from prunewise.samples.selection import GROUPS
from prunewise.samples.suspecting import _cut_of


def scores_of(
    learnability: Any, *, labels: Any = None, mode: str = "train", margins: Any = None, **changes: Any
) -> pw.SampleScores:
    """Scores with a given learnability (in thousandths) and mean margins."""
    share = np.asarray(learnability, dtype=np.float64)
    n = len(share)
    hits = np.round(share * 1000).astype(np.int64)
    margin = 2 * share - 1 if margins is None else np.asarray(margins, dtype=np.float64)
    from prunewise.samples.ids import hash_array
    from prunewise.samples.scores import as_labels

    zeros = np.zeros(n, np.int64)
    columns = {
        "sample_id": np.arange(n), "observations": zeros + 1000, "hits": hits, "forgetting_events": zeros,
        "first_learnt": zeros - (hits == 0), "last_missed": zeros, "aum": 5 * margin, "aum_softmax": margin,
        "el2n": 1 - share, "confidence": share, "variability": share * (1 - share), "loss": 1 - share,
        "last_wrong": zeros + 1,
    }  # fmt: skip
    info = {"mode": mode, "label_hash": None if labels is None else hash_array(as_labels(labels))}
    return pw.SampleScores(**{**columns, **changes}, info=info)  # type: ignore[arg-type]


# -- suspects -----------------------------------------------------------------------------------------------------


def test_worst_first_with_what_is_known_of_them() -> None:
    margins = np.array([0.9, -0.7, 0.8, -0.95, 0.85, 0.9, -0.7])
    s = scores_of(np.full(7, 0.5), margins=margins, last_wrong=np.arange(7), sample_id=np.array(list("abcdefg")))
    found = pw.suspects(s, np.arange(7) * 2)
    assert found.sample_id.tolist() == ["d", "b", "g"]
    assert found.score.tolist() == [0.95, 0.7, 0.7]
    assert found.number.tolist() == found.proposed_label.tolist() == [3, 1, 6]
    assert found.given_label.tolist() == [6, 2, 12]
    assert found.estimated_count == len(found) == 3 and found.threshold == 0
    assert "| d | 0.950 | 6 | 3 |" in found.table()
    assert pw.suspects(s, np.arange(7) * 2, limit=1).sample_id.tolist() == ["d"]
    assert pw.suspects(s, np.arange(7) * 2, limit=1).estimated_count == 3
    assert len(pw.suspects(s, np.arange(7) * 2, threshold=0.9)) == 1
    summary = "Suspects: 3 of 7 samples, score above 0.000, estimated_count=3, worst first: 'd', 'b', 'g'"
    assert repr(found) == str(found) == summary
    assert repr(pw.suspects(s, np.arange(7) * 2, threshold=1.0)).endswith("estimated_count=0")
    assert repr(pw.suspects(s, np.arange(7) * 2, threshold=-1.0)).endswith("worst first: 'd', 'b', 'g', …")
    assert found == found and found != pw.suspects(s, np.arange(7) * 2), "arrays are not compared"


@pytest.mark.parametrize(
    "call",
    [
        pw.suspects,
        pw.triage,
        lambda s, labels: pw.SampleSelector().fit(s, labels),
        lambda s, labels: pw.gallery(s, labels, "suspect", targets=labels),
    ],
    ids=["suspects", "triage", "selector", "gallery"],
)
def test_a_warning_names_the_line_of_the_caller(call: Any) -> None:
    with pytest.warns(UserWarning, match="cannot be told from hard samples") as caught:
        call(unsure(4000, 0.1)[0], np.zeros(4000, np.int64))
    assert caught[0].filename == __file__


def test_ids_of_others_cannot_break_the_table() -> None:
    margins = np.where(np.arange(40) < 2, -0.95, 0.9)
    ids = np.array(["a|b", "\x1b[2J\nc", *(f"x{i}" for i in range(38))])
    found = pw.suspects(scores_of((1 + margins) / 2, margins=margins, sample_id=ids), np.zeros(40, np.int64))
    table = found.table()
    assert r"| a\|b | 0.950 |" in table
    assert len(table.splitlines()) == 2 + len(found)
    assert "\x1b" not in table


Floats = npt.NDArray[np.float64]


def right_labels(n: int, centre: float = 0.0, hard: float = 0.15, seed: int = 0) -> Floats:
    """Scores of n right labels: most accepted, a share of hard ones that reach above artanh `centre`."""
    random = np.random.default_rng(seed)
    difficult = random.normal(centre - 0.3, 0.4, n)
    return np.tanh(np.where(random.random(n) < hard, difficult, random.normal(centre - 1.2, 0.35, n)))


def mixed_labels(n: int, share: float, centre: float = 0.0, seed: int = 0) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Scores of n labels, a share of them wrong: those are mirrored at artanh `centre`."""
    wrong = np.random.default_rng(seed + 100).random(n) < share
    score = right_labels(n, centre, seed=seed)
    return np.where(wrong, np.tanh(2 * centre - np.arctanh(score)), score), wrong


def test_clean_data_have_no_suspects() -> None:
    margins = np.random.default_rng(0).beta(8, 2, size=1000)
    assert len(pw.suspects(scores_of(np.ones(1000), margins=margins), np.zeros(1000))) == 0
    score = right_labels(2000)
    assert (score > 0).mean() > 0.02  # hard samples that the model contradicts
    found = pw.suspects(scores_of(np.ones(2000), margins=-score), np.zeros(2000))
    assert len(found) <= found.estimated_count <= 10


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4])
@pytest.mark.parametrize("centre", [0.0, -0.4])
def test_the_mirror_image_is_found(share: float, centre: float) -> None:
    score, wrong = mixed_labels(3000, share, centre)
    split = mirrored_split(score, memorised=centre < 0)
    best = min(((score > cut) != wrong).sum() for cut in np.linspace(-1, 1, 201))
    assert ((score > split.cut) != wrong).sum() <= 1.3 * best + 15
    assert split.count == pytest.approx(wrong.sum(), rel=0.1, abs=20)
    assert np.arctanh(split.centre) == pytest.approx(centre, abs=0.1)


def test_what_was_learned_by_heart_needs_early_contradiction() -> None:
    """The same scores: the mirror is below 0 only where EL2N saw the contradictions, and the rest was known."""
    score, wrong = mixed_labels(3000, 0.2, -0.5)

    def found(early_wrong: float, early_right: float, **info: Any) -> pw.Suspects:
        s = scores_of(np.ones(3000), margins=-score, el2n=np.where(wrong, early_wrong, early_right))
        return pw.suspects(dataclasses.replace(s, info={**s.info, **info}), np.zeros(3000))

    assert found(1.2, 0.3).estimated_count == pytest.approx(wrong.sum(), rel=0.15)
    assert found(1.2, 0.3).threshold < -0.1
    for result in (
        found(0.8, 0.3),  # hard samples, learned late
        found(0.95, 0.9),  # the model knew nothing yet
        found(1.2, 0.3, el2n_window=1001),  # longer than the training: too short to learn anything by heart
        found(1.2, 0.3, task="multilabel"),
    ):
        assert result.threshold > 0


def unsure(n: int, share: float, seed: int = 0) -> tuple[pw.SampleScores, npt.NDArray[np.bool_]]:
    """Scores of a model that knows a few samples well and most of them hardly, and was shown any of ten labels for some."""
    random = np.random.default_rng(seed)
    logits, true = random.normal(0, 1, (n, 10)), random.integers(0, 10, n)
    logits[np.arange(n), true] += 5 * random.beta(1.5, 1.5, n)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = random.random(n) < share
    given = np.where(wrong, (true + random.integers(1, 10, n)) % 10, true)
    label = p[np.arange(n), given]
    p[np.arange(n), given] = 0
    return scores_of(np.full(n, 0.45), confidence=label, margins=label - p.max(1)), wrong


@pytest.mark.parametrize(("share", "precision"), [(0.0, None), (0.1, 0.3), (0.4, 0.7)])
def test_a_model_that_learned_little_counts_where_it_is_surest_and_says_so(share: float, precision: Any) -> None:
    s, wrong = unsure(4000, share)
    with pytest.warns(UserWarning, match="cannot be told from hard samples: this training got 45% of its labels right"):
        found = pw.suspects(s, np.zeros(4000))
    other = s.confidence - s.aum_softmax
    firmest = np.argsort(-np.maximum(s.confidence, other))[:400]
    assert not found.separable and ", not separable" in repr(found)
    assert found.estimated_count == len(found) == round(4000 * (other > s.confidence)[firmest].mean())
    assert len(found) / 4000 == pytest.approx(wrong.mean(), abs=0.03)
    np.testing.assert_allclose(found.all_scores, (other - s.confidence) / (other + s.confidence))
    assert (found.all_scores > found.threshold).sum() == len(found)
    if precision:
        assert wrong[found.number].mean() > precision
    assert pw.suspects(s, np.zeros(4000), threshold=0.0).separable  # no threshold is asked of the data: no warning


def test_a_short_training_is_believed_only_where_it_is_firm() -> None:
    s, wrong = unsure(4000, 0.2)
    short = dataclasses.replace(s, observations=s.observations // 200, hits=s.hits // 200)
    with pytest.warns(UserWarning, match="this training got 40% of its labels right"):
        found = pw.suspects(short, np.zeros(4000))
    assert found.threshold == 2 / 3 and (found.score > 2 / 3).all() and 0 < len(found) < wrong.sum()
    with pytest.warns(UserWarning, match="cannot be told"):
        longer = pw.suspects(dataclasses.replace(short, info={**s.info, "el2n_window": 5}), np.zeros(4000))
    assert longer.threshold < 2 / 3


def test_of_a_model_that_contradicts_all_it_is_sure_of_at_most_half_is_believed() -> None:
    s, _ = unsure(1000, 0.9)
    with pytest.warns(UserWarning, match="cannot be told"):
        found = pw.suspects(s, np.zeros(1000))
    assert len(found) == 500 and found.threshold > 0


@pytest.mark.parametrize(("count", "found"), [(0, 0), (1, 0), (100, 100), (199, 100), (201, 300), (600, 300)])
def test_of_equal_scores_all_are_suspected_or_none(count: int, found: int) -> None:
    """A hundred at 0.5, two hundred at 0.2; below 0 the label is preferred."""
    relative = np.random.default_rng(0).permutation(np.repeat([0.5, 0.2, 0.0, -0.3], [100, 200, 300, 400]))
    assert (relative > _cut_of(relative, count)).sum() == found


def test_scores_of_several_labels_are_not_divided() -> None:
    s, _ = unsure(4000, 0.1)
    with pytest.warns(UserWarning, match="cannot be told"):
        found = pw.suspects(dataclasses.replace(s, info={**s.info, "task": "multilabel"}), np.zeros(4000))
    np.testing.assert_allclose(found.all_scores, -s.aum_softmax, atol=1e-12)


def test_scores_that_tell_nothing() -> None:
    few = scores_of(np.ones(20), margins=np.linspace(-0.5, 0.9, 20))
    assert pw.suspects(few, np.zeros(20)).threshold == 0  # too few to fit a distribution to
    same = scores_of(np.ones(50), margins=np.full(50, 0.7))
    assert len(pw.suspects(same, np.zeros(50))) == 0
    contradicted = scores_of(np.zeros(50), margins=np.linspace(-0.9, -0.5, 50), confidence=np.full(50, 0.05))
    with pytest.warns(UserWarning, match="cannot be told"):
        assert len(pw.suspects(contradicted, np.zeros(50))) == 25, "at most a half"
    undecided = scores_of(np.zeros(50), margins=np.zeros(50))
    assert len(pw.suspects(undecided, np.zeros(50))) == 0


@pytest.mark.parametrize("epochs", [1, 9, 10, 30])
def test_a_model_that_knows_nothing_names_at_most_a_half(epochs: int) -> None:
    rec = pw.LearnabilityRecorder(300)
    torch.manual_seed(0)
    labels = torch.randint(0, 1000, (300,))
    for _ in range(epochs):
        rec.update(torch.arange(300), torch.randn(300, 1000), labels)
    with pytest.warns(UserWarning, match="cannot be told from hard samples: this training got 0% of its labels right"):
        found = pw.suspects(rec.scores(), labels)
    assert len(found) <= found.estimated_count <= 150 and not found.separable


def test_the_split_is_the_same_from_any_number_of_scores() -> None:
    """It is fitted to a histogram: copies of the scores change nothing but the count."""
    score, _ = mixed_labels(1000, 0.2)
    once, often = mirrored_split(score, memorised=False), mirrored_split(np.tile(score, 50), memorised=False)
    assert often.cut == pytest.approx(once.cut, abs=0.05) and often.count == pytest.approx(50 * once.count, rel=0.05)


def test_two_groups_against_all_cuts() -> None:
    values = np.random.default_rng(1).normal(size=30).round(1)

    def within(cut: float) -> float:
        parts = [values[values <= cut], values[values > cut]]
        return sum(((p - p.mean()) ** 2).sum() for p in parts if len(p))

    best = min(within(c) for c in values)
    assert within(two_groups(values)) == pytest.approx(best)
    assert two_groups(np.ones(4)) == 1 and two_groups(np.array([])) == 0


def test_samples_never_seen_are_no_suspects() -> None:
    s = scores_of([0.5, 0.5], margins=[-0.9, np.nan], observations=np.array([1000, 0]), hits=np.array([500, 0]))
    assert pw.suspects(s, [0, 0]).number.tolist() == [0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: pw.suspects(s, [0, 1]), "2 labels for the scores of 3"),
        (lambda s: pw.suspects(s, [0, 1, 2]), "not the labels that the scores were recorded with"),
        (lambda s: pw.suspects([1.0], [0]), "takes SampleScores"),
        (lambda s: pw.suspects(s, [0, 0, 0], limit=-1), "limit=-1"),
        (lambda s: pw.suspects(s, [0, 0, 0], threshold=2), "threshold=2"),
        (lambda s: pw.triage(s, [0, 0, 0], ambiguous=2), "ambiguous=2"),
        (lambda s: pw.triage(s, [0, 0, 0]).numbers("nice"), "'nice' is no group"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make(scores_of(np.ones(3), labels=[0, 0, 0]))


def test_scores_that_no_recorder_gives() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(pw.DataError, match="1 observed samples have no finite aum_softmax"):
            pw.suspects(scores_of(np.ones(3), margins=[0.5, bad, 0.5]), [0, 0, 0])


def test_labels_outside_the_classes() -> None:
    rec = pw.LearnabilityRecorder(2)
    rec.update(torch.arange(2), torch.eye(2), torch.arange(2))
    with pytest.raises(pw.DataError, match="label 2 is none of the 2 classes"):
        pw.suspects(rec.scores(), [0, 2])


def train_on_digits(epochs: int, share: float, kind: str = "symmetric") -> tuple[pw.SampleScores, Any, Any]:
    """Scores of one recorded training on 900 digits, the labels as given, and the true ones."""
    datasets = pytest.importorskip("sklearn.datasets")
    data, clean = datasets.load_digits(return_X_y=True)
    data, clean = data[:900], clean[:900]
    random = np.random.default_rng(0)
    wrong = np.zeros(900, bool)
    wrong[random.permutation(900)[: round(share * 900)]] = True
    step = random.integers(1, 10, 900) if kind == "symmetric" else 1
    noisy = np.where(wrong, (clean + step) % 10, clean)
    x, y = torch.as_tensor(data / 16, dtype=torch.float32), torch.as_tensor(noisy)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rec = pw.LearnabilityRecorder(900)
    for _ in range(epochs):
        for ids in torch.randperm(900).split(64):
            logits = model(x[ids])
            rec.update(ids, logits, y[ids])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, y[ids]).backward()
            optimizer.step()
    return rec.scores(noisy), noisy, clean


def test_flipped_digits_are_found() -> None:
    """One recorded training of two seconds. The benchmark has the numbers; these are its floors."""
    metrics = pytest.importorskip("sklearn.metrics")
    s, noisy, clean = train_on_digits(20, 0.2)
    wrong = noisy != clean
    found = pw.suspects(s, noisy)
    assert metrics.roc_auc_score(wrong, found.all_scores) > 0.98
    assert metrics.roc_auc_score(wrong, s.difficulty("learnability")) > 0.97
    assert wrong[found.number].mean() > 0.85 and wrong[found.number].sum() > 0.9 * 180
    assert abs(found.estimated_count - 180) < 30
    right = found.proposed_label == clean[found.number]
    assert right[wrong[found.number]].mean() > 0.75  # by chance 0.1; a late mistake may be about the wrong class
    groups = pw.triage(s, noisy)
    assert groups.numbers("suspect").tolist() == sorted(found.number.tolist())
    assert sum(groups.counts().values()) == 900


@pytest.mark.parametrize("epochs", [5, 15, 60])
def test_right_digits_are_left_alone(epochs: int) -> None:
    s, labels, _ = train_on_digits(epochs, 0)
    found = pw.suspects(s, labels)
    assert len(found) <= 18 and found.estimated_count <= 27  # 2 and 3 %


@pytest.mark.parametrize(
    ("epochs", "share", "kind", "precision", "recall"),
    [
        (6, 0.2, "symmetric", 0.8, 0.9),
        (8, 0.2, "asymmetric", 0.65, 0.75),
        (60, 0.2, "asymmetric", 0.8, 0.8),
        (10, 0.4, "symmetric", 0.85, 0.9),
    ],
)
def test_flips_are_found_in_short_and_long_trainings(
    epochs: int, share: float, kind: str, precision: float, recall: float
) -> None:
    s, noisy, clean = train_on_digits(epochs, share, kind)
    wrong = noisy != clean
    found = pw.suspects(s, noisy)
    hits = wrong[found.number].sum()
    assert hits / len(found) > precision and hits / wrong.sum() > recall
    assert found.estimated_count == pytest.approx(wrong.sum(), rel=0.3)


# -- triage and subsets -------------------------------------------------------------------------------------------


def test_triage_by_hand() -> None:
    share = np.array([1.0, 0.9, 0.3, 0.05, 0.8, 0.0])
    s = scores_of(
        share,
        margins=[0.9, 0.8, 0.1, -0.9, 0.7, np.nan],
        variability=np.array([0.0, 0.05, 0.4, 0.1, 0.45, np.nan]),
        observations=np.array([1000] * 5 + [0]),
    )
    groups = pw.triage(s, np.zeros(6), ambiguous=0.4)
    assert groups.group.tolist() == ["redundant", "easy", "hard", "suspect", "ambiguous", "unseen"]
    assert groups.counts() == dict.fromkeys(GROUPS, 1)
    summary = "Triage of 6 samples: 1 easy, 1 ambiguous, 1 hard, 1 suspect, 1 redundant, 1 unseen"
    assert repr(groups) == str(groups) == summary


@pytest.mark.parametrize("strategy", ["difficulty", "coverage", "random"])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.97, 1.0])
def test_subsets_have_the_size_asked_for(strategy: str, fraction: float) -> None:
    s = scores_of(np.random.default_rng(0).random(211) ** 3)
    chosen = pw.select_subset(s, fraction, strategy=strategy)
    assert len(chosen) == max(1, round(fraction * 211)) == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all() and chosen.min() >= 0 and chosen.max() < 211
    np.testing.assert_array_equal(chosen, pw.select_subset(s, fraction, strategy=strategy))


def test_difficulty_keeps_one_end() -> None:
    s = scores_of(np.linspace(1, 0, 10))
    assert pw.select_subset(s, 0.3, strategy="difficulty").tolist() == [7, 8, 9]
    assert pw.select_subset(s, 0.3, strategy="difficulty", keep="easy").tolist() == [0, 1, 2]
    assert pw.select_subset(s, 0.3, strategy="difficulty", by="loss").tolist() == [7, 8, 9]


@pytest.mark.parametrize("strategy", ["difficulty", "coverage", "random"])
def test_subsets_without_some(strategy: str) -> None:
    s = scores_of(np.linspace(1, 0, 20))
    out = np.array([19, 3, 4])
    assert not np.isin(pw.select_subset(s, 0.5, strategy=strategy, without=out), out).any()
    assert len(pw.select_subset(s, 0.5, strategy=strategy, without=out)) == 10
    by_mask = pw.select_subset(s, 0.5, strategy=strategy, without=np.isin(np.arange(20), out))
    np.testing.assert_array_equal(by_mask, pw.select_subset(s, 0.5, strategy=strategy, without=out))
    assert len(pw.select_subset(s, 0.9, strategy=strategy, without=out)) == 17, "all that are left"
    alone = pw.select_subset(s, 0.5, strategy=strategy, without=np.arange(1, 20))
    assert alone.tolist() == [0]
    found = pw.suspects(s, np.zeros(20))
    chosen = pw.select_subset(s, 0.5, strategy=strategy, without=found)
    assert len(found) and chosen.tolist() == pw.select_subset(s, 0.5, strategy=strategy, without=found.number).tolist()
    with pytest.raises(pw.DataError, match="suspects among 20 samples, and the scores are of 19"):
        pw.select_subset(s.take(np.arange(19)), 0.5, strategy=strategy, without=found)


def test_coverage_drops_the_hardest_and_covers_the_rest_evenly() -> None:
    """A hundred easy samples, ten in between, ten hard, ten hardest."""
    share = np.concatenate([np.full(100, 0.95), np.full(10, 0.65), np.full(10, 0.35), np.full(10, 0.0)])
    chosen = pw.select_subset(scores_of(share), 36 / 130, strategy="coverage", strata=3, drop_hardest=10 / 130)
    groups = np.searchsorted([100, 110, 120], chosen, side="right")
    assert np.bincount(groups, minlength=4).tolist() == [16, 10, 10, 0]
    few = pw.select_subset(scores_of(share), 12 / 130, strategy="coverage", strata=3, drop_hardest=10 / 130)
    assert np.bincount(np.searchsorted([100, 110, 120], few, side="right"), minlength=4).tolist() == [4, 4, 4, 0]


def test_ties_are_broken_by_the_seed_and_not_by_position() -> None:
    s = scores_of(np.full(1000, 0.5))
    a = pw.select_subset(s, 0.1, strategy="difficulty", seed=0)
    b = pw.select_subset(s, 0.1, strategy="difficulty", seed=1)
    assert not np.array_equal(a, b) and 350 < a.mean() < 650


@pytest.mark.parametrize(
    ("given", "message"),
    [({"fraction": 0}, "fraction=0"), ({"fraction": 1.1}, "fraction=1.1"), ({"fraction": True}, "fraction=True"),
     ({"strategy": "best"}, "strategy='best'"), ({"keep": "all"}, "keep='all'"), ({"drop_hardest": 1}, "drop_hardest=1"),
     ({"drop_hardest": "x"}, "drop_hardest='x'"), ({"fraction": "x"}, "fraction='x'"), ({"seed": -1}, "seed=-1"),
     ({"by": ["aum"]}, "no score of difficulty"), ({"strata": 0}, "strata=0"), ({"by": "size"}, "no score of difficulty"),
     ({"without": [9]}, r"without=\[9\] should hold numbers of samples, from 0 to 8"), ({"without": [-1]}, "from 0 to 8"),
     ({"without": [[1], [1, 2]]}, "from 0 to 8"),
     ({"without": ["a"]}, "from 0 to 8"), ({"without": [True]}, "from 0 to 8"), ({"without": range(9)}, "nothing is left")],
)  # fmt: skip
def test_bad_subsets(given: dict[str, Any], message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        pw.select_subset(scores_of(np.linspace(0, 1, 9)), **{"fraction": 0.5, **given})


def test_shares_of_any_precision() -> None:
    s = scores_of(np.linspace(0, 1, 9))
    assert pw.select_subset(s, np.float32(0.5)).tolist() == pw.select_subset(s, 0.5).tolist()


def test_unseen_samples_have_no_difficulty() -> None:
    s = scores_of([0.5, 0.0], observations=np.array([1000, 0]), margins=[0.1, np.nan], aum=np.array([0.1, np.nan]))
    with pytest.raises(pw.DataError, match="1 of 2 samples were never observed"):
        pw.select_subset(s, 0.5)
    assert len(pw.select_subset(s, 0.5, strategy="random")) == 1
