"""What nodes lose in 16 bits: twins of them, fed with rounded values, beside them in the graph as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

from llmc.passes.base import Activations
from llmc.passes.graph import Constant, Graph, Node, Tensor, Variable, copy_graph, fresh_names, numpy_dtype, onnx_dtype
from llmc.passes.precision.half import FLOAT, Half
from llmc.passes.simplify.evaluate import MOVE

SAMPLES = 4
"""Samples that losses are measured on: rounding is alike on all."""
DEEPEST = 4
"""Nodes in a row that may have to stay as they are for the sake of the last."""


@dataclass(frozen=True)
class Trial:
    """A node to try, with the nodes before it that stay as they are for its sake; none: it changes itself."""

    node: str
    exact: frozenset[str] = frozenset()


@dataclass
class Lossy:
    """What has to stay as it is, so that rounding does no more harm than it must."""

    kept: dict[str, str]
    """Node → why."""
    hopeless: dict[str, float]
    """Node → its loss, where it is as large whatever stays as it is before it."""


def find_lossy(
    graph: Graph, nodes: Sequence[str], half: Half, limit: float, activations: Activations, *, border: bool
) -> Lossy:
    """Which of the nodes lose more than `limit`, and the fewest before each that have to stay as they are with it.

    With `border` the inputs of the graph change too. `graph` is left as it is.
    """
    found = Lossy({}, {})
    trials = [Trial(name) for name in nodes]
    for depth in range(DEEPEST + 1):
        if not trials:
            break
        measured = losses(copy_graph(graph), trials, half, activations, SAMPLES, border=border)
        above = []
        for trial, loss in zip(trials, measured, strict=True):
            if loss > limit:
                above.append(trial)
                found.hopeless.setdefault(trial.node, loss)
            elif depth:
                loss = found.hopeless.pop(trial.node)
                reason = f"'{trial.node}' is {loss:.2%} off on the data with {half.name} before it"
                for name in trial.exact:
                    found.kept.setdefault(name, reason)
        trials = _widened(graph, above, half)
    return found


def _widened(graph: Graph, trials: Sequence[Trial], half: Half) -> list[Trial]:
    """The trials with one more node before each; all that only moves values on the way belongs to it."""
    by_name = {node.name: node for node in graph.nodes}
    wider = []
    for trial in trials:
        if not trial.exact:
            wider.append(Trial(trial.node, frozenset({trial.node})))
            continue
        exact = set(trial.exact)
        waiting = [t for name in trial.exact for t in by_name[name].inputs]
        while waiting:
            tensor = waiting.pop()
            maker = tensor.inputs[0] if tensor.inputs else None
            changes = onnx_dtype(tensor) in half.sources
            if changes and maker is not None and maker.name not in exact and maker.name in by_name:
                exact.add(maker.name)
                waiting += maker.inputs if maker.op in MOVE else []
        if exact != trial.exact:
            wider.append(Trial(trial.node, frozenset(exact)))
    return wider


def losses(
    graph: Graph, trials: Sequence[Trial], half: Half, activations: Activations, samples: int, *, border: bool = False
) -> list[float]:
    """For each trial the L2 norm of what rounding does to the node's results, over that of the results.

    Rounded is what nodes of the trial that stay as they are read from others, and where it has none, all that the node
    reads, and what it gives. All other values are those of the model as it is on the data. Infinite where rounding
    makes an infinity or NaN that it has not. `graph` is a copy to spoil; with `border` its inputs are rounded for nodes
    that stay too.
    """
    twins = _Twins(graph, half, border)
    measured = [twins.add(trial) for trial in trials]
    graph.nodes = twins.nodes
    sums = [[0.0, 0.0] for _ in trials]
    for _, values in activations.stream(graph, [name for pair in measured for name in pair], samples):
        for total, pair in zip(sums, measured, strict=True):
            signal, noise = (float(values[name]) for name in pair)
            if isfinite(signal):  # infinities of the model itself say nothing
                total[0] += signal
                total[1] += noise if isfinite(noise) else inf
    return [sqrt(noise / signal) if signal else (inf if noise else 0.0) for signal, noise in sums]


class _Twins:
    """Builds the twins; every tensor is rounded once, whoever reads it."""

    def __init__(self, graph: Graph, half: Half, border: bool) -> None:
        self.half = half
        self.stay = set() if border else {id(tensor) for tensor in graph.inputs}
        self.fresh = fresh_names(graph)
        self.by_name = {node.name: node for node in graph.nodes}
        self.rounded: dict[int, Tensor] = {}
        self.order = {id(node): index for index, node in enumerate(graph.nodes)}
        self.nodes = list(graph.nodes)

    def add(self, trial: Trial) -> tuple[str, str]:
        """The names of the scalars that hold the sums of squares of the node's results, and of what they are off."""
        made: dict[int, Tensor] = {}
        exact = trial.exact
        for node in sorted((self.by_name[name] for name in {trial.node, *exact}), key=lambda n: self.order[id(n)]):
            inputs = [made.get(id(tensor)) or self._read(tensor, bool(exact)) for tensor in node.inputs]
            outputs = [Variable(self.fresh(f"{t.name}_twin"), t.dtype, t.shape) if t.name else t for t in node.outputs]
            self.nodes.append(Node(node.op, self.fresh(f"{node.name}_twin"), dict(node.attrs), inputs, outputs))
            self.nodes[-1].domain = node.domain
            made.update((id(old), new) for old, new in zip(node.outputs, outputs, strict=True))
        result = self.by_name[trial.node].outputs[0]
        found = made[id(result)] if exact else self._round(made[id(result)])
        result, found = self._wide(result), self._wide(found)
        off = self._node("Sub", [result, found], "off")
        return self._squares(result), self._squares(off)

    def _read(self, tensor: Tensor, exact: bool) -> Tensor:
        """What a twin reads: rounded, unless its type does not change, or a node that stays finds it as it was."""
        as_it_was = isinstance(tensor, Constant) or id(tensor) in self.stay
        changes = onnx_dtype(tensor) in self.half.sources and tensor.name
        return self._round(tensor) if changes and not (exact and as_it_was) else tensor

    def _round(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.rounded:
            narrow = self._node("Cast", [tensor], self.half.name, self.half.dtype, to=self.half.dtype)
            kind = onnx_dtype(tensor)
            self.rounded[id(tensor)] = self._node("Cast", [narrow], "rounded", kind, to=kind)
        return self.rounded[id(tensor)]

    def _wide(self, tensor: Tensor) -> Tensor:
        """In float32, whose squares do not overflow."""
        return tensor if onnx_dtype(tensor) == FLOAT else self._node("Cast", [tensor], "wide", to=FLOAT)

    def _squares(self, tensor: Tensor) -> str:
        return str(self._node("ReduceSumSquare", [tensor], "squares", keepdims=0).name)

    def _node(self, op: str, inputs: list[Tensor], what: str, dtype: int = FLOAT, **attributes: int) -> Variable:
        made = Variable(self.fresh(f"{inputs[0].name}_{what}"), numpy_dtype(dtype))
        self.nodes.append(Node(op, self.fresh(f"{made.name}/{op}"), attributes, inputs, [made]))
        return made
