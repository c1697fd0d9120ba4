"""The fallback where a width is baked into the user's Python: the exported graph with its constants rewritten.

Single modules become graphs where that is enough (`Parts`), or else the whole model does (`rebuild`). The original is
exported once in eval mode and once in train mode, so whatever its code does with `self.training` is kept. The operations
of each graph are recorded and labelled like the model's own; every tensor's pruned shape is known from that, and integers
in the graph (sizes, bounds of slices, paddings, group counts) are rewritten to it. Other numbers stay what they were.
"""

from __future__ import annotations

from prunewise.core.graph.module import RebuiltModule
from prunewise.core.graph.parts import Parts
from prunewise.core.graph.rebuild import rebuild

__all__ = ["Parts", "RebuiltModule", "rebuild"]
