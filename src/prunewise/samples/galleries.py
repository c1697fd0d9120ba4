"""The easiest, the hardest and the most suspect samples, to look at."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunewise._files import replacing
from prunewise.core.checks import is_count
from prunewise.core.errors import CheckpointError, DataError
from prunewise.samples.checking import kind_of
from prunewise.samples.lookup import reader
from prunewise.samples.pictures import new_figure
from prunewise.samples.scores import Ints, SampleScores
from prunewise.samples.showing import MOST_COLUMNS, Content, as_image, as_row, cell, content_of, label_of, printable
from prunewise.samples.suspecting import Suspects, suspects

CHOICES = ("easiest", "hardest", "suspect")
_TITLE = 24  # characters over an image
_STYLE = (
    "body{font-family:sans-serif}table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .5em;"
    "text-align:left;vertical-align:top}img{height:96px;image-rendering:pixelated}"
)


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One sample of a gallery.

    Attributes:
        sample_id: its id, an int or a string.
        score: by which it was chosen.
        label: as given, or the name of the class; None where it is not known.
        proposed_label: of a suspect, as `label`; None where there is none.
        content: what is shown of it: an image, a text or a row.
    """

    sample_id: Any
    score: float
    label: Any
    proposed_label: Any
    content: Any


@dataclass(frozen=True, eq=False)
class Gallery:
    """Samples to look at, in the order of their scores; made by `gallery`. `str()` of it is `table()`.

    Attributes:
        choice: "easiest", "hardest" or "suspect".
        by: the name of the score.
        kind: what the samples are: "image", "text" or "row".
        exhibits: the samples, best fitting first.
    """

    choice: str
    by: str
    kind: str
    exhibits: tuple[Exhibit, ...]

    def __len__(self) -> int:
        return len(self.exhibits)

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int = 60) -> str:
        """Plain text, a line a sample, cells of at most `width` characters; control characters are escaped."""
        lines = self._cells(width)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([f"{self.choice} by {self.by}", *text])

    def html(self, width: int = 1000) -> str:
        """A page of its own, with nothing to load; texts of at most `width` characters. All that data say is escaped.

        Raises:
            PrunewiseError: the samples are images, and matplotlib is not installed.
        """
        head, *lines = ([html.escape(c) for c in line] for line in self._cells(width))
        if self.kind == "image":
            for line, exhibit in zip(lines, self.exhibits, strict=True):
                line[-1] = f'<img alt="{line[-1]}" src="data:image/png;base64,{_png(exhibit.content)}">'
        title = html.escape(f"{self.choice} by {self.by}")
        rows = [f"<tr>{''.join(f'<td>{c}</td>' for c in line)}</tr>" for line in lines]
        return "\n".join(
            [
                f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>',
                f"<body><h1>{title}</h1><table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>",
                *rows,
                "</table></body></html>\n",
            ]
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write `html()` to a file, at one stroke.

        Raises:
            CheckpointError: the file cannot be written.
        """
        text, target = self.html(), Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error

    def plot(self, columns: int = 6) -> Any:
        """The images as a grid with id, label and score over each; a matplotlib Figure. Needs the extra `plot`.

        Raises:
            DataError: the samples are no images.
            PrunewiseError: matplotlib is not installed.
        """
        if not is_count(columns, 1):
            raise DataError(f"columns={columns!r} should be an int of at least 1")
        if self.kind != "image" and self.exhibits:
            raise DataError(f"a grid is for images, and these samples are {self.kind}s: use .table() or .to_html(path)")
        columns = min(columns, max(1, len(self)))
        rows = -(-max(1, len(self)) // columns)
        figure = new_figure(figsize=(1.8 * columns, 2.2 * rows + 0.4))
        figure.suptitle(f"{self.choice} by {self.by}: id, label, score" if self.exhibits else "no samples")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, exhibit in zip(grid, self.exhibits, strict=False):
            axes.imshow(as_image(exhibit.content), cmap="gray", vmin=0, vmax=1)
            title = "\n".join(printable(line, _TITLE) for line in _caption(exhibit))
            axes.set_title(title, fontsize="small", parse_math=False)  # data write no formulas
        return figure

    def _cells(self, width: int) -> list[list[str]]:
        """The table's head and its lines."""
        rows = [_shown(e.content, self.kind, width) for e in self.exhibits]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        proposed = self.choice == "suspect"
        lines = [["sample", self.by, "label", *(["proposed"] if proposed else []), *columns]]
        for e, row in zip(self.exhibits, rows, strict=True):
            known = [
                cell(e.sample_id),
                f"{e.score:.4g}",
                cell(e.label),
                *([cell(e.proposed_label)] if proposed else []),
            ]
            lines.append(known + [row.get(column, "") for column in columns])
        return lines


def gallery(
    scores: SampleScores,
    dataset: Any,
    choice: str | Suspects = "hardest",
    *,
    count: int = 24,
    by: str = "learnability",
    targets: Any = None,
    class_names: Sequence[Any] | Mapping[Any, Any] | None = None,
    content: Content = None,
) -> Gallery:
    """The samples that a score puts first, with id, label and score: images, texts or tabular rows.

    Samples are looked up by their ids: in a data set of `track` (or a `Subset` of one) by the ids that it knows, in a mapping by
    its keys, and in any other by position if the ids are 0, 1, ... N-1. So are they in a tracked one that knows no such ids: a
    recorder made without `ids` has numbers for them. They are shown as the data set gives them, so give one without augmentation.

    Images are tensors (C, H, W) or (H, W), arrays (H, W, C) too, with C of 1, 3 or 4, and PIL images. Values outside of
    [0, 1] that are not those of 8 bits are scaled to it; pixels that are not finite are black. Texts are strings. Rows are
    dicts, or one dimension of numbers or strings, of at most 24 columns.

    Args:
        scores: of the data set's samples. Those without a finite score are left out.
        dataset: map-style, best the tracked one that was trained on.
        choice: "easiest", "hardest" or "suspect"; or what `suspects(scores, targets)` found.
        count: at most so many samples.
        by: the score for "easiest" and "hardest"; equal ones are in the order of the data set.
        targets: the N labels in the order of the sample numbers; needed for "suspect". Default: those that the samples
            carry, second in a tuple, or a dict's "labels", "targets", "label" or "target".
        class_names: names of the labels.
        content: what of a sample is shown: a key, an index or a function of the sample. Default: the first of a tuple;
            the only entry of a dict besides its label, or its only image, or all of it as a row.

    Returns:
        A `Gallery`: `.plot()` draws images, `.table()` is plain text, `.html()` a page and `.to_html(path)` a file.

    Raises:
        DataError: a setting out of range; scores or labels of another data set; a data set that cannot be looked up by
            these ids; no sample with a score; samples that cannot be shown, or of several kinds.

    Example:
        >>> import torch
        >>> from prunewise import LearnabilityRecorder, track
        >>> reviews = track([("a fine film", 1), ("never again", 1)], ids=["r7", "r9"])
        >>> recorder = LearnabilityRecorder(2, ids=reviews.index)
        >>> recorder.update(["r7", "r9"], torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))
        >>> print(gallery(recorder.scores(), reviews, count=1, class_names=["bad", "good"]))
        hardest by learnability
        sample  learnability  label  text
        r9      0             good   never again
    """
    if not isinstance(scores, SampleScores):
        raise DataError(f"gallery takes SampleScores, as recorder.scores() gives them; got {kind_of(scores)}")
    if not is_count(count, 1):
        raise DataError(f"count={count!r} should be an int of at least 1")
    if class_names is not None and not (hasattr(class_names, "__getitem__") and hasattr(class_names, "__len__")):
        raise DataError(f"class_names are {kind_of(class_names)}: give the names in a list, or in a dict by label")
    given, proposed = None, None
    if isinstance(choice, str) and choice in ("easiest", "hardest"):
        numbers, values = _extremes(scores, choice, by, count)
        if targets is not None:
            given = scores.check_targets(targets)[numbers]
    else:
        found = _suspects(scores, choice, targets, count)
        numbers, values, given, proposed = found.number, found.score, found.given_label, found.proposed_label
        choice, by = "suspect", "score"
    read = reader(dataset, scores)
    exhibits = []
    for place, number in enumerate(numbers[:count].tolist()):
        sample = read(number)
        label = label_of(sample) if given is None else given[place]
        suggested = None if proposed is None or proposed[place] < 0 else proposed[place]
        exhibits.append(
            Exhibit(
                sample_id=scores.sample_id[number].item(),
                score=float(values[place]),
                label=_named(label, class_names),
                proposed_label=_named(suggested, class_names),
                content=content_of(sample, content),
            )
        )
    return Gallery(choice, by, _kind(exhibits), tuple(exhibits))


def _extremes(scores: SampleScores, choice: str, by: str, count: int) -> tuple[Ints, Any]:
    difficulty = scores.difficulty(by)
    known = np.flatnonzero(np.isfinite(difficulty))
    if not len(known):
        raise DataError(f"no sample has a finite {by}: record at least one batch first")
    sign = 1 if choice == "easiest" else -1
    # many are missed, or hit, every time: of those the margins tell which comes first
    order = np.lexsort((sign * scores.difficulty("aum")[known], sign * difficulty[known]))
    numbers = known[order[:count]]
    return numbers, getattr(scores, by)[numbers]


def _suspects(scores: SampleScores, choice: Any, targets: Any, count: int) -> Suspects:
    if isinstance(choice, Suspects):
        same = len(choice.all_scores) == len(scores)
        if not same or not np.array_equal(scores.sample_id[choice.number], choice.sample_id):
            raise DataError("these suspects were found among other samples: give those of suspects(scores, targets)")
        return choice
    if not isinstance(choice, str) or choice not in CHOICES:
        raise DataError(f"choice={choice!r:.80} should be one of {', '.join(CHOICES)}, or what suspects() found")
    if targets is None:
        raise DataError(
            "suspects are told by their labels: give targets=, the N labels in the order of the sample numbers"
        )
    return suspects(scores, targets, limit=count)


def _named(label: Any, names: Sequence[Any] | Mapping[Any, Any] | None) -> Any:
    """The label as a plain value; its name where there is one."""
    if hasattr(label, "item") and getattr(label, "ndim", 1) == 0:
        label = label.item()
    if names is None or label is None:
        return label
    if isinstance(names, Mapping):
        return names.get(label, label) if isinstance(label, (int, str)) else label
    return names[label] if is_count(label) and label < len(names) else label


def _kind(exhibits: Sequence[Exhibit]) -> str:
    """What all samples are: "image", "text" or "row"."""
    kinds: dict[str, Any] = {}
    columns: dict[str, None] = {}
    for exhibit in exhibits:
        value = exhibit.content
        row = None
        if isinstance(value, str):
            kind = "text"
        elif as_image(value) is not None:
            kind = "image"
        elif (row := as_row(value)) is not None:
            kind = "row"
            columns |= dict.fromkeys(row)
        else:
            raise DataError(
                f"sample {exhibit.sample_id!r:.80} cannot be shown: {_what(value)} is no image, text or tabular row. Say with "
                "content= what to show: a key, an index or a function of the sample"
            )
        kinds.setdefault(kind, exhibit.sample_id)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} (sample {first!r:.40})" for kind, first in kinds.items())
        raise DataError(f"the samples are of several kinds: {found}; say with content= what to show of each")
    if len(columns) > MOST_COLUMNS:
        raise DataError(
            f"rows of {len(columns):,} columns are too wide to show (at most {MOST_COLUMNS}): choose some, or make images of them, "
            "with content=, a function of the sample"
        )
    return next(iter(kinds), "row")


def _what(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")


def _shown(content: Any, kind: str, width: int) -> dict[str, str]:
    """The cells of a sample by column."""
    if kind == "text":
        return {"text": printable(content, width)}
    if kind == "image":
        image = as_image(content)
        assert image is not None
        return {"image": "×".join(map(str, getattr(content, "shape", image.shape)))}
    return as_row(content) or {}


def _caption(exhibit: Exhibit) -> list[str]:
    label, proposed = cell(exhibit.label), cell(exhibit.proposed_label)
    if proposed:  # room for both
        label = f"{printable(label, _TITLE // 2 - 2)} → {printable(proposed, _TITLE // 2 - 2)}"
    lines = [cell(exhibit.sample_id), label, f"{exhibit.score:.3g}"]
    return [line for line in lines if line]


def _png(content: Any) -> str:
    new_figure()  # says so where there is no matplotlib
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, np.asarray(as_image(content)), format="png", cmap="gray", vmin=0, vmax=1)
    return base64.b64encode(stream.getvalue()).decode()
