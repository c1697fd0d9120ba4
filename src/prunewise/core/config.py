"""Keep a model's `config` in step with its widths, where the architecture's config can express them.

Hugging Face's models are built from a config object, and `from_pretrained` builds them from the saved one again.
Nothing here knows a library: a config is an attribute `config` that has `to_dict()`, and that the model's class takes as
its only argument.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prunewise.core.errors import VerificationError
from prunewise.core.proof import compare, outputs
from prunewise.core.trace import Inputs

_MAX_BUILDS = 100
_SAME = 1e-6  # the same weights in the same class: not even rounding should differ
_DEPTH = 3  # configs inside configs (a text and a vision part, say)

Field = tuple[str | int, ...]  # the way to an integer: attribute names, an index into a list at the end
Sizes = dict[tuple[str, int], int]  # (parameter, dimension) -> size


def has_config(model: nn.Module) -> bool:
    """True where the model was built from a config object of its own."""
    return callable(getattr(getattr(model, "config", None), "to_dict", None))


def fit_config(small: nn.Module, example_inputs: Inputs) -> str | None:
    """Set the integers of `small.config` to the new widths; None, or why they cannot express them.

    A config is accepted when the model's own class, built from it and given the small model's state, has the same
    shapes and computes the same outputs. Otherwise the config is left as it was.
    """
    search = _Search(small, example_inputs)
    try:
        found = search.run(copy.deepcopy(small.config), [])
    except Exception as error:  # whatever a constructor or a config of others does must not cost the small model
        return str(error) if isinstance(error, VerificationError) else f"{type(error).__name__}: {error}"
    if found is None:
        return search.problem
    before = [(path, _get(small.config, path)) for path, _ in found]
    want = outputs(small, example_inputs, False)
    try:
        for path, value in found:
            _set(small.config, path, value)
        compare(want, outputs(small, example_inputs, False), "the small model with its new config", at_most=_SAME)
    except Exception as error:
        for path, value in before:
            _set(small.config, path, value)
        return f"its forward reads the config: {error}"
    return None


class _Search:
    """Integers of a config are changed one after another until the model built from it has the small one's shapes."""

    def __init__(self, small: nn.Module, example_inputs: Inputs) -> None:
        self.small, self.example_inputs = small, example_inputs
        self.want = _sizes(small)
        self.builds = 0
        self.tried: set[frozenset[tuple[Field, int]]] = set()
        self.problem = "no setting of it gives these widths"

    def run(self, config: Any, changes: list[tuple[Field, int]]) -> list[tuple[Field, int]] | None:
        """The changes that lead to the small model, or None."""
        if frozenset(changes) in self.tried:
            return None
        self.tried.add(frozenset(changes))
        have = self._built(config)
        if have is None or have.keys() != self.want.keys():
            self.problem = (
                f"{type(self.small).__name__} cannot be built from its config alone" if not changes else self.problem
            )
            return None
        wrong = {at for at, size in self.want.items() if have[at] != size}
        if not wrong:
            return changes if self._same(config) else self._counted(config, changes)
        for path, value in self._candidates(config, have, wrong, {path for path, _ in changes}):
            trial = copy.deepcopy(config)
            _set(trial, path, value)
            found = self.run(trial, [*changes, (path, value)])
            if found is not None:
                return found
        return None

    def _candidates(
        self, config: Any, have: Sizes, wrong: set[tuple[str, int]], done: set[Field]
    ) -> list[tuple[Field, int]]:
        """Integers which, set to a new value, would mend something, and break nothing that they move."""
        asked: dict[Field, dict[tuple[str, int], float]] = {}  # the value that each size it moves asks for
        for path, value in list(_integers(config)):
            if path not in done and any(have[at] % value == 0 for at in wrong):
                asked[path] = self._asked(config, have, path, value)
        moves = Counter(at for news in asked.values() for at in news)
        for path, news in asked.items():
            alone = {new: at for at, new in news.items() if moves[at] == 1}
            if len(alone) > 1:
                (one, _), (other, _) = sorted(alone.values())[:2]
                self.problem = (
                    f"{'.'.join(map(str, path))} would have to be one number for {one} and another for {other}"
                )
                return []
        for name, dim in sorted(at for at in wrong if not moves[at]):
            self.problem = f"no integer in it stands for dimension {dim} of {name}"
            return []
        found = [(path, set(news.values())) for path, news in asked.items()]
        values = dict(_integers(config))
        return [
            (path, int(new))
            for path, news in found
            if len(news) == 1 and (new := min(news)) == int(new) and 0 < new != values[path]
        ]

    def _asked(self, config: Any, have: Sizes, path: Field, value: int) -> dict[tuple[str, int], float]:
        """For every size that an integer moves, the integer's value that would make it what the small model has."""
        for other in (2 * value, value + 1, 3 * value):
            trial = copy.deepcopy(config)
            _set(trial, path, other)
            moved = self._built(trial)
            if moved is not None and moved.keys() == have.keys():
                break
        else:
            return {}  # the number of layers, say
        # size = have + slope * (new - value)
        return {
            at: value + (self.want[at] - size) * (other - value) / (moved[at] - size)
            for at, size in have.items()
            if moved[at] != size
        }

    def _counted(self, config: Any, changes: list[tuple[Field, int]]) -> list[tuple[Field, int]] | None:
        """Integers that move no shape (a number of heads), set to what the small model's modules hold."""
        done = {path for path, _ in changes}
        for old, new in self._attributes(config):
            for path, value in list(_integers(config)):
                # a number of heads is what modules hold, or what the size of a head that they hold leaves of a width
                for other in {new if value == old else value, value * old // max(new, 1)} - {value, 0}:
                    trial = copy.deepcopy(config)
                    _set(trial, path, other)
                    if path not in done and self._built(trial) == self.want and self._same(trial):
                        return [*changes, (path, other)]
        return None

    def _attributes(self, config: Any) -> list[tuple[int, int]]:
        """Integers on the modules of the model built from `config`, and of the small one, where they differ."""
        model = self._build(config)
        found: dict[tuple[int, int], None] = {}
        if model is not None:
            theirs = dict(self.small.named_modules())
            for name, module in model.named_modules():
                for key, value in vars(module).items():
                    new = vars(theirs[name]).get(key) if name in theirs else None
                    if type(value) is int and type(new) is int and value != new:
                        found[value, new] = None
        return list(found)

    def _built(self, config: Any) -> Sizes | None:
        model = self._build(config)
        return None if model is None else _sizes(model)

    def _build(self, config: Any) -> nn.Module | None:
        """The stock model, without memory or values; None where the architecture refuses the combination."""
        self.builds += 1
        if self.builds > _MAX_BUILDS:
            raise VerificationError(f"its {sum(1 for _ in _integers(config))} integers allow too many settings to try")
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            with torch.device("meta"), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                return type(self.small)(copy.deepcopy(config))
        except Exception:
            return None
        finally:
            logging.disable(level)

    def _same(self, config: Any) -> bool:
        """True where the stock model with the small one's tensors computes what the small one does."""
        model = self._build(config)
        if model is None:
            return False
        try:
            model.load_state_dict(self.small.state_dict(), assign=True)
            _share_buffers(model, self.small)
            want = outputs(self.small, self.example_inputs, False)
            compare(want, outputs(model, self.example_inputs, False), "the model built from the config", at_most=_SAME)
        except Exception as error:
            self.problem = f"the widths fit, but {error}"
            return False
        return True


def _share_buffers(model: nn.Module, small: nn.Module) -> None:
    """Give `model` the buffers of `small` that no state_dict holds; what has another shape there is left out."""
    theirs = dict(small.named_buffers())
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            other = theirs.get(f"{path}.{leaf}" if path else leaf)
            if buffer is not None and buffer.is_meta and other is not None and other.shape == buffer.shape:
                module._buffers[leaf] = other


def _sizes(model: nn.Module) -> Sizes:
    return {(name, dim): size for name, p in model.state_dict().items() for dim, size in enumerate(p.shape)}


def _integers(config: Any, depth: int = _DEPTH) -> Iterator[tuple[Field, int]]:
    """Every integer above 1 in a config, in its lists, and in configs inside it."""
    for name, value in sorted(vars(config).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield (name,), value
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            yield from (((name, i), v) for i, v in enumerate(value) if v > 1)
        elif depth and callable(getattr(value, "to_dict", None)):
            yield from (((name, *path), v) for path, v in _integers(value, depth - 1))


def _get(config: Any, path: Field) -> Any:
    for step in path:
        config = config[step] if isinstance(step, int) else getattr(config, step)
    return config


def _set(config: Any, path: Field, value: Any) -> None:
    *way, last = path
    if isinstance(last, int):
        old = _get(config, tuple(way))
        _set(config, tuple(way), type(old)(value if i == last else v for i, v in enumerate(old)))
    else:
        setattr(_get(config, tuple(way)), str(last), value)
