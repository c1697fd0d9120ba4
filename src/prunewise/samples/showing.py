"""One sample, made fit for the eye: what of it is shown, as an image, a text or a row. Data are not trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from prunewise.core.errors import DataError
from prunewise.samples.passes import LABELS
from prunewise.samples.tracking import FIELD

MOST_COLUMNS = 24
_MOST_PIXELS = 256  # a side; more than a gallery has room for
_MOST_ITEMS = 8  # of a short list inside a cell

Content = str | int | Callable[[Any], Any] | None


def content_of(sample: Any, content: Content) -> Any:
    """What is shown of a sample: what `content` says; else the input of a pair, the only (or only image) entry of a dict."""
    if callable(content):
        return content(sample)
    if content is not None:
        try:
            return sample[content]
        except (LookupError, TypeError) as error:
            keys = f" of {', '.join(map(str, sample))}"[:200] if isinstance(sample, Mapping) else ""
            raise DataError(
                f"content={content!r} is no entry of the samples, each a {type(sample).__name__}{keys}"
            ) from error
    if isinstance(sample, Mapping):
        entries = {k: v for k, v in sample.items() if k not in LABELS and k != FIELD}
        pictures = [v for v in entries.values() if as_image(v) is not None]
        if len(entries) == 1:
            return next(iter(entries.values()))
        return pictures[0] if len(pictures) == 1 else entries
    return sample[0] if isinstance(sample, (tuple, list)) and len(sample) else sample


def label_of(sample: Any) -> Any:
    """The label that a sample carries: the second of a tuple, or the first usual name of a dict; None where there is none."""
    if isinstance(sample, Mapping):
        return next((sample[name] for name in LABELS if name in sample), None)
    return sample[1] if isinstance(sample, (tuple, list)) and len(sample) > 1 else None


def as_image(value: Any) -> npt.NDArray[np.float64] | None:
    """(H, W), (H, W, 3) or (H, W, 4) in [0, 1], at most some 256 pixels a side; None for what is no image.

    Values outside [0, 1] are those of 8 bits, or else scaled so that the least is 0 and the greatest 1; what is not
    finite is 0.
    """
    if type(value).__module__.partition(".")[0] == "PIL":
        value = np.asarray(value.convert("RGB"))
    if not isinstance(value, (Tensor, np.ndarray)) or value.ndim not in (2, 3):
        return None
    pixels = _array(value)
    if pixels.dtype.kind not in "biuf" or not pixels.size:
        return None
    if pixels.ndim == 3:
        first, last = pixels.shape[0] in (1, 3, 4), pixels.shape[2] in (1, 3, 4)
        if not first and not last:
            return None
        # where both could be the channels: tensors have them first, arrays last
        if first and (isinstance(value, Tensor) or not last):
            pixels = pixels.transpose(1, 2, 0)
        if pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
    step = -(-max(pixels.shape[:2]) // _MOST_PIXELS)
    return _to_unit(pixels[::step, ::step])


def as_row(value: Any) -> dict[str, str] | None:
    """The cells of a tabular row by column: of a dict, or of one dimension of numbers or strings; None for anything else."""
    if isinstance(value, Mapping):
        return {printable(str(k), 40): cell(v) for k, v in value.items()}
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim <= 1:
        value = _array(value).tolist()
    if isinstance(value, (bool, int, float, np.generic)):
        return {"value": cell(value)}
    if isinstance(value, (list, tuple)) and all(isinstance(v, (bool, int, float, str, np.generic)) for v in value):
        return {str(column): cell(v) for column, v in enumerate(value)}
    return None


def cell(value: Any, width: int = 60) -> str:
    """Any value in one short line: numbers in four digits, arrays by dtype and shape, text printable."""
    if isinstance(value, (Tensor, np.ndarray)):
        array = _array(value)
        if array.ndim > 1 or array.size > _MOST_ITEMS:
            return f"{array.dtype} {'×'.join(map(str, array.shape))}"
        value = array.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        if len(value) > _MOST_ITEMS:
            return f"{type(value).__name__} of {len(value):,}"
        return printable(f"[{', '.join(cell(v, width) for v in value)}]", width)
    return "" if value is None else printable(str(value), width)


def printable(text: str, width: int = 60) -> str:
    r"""At most `width` characters in one line; what would move a terminal's cursor or turn the text around is escaped.

    Example:
        >>> print(printable("red\x1b[31m\nline two", 16))
        red\x1b[31m\nli…
    """
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: width + 1])
    return safe if len(safe) <= width else safe[: width - 1] + "…"


def _array(value: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not isinstance(value, Tensor):
        return value
    try:
        tensor = value.detach().cpu()
        # numpy has no bfloat16, and no 8-bit floats
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise DataError(f"a {value.layout} tensor on {value.device} cannot be shown: {str(error)[:200]}") from error


def _to_unit(pixels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    eight_bits = pixels.dtype == np.uint8
    values = pixels.astype(np.float64)
    finite = np.isfinite(values)
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    if eight_bits or (pixels.dtype.kind in "iu" and low >= 0 and 1 < high <= 255):
        return values / 255
    if low < 0 or high > 1:
        with np.errstate(over="ignore", invalid="ignore"):
            values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.where(finite, values, 0.0)
