"""One ONNX graph for all masks: sublayers that are skipped together are a branch of an ``If``, chosen by an input."""

from collections.abc import Iterable
from typing import Any, NamedTuple


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


def branched(model: Any, sides: dict[int, Sides], hidden: dict[int, str]) -> Any:
    """A traced model in which branches run, or are skipped, as the inputs ``skip_input`` say.

    Args:
        model: An ``onnx.ModelProto`` of which the first output is kept. It is changed.
        sides: By index of the first switch, in execution order.
        hidden: By index of a switch, the value that becomes the output ``hidden_output``.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    outside = {graph.output[0].name, *hidden.values(), *(value for ends in sides.values() for value in ends[:2])}
    nodes, replaced = _deduplicated(graph.node, outside), dict[int, Any]()
    for switch, ends in sides.items():
        inside = _inside(nodes, ends, outside)
        runs = [nodes[at] for at in inside]
        own, skipped = f"{ends.leaves}.run", f"{ends.leaves}.skip"
        runs[-1].output[:] = [own if name == ends.leaves else name for name in runs[-1].output]
        skips = helper.make_node("Constant", [], [skipped], value_float=0.0)
        if ends.adds_residual:
            skips = helper.make_node("Identity", [ends.enters], [skipped])
        returns = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (skipped, own)]
        parts: dict[str, Any] = {
            "then_branch": helper.make_graph([skips], skipped, [], returns[:1]),
            "else_branch": helper.make_graph(runs, own, [], returns[1:]),
        }
        replaced |= dict.fromkeys(inside)
        replaced[inside[-1]] = helper.make_node("If", [skip_input(switch)], [ends.leaves], **parts)
        graph.input.append(helper.make_tensor_value_info(skip_input(switch), TensorProto.BOOL, []))
    kept = [replaced.get(at, node) for at, node in enumerate(nodes)]
    kept += [helper.make_node("Identity", [value], [hidden_output(switch)]) for switch, value in hidden.items()]
    del graph.node[:], graph.output[1:], graph.value_info[:]
    graph.node.extend(node for node in kept if node is not None)
    names = [hidden_output(switch) for switch in hidden]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return model


def _deduplicated(nodes: Iterable[Any], outside: set[str]) -> list[Any]:
    """Nodes without those that compute the same as another one: ONNX Runtime does not merge them within branches."""
    kept, first, same = list[Any](), dict[Any, Any](), dict[str, str]()
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
        original = first.setdefault((node.op_type, tuple(node.input), tuple(attributes)), node)
        if original is not node and outside.isdisjoint(node.output):
            same |= zip(node.output, original.output, strict=True)
        else:
            kept.append(node)
    return kept


def _inside(nodes: list[Any], ends: Sides, outside: set[str]) -> list[int]:
    """Positions of the nodes between the ends of a branch whose values nothing else reads.

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
