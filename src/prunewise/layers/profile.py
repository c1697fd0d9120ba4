"""What `compactness` found, as data, as a table, as a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from prunewise.core.errors import PrunewiseError
from prunewise.core.sparsity import SparsityPlan


@dataclass(frozen=True)
class LayerCompactness:
    """How far one layer shrinks alone.

    Attributes:
        name: module path.
        params: weights of the layer.
        kept: the fewest that hold the metric, all other layers being whole.
        metric: the metric with so many.
    """

    name: str
    params: int
    kept: int
    metric: float

    @property
    def density(self) -> float:
        """Share of the weights kept, in (0, 1]; lower = more compact."""
        return self.kept / self.params


@dataclass(frozen=True)
class Compactness:
    """How compact each layer of a network can be.

    Attributes:
        layers: one row a layer, in the order of the model.
        base: metric of the whole model.
        tolerance: by how much it could fall.
        together: the plan with all layers shrunk at once that holds the metric.
        together_metric: the metric of that plan.
        evaluations: how many evaluations this call made.
        method: the pruning method.
    """

    layers: tuple[LayerCompactness, ...]
    base: float
    tolerance: float
    together: SparsityPlan
    together_metric: float
    evaluations: int
    method: str

    @property
    def summary(self) -> str:
        """One sentence: where the network is most compact, where least, and how far all of it goes together."""
        least = min(self.layers, key=lambda row: row.density)
        most = max(self.layers, key=lambda row: row.density)
        return (
            f"The network is most compact at {least.name!r}, which alone needs {least.density:.1%} of its {least.params:,} weights "
            f"to stay within {self.tolerance:g} of {self.base:g}, and least at {most.name!r}, which needs {most.density:.1%}; "
            f"all layers together keep {1 - self.together.sparsity:.1%}."
        )

    def table(self) -> str:
        """One line a layer: weights, share kept alone, metric then, share kept when all shrink together; and the summary."""
        width = max(len("layer"), len("all"), *(len(row.name) for row in self.layers))
        lines = [f"{'layer':<{width}}  {'weights':>12}  {'alone':>7}  {'metric':>9}  {'together':>8}"]
        for row in self.layers:
            shared = 1 - self.together[row.name]
            lines.append(
                f"{row.name:<{width}}  {row.params:>12,}  {row.density:>7.2%}  {row.metric:>9.4g}  {shared:>8.2%}"
            )
        total = sum(row.params for row in self.layers)
        lines.append(
            f"{'all':<{width}}  {total:>12,}  {'':>7}  {self.together_metric:>9.4g}  {1 - self.together.sparsity:>8.2%}"
        )
        return "\n".join([*lines, "", self.summary])

    __str__ = table

    def plot(self, axes: Any = None) -> Any:
        """Bars by depth: how high = share of weights kept alone (logarithmic); how wide = the layer's weights (square root).

        Args:
            axes: matplotlib axes to draw on; None makes new ones.

        Returns:
            The axes.

        Raises:
            PrunewiseError: no axes were given and matplotlib is not installed (`pip install 'prunewise[plot]'`).
        """
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise PrunewiseError("plots need matplotlib: pip install 'prunewise[plot]'") from error
            axes = pyplot.subplots(figsize=(max(4.0, 0.35 * len(self.layers)), 3.5), layout="constrained")[1]
        depth = list(range(len(self.layers)))
        largest = max(row.params for row in self.layers)
        widths = [0.15 + 0.8 * math.sqrt(row.params / largest) for row in self.layers]
        axes.bar(depth, [row.density for row in self.layers], width=widths, label="alone")
        axes.plot(depth, [1 - self.together[row.name] for row in self.layers], "k_", label="together")
        axes.set_yscale("log")
        axes.set_xticks(depth, [row.name for row in self.layers], rotation=90)
        axes.set_xlabel("depth")
        axes.set_ylabel("weights kept")
        axes.legend()
        return axes

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready data, with a schema version."""
        return {
            "kind": "prunewise/compactness",
            "schema_version": 1,
            "base": self.base,
            "tolerance": self.tolerance,
            "method": self.method,
            "evaluations": self.evaluations,
            "layers": [asdict(row) for row in self.layers],
            "together": self.together.to_dict(),
            "together_metric": self.together_metric,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)
