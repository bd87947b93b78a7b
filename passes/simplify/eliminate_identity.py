"""The pass `eliminate-identity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    fresh_names,
    metadata,
    module_of,
    outputs_of_scopes,
    remove_nodes,
    scopes,
)
from llmc.passes.simplify.local_rules import Instead, Rules, Site, StaysError
from llmc.passes.simplify.masked_fill import MASKS
from llmc.passes.simplify.no_operations import NO_OPERATIONS
from llmc.passes.simplify.substitute import may_rename, substitute
from llmc.passes.simplify.views import PAIRS

RULES = Rules(NO_OPERATIONS, PAIRS, MASKS)


class EliminateIdentity(Pass):
    """Removes nodes that do nothing, and merges those that follow one another where one does the same.

    Nothing is done by: Identity; Dropout at inference; Cast to the type that is there; Transpose that keeps the order;
    Reshape, Flatten, Squeeze, Unsqueeze, Expand and Tile to the shape that is there (symbolic dimensions by name);
    Slice of everything, Pad of zero, Split into one, Resize by 1; Concat, Max, Min, Sum and Mean of one input;
    x + 0, x - 0, x * 1, x / 1, x ** 1, and the same with logical and bitwise operators, where broadcasting cannot
    change the shape; Where with a constant condition; Clip without bounds; reductions of no axes; Neg, Not of itself;
    Relu, Abs, Floor, Ceil, Round, Sign of itself.

    One of two is enough: Transpose of Transpose; Reshape, Flatten, Squeeze, Unsqueeze of each other, where the last
    shape alone decides (a 0 in it, which means a dimension of the shape between, is resolved first); Cast of Cast,
    a → b → c, where b holds every value of a: float16 → float32 → float16 is nothing, int32 → int64 → float32 is
    int32 → float32, float32 → float16 → float32 stays. ScatterND of one value to the places where a mask is true, which
    NonZero finds, is Where: TensorRT has no NonZero.

    Outputs of the graph keep their names. What only the removed nodes read is removed with them.

    **Safety:** exact, but for the sign of zero: -0.0 + 0.0 is 0.0, and is -0.0 without the addition.

    Source: ONNX operator specifications; IEEE 754-2019, section 6.3 (the sign bit).
    """

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        context.infer_shapes(graph)
        walk = _Walk(graph, context)
        all_scopes = scopes(graph)
        for scope in all_scopes:
            walk.simplify(scope)
        for scope in reversed(all_scopes):  # what inner scopes no longer read may be dead in outer ones
            walk.drop_bypassed(scope)
        return walk.result


class _Walk:
    """One run of the pass."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self.context, self.result = context, PassResult()
        self.opset = graph.opset
        self.given_back = outputs_of_scopes(graph)
        self.fresh: Callable[[str], str] = fresh_names(graph)
        self.bypassed: set[int] = set()
        """Ids of nodes that a rewrite has taken a reader from."""

    def simplify(self, scope: Graph) -> None:
        """Apply the rules to each node of one scope, in graph order, until none fits it any more."""
        made = {id(tensor) for node in scope.nodes for tensor in node.outputs}
        kept: list[Node] = []
        removed: list[Node] = []
        for node in scope.nodes:
            current: Node | None = node
            while current is not None:
                following = self.rewritten(current, made)
                if following is current:
                    break
                removed.append(current)
                current = following
            if current is not None:
                kept.append(current)
        if removed:
            scope.nodes = kept
            remove_nodes(scope, removed)

    def rewritten(self, node: Node, made: set[int]) -> Node | None:
        """The node itself, the one in its place, or None where its result is another tensor now."""
        if node.domain not in (None, "", "ai.onnx"):
            return node
        refusals = []
        for name, rule in RULES.by_operator.get(node.op, ()):
            try:
                outcome = rule(Site(node, self.opset))
                if outcome is None:
                    continue
                if isinstance(outcome, Tensor):
                    self.check(node, outcome, made)
            except StaysError as refusal:
                refusals.append(NearMiss(name, node.name, str(refusal), module_of(node)))
                continue
            if not self.context.apply(self.result, name, node, _detail(node, outcome)):
                return node
            self.bypassed.update(id(before) for tensor in node.inputs for before in tensor.inputs)
            if isinstance(outcome, Instead):
                return self.replace(node, outcome)
            return self.forward(node, outcome, made)
        self.result.near_misses.extend(refusals)
        return node

    def check(self, node: Node, same: Tensor, made: set[int]) -> None:
        """Raise StaysError where the node must stay although its first output is another tensor."""
        for tensor in node.outputs[1:]:
            if tensor.outputs or id(tensor) in self.given_back:
                raise StaysError(f"its output '{tensor.name}' is used too")
        result = node.outputs[0]
        if node.op == "Identity" and id(result) in self.given_back and not may_rename(same, self.given_back, made):
            raise StaysError(f"'{result.name}' is an output of the graph, and so is or cannot be '{same.name}'")

    def forward(self, node: Node, same: Tensor, made: set[int]) -> Node | None:
        """Let the node's first output be `same`; the Identity that an output of the graph may need."""
        result = node.outputs[0]
        list.clear(node.outputs)
        return substitute(result, same, self.given_back, made, node)

    def replace(self, node: Node, instead: Instead) -> Node:
        """The new node, which makes the old one's outputs."""
        inputs = [
            t if isinstance(t, Tensor) else Constant(self.fresh(f"{node.outputs[0].name}.shape"), t)
            for t in instead.inputs
        ]
        outputs = list(node.outputs)
        for tensor in outputs:
            list.clear(tensor.inputs)
        list.clear(node.outputs)
        new = Node(instead.op, node.name, instead.attributes, inputs, outputs)
        metadata(new).update(metadata(node))
        new.doc_string = node.doc_string
        return new

    def drop_bypassed(self, scope: Graph) -> None:
        """Remove what only removed nodes read, and what only that reads, and so on."""
        dead: list[Node] = []
        removed_readers: dict[int, int] = {}
        for node in reversed(scope.nodes):
            if id(node) in self.bypassed and not any(self.read(tensor, removed_readers) for tensor in node.outputs):
                dead.append(node)
                for tensor in _read_by(node):
                    removed_readers[id(tensor)] = removed_readers.get(id(tensor), 0) + 1
                    self.bypassed.update(id(before) for before in tensor.inputs)
        if dead:
            remove_nodes(scope, dead)

    def read(self, tensor: Tensor, removed_readers: dict[int, int]) -> bool:
        return id(tensor) in self.given_back or len(tensor.outputs) > removed_readers.get(id(tensor), 0)


def _read_by(node: Node) -> Iterator[Tensor]:
    """The inputs of a node and of all nodes in its subgraphs, each as often as it is read."""
    yield from node.inputs
    for subgraph in node.subgraphs():
        for inner in subgraph.nodes:
            yield from _read_by(inner)


def _detail(node: Node, outcome: Tensor | Instead) -> str:
    result = node.outputs[0].name
    if isinstance(outcome, Tensor):
        return f"'{result}' is '{outcome.name}'"
    return f"'{result}' is {outcome.op} of '{next(t.name for t in outcome.inputs if isinstance(t, Tensor))}'"
