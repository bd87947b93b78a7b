"""What a pass changed in a graph: nodes removed, added and rewired, weights replaced, as lines to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx

from llmc.compiler.pipeline import Step
from llmc.compiler.report.text import printable
from llmc.passes.graph import Structure, dtype_name, raw_values, to_structure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LINES_SHOWN = 60
"""Of one pass; a dump of the passes has everything."""
ELEMENTS_SHOWN = 4
"""Of a list or a tensor among the attributes."""
_STYLES = {"-": "red", "+": "green", "~": "yellow"}


@dataclass
class Changes:
    """Lines that begin with '-', '+' or '~': nodes in graph order, then weights, then inputs and outputs."""

    lines: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"removed": 0, "added": 0, "rewired": 0})
    """Nodes that are gone, new, or have other inputs, outputs or attributes under the same name."""

    def __bool__(self) -> bool:
        return bool(self.lines)


def changes(before: Structure, after: Structure) -> Changes:
    """What differs between two graphs; nodes are the same where they have one name and one operator."""
    found = Changes()
    _compare_nodes(_nodes(before.model.graph), _nodes(after.model.graph), found)
    found.lines += _weights(before, after)
    for role in ("input", "output"):
        old, new = ({v.name: _typed(v) for v in getattr(structure.model.graph, role)} for structure in (before, after))
        found.lines += _replaced(old, new, role)
    return found


class ChangePrinter:
    """Listens to a run and prints what each step changed; says nothing of a step that changed nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, step: Step) -> None:
        """Print the changes of one step."""
        found = changes(step.before, to_structure(step.graph))
        if not found:
            return
        counts = ", ".join(f"{count} {what}" for what, count in found.counts.items() if count)
        title = f"{step.index} {step.key}" + (f": {counts}" if counts else "")
        self.console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        for line in found.lines[:LINES_SHOWN]:
            self.console.print(_styled(line), soft_wrap=True)
        if len(found.lines) > LINES_SHOWN:
            self.console.print(f"  and {len(found.lines) - LINES_SHOWN} more; --dump-passes has all", style="dim")


def _styled(line: str) -> Text:
    from rich.text import Text

    return Text(f"  {printable(line)}", _STYLES[line[0]])


def _nodes(graph: onnx.GraphProto) -> dict[tuple[str, str], onnx.NodeProto]:
    """(name, operator) → node, those of subgraphs behind the node that has them."""
    found: dict[tuple[str, str], onnx.NodeProto] = {}
    for node in graph.node:
        found[node.name, f"{node.domain}::{node.op_type}"] = node
        for attribute in node.attribute:
            if attribute.type == attribute.GRAPH:
                found |= _nodes(attribute.g)
    return found


def _compare_nodes(
    before: Mapping[tuple[str, str], onnx.NodeProto], after: Mapping[tuple[str, str], onnx.NodeProto], found: Changes
) -> None:
    """Lines in the order of `after`; what was removed stands behind the node that stayed before it."""
    removed: dict[tuple[str, str], list[onnx.NodeProto]] = {}
    last = ("", "")
    for key, node in before.items():
        if key in after:
            last = key
        else:
            removed.setdefault(last, []).append(node)
    _remove(removed.get(("", ""), ()), found)
    for key, node in after.items():
        if key not in before:
            found.counts["added"] += 1
            found.lines.append(f"+ {_node_text(node)}")
        else:
            differences = list(_differences(before[key], node))
            found.counts["rewired"] += bool(differences)
            found.lines += [f"~ {node.op_type} '{node.name}': {'; '.join(differences)}"] if differences else []
        _remove(removed.get(key, ()), found)


def _remove(nodes: Iterable[onnx.NodeProto], found: Changes) -> None:
    for node in nodes:
        found.counts["removed"] += 1
        found.lines.append(f"- {_node_text(node)}")


def _differences(old: onnx.NodeProto, new: onnx.NodeProto) -> Iterator[str]:
    for role, before, after in (("input", old.input, new.input), ("output", old.output, new.output)):
        for index in range(max(len(before), len(after))):
            pair = [names[index] if index < len(names) else "" for names in (before, after)]
            if pair[0] != pair[1]:
                yield f"{role} {index}: {pair[0] or 'none'} → {pair[1] or 'none'}"
    attributes = [{a.name: _attribute_text(a) for a in node.attribute} for node in (old, new)]
    for name in sorted({*attributes[0], *attributes[1]}):
        values = [given.get(name, "none") for given in attributes]
        if values[0] != values[1]:
            yield f"{name}: {values[0]} → {values[1]}"


def _node_text(node: onnx.NodeProto) -> str:
    """'y = Conv(x, w) {group=2}  conv_3'."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    attributes = ", ".join(f"{a.name}={_attribute_text(a)}" for a in node.attribute)
    settings = f" {{{attributes}}}" if attributes else ""
    return f"{', '.join(node.output)} = {operator}({', '.join(node.input)}){settings}  {node.name}"


def _attribute_text(attribute: onnx.AttributeProto) -> str:
    if attribute.type in (attribute.GRAPH, attribute.GRAPHS):
        return "graph"
    if attribute.type == attribute.TENSOR:
        values = onnx.numpy_helper.to_array(attribute.t)
        shown = ", ".join(map(str, values.reshape(-1)[:ELEMENTS_SHOWN]))
        more = ", …" if values.size > ELEMENTS_SHOWN else ""
        return f"{dtype_name(attribute.t.data_type)}{list(values.shape)} {shown}{more}"
    if attribute.type in (attribute.TYPE_PROTO, attribute.SPARSE_TENSOR):
        return "…"
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _weights(before: Structure, after: Structure) -> Iterator[str]:
    """Large weights that came, went or changed their type; and all, however small, that have other values."""
    old, new = ({t.name: t for t in structure.model.graph.initializer} for structure in (before, after))
    was, now = ({name: f"{dtype_name(t.data_type)}{list(t.dims)}" for name, t in kept.items()} for kept in (old, new))
    yield from _replaced(
        {name: kind for name, kind in was.items() if name in before.weights or name in now},
        {name: kind for name, kind in now.items() if name in after.weights or name in was},
        "weight",
    )
    for name, tensor in new.items():
        if was.get(name) == now[name] and not _same_values(before, old[name], after, tensor):
            yield f"~ weight {name} {now[name]}: other values"


def _same_values(before: Structure, old: onnx.TensorProto, after: Structure, new: onnx.TensorProto) -> bool:
    if new.name not in after.weights or new.name not in before.weights:
        return old.raw_data == new.raw_data
    was, now = before.weights[new.name], after.weights[new.name]
    return was is now or bytes(raw_values(was, old.data_type)) == bytes(raw_values(now, new.data_type))


def _replaced(old: Mapping[str, str], new: Mapping[str, str], role: str) -> Iterator[str]:
    """Lines for what has no equal on the other side, by name and type."""
    yield from (f"- {role} {name} {kind}" for name, kind in old.items() if name not in new)
    yield from (f"+ {role} {name} {kind}" for name, kind in new.items() if name not in old)
    for name, kind in new.items():
        if old.get(name, kind) != kind:
            yield f"~ {role} {name}: {old[name]} → {kind}"


def _typed(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = ", ".join(d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim)
    return f"{dtype_name(tensor.elem_type)}[{sizes}]"
