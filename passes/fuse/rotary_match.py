"""Finds rotary position embedding, spelled out around a Neg or a Sub, and says what it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.passes.fuse.attention_match import producer, single, users_of
from llmc.passes.graph import Constant, Node, Tensor, constant_value
from llmc.passes.match import attribute, called, position
from llmc.passes.shapes.dimension import ONE, Dimension
from llmc.passes.shapes.dimensions import Dimensions
from llmc.passes.shapes.shape_rules import slice_inputs

KEEPS_ELEMENTS = {"Cast", "Cos", "Gather", "Identity", "Mul", "Sin", "Slice", "Squeeze", "Unsqueeze"}
"""Operators between two equal halves and a cosine that is multiplied with, which do the same to both."""


class NotRotaryError(Exception):
    """The first thing that stops a Neg or Sub from being part of a rotary embedding."""


@dataclass(frozen=True)
class Part:
    """`source[..., start:end:step]` along the last axis."""

    source: Tensor
    start: int
    end: int
    step: int


@dataclass(frozen=True)
class Half:
    """Half of a table of cosines or sines: `source`, and what was done to it, the last node first."""

    source: Tensor | np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    done: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Rotation:
    """y of x [batch, heads, sequence, size], whose first `size` elements are rotated."""

    root: Node
    x: Tensor
    cos: Half
    sin: Half
    cos_shape: Tensor
    """The tensor that is multiplied with, for its shape."""
    size: int
    interleaved: bool


class RotaryMatcher:
    """Looks at a Neg, or at a Sub, and around it. `given_back` are the ids of all graphs' outputs."""

    def __init__(self, dims: Dimensions, given_back: set[int]) -> None:
        self.dims, self.given_back = dims, given_back

    def at(self, node: Node) -> Rotation:
        """The rotation that a Neg or Sub is the heart of. Raises NotRotaryError."""
        rotation = self._negated(node) if node.op == "Neg" else self._subtracted(node)
        return self._widened(rotation)

    def _negated(self, negation: Node) -> Rotation:
        """`x · cos + concat(-second, first) · sin`."""
        second = self._part(negation.inputs[0])
        joined = self._only_user(negation.outputs[0])
        interleaved = second.step == 2
        if interleaved:
            joined = self._only_user(joined.outputs[0]) if joined.op in ("Unsqueeze", "Reshape") else joined
        first = self._other_half(joined, second, 1)
        if interleaved:
            joined = self._only_user(joined.outputs[0])
        turned = self._only_user(joined.outputs[0])
        total = self._only_user(turned.outputs[0]) if turned.op == "Mul" else turned
        if turned.op != "Mul" or total.op != "Add":
            raise NotRotaryError(f"the rotated halves go to {called(turned)}, where the sine and a sum are needed")
        straight = producer(_other(total, turned.outputs[0]))
        if straight is None or straight.op != "Mul" or not any(t is first.source for t in straight.inputs):
            raise NotRotaryError(f"{called(total)} adds no product of '{first.source.name}' and the cosine")
        self._only_user(straight.outputs[0])
        cos, sin = _other(straight, first.source), _other(turned, joined.outputs[0])
        size = self._size(first.source)
        return Rotation(
            total, first.source, self.half(cos, interleaved), self.half(sin, interleaved), cos, size, interleaved
        )

    def _subtracted(self, difference: Node) -> Rotation:
        """`concat(first · cos - second · sin, first · sin + second · cos)`."""
        products = [producer(tensor) for tensor in difference.inputs]
        if any(node is None or node.op != "Mul" for node in products):
            raise NotRotaryError(f"{called(difference)} is no difference of products")
        joined = self._only_user(difference.outputs[0])
        interleaved = joined.op in ("Unsqueeze", "Reshape")
        if interleaved:
            joined = self._only_user(joined.outputs[0])
        if joined.op != "Concat" or len(joined.inputs) != 2:
            raise NotRotaryError(f"the result of {called(difference)} goes to {called(joined)}, where Concat is needed")
        other = producer(joined.inputs[1])
        total = producer(other.inputs[0]) if interleaved and other is not None else other
        if total is None or total.op != "Add":
            raise NotRotaryError(f"{called(joined)} joins no sum to the difference")
        first, cos, second, sin = self._factors(difference)
        wanted = {frozenset((id(first), id(sin))), frozenset((id(second), id(cos)))}
        found = {frozenset(map(id, node.inputs)) for t in total.inputs if (node := producer(t)) is not None}
        if wanted != found:
            raise NotRotaryError(f"{called(total)} is no sum of the products crosswise")
        parts = self._part(first), self._part(second)
        size = self._size(parts[0].source)
        stride = (0, size, 2), (1, size, 2)
        halves = stride if interleaved else ((0, size // 2, 1), (size // 2, size, 1))
        if parts[0].source is not parts[1].source or tuple((p.start, p.end, p.step) for p in parts) != halves:
            raise NotRotaryError(f"'{first.name}' and '{second.name}' are not the halves of one tensor")
        root = self._only_user(joined.outputs[0]) if interleaved else joined
        return Rotation(root, parts[0].source, Half(cos), Half(sin), cos, size, interleaved)

    def _factors(self, difference: Node) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """first, cos, second, sin of `first · cos - second · sin`."""
        found: list[Tensor] = []
        for tensor in difference.inputs:
            left, right = tensor.inputs[0].inputs
            if not self._is_part(left):
                left, right = right, left
            found += [left, right]
        first, cos, second, sin = found
        return first, cos, second, sin

    def _is_part(self, tensor: Tensor) -> bool:
        try:
            return bool(self._part(tensor).source)
        except NotRotaryError:
            return False

    def _widened(self, rotation: Rotation) -> Rotation:
        """The same of a larger x, where x is its first part, and the rest is put back behind the result."""
        users = users_of(rotation.root.outputs[0])
        join = users[0] if len(users) == 1 and id(rotation.root.outputs[0]) not in self.given_back else None
        if (
            join is None
            or join.op != "Concat"
            or len(join.inputs) != 2
            or join.inputs[0] is not rotation.root.outputs[0]
        ):
            return rotation
        try:
            rest = self._part(join.inputs[1])
            size = self._size(rest.source)
        except NotRotaryError:
            return rotation
        if (rest.start, rest.end, rest.step) != (rotation.size, size, 1):
            return rotation
        front = self._part(rotation.x) if rest.source is not rotation.x else None
        if front is not None and (front.source, front.start, front.end) != (rest.source, 0, rotation.size):
            return rotation
        cos, sin, shape = rotation.cos, rotation.sin, rotation.cos_shape
        return Rotation(join, rest.source, cos, sin, shape, rotation.size, rotation.interleaved)

    def _other_half(self, joined: Node, second: Part, which: int) -> Part:
        """The half that a Concat puts behind the negated one."""
        if joined.op != "Concat" or len(joined.inputs) != 2:
            raise NotRotaryError(f"the negated half goes to {called(joined)}, where Concat of two is needed")
        tensor = joined.inputs[which]
        maker = producer(tensor)
        if second.step == 2 and maker is not None and maker.op in ("Unsqueeze", "Reshape"):
            tensor = maker.inputs[0]
        first = self._part(tensor)
        size = self._size(second.source)
        wanted = (0, size, 2) if second.step == 2 else (0, second.start, 1)
        if first.source is not second.source or (first.start, first.end, first.step) != wanted:
            raise NotRotaryError(f"'{tensor.name}' is not the first half of '{second.source.name}'")
        if (second.start, second.end) != ((1, size) if second.step == 2 else (size // 2, size)) or size % 2:
            raise NotRotaryError(f"'{second.source.name}' is not split into halves")
        return first

    def _part(self, tensor: Tensor) -> Part:
        """The piece of the last axis of another tensor that this one is."""
        node = producer(tensor)
        if node is not None and node.op == "Split":
            return self._split(node, tensor)
        if node is None or node.op != "Slice" or len(node.inputs) < 3:
            raise NotRotaryError(f"'{tensor.name}' is no part of another tensor")
        size = self._size(node.inputs[0])
        shape = self.dims.of(node.inputs[0]) or ()
        starts, ends, axes, steps = slice_inputs(self.dims, node, len(shape))
        if axes != [len(shape) - 1] or not starts or not ends or not steps or starts[0] is None or ends[0] is None:
            raise NotRotaryError(f"{called(node)} does not take a known part of the last axis")
        picked = range(size)[starts[0].number : ends[0].number : steps[0]]
        return Part(node.inputs[0], picked.start, picked.stop, picked.step)

    def _split(self, node: Node, tensor: Tensor) -> Part:
        shape = self.dims.of(node.inputs[0]) or ()
        sizes = [(self.dims.of(output) or (None,))[-1] for output in node.outputs]
        numbers = [size.number if size is not None else None for size in sizes]
        if node.attrs.get("axis", 0) % max(len(shape), 1) != len(shape) - 1 or None in numbers:
            raise NotRotaryError(f"{called(node)} does not take known parts of the last axis")
        before = sum(n or 0 for n in numbers[: position(node, tensor)])
        return Part(node.inputs[0], before, before + (numbers[position(node, tensor)] or 0), 1)

    def _size(self, tensor: Tensor) -> int:
        shape = self.dims.of(tensor)
        if not shape or shape[-1].number is None:
            raise NotRotaryError(f"the size of the last axis of '{tensor.name}' is not known")
        return shape[-1].number

    def _only_user(self, tensor: Tensor) -> Node:
        users = users_of(tensor)
        if id(tensor) in self.given_back or len(users) != 1:
            raise NotRotaryError(f"'{tensor.name}', inside the pattern, is an output of the graph or used twice")
        return users[0]

    def half(self, tensor: Tensor, interleaved: bool) -> Half:
        """One of the two equal halves (or of the pairs of equals) that a table of cosines or sines is made of."""
        done: list[Node] = []
        while (node := producer(tensor)) is not None:
            doubled = self._doubled(node, interleaved)
            if doubled is not None:
                return Half(doubled, tuple(done))
            if not self._keeps_halves(node):
                raise NotRotaryError(f"'{tensor.name}' comes from {called(node)}: its halves are not known to be equal")
            done.append(node)
            tensor = next(t for t in node.inputs if single(t) is None) if node.op == "Mul" else node.inputs[0]
        value = constant_value(tensor) if isinstance(tensor, Constant) else None
        if value is None or not value.ndim:
            raise NotRotaryError(f"the halves of '{tensor.name}' are not known to be equal")
        middle = value.shape[-1] // 2
        first, second = (
            (value[..., 0::2], value[..., 1::2]) if interleaved else (value[..., :middle], value[..., middle:])
        )
        if not np.array_equal(first, second):
            raise NotRotaryError(f"the halves of '{tensor.name}' differ")
        return Half(np.ascontiguousarray(first), tuple(done))

    def _keeps_halves(self, node: Node) -> bool:
        if node.op not in KEEPS_ELEMENTS or node.domain:
            return False
        shape = self.dims.of(node.outputs[0])
        if node.op in ("Unsqueeze", "Squeeze"):
            before = self.dims.of(node.inputs[0])
            return before is not None and shape is not None and before[-1:] == shape[-1:]
        if node.op == "Mul":
            return sum(single(tensor) is None for tensor in node.inputs) == 1
        if node.op == "Gather":
            table = self.dims.of(node.inputs[0])
            return bool(node.attrs.get("axis", 0) == 0 and table is not None and len(table) > 1)
        if node.op == "Slice":  # of the places, not of the elements
            axes = slice_inputs(self.dims, node, len(shape))[2] if shape and len(node.inputs) > 2 else None
            return axes is not None and shape is not None and len(shape) - 1 not in axes
        return True

    def _doubled(self, node: Node, interleaved: bool) -> Tensor | None:
        """f of `Concat(f, f)`, or of `Reshape(Expand(Unsqueeze(f, -1), [..., 2]))` where pairs are equal."""
        shape = self.dims.of(node.outputs[0])
        if shape is None:
            return None
        if node.op == "Concat" and not interleaved:
            whole = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            return node.inputs[0] if whole and node.attrs["axis"] % len(shape) == len(shape) - 1 else None
        expand = producer(node.inputs[0]) if node.op == "Reshape" and interleaved else None
        insert = producer(expand.inputs[0]) if expand is not None and expand.op == "Expand" else None
        if expand is None or insert is None or insert.op != "Unsqueeze":
            return None
        source, inserted, pairs = (self.dims.of(t) for t in (insert.inputs[0], insert.outputs[0], expand.outputs[0]))
        two = Dimension.of(2)
        if source is None or inserted != (*source, ONE) or pairs != (*source, two):
            return None
        return insert.inputs[0] if shape == (*source[:-1], source[-1] * two) else None


def _other(node: Node, tensor: Tensor) -> Tensor:
    """The operand of a node that `tensor` is not."""
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def unsqueezes_heads(node: Node, rank: int, axis: int) -> bool:
    """Whether a node only makes room for heads: [b, s, d] → [b, 1, s, d] (axis 1) or [b, s, 1, d] (axis 2)."""
    axes = attribute(node, "axes") if node.op == "Unsqueeze" else None
    return axes is not None and rank == 4 and [given % 4 for given in axes] == [axis]
