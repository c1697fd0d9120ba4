"""The estimator-shaped front."""

from __future__ import annotations

import numpy as np
import pytest

import prunewise as pw
from tests.samples.test_suspects import scores_of

N = 100
RNG = np.random.default_rng(0)
MARGINS = np.concatenate([RNG.uniform(0.5, 0.9, 90), RNG.uniform(-0.9, -0.6, 10)])
SCORES = scores_of((MARGINS + 1) / 2)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9, 1.0])
def test_suspects_go_first_and_the_fraction_is_of_all(fraction: float) -> None:
    fitted = pw.SampleSelector(fraction).fit(SCORES, np.zeros(N))
    assert fitted.suspects_.tolist() == list(range(90, 100)) and fitted.n_samples_ == N
    assert fitted.support_.dtype == bool and fitted.support_.sum() == min(90, round(fraction * N))
    assert not fitted.support_[90:].any()
    np.testing.assert_array_equal(fitted.get_support(indices=True), np.flatnonzero(fitted.get_support()))
    np.testing.assert_array_equal(fitted.difficulty_, SCORES.difficulty("aum"))


def test_without_labels_it_is_select_subset() -> None:
    fitted = pw.SampleSelector(0.3, strategy="difficulty", by="loss", seed=4).fit(SCORES)
    expected = pw.select_subset(SCORES, 0.3, strategy="difficulty", by="loss", seed=4)
    np.testing.assert_array_equal(fitted.get_support(indices=True), expected)
    few = {"drop_hardest": 0.5, "strata": 3}
    covered = pw.SampleSelector(0.3, by="loss", **few).fit(SCORES)
    np.testing.assert_array_equal(covered.get_support(indices=True), pw.select_subset(SCORES, 0.3, by="loss", **few))
    kept = pw.SampleSelector(0.3, drop_suspects=False, strategy="difficulty", by="loss", seed=4).fit(
        SCORES, np.zeros(N)
    )
    np.testing.assert_array_equal(kept.get_support(indices=True), expected)


def test_settings_as_estimators_have_them() -> None:
    selector = pw.SampleSelector(0.2)
    assert selector.set_params(fraction=0.4, keep="easy") is selector
    assert selector.get_params()["fraction"] == 0.4 and "keep='easy'" in repr(selector)
    with pytest.raises(pw.DataError, match="'size' is no setting"):
        selector.set_params(size=3, fraction=0.9)
    assert selector.fraction == 0.4


def test_scikit_learn_clones_it() -> None:
    base = pytest.importorskip("sklearn.base")
    selector = pw.SampleSelector(0.25, by="loss").fit(SCORES)
    copy = base.clone(selector)
    assert copy.get_params() == selector.get_params() and not hasattr(copy, "support_")


def test_scikit_learn_shows_it_and_tells_whether_it_is_fitted() -> None:
    utils = pytest.importorskip("sklearn.utils")
    from sklearn.exceptions import NotFittedError
    from sklearn.pipeline import Pipeline
    from sklearn.utils.validation import check_is_fitted

    pipeline = Pipeline([("select", pw.SampleSelector(0.25))])
    assert "SampleSelector" in pipeline._repr_html_()
    with pytest.raises(NotFittedError):
        check_is_fitted(pw.SampleSelector())
    check_is_fitted(pw.SampleSelector().fit(SCORES))
    if hasattr(utils, "get_tags"):  # since 1.6
        assert not utils.get_tags(pw.SampleSelector()).target_tags.required


def test_labels_by_either_name() -> None:
    by_place = pw.SampleSelector().fit(SCORES, np.zeros(N))
    for given in ({"targets": np.zeros(N)}, {"y": np.zeros(N)}):
        np.testing.assert_array_equal(pw.SampleSelector().fit(SCORES, **given).support_, by_place.support_)
    with pytest.raises(pw.DataError, match="labels twice"):
        pw.SampleSelector().fit(SCORES, np.zeros(N), y=np.zeros(N))


def test_bad_input() -> None:
    with pytest.raises(pw.DataError, match="not fitted"):
        pw.SampleSelector().get_support()
    with pytest.raises(pw.DataError, match="takes SampleScores"):
        pw.SampleSelector().fit([1])  # type: ignore[arg-type]
    for fraction in (0, 2, -0.5):
        with pytest.raises(pw.DataError, match="fraction="):
            pw.SampleSelector(fraction).fit(SCORES)
    with pytest.raises(pw.DataError, match="99 labels"):
        pw.SampleSelector().fit(SCORES, np.zeros(99))
