"""Tensor by tensor along the graph: where an error appears, and how it grows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llmc.compiler.blame.report import TensorError
from llmc.compiler.loaders import Feeds
from llmc.compiler.session import Session
from llmc.compiler.verification import compare
from llmc.passes.graph import (
    Array,
    Constant,
    Graph,
    Node,
    Tensor,
    dtype_name,
    module_of,
    onnx_dtype,
    outer_tensors,
)

AT_ONCE = 1 << 30
"""Bytes of tensors, about, that are held of each graph at one time."""


def growth(before: Graph, after: Graph, sample: Feeds, names: Sequence[str] | None = None) -> list[TensorError]:
    """How far apart each tensor that both graphs compute is, matched by name, in the order of `after`.

    Floating-point results of outer nodes, of the same shape in both, or those of `names` among them. What was fused
    away in one of them has no name there, and is left out; its region's results stay.
    """
    makers = {t.name: (node, t) for node in after.nodes for t in node.outputs if t.name and not isinstance(t, Constant)}
    earlier = {t.name: node for node in before.nodes for t in node.outputs if t.name}
    common = [name for name in makers if name in earlier and (names is None or name in names)]
    errors = []
    for expected, found in _values(before, after, common, sample):
        for name, value in expected.items():
            if value.dtype.kind in "fV" and value.shape == found[name].shape:
                errors.append(_error(*makers[name], earlier[name], value, found[name]))
    return errors


def _values(
    before: Graph, after: Graph, names: Sequence[str], sample: Feeds
) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array]]]:
    """The values in both graphs, as many tensors at a time as memory shall hold."""
    one, other = Session(before, names), Session(after, names)
    batch: list[str] = []
    known, held = outer_tensors(after), 0
    for name in names:
        held += _bytes(known[name], sample)
        batch.append(name)
        if held > AT_ONCE:
            yield one.run(sample, batch), other.run(sample, batch)
            batch, held = [], 0
    if batch:
        yield one.run(sample, batch), other.run(sample, batch)


def _bytes(tensor: Tensor, sample: Feeds) -> int:
    """About as many as the tensor has: a size that is not known is taken for the largest one of the inputs."""
    most = max((size for value in sample.values() for size in value.shape), default=1)
    return 4 * int(np.prod([size if isinstance(size, int) else most for size in tensor.shape or ()], dtype=np.int64))


def _error(node: Node, tensor: Tensor, origin: Node, expected: Array, found: Array) -> TensorError:
    (line,) = compare([({tensor.name: expected}, {tensor.name: found})])
    return TensorError(
        tensor=tensor.name,
        node=node.name,
        op=node.op,
        module=module_of(node) or module_of(origin),
        dtype=dtype_name(onnx_dtype(tensor)),
        relative_l2=line.relative_l2,
        max_abs=line.max_abs,
        cosine=line.cosine,
        finite=line.finite,
        expected=_range(expected),
        found=_range(found),
    )


def _range(value: Array) -> tuple[float, float]:
    """The least and the largest value that is finite; NaN where none is."""
    finite = value.astype(np.float64)
    finite = finite[np.isfinite(finite)]
    return (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)


def differs(error: TensorError) -> bool:
    """Whether the values are not the same, bit for bit."""
    return not error.finite or error.max_abs != 0


def landmarks(errors: Sequence[TensorError], most: int) -> list[TensorError]:
    """The lines that tell the story, in graph order: where it begins, where it jumps up most, and the end."""
    changed = [error for error in errors if differs(error)]
    if len(changed) <= most:
        return changed
    sizes = [_size(error) for error in changed]
    jumps = sorted(range(1, len(changed)), key=lambda i: sizes[i - 1] / sizes[i])
    chosen = {0, len(changed) - 1, *jumps[: most - 2]}
    return [error for index, error in enumerate(changed) if index in chosen]


def _size(error: TensorError) -> float:
    """The relative error, with a floor and a ceiling that ratios can be made of."""
    value = error.relative_l2 if error.finite and error.relative_l2 is not None else np.inf
    return float(min(max(value, 1e-12), 1e12))
