"""One ONNX graph for all masks: sublayers that are skipped together are a branch of an ``If``, chosen by an input.

A row that goes on runs the same graph: what it has run is skipped, and its saved hidden states are an input. Branches
are not nested, as ONNX Runtime packs weights for its matrix products only down to the first level.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

STATES = "states"  # input: the hidden states from which rows go on


class Sides(NamedTuple):
    """The values of a graph that enter and leave a branch."""

    enters: str
    leaves: str
    adds_residual: bool  # then a skipped branch returns what enters; otherwise a zero, which the layer adds to it


def skip_input(switch: int) -> str:
    """Name of the input, a bool, that skips a branch; ``switch`` is the index of its first switch."""
    return f"skip.{switch}"


def hidden_output(switch: int) -> str:
    """Name of the output with the hidden states before the layer of a switch, ``[n, tokens, width]``."""
    return f"hidden.{switch}"


def resume_input(switch: int) -> str:
    """Name of the input, a bool, that the hidden states before the layer of a switch are the given ones."""
    return f"resume.{switch}"


def branched(model: Any, sides: dict[int, Sides], hidden: dict[int, str]) -> Any:
    """A traced model in which branches run, or are skipped, as the inputs ``skip_input`` say.

    Args:
        model: An ``onnx.ModelProto`` of which the first output is kept. It is changed.
        sides: By index of the first switch, in execution order.
        hidden: By index of a switch, the value that becomes the output ``hidden_output``; where ``resume_input`` says
            so, it is the input ``STATES``.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    outside = {graph.output[0].name, *hidden.values(), *(value for ends in sides.values() for value in ends[:2])}
    nodes, replaced = _deduplicated(graph.node, outside), dict[int, Any]()
    for switch, ends in sides.items():
        inside = _inside(nodes, ends, outside)
        skipped = ("Identity", [ends.enters]) if ends.adds_residual else ("Constant", list[str]())
        replaced |= dict.fromkeys(inside)
        replaced[inside[-1]] = _either(skip_input(switch), skipped, [nodes[at] for at in inside], ends.leaves)
    nodes = [node for node in (replaced.get(at, node) for at, node in enumerate(nodes)) if node is not None]
    for switch, value in hidden.items():
        at = next(at for at, node in enumerate(nodes) if value in node.output)
        ran = f"{value}.ran"
        nodes[at].output[:] = [ran if name == value else name for name in nodes[at].output]
        keeps = [helper.make_node("Identity", [ran], [value])]
        nodes.insert(at + 1, _either(resume_input(switch), ("Identity", [STATES]), keeps, value))
        nodes.append(helper.make_node("Identity", [value], [hidden_output(switch)]))
    del graph.node[:], graph.output[1:], graph.value_info[:]
    graph.node.extend(nodes)
    flags = [*map(skip_input, sides), *map(resume_input, hidden)]
    graph.input.extend(helper.make_tensor_value_info(flag, TensorProto.BOOL, []) for flag in flags)
    if hidden:
        graph.input.append(helper.make_tensor_value_info(STATES, TensorProto.FLOAT, ["resumed", "tokens", "width"]))
    names = map(hidden_output, hidden)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return model


def _either(flag: str, otherwise: tuple[str, list[str]], runs: list[Any], leaves: str) -> Any:
    """An ``If`` that gives the value ``leaves``: one operator on its inputs where ``flag`` is true, else ``runs``."""
    from onnx import TensorProto, helper

    operator, values = otherwise
    own, other = f"{flag}.false", f"{flag}.true"
    runs[-1].output[:] = [own if name == leaves else name for name in runs[-1].output]
    zero: dict[str, Any] = {} if values else {"value_float": 0.0}
    replaces = helper.make_node(operator, values, [other], **zero)
    returns = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (other, own)]
    parts: dict[str, Any] = {
        "then_branch": helper.make_graph([replaces], other, [], returns[:1]),
        "else_branch": helper.make_graph(runs, own, [], returns[1:]),
    }
    return helper.make_node("If", [flag], [leaves], **parts)


def _deduplicated(nodes: Iterable[Any], outside: set[str]) -> list[Any]:
    """Nodes without those that compute the same as another one, or nothing.

    ONNX Runtime does not merge them within branches.
    """
    kept = list[Any]()
    first = dict[Any, Any]()
    same = dict[str, str]()
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
        original = first.setdefault((node.op_type, tuple(node.input), tuple(attributes)), node)
        equal = [*(node.input if node.op_type == "Identity" else original.output)]
        if equal != [*node.output] and outside.isdisjoint(node.output):
            same |= zip(node.output, equal, strict=True)
        else:
            kept.append(node)
    return kept


def _inside(nodes: list[Any], ends: Sides, outside: set[str]) -> list[int]:
    """Positions of the nodes between the ends of a branch whose values nothing else reads, ascending.

    What does not depend on what enters, such as a mask of attention, stays outside: it is computed once for all layers.
    """
    readers, depends = dict[str, set[int]](), {ends.enters}
    last = next(at for at, node in enumerate(nodes) if ends.leaves in node.output)
    for at, node in enumerate(nodes):
        for name in node.input:
            readers.setdefault(name, set()).add(at)
        if at <= last and depends.intersection(node.input):
            depends.update(node.output)
    inside = {last}
    for at in reversed(range(last)):
        names = nodes[at].output
        if all(name in depends and name not in outside and readers.get(name, {-1}) <= inside for name in names):
            inside.add(at)
    return sorted(inside)
