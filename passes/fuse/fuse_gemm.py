"""The pass `fuse-gemm`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from llmc.passes.graph import Shape, Tensor, shape_of
from llmc.passes.rewrite import Attribute, Attributes, Rewrite, RewritePass, Weight


class GemmFromMatMul(Rewrite):
    """a · b + bias."""

    opset = 13

    def pattern(self, op: Any, a: Any, b: Any, bias: Weight) -> Any:
        return op.Add(op.MatMul(a, b), bias)

    def check(self, a: Any, b: Any, bias: Any) -> str | None:
        return _not_matrices(a, b) or _not_broadcast(bias, _sizes(a, b, 0, 0))

    def replace(self, op: Any, a: Any, b: Any, bias: Any) -> Any:
        return op.Gemm(a, b, bias)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        rows, inner, columns = (int(n) for n in rng.integers(2, 6, 3))
        bias = [(columns,), (1, columns), (1,)][int(rng.integers(3))]
        return {"a": (rows, inner), "b": (inner, columns), "bias": bias}


class GemmBias(Rewrite):
    """Gemm without a bias, and an Add."""

    opset = 13

    def pattern(
        self, op: Any, a: Any, b: Any, bias: Weight, flip_a: Attribute, flip_b: Attribute, others: Attributes
    ) -> Any:
        return op.Add(op.Gemm(a, b, transA=flip_a, transB=flip_b, others=others), bias)

    def check(self, a: Any, b: Any, bias: Any, flip_a: Any, flip_b: Any) -> str | None:
        return _not_matrices(a, b) or _not_broadcast(bias, _sizes(a, b, flip_a, flip_b))

    def replace(self, op: Any, a: Any, b: Any, bias: Any, flip_a: Any, flip_b: Any, others: Any) -> Any:
        return op.Gemm(a, b, bias, transA=flip_a, transB=flip_b, others={**others, "beta": 1.0})

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        values = GemmFromMatMul().example(rng)
        return values | {"a": values["a"][::-1], "flip_a": 1, "flip_b": 0, "others": {"alpha": 0.5}}


class _GemmTransposed(Rewrite):
    """Gemm of a transposed operand: the transposition becomes an attribute."""

    opset = 13

    def check(self, perm: Any) -> str | None:
        return None if perm in (None, [1, 0]) else f"the transposition is {perm}, [1, 0] is needed"

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        rows, inner, columns = (int(n) for n in rng.integers(2, 6, 3))
        shapes = {"a": (rows, inner), "b": (inner, columns), "bias": (columns,)}
        return shapes | {"perm": [1, 0], "flip": 0, "others": {"alpha": 0.5, "beta": 2.0}}


class GemmTransposedA(_GemmTransposed):
    """Gemm(aᵀ, b, bias)."""

    def pattern(self, op: Any, a: Any, b: Any, bias: Any, perm: Attribute, flip: Attribute, others: Attributes) -> Any:
        return op.Gemm(op.Transpose(a, perm=perm), b, op.optional(bias), transA=flip, others=others)

    def replace(self, op: Any, a: Any, b: Any, bias: Any, flip: Any, others: Any) -> Any:
        return op.Gemm(a, b, bias, transA=1 - flip, others=others)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        values = super().example(rng)
        return values | {"a": values["a"][::-1]}


class GemmTransposedB(_GemmTransposed):
    """Gemm(a, bᵀ, bias)."""

    def pattern(self, op: Any, a: Any, b: Any, bias: Any, perm: Attribute, flip: Attribute, others: Attributes) -> Any:
        return op.Gemm(a, op.Transpose(b, perm=perm), op.optional(bias), transB=flip, others=others)

    def replace(self, op: Any, a: Any, b: Any, bias: Any, flip: Any, others: Any) -> Any:
        return op.Gemm(a, b, bias, transB=1 - flip, others=others)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        values = super().example(rng)
        return values | {"b": values["b"][::-1]}


class TransposedRows(Rewrite):
    """A product and a bias between two Transposes of the axes that both leave alone, where the second undoes the first.

    torch.nn.MultiheadAttention with `batch_first` projects its result so.
    """

    def pattern(self, op: Any, x: Any, weight: Weight, bias: Weight, there: Attribute, back: Attribute) -> Any:
        product = op.MatMul(op.Transpose(x, perm=there), weight)
        return op.Transpose(op.Add(product, bias), perm=back)

    def check(self, weight: Any, bias: Any, there: Any, back: Any) -> str | None:
        if there is None or back is None or [there[axis] for axis in back] != sorted(there):
            return f"the transposition {back} does not undo {there}"
        if there[-1] != len(there) - 1:
            return f"the transposition {there} moves the last axis"
        if len(weight.shape) != 2 or len(bias.shape) != 1:
            return f"'{weight.name}' is no matrix, or '{bias.name}' no bias of its columns"
        return None

    def replace(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        outer, middle, inner, columns = (int(n) for n in rng.integers(2, 6, 4))
        shapes = {"x": (outer, middle, inner), "weight": (inner, columns), "bias": (columns,)}
        return shapes | {"there": [1, 0, 2], "back": [1, 0, 2]}


def _not_matrices(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        shape = shape_of(tensor)
        if shape is None or len(shape) != 2:
            return f"'{tensor.name}' has {'an unknown rank' if shape is None else f'{len(shape)} axes'}, Gemm takes 2"
    return None


def _sizes(a: Tensor, b: Tensor, transposed_a: int, transposed_b: int) -> Shape:
    """Rows and columns of the product of two matrices."""
    return (a.shape[1 if transposed_a else 0], b.shape[0 if transposed_b else 1])


def _not_broadcast(bias: Tensor, sizes: Shape) -> str | None:
    """Why the bias does not broadcast to a matrix of these sizes without making it larger."""
    shape = shape_of(bias) or ()
    fits = all(n in (1, size) for n, size in zip(shape[::-1], sizes[::-1], strict=False))
    return None if len(shape) <= 2 and fits else f"'{bias.name}' has shape {list(shape)}, the product {list(sizes)}"


class FuseGemm(RewritePass):
    """Fuses the product of two matrices and a constant bias to Gemm, with transpositions as attributes.

    a [M, K], b [K, N], bias constant that broadcasts to [M, N]: `Add(MatMul(a, b), bias)` → `Gemm(a, b, bias)`;
    `Add(Gemm(a, b), bias)` → `Gemm(a, b, bias)`; `Gemm(Transpose(a), b)` → `Gemm(a, b, transA=1)`, b alike. Products
    of more than two axes stay MatMul and Add; of x [s, b, k], weight [k, n] and bias [n] constant,
    `Transpose(Add(MatMul(Transpose(x), weight), bias))` → `Add(MatMul(x, weight), bias)` where both swap s and b.

    **Safety:** tolerance; the same sum, rounded once instead of twice.

    Source: ONNX operator Gemm-13.
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"
    repeat: ClassVar = True
    rules: ClassVar = (GemmFromMatMul(), GemmBias(), GemmTransposedA(), GemmTransposedB(), TransposedRows())
