"""Export a model into one graph a mode."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunewise.core.errors import TraceError, VerificationError
from prunewise.core.graph.call import Call, template
from prunewise.core.graph.nodes import bound_arguments, node_line, node_name, put_argument
from prunewise.core.untouched import copied, nothing_fused

_aten = torch.ops.aten


class Flat(nn.Module):
    """`model` with a list of tensors in and a list of tensors out: what is exported."""

    def __init__(self, model: nn.Module, call: Call, training: bool) -> None:
        super().__init__()
        self.model, self.call, self.mode = model, call, training

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """Run the model; the containers of its output are noted."""
        out: list[Tensor] = []
        self.call.outputs[self.mode] = template(self.call.run(self.model, tensors), out)
        return out


Exported = tuple[fx.Graph, dict[str, Tensor]]  # tensors by the model's own names; tensors that the model does not name


def export_graph(model: nn.Module, call: Call, training: bool) -> Exported:
    """The graph of one mode, made of a copy: what the user's own `train` and `forward` leave behind stays there.

    Raises:
        TraceError: torch.export cannot capture the model.
    """
    free = [None if dim is None else {dim: torch.export.Dim.AUTO} for dim in call.grows]
    name, mode = type(model).__name__, "train" if training else "eval"
    module: Any = None
    model = copied(model)
    with nothing_fused(), torch.enable_grad():
        flat = Flat(model, call, training).train(training)
        for given, shapes in ((call.doubled(), (free,)), (call.tensors, None)):
            try:
                module = torch.export.export(flat, (given,), dynamic_shapes=shapes, strict=False).module()
            except Exception as error:
                text = str(error).strip().partition("\n")[0]
                failure = TraceError(
                    f"torch.export could not capture {name} in {mode} mode: {type(error).__name__}: {text}."
                )
                failure.__cause__ = error
                continue
            places = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
            if not any(
                dim is not None and isinstance(p, Tensor) and str(p.shape[dim]).isdigit()
                for p, dim in zip(places, call.grows, strict=True)
            ):
                break
            call.fixed.add(training)
            if given is call.tensors:  # another export would fix the same size
                break
    if module is None:
        raise failure
    graph: fx.Graph = module.graph
    _inline(graph, module)
    graph.set_codegen(fx.graph.CodeGen())
    known = {
        n
        for n, _ in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
    constants: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" or (node.op == "call_function" and not node.users and _is_assertion(node)):
            graph.erase_node(node)
        elif node.op == "get_attr":
            target = str(node.target).removeprefix("model.")
            if target not in known:
                value = operator.attrgetter(str(node.target))(module)
                target = f"_constant_{mode}_{len(constants)}"
                constants[target] = value.detach().clone()
            node.target = target
    return graph, constants


def _is_assertion(node: fx.Node) -> bool:
    return node_name(node).startswith(("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range"))


def _inline(graph: fx.Graph, module: nn.Module) -> None:
    """Regions without gradient, or with autocast off, become part of the graph."""
    for node in list(graph.nodes):
        kind = str(node.target)
        if kind not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        at = 1 if kind.endswith("enabled") else 4
        if kind.endswith("autocast") and node.args[2]:
            raise VerificationError(f"autocast inside the model is not followed: {node_line(node)}")
        inner = operator.attrgetter(node.args[at].target)(module)
        values = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), node.args[at + 1 :], strict=True))
        with graph.inserting_before(node):
            if at == 1:
                ambient = graph.call_function(torch.is_grad_enabled)
                graph.call_function(torch._C._set_grad_enabled, (node.args[0],))
            out: Any = None
            for each in inner.graph.nodes:
                if each.op == "output":
                    out = fx.node.map_arg(each.args[0], values.__getitem__)
                elif each.op != "placeholder":
                    values[each] = graph.node_copy(each, values.__getitem__)
            if at == 1:
                graph.call_function(torch._C._set_grad_enabled, (ambient,))
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(out[user.args[1]])
                graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(out)
        holder = node.args[at]
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def with_flags(graph: fx.Graph) -> fx.Graph:
    """A copy of an eval graph with every flag for training set."""
    graph = copy.deepcopy(graph)
    for node in graph.nodes:
        if (
            node_name(node) == "batch_norm" and bound_arguments(node)["momentum"] == 0.0
        ):  # momentum=None: torch says 0 in eval mode
            put_argument(node, "momentum", 0.1)
        for flag in ("train", "training"):
            if flag in bound_arguments(node):
                put_argument(node, flag, True)
    return graph
