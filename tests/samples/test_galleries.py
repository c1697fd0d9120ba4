"""Galleries: the right samples by their ids, whatever they are, and nothing that data say taken for code."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import re
from collections import UserDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import prunewise as pw
from prunewise.samples.showing import as_image, cell, printable
from tests.samples import hide_matplotlib
from tests.samples.test_suspects import scores_of

N = 6
SHARE = np.array([0.5, 0.1, 0.9, 0.1, 1.0, 0.7])  # hardest first: 1, 3, 0, 5, 2, 4
SCORES = scores_of(SHARE)
NAMES = [f"s{i}" for i in range(N)]
TEXTS = [(f"text {i}", i % 2) for i in range(N)]
HOSTILE = '<script>alert("x")</script>&\x1b[2J\u202e\n| $\\frac{$'


def ids_of(gallery: pw.Gallery) -> list[Any]:
    return [e.sample_id for e in gallery.exhibits]


def texts_of(gallery: pw.Gallery) -> list[Any]:
    return [e.content for e in gallery.exhibits]


# -- which samples ------------------------------------------------------------------------------------------------


def test_hardest_and_easiest_ties_in_order() -> None:
    hardest = pw.gallery(SCORES, TEXTS, count=3)
    assert ids_of(hardest) == [1, 3, 0] and texts_of(hardest) == ["text 1", "text 3", "text 0"]
    assert [e.score for e in hardest.exhibits] == [0.1, 0.1, 0.5] and [e.label for e in hardest.exhibits] == [1, 1, 0]
    assert ids_of(pw.gallery(SCORES, TEXTS, "easiest", count=2)) == [4, 2]
    assert ids_of(pw.gallery(SCORES, TEXTS, "hardest", by="el2n", count=99)) == [1, 3, 0, 5, 2, 4]
    assert hardest.by == "learnability" and hardest.kind == "text" and len(hardest) == 3


def test_samples_without_a_finite_score_are_left_out() -> None:
    seen = np.array([0, 0, 1000, 1000, 1000, 1000])
    aum = np.array([1, 1, np.nan, -np.inf, 2, 3])
    scores = scores_of(SHARE, observations=seen, hits=np.where(seen, SCORES.hits, 0), aum=aum)
    assert ids_of(pw.gallery(scores, TEXTS)) == [3, 5, 2, 4]
    assert ids_of(pw.gallery(scores, TEXTS, "easiest", by="aum", count=2)) == [5, 4]
    nothing = scores_of(SHARE, observations=np.zeros(N, int), hits=np.zeros(N, int))
    with pytest.raises(pw.DataError, match="no sample has a finite learnability"):
        pw.gallery(nothing, TEXTS)
    with pytest.raises(pw.DataError, match="no sample has a finite learnability"):
        pw.gallery(scores_of([]), [])


def test_suspects_with_what_is_proposed() -> None:
    margins = np.array([0.9, -0.7, 0.8, -0.95, 0.85, -0.1])
    scores = scores_of(SHARE, margins=margins, last_wrong=np.array([1, 0, 1, 0, 1, -1]))
    labels = np.array([0, 1, 0, 1, 0, 1])
    found = pw.gallery(scores, TEXTS, "suspect", targets=labels, class_names=["cat", "dog"])
    assert ids_of(found) == [3, 1, 5]
    assert [(e.label, e.proposed_label) for e in found.exhibits] == [("dog", "cat"), ("dog", "cat"), ("dog", None)]
    assert [e.score for e in found.exhibits] == [0.95, 0.7, 0.1]
    assert "3       0.95   dog    cat       text 3" in found.table().splitlines()
    given = pw.suspects(scores, labels)
    assert ids_of(pw.gallery(scores, TEXTS, given, count=2)) == [3, 1]
    with pytest.raises(pw.DataError, match="give targets="):
        pw.gallery(scores, TEXTS, "suspect")
    with pytest.raises(pw.DataError, match="among other samples"):
        pw.gallery(scores.take([0, 1]), TEXTS, given)
    none = pw.gallery(scores_of(SHARE, margins=np.full(N, 0.5)), TEXTS, "suspect", targets=labels)
    assert len(none) == 0 and "suspect by score" in none.table() and "<table>" in none.html()


def test_labels_of_the_data_set_of_targets_and_by_name() -> None:
    rows = [{"text": f"t{i}", "label": torch.tensor(i)} for i in range(N)]
    assert [e.label for e in pw.gallery(SCORES, rows, count=2).exhibits] == [1, 3]
    assert [e.label for e in pw.gallery(SCORES, rows, count=2, targets=np.arange(N) * 2).exhibits] == [2, 6]
    assert [e.label for e in pw.gallery(SCORES, rows, count=2, class_names={1: "one"}).exhibits] == ["one", 3]
    assert [e.label for e in pw.gallery(SCORES, rows, count=2, class_names=["zero", "one"]).exhibits] == ["one", 3]
    assert [e.label for e in pw.gallery(SCORES, ["a"] * N, count=1).exhibits] == [None]
    several = pw.gallery(SCORES, rows, count=1, targets=np.eye(N)[:, :3])
    assert "[0, 1, 0]" in several.table()


# -- looked up by id ----------------------------------------------------------------------------------------------


def with_ids(ids: Any) -> pw.SampleScores:
    return dataclasses.replace(SCORES, sample_id=np.asarray(ids))


def test_ids_and_not_positions() -> None:
    order = [4, 2, 0, 5, 1, 3]  # the data set at hand is sorted in another way than the one that was recorded
    tracked = pw.track([TEXTS[i] for i in order], ids=[NAMES[i] for i in order])
    assert texts_of(pw.gallery(with_ids(NAMES), tracked, count=3)) == ["text 1", "text 3", "text 0"]
    numbered = pw.track([TEXTS[i] for i in order], ids=order)
    assert texts_of(pw.gallery(SCORES.take([3, 1]), numbered)) == ["text 3", "text 1"]
    scores = with_ids(order)
    for given in (scores, scores.take(np.argsort(order))):  # the ids of the second happen to be 0, 1, ... N-1
        assert texts_of(pw.gallery(given, numbered, count=2)) == ["text 2", "text 5"]
    subset = Subset(Subset(tracked, [3, 1]), [0])
    assert texts_of(pw.gallery(with_ids(NAMES), subset, count=1)) == ["text 1"]


def test_a_recorder_without_ids_has_numbers_for_ids() -> None:
    tracked = pw.track(TEXTS, ids=[6, 5, 4, 3, 2, 1])
    recorder = pw.LearnabilityRecorder(N)
    for text, label, number in DataLoader(tracked, batch_size=2, shuffle=True):
        right = torch.tensor([t == "text 4" for t in text])
        recorder.update(number, torch.nn.functional.one_hot(torch.where(right, label, 1 - label), 2).float(), label)
    assert texts_of(pw.gallery(recorder.scores(), tracked, "easiest", count=1)) == ["text 4"]


def test_a_recorder_without_ids_over_a_set_whose_ids_are_numbers_in_another_order(tmp_path: Any) -> None:
    """What was recorded says whether its ids are numbers or the samples' own; files say so too."""
    own = [3, 1, 5, 0, 2, 4]
    tracked = pw.track(TEXTS, ids=own)
    numbers, wrong = torch.arange(N), torch.tensor([0, 0, 1, 0, 0, 0])
    for ids, file in ((None, "numbers"), (tracked.index, "own")):
        recorder = pw.LearnabilityRecorder(N, ids=ids)
        recorder.update(numbers, torch.tensor([[2.0, 0.0]] * N), wrong)
        scores = recorder.scores()
        assert scores.info["ids"] == file and scores.info["total"] == N
        if importlib.util.find_spec("pyarrow"):
            scores.to_parquet(tmp_path / file)
            scores = pw.SampleScores.from_parquet(tmp_path / file)
        for some in (scores, scores.take([5, 2, 0]), scores.take(np.argsort(scores.sample_id))):
            assert texts_of(pw.gallery(some, tracked, count=1)) == ["text 2"]
    with pytest.raises(pw.DataError, match="scores of 6 samples, and a data set of 2"):
        pw.gallery(SCORES, TEXTS[:2])


def test_equal_scores_are_told_apart_by_their_margins() -> None:
    scores = scores_of(np.zeros(N), margins=[-0.2, -0.9, -0.4, -0.1, -0.5, -0.3])
    assert texts_of(pw.gallery(scores, TEXTS, "hardest", count=3)) == ["text 1", "text 4", "text 2"]
    assert texts_of(pw.gallery(scores, TEXTS, "easiest", count=2)) == ["text 3", "text 0"]


def test_some_of_the_scores_of_a_tracked_set() -> None:
    tracked = pw.track(TEXTS)
    for some in ([0, 1, 2], [1, 2, 3]):
        assert texts_of(pw.gallery(SCORES.take(some), tracked, count=1)) == ["text 1"]


class ByName(Dataset):
    """Its keys are the ids."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, key: str) -> Any:
        return dict(zip(NAMES, TEXTS, strict=True))[key]


def test_data_sets_by_key() -> None:
    by_id = dict(zip(NAMES, TEXTS, strict=True))
    for dataset in (by_id, pw.track(by_id, ids=NAMES[::-1]), pw.track(ByName(), ids=NAMES), UserDict(by_id)):
        assert texts_of(pw.gallery(with_ids(NAMES), dataset, count=2)) == ["text 1", "text 3"]
    del by_id["s3"]
    with pytest.raises(pw.DataError, match="no sample 's3'"):
        pw.gallery(with_ids(NAMES), by_id)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from TEXTS


@pytest.mark.parametrize(
    ("scores", "dataset", "message"),
    [
        (with_ids(NAMES), TEXTS, "not tracked by them"),
        (with_ids(np.arange(N)[::-1]), TEXTS, "not tracked by them"),
        (with_ids(NAMES), pw.track(TEXTS), "sample id 's1' is none of the 6"),
        (with_ids(NAMES), pw.track(TEXTS, ids=list("abcdef")), "sample id 's1' is none of the 6"),
        (SCORES, TEXTS[:-1], "scores of 6 samples, and a data set of 5"),
        (SCORES, pw.track(TEXTS[:-1]), "scores of 6 samples, and a data set of 5"),
        (SCORES, ConcatDataset([pw.track(TEXTS[:3]), pw.track(TEXTS[3:])]), "carry ids of their own"),
        (SCORES, Stream(), "no sample can be looked up in a Stream"),
        (SCORES, pw.track(Stream()), "no sample can be looked up in a TrackedIterable"),
        (SCORES, iter(TEXTS), "no sample can be looked up"),
        (SCORES, None, "no sample can be looked up"),
    ],
)
def test_data_sets_that_cannot_be_looked_up(scores: Any, dataset: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        pw.gallery(scores, dataset)


# -- what of a sample is shown ------------------------------------------------------------------------------------


class Scan(NamedTuple):
    pixels: torch.Tensor
    label: int


def test_images_of_every_form_are_the_same_image() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    forms = [
        pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels.transpose(2, 0, 1).copy()), image.fromarray(pixels),
        torch.from_numpy(pixels.transpose(2, 0, 1) / 255), pixels.astype(np.int64), torch.from_numpy(pixels.copy()),
    ]  # fmt: skip
    for form in forms:
        shown = as_image(form)
        assert shown is not None and shown.shape == (6, 5, 3)
        np.testing.assert_allclose(shown, pixels / 255)


def test_values_that_are_no_colours() -> None:
    np.testing.assert_allclose(as_image(torch.tensor([[-1.0, 1.0], [0.0, 1.0]])), [[0, 1], [0.5, 1]])
    np.testing.assert_allclose(as_image(torch.tensor([[[0.25, 0.5]]], dtype=torch.bfloat16)), [[0.25, 0.5]])
    np.testing.assert_allclose(as_image(np.array([[np.nan, -2.0], [np.inf, 2.0]])), [[0, 0], [0, 1]])
    np.testing.assert_allclose(as_image(np.full((2, 2), np.nan)), np.zeros((2, 2)))
    np.testing.assert_allclose(as_image(np.full((2, 2), 7.0)), np.zeros((2, 2)))
    np.testing.assert_allclose(as_image(np.array([[True, False]])), [[1, 0]])
    np.testing.assert_allclose(as_image(np.array([[0, 1]])), [[0, 1]])
    assert as_image(np.zeros((3, 2000, 1000))).shape == (250, 125, 3)  # type: ignore[union-attr]
    for other in (
        np.zeros((2, 4, 5)),
        np.zeros((0, 3)),
        np.zeros(3),
        np.array([["a"]]),
        np.zeros((1, 1), complex),
        [[1]],
    ):
        assert as_image(other) is None


@pytest.mark.parametrize("form", ["tensors", "tuple", "dict", "hf", "bare", "array", "gray"])
def test_a_grid_of_images(form: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pixels = torch.rand(N, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(N)
    dataset: Any = {
        "tensors": TensorDataset(pixels, labels),
        "tuple": [Scan(x, 0) for x in pixels],
        "dict": [{"image": x, "caption": "a", "size": 3, "label": 0} for x in pixels],
        "hf": [{"pixel_values": x, "labels": 0} for x in pixels],
        "bare": list(pixels),
        "array": pixels.permute(0, 2, 3, 1).numpy(),
        "gray": [(x[:1], 0) for x in pixels],
    }[form]
    shown = pw.gallery(SCORES, pw.track(dataset), count=5)
    assert shown.kind == "image"
    figure = shown.plot(columns=3)
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(figure.axes) == 6 and len(drawn) == 5
    for picture, number in zip(drawn, (1, 3, 0, 5, 2), strict=True):
        expected = pixels[number, 0] if form == "gray" else pixels[number].permute(1, 2, 0)
        np.testing.assert_allclose(picture, expected, rtol=1e-6)
    assert figure.axes[0].get_title().startswith("1\n")
    figure.savefig(tmp_path / "a.png")
    assert (
        shown.table().splitlines()[2].endswith("1×4×5" if form == "gray" else "4×5×3" if form == "array" else "3×4×5")
    )


def test_images_in_a_page() -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    pixels = np.random.default_rng(0).integers(0, 256, (N, 4, 5, 3), dtype=np.uint8)
    page = pw.gallery(SCORES, pixels, count=2).html()
    found = re.findall(r'<img alt="4×5×3" src="data:image/png;base64,([^"]*)">', page)
    read = [np.asarray(image.open(io.BytesIO(base64.b64decode(f))).convert("RGB")) for f in found]
    np.testing.assert_array_equal(read, pixels[[1, 3]])


def test_rows() -> None:
    rows = [{"age": 20 + i, "income": i / 3, "town": None, "more": torch.zeros(9), "label": 1} for i in range(N)]
    shown = pw.gallery(SCORES, pw.track(rows), count=1)
    assert shown.kind == "row"
    head, line = shown.table().splitlines()[1:]
    assert head.split() == ["sample", "learnability", "label", "age", "income", "town", "more"]
    assert line.split() == ["1", "0.1", "1", "21", "0.3333", "float32", "9"]
    vectors = pw.gallery(SCORES, TensorDataset(torch.arange(2 * N).view(N, 2) / 4, torch.zeros(N).long()), count=1)
    assert vectors.table().splitlines()[1:] == [
        "sample  learnability  label  0    1",
        "1       0.1           0      0.5  0.75",
    ]
    assert pw.gallery(SCORES, list(range(N)), count=1).table().splitlines()[-1].split() == ["1", "0.1", "1"]
    unlike = [{"a": 1}, {"a": 2, "b": 3}, {}, {"b": 4, "c": 5}, {}, {}]
    assert [e.content for e in pw.gallery(SCORES, unlike, count=2, content=lambda s: s).exhibits] == [
        unlike[1],
        unlike[3],
    ]
    assert "a  b  c" in pw.gallery(SCORES, unlike, count=2, content=lambda s: s).table()


def test_content_says_what_is_shown() -> None:
    rows = [(torch.zeros(784), f"text {i}", {"pixels": np.full((2, 2), i)}) for i in range(N)]
    assert pw.gallery(SCORES, rows, content=1).kind == "text"
    assert pw.gallery(SCORES, rows, content=lambda s: s[0].view(28, 28)).kind == "image"
    assert pw.gallery(SCORES, [r[2] for r in rows], content="pixels").kind == "image"
    with pytest.raises(pw.DataError, match="content='size' is no entry of the samples, each a dict of pixels"):
        pw.gallery(SCORES, [r[2] for r in rows], content="size")
    with pytest.raises(pw.DataError, match="content=7 is no entry"):
        pw.gallery(SCORES, rows, content=7)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(784), "784 columns are too wide"),
        ({f"c{i}": i for i in range(25)}, "25 columns are too wide"),
        (torch.zeros(2, 3, 4, 5), "a Tensor of shape .2, 3, 4, 5. is no image"),
        (torch.zeros(2, 4, 5), "a Tensor of shape .2, 4, 5. is no image"),
        (torch.zeros(4, 4, device="meta"), "meta cannot be shown"),
        (torch.zeros(4, 4).to_sparse(), "parse"),
        (object(), "an? object is no image"),
        (None, "NoneType is no image"),
    ],
)
def test_what_cannot_be_shown(sample: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        pw.gallery(SCORES, [sample] * N)


def test_samples_of_several_kinds() -> None:
    with pytest.raises(pw.DataError, match=r"several kinds: text \(sample 1\), row \(sample 0\).*content="):
        pw.gallery(SCORES, [3, "a", 3, "a", "a", "a"])


# -- hostile data -------------------------------------------------------------------------------------------------


def test_nothing_that_data_say_is_code(tmp_path: Path) -> None:
    names = [HOSTILE + str(i) for i in range(N)]
    rows = [{HOSTILE: HOSTILE, "other": [HOSTILE], "label": HOSTILE} for _ in range(N)]
    scores = with_ids(names)
    for dataset in (rows, [(HOSTILE, HOSTILE)] * N):
        shown = pw.gallery(scores, pw.track(dataset, ids=names), class_names={HOSTILE: f"<b>{HOSTILE}"})
        shown.to_html(tmp_path / "deep" / "a.html")
        page = (tmp_path / "deep" / "a.html").read_text(encoding="utf-8")
        assert page == shown.html()
        assert set(re.findall(r"<[^>]*>", page)) <= {
            "<!doctype html>", "<html>", "<head>", '<meta charset="utf-8">', "<title>", "</title>", "<style>", "</style>",
            "</head>", "<body>", "<h1>", "</h1>", "<table>", "<tr>", "<th>", "</th>", "</tr>", "<td>", "</td>", "</table>",
            "</body>", "</html>",
        }  # fmt: skip
        assert "&lt;script&gt;alert(&quot;x&quot;)" in page
        text = shown.table()
        assert text.replace("\n", "").isprintable() and len(text.splitlines()) == N + 2


def test_captions_are_no_formulas() -> None:
    pytest.importorskip("matplotlib")
    images = [(torch.rand(2, 2), "$\\frac{$") for _ in range(N)]
    figure = pw.gallery(
        with_ids([f"${i}$ \\frac{{" for i in range(N)]), pw.track(images, ids=[f"${i}$ \\frac{{" for i in range(N)])
    ).plot()
    figure.canvas.draw()
    assert figure.axes[0].get_title() == "$1$ \\frac{\n$\\frac{$\n0.1"


def test_cells_are_short() -> None:
    assert cell("a" * 100) == "a" * 59 + "…" and len(printable("\x00" * 10_000)) == 60
    assert cell(np.float32(1 / 3)) == "0.3333" and cell(torch.tensor(2)) == "2" and cell(None) == ""
    assert (
        cell(np.zeros((3, 4))) == "float64 3×4"
        and cell(list(range(1000))) == "list of 1,000"
        and cell((1, "a")) == "[1, a]"
    )
    assert cell(float("nan")) == "nan" and cell("\ud800") == "\\ud800"


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pw.gallery(None, TEXTS), "takes SampleScores.*NoneType"),  # type: ignore[arg-type]
        (lambda: pw.gallery(SCORES, TEXTS, "worst"), "choice='worst' should be one of easiest"),
        (lambda: pw.gallery(SCORES, TEXTS, 3), "choice=3"),  # type: ignore[arg-type]
        (lambda: pw.gallery(SCORES, TEXTS, count=0), "count=0"),
        (lambda: pw.gallery(SCORES, TEXTS, count=True), "count=True"),
        (lambda: pw.gallery(SCORES, TEXTS, by="size"), "no score of difficulty"),
        (lambda: pw.gallery(SCORES, TEXTS, class_names=5), "class_names are an int"),  # type: ignore[arg-type]
        (lambda: pw.gallery(SCORES, TEXTS, targets=[1]), "1 labels for the scores of 6"),
        (lambda: pw.gallery(SCORES, TEXTS).plot(), "these samples are texts: use .table"),
        (lambda: pw.gallery(SCORES, np.zeros((N, 2, 2))).plot(columns=0), "columns=0"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(pw.DataError, match=message):
        make()


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pw.CheckpointError, match="cannot be written"):
        pw.gallery(SCORES, TEXTS).to_html(tmp_path / "file" / "a.html")


def test_an_empty_grid_and_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    images = np.zeros((N, 2, 2))
    empty = pw.gallery(scores_of(SHARE, margins=np.full(N, 0.5)), images, "suspect", targets=np.zeros(N, int))
    assert empty.plot().get_suptitle() == "no samples"
    hide_matplotlib(monkeypatch)
    shown = pw.gallery(SCORES, images)
    assert "2×2" in shown.table()
    for draw in (shown.plot, shown.html):
        with pytest.raises(pw.PrunewiseError, match="prunewise.plot."):
            draw()
