"""The pass `split-packed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llmc.passes.base import Context, NearMiss, Pass, PassResult
from llmc.passes.fuse.packed_views import (
    PICKS,
    Step,
    View,
    can_make,
    make,
    moved,
    parts,
    steps,
)
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Rowwise,
    Tensor,
    fresh_names,
    loaded,
    metadata,
    module_of,
    onnx_dtype,
    outputs_of_scopes,
    rows_of,
    scopes,
)
from llmc.passes.match import called
from llmc.passes.pattern import Builder
from llmc.passes.placement import Placement
from llmc.passes.rewrite import merged_metadata
from llmc.passes.shapes.dimension import Dimension, Shape
from llmc.passes.shapes.dimensions import Dimensions

RULE = "packed"


class NotPackedError(Exception):
    """The first thing that keeps parts from being a Split."""


@dataclass(frozen=True)
class Part:
    """A tensor that takes columns of x [..., n], and how."""

    tensor: Tensor
    view: View

    @property
    def width(self) -> Dimension:
        return Dimension.of(self.view.columns.size)

    def first(self) -> int:
        """The first column."""
        return int(self.view.columns.flat[0])


@dataclass(frozen=True)
class Product:
    """`MatMul(x, weight)`, or that plus `bias`, or both in a Gemm: what packs the parts."""

    node: Node
    weight: Constant
    bias: Constant | None


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    x: Tensor
    shape: Shape
    """Of x, its axes in the order that they are brought to."""
    parts: list[Part]
    made: list[list[Step]]
    """The steps from each part of the Split to its tensor."""
    columns: Array | None
    """The order that the columns must be brought to; None where they are in it."""
    order: list[int]
    """The order that the other axes must be brought to."""
    product: Product | None

    def describe(self) -> str:
        if len(self.parts) == 1:
            return "one Reshape and Transpose for several"
        return f"{len(self.parts)} parts{', their columns put in order' if self.columns is not None else ''}"


class SplitPacked(Pass):
    """Takes a packed tensor apart with one Split, where a graph gives its parts axes of their own and picks each one.

    x [..., n], any type: Reshape, Transpose, Squeeze, Unsqueeze that give the columns of x axes of their own; then
    Gather, GatherND, Slice or Split, which pick parts along these; then more of the first →
    `Split(x, parts, axis=-1)`, and at most Reshape, Transpose and Reshape behind each part.
    torch.nn.MultiheadAttention takes queries, keys and values apart like that, so do timm, GPT-NeoX, BLOOM and Falcon.

    Where the columns of a part do not stand together, as of [..., heads, 3, size], those of the product that makes x
    are moved: `MatMul(y, weight [m, n])` → `MatMul(y, weight[:, order])`, its bias as well, or both of a Gemm. Weight
    and bias must be constants that nothing else reads. The weight is put in order when it is read.

    Where all parts swap sequence and batch, y is transposed instead: attention then finds [batch, sequence, heads ·
    size]. A tensor that is not taken apart, but goes through several such nodes, needs no more than these three.

    **Safety:** exact; where columns of a product are moved tolerance, each number being the same sum, which a kernel
    may add in another order (float32: 1e-6 of the largest value).

    Source: torch.nn.functional, `_in_projection_packed`; transformers, GPTNeoXAttention and BloomAttention; ONNX
    operators Gather-13, Slice-13 and Split-18.
    """

    after: ClassVar = ("fold-constants", "fuse-rotary-embedding")
    safety: ClassVar = "tolerance"

    def run(self, graph: Graph, context: Context) -> PassResult:
        result = PassResult()
        context.infer_shapes(graph)
        packed = _Packed(graph)
        for scope in scopes(graph):
            packed.enter(scope)
            for node in [n for n in scope.nodes if n.op == "Reshape" and not n.domain]:
                try:
                    plan = packed.plan(node) if node.inputs else None  # it may have gone with one before it
                except NotPackedError as reason:
                    result.near_misses.append(NearMiss(RULE, node.name, str(reason), module_of(node)))
                    continue
                if plan is not None and context.apply(result, RULE, node, plan.describe()):
                    packed.replace(node, plan)
            packed.placement.finish()
        return result


class _Packed:
    """One run of the pass over a graph whose shapes have been inferred."""

    def __init__(self, graph: Graph) -> None:
        self.opset, self.dims = graph.opset, Dimensions(graph)
        self.given_back = outputs_of_scopes(graph)
        self.fresh: Callable[[str], str] = fresh_names(graph)

    def enter(self, scope: Graph) -> None:
        """Look at the nodes of one scope."""
        self.placement = Placement(scope, self.given_back)
        self.inside = {id(node) for node in scope.nodes}

    def plan(self, reshape: Node) -> Plan | None:
        """How to take the parts that a Reshape tells apart; None where it tells none apart. Raises NotPackedError."""
        x = reshape.inputs[0]
        shape = self.dims.of(x)
        whole = View.whole(shape) if shape is not None and len(shape) > 1 else None
        view = moved(reshape, whole, shape, self.dims) if whole is not None and shape is not None else None
        if view is None or shape is None or view.columns.ndim < 2:
            return None
        found = sorted(self._parts(reshape.outputs[0], view, shape), key=Part.first)
        taken = np.concatenate([part.view.columns.reshape(-1) for part in found])
        columns = None if np.array_equal(taken, np.arange(shape[-1].number or 0)) else taken
        if len(found) == 1 and (columns is not None or self._length(found[0].tensor, x) < 3):
            return None
        if columns is not None and not np.array_equal(np.sort(taken), np.arange(shape[-1].number or 0)):
            raise NotPackedError(f"of the columns of '{x.name}' not each is taken once")
        maker = self._product(x)
        if columns is not None and isinstance(maker, str):
            raise NotPackedError(f"the columns of its parts do not stand together, and {maker}")
        product = None if isinstance(maker, str) else maker
        order = list(range(len(shape) - 1))
        orders = {tuple(part.view.order) for part in found}
        if product is not None and len(orders) == 1 and sorted(*orders) == order:
            order = list(*orders)
        given = tuple(shape[axis] for axis in [*order, -1])
        made = [steps(part.view.in_order(order), given) for part in found]
        if len(found) == 1 and len(made[0]) >= self._length(found[0].tensor, x):
            return None
        if not all(can_make((*given[:-1], part.width), plan) for part, plan in zip(found, made, strict=True)):
            raise NotPackedError("the shape of a part would have to be computed in each run")
        return Plan(x, given, found, made, columns, order, product)

    def _parts(self, tensor: Tensor, view: View, x: Shape, picked: bool = False) -> Iterator[Part]:
        """The tensors that take columns of x, as far down as they do nothing else; of parts, parts are not taken."""
        found = Part(tensor, view)
        while (user := self._only_user(tensor)) is not None:
            following = moved(user, view, x, self.dims)
            if following is None:
                break
            tensor, view = user.outputs[0], following
            if can_make((*x[:-1], Part(tensor, view).width), steps(view, x)):
                found = Part(tensor, view)
        users = self._users(tensor)
        taken = [self._taken(user, view, x) for user in users]
        if picked or not any(user.op in PICKS for user in users) or None in taken:
            yield found
            return
        if id(tensor) in self.given_back:
            raise NotPackedError(f"'{tensor.name}', the parts side by side, is an output of the graph")
        for user, views in zip(users, taken, strict=True):
            for output, part in zip(user.outputs, views or [], strict=True):
                if part is None:
                    raise NotPackedError(f"{called(user)} takes not one part that is known")
                yield from self._parts(output, part, x, picked=user.op in PICKS)

    def _taken(self, user: Node, view: View, x: Shape) -> list[View | None] | None:
        """What a node beside others makes of a view: parts, or all of it moved; None where it does something else."""
        if id(user) not in self.inside:
            return None
        following = moved(user, view, x, self.dims)
        return parts(user, view, self.dims) if user.op in PICKS else None if following is None else [following]

    def _users(self, tensor: Tensor) -> list[Node]:
        """The nodes that read a tensor, but for those whose results nobody reads."""
        users = [u for u in tensor.outputs if any(o.outputs or id(o) in self.given_back for o in u.outputs)]
        return users if all(u.inputs[0] is tensor and not u.domain for u in users) else []

    def _only_user(self, tensor: Tensor) -> Node | None:
        users = self._users(tensor)
        alone = len(users) == 1 and id(users[0]) in self.inside and id(tensor) not in self.given_back
        return users[0] if alone else None

    def _length(self, tensor: Tensor, x: Tensor) -> int:
        """The nodes between x and a tensor."""
        count = 0
        while tensor is not x:
            tensor, count = tensor.inputs[0].inputs[0], count + 1
        return count

    def _product(self, x: Tensor) -> Product | str:
        """The product that makes x, of which nothing else may know; else what stands against changing it."""
        node: Node | None = x.inputs[0] if x.inputs else None
        bias: Tensor | None = None
        inner = [x]
        if node is not None and node.op == "Add" and not node.domain:
            sums = [(t, node.inputs[1 - index]) for index, t in enumerate(node.inputs) if isinstance(t, Constant)]
            if len(sums) == 1:
                bias, tensor = sums[0]
                node = tensor.inputs[0] if tensor.inputs else None
                inner.append(tensor)
        elif node is not None and node.op == "Gemm" and len(node.inputs) > 2 and not node.inputs[2].is_empty():
            bias = node.inputs[2]
        if node is None or node.op not in ("MatMul", "Gemm") or node.domain or id(node) not in self.inside:
            return f"'{x.name}' is made by no MatMul or Gemm"
        if any(len(tensor.outputs) != 1 or id(tensor) in self.given_back for tensor in inner):
            return f"what {called(node)} makes is used elsewhere too"
        weight = node.inputs[1]
        for constant, shape in ((weight, 2), (bias, 1)):
            if constant is None:
                continue
            if not isinstance(constant, Constant) or len(constant.shape) != shape or len(constant.outputs) != 1:
                return f"'{constant.name}' of {called(node)} is no constant for it alone"
        assert isinstance(weight, Constant)
        width = weight.shape[0 if node.attrs.get("transB", 0) else 1]
        if isinstance(bias, Constant) and list(bias.shape) != [width]:
            return f"'{bias.name}' is no bias of the columns"
        return Product(node, weight, bias if isinstance(bias, Constant) else None)

    def replace(self, reshape: Node, plan: Plan) -> None:
        """Do it."""
        op: Any = Builder(self.opset, self.fresh, reshape.name)
        x = plan.x
        if plan.product is not None and (plan.columns is not None or plan.order != sorted(plan.order)):
            x = self._remade(op, plan.product, plan)
        widths = [part.view.columns.size for part in plan.parts]
        if len(widths) == 1:
            split = (x,)
        elif len(set(widths)) > 1:
            split = op.Split(x, split=widths, axis=-1, outputs=len(widths))
        else:
            counted = {"num_outputs": len(widths)} if self.opset >= 18 else {}
            split = op.Split(x, axis=-1, outputs=len(widths), **counted)
        made = [
            make(op, tensor, (*plan.shape[:-1], part.width), how)
            for tensor, part, how in zip(split, plan.parts, plan.made, strict=True)
        ]
        if made[0] is plan.x:  # a chain that comes back to where it began
            made = [op.Identity(plan.x)]
        for node in op.nodes:
            if not metadata(node):
                metadata(node).update(merged_metadata(reshape, [reshape]))
        self.placement.after(reshape, op.nodes)
        for maker in {id(part.tensor.inputs[0]): part.tensor.inputs[0] for part in plan.parts}.values():
            self.placement.remove(maker)
        for part, new in zip(plan.parts, made, strict=True):
            maker = new.inputs[0]
            maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is new)] = part.tensor
        self.dims.follow(op.nodes)

    def _remade(self, op: Any, product: Product, plan: Plan) -> Tensor:
        """The product with its columns, and the axes before them, in the order of the plan."""
        node = product.node
        y, weight, bias = node.inputs[0], product.weight, product.bias
        if plan.order != sorted(plan.order):
            y = op.Transpose(y, perm=[*plan.order, len(plan.order)])
        if plan.columns is not None:
            weight = self._columns(weight, plan.columns, 0 if node.attrs.get("transB", 0) else 1)
            bias = self._columns(bias, plan.columns, 0) if bias is not None else None
        if node.op == "Gemm":
            made = op.Gemm(y, weight, *([] if bias is None else [bias]), **node.attrs)
        else:
            made = op.MatMul(y, weight)
        result: Tensor = made
        made.inputs[0].name = node.name
        if node.op == "MatMul" and bias is not None:
            result = op.Add(made, bias)
        for new in op.nodes:
            metadata(new).update(metadata(node))
        return result

    def _columns(self, constant: Constant, columns: Array, axis: int) -> Constant:
        """A weight or bias with its columns in this order, whenever it is read."""
        held = constant._values  # as it is now

        def ordered(rows: slice) -> Array:
            return rows_of(held, rows).take(columns, 1) if axis else loaded(held).take(columns[rows], 0)

        values = Rowwise(onnx_dtype(constant), tuple(map(int, constant.shape)), ordered)
        return Constant(self.fresh(f"{constant.name}_in_order"), values)
