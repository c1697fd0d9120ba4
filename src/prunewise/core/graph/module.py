"""The module that holds the graphs: one for train mode and one for eval mode, over the same parameters."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from prunewise.core.graph.call import Call, fill


class RebuiltModule(fx.GraphModule):
    """What `rebuild` returns: one graph for train mode, one for eval mode (or one for both), over the same parameters."""

    def __init__(self, state: nn.Module, graphs: dict[bool, fx.Graph], call: Call, name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(self, kind).update(getattr(state, kind))
        self._non_persistent_buffers_set.update(state._non_persistent_buffers_set)
        self._call = call
        self._install(graphs)

    def _install(self, graphs: dict[bool, fx.Graph]) -> None:
        self._graphs = graphs
        self._compiled: dict[bool, Any] = {}
        for mode in (not self.training, self.training):
            if mode not in self._compiled:
                self.graph = graphs[mode]  # compiles

    def recompile(self) -> Any:
        """Compile the current graph; `forward` takes and gives what the original's does."""
        code = super().recompile()
        cls: Any = type(self)
        for mode, graph in self.__dict__.get("_graphs", {}).items():
            if graph is self._graph:
                self._compiled[mode] = cls.forward
        cls.forward = RebuiltModule._forward
        return code

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self._compiled[self.training](self, *self._call.flat(args, kwargs, self.training))
        return fill(self._call.outputs[self.training], out)

    def train(self, mode: bool = True) -> RebuiltModule:
        """Switch to the graph of this mode."""
        super().train(mode)
        if self._graph is not self._graphs[mode]:
            self.graph = self._graphs[mode]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RebuiltModule:
        new = RebuiltModule.__new__(RebuiltModule)
        memo[id(self)] = new
        own = ("_graphs", "_compiled", "_graph", "_call")
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in own})
        new._call = self._call
        copies = {id(graph): copy.deepcopy(graph) for graph in self._graphs.values()}
        new._install({mode: copies[id(graph)] for mode, graph in self._graphs.items()})
        return new

    def __reduce__(self) -> Any:
        raise TypeError("a rebuilt model cannot be pickled: save its plan and state_dict (prunewise.save_pruned)")


def skeleton_of(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """Plain modules that hold the same tensors under the same names."""
    if id(module) not in seen:
        seen[id(module)] = out = nn.Module()
        out._parameters.update(module._parameters)
        out._buffers.update(module._buffers)
        out._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        out._modules.update({k: m if m is None else skeleton_of(m, seen) for k, m in module._modules.items()})
    return seen[id(module)]
