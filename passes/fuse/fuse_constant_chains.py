"""The pass `fuse-constant-chains`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from llmc.passes.fuse.channel_weights import values_of
from llmc.passes.graph import Array, Tensor
from llmc.passes.rewrite import Rewrite, RewritePass, Weight


class _Chain(Rewrite):
    """What the rules share: two constants that become one."""

    @abstractmethod
    def combine(self, a: Array, b: Array) -> Array:
        """One constant for both, in the type of its arguments."""

    def check(self, a: Any, b: Any) -> str | None:
        combined = self.combined(a, b)
        if combined.size > max(values_of(a).size, values_of(b).size):
            return f"'{a.name}' and '{b.name}' together are larger than each"
        return _lost(combined, values_of(a).dtype)

    def combined(self, a: Tensor, b: Tensor) -> Array:
        """The constant for both; float64 for floats, so that it is rounded once."""
        first, second = values_of(a), values_of(b)
        if first.dtype.kind not in "iu":
            first, second = first.astype(np.float64), second.astype(np.float64)
        with np.errstate(all="ignore"):
            return np.asarray(self.combine(first, second))

    def constant(self, a: Tensor, b: Tensor) -> Array:
        return self.combined(a, b).astype(values_of(a).dtype)

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        rows, columns = (int(n) for n in rng.integers(1, 5, 2))
        shapes = [(), (columns,), (rows, 1)]
        first = shapes[int(rng.integers(3))]
        second = first if rng.integers(2) else ()
        return {"x": (2, rows, columns), "a": rng.uniform(0.5, 2, first), "b": rng.uniform(0.5, 2, second)}


def _lost(combined: Array, dtype: np.dtype[Any]) -> str | None:
    """Why a constant cannot be written in a type: too large, or nearly nothing."""
    if dtype.kind in "iu":
        return None
    with np.errstate(over="ignore", under="ignore"):
        narrow = combined.astype(dtype).astype(np.float64)
    if not np.isfinite(narrow).all():
        return f"both constants together overflow {dtype.name}"
    if (np.abs(narrow - combined) > np.abs(combined) * 2.0**-8).any():
        return f"both constants together are too small for {dtype.name}"
    return None


class AddAdd(_Chain):
    """(x + a) + b."""

    def combine(self, a: Array, b: Array) -> Array:
        return a + b

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Add(op.Add(x, a), b)

    def replace(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Add(x, self.constant(a, b))


class AddSub(AddAdd):
    """(x + a) - b."""

    def combine(self, a: Array, b: Array) -> Array:
        return a - b

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Sub(op.Add(x, a), b)


class SubAdd(AddAdd):
    """(x - a) + b."""

    def combine(self, a: Array, b: Array) -> Array:
        return b - a

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Add(op.Sub(x, a), b)


class SubSub(_Chain):
    """(x - a) - b."""

    def combine(self, a: Array, b: Array) -> Array:
        return a + b

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Sub(op.Sub(x, a), b)

    def replace(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Sub(x, self.constant(a, b))


class MulMul(_Chain):
    """(x · a) · b."""

    def combine(self, a: Array, b: Array) -> Array:
        return a * b

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Mul(op.Mul(x, a), b)

    def replace(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Mul(x, self.constant(a, b))


class _Quotient(_Chain):
    """Divisions: of floats only, because integers are rounded by each."""

    def check(self, a: Any, b: Any) -> str | None:
        if values_of(a).dtype.kind in "iu":
            return "integers are rounded by each division"
        return super().check(a, b)


class MulDiv(_Quotient):
    """(x · a) / b."""

    def combine(self, a: Array, b: Array) -> Array:
        return np.divide(a, b)

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Div(op.Mul(x, a), b)

    def replace(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Mul(x, self.constant(a, b))


class DivMul(MulDiv):
    """(x / a) · b."""

    def combine(self, a: Array, b: Array) -> Array:
        return np.divide(b, a)

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Mul(op.Div(x, a), b)


class DivDiv(_Quotient):
    """(x / a) / b."""

    def combine(self, a: Array, b: Array) -> Array:
        return a * b

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.Div(op.Div(x, a), b)

    def replace(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Div(x, self.constant(a, b))


class MatMulMatMul(_Chain):
    """(x · A) · B, where A · B is no larger than what it replaces."""

    def combine(self, a: Array, b: Array) -> Array:
        return a @ b

    def pattern(self, op: Any, x: Any, a: Weight, b: Weight) -> Any:
        return op.MatMul(op.MatMul(x, a), b)

    def check(self, a: Any, b: Any) -> str | None:
        first, second = values_of(a), values_of(b)
        if not first.ndim == second.ndim == 2:
            return f"'{a.name}' and '{b.name}' are not both matrices"
        freed = sum(values.size for t, values in ((a, first), (b, second)) if len(t.outputs) == 1)
        if len(first) * second.shape[1] > freed:
            return f"the product of '{a.name}' and '{b.name}' is larger than what would go"
        return _lost(self.combined(a, b), first.dtype)

    def replace(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.MatMul(x, self.constant(a, b))

    def example(self, rng: np.random.Generator) -> dict[str, Any]:
        rows, between, columns = (int(n) for n in rng.integers(4, 9, 3))
        # Small enough that sums of `between` products stay of order 1.
        return {"x": (3, rows), "a": rng.uniform(0, 0.3, (rows, between)), "b": rng.uniform(0, 0.3, (between, columns))}


class FuseConstantChains(RewritePass):
    """Merges constants that one tensor is added to, multiplied with or divided by, one after another.

    x [any shape], a, b constants: `Add(Add(x, a), b)` → `Add(x, a + b)`, `Mul(Mul(x, a), b)` → `Mul(x, a · b)`, the
    same with Sub and Div in either place; `MatMul(MatMul(x, A), B)` → `MatMul(x, A · B)` where the product has no more
    elements than the matrices that go. The constant is computed in float64 and rounded once; in integers as they wrap,
    whose division stays. Left alone where both together are larger than each, overflow, or are lost to underflow.

    **Safety:** tolerance; one rounding of the constant in place of one of the tensor (float32: 1e-6 of the largest
    value on the way, float16: 1e-3).

    Source: associativity, which floating point has up to rounding (Goldberg, What Every Computer Scientist Should Know
    About Floating-Point Arithmetic, 1991).
    """

    after: ClassVar = ("fold-constants",)
    safety: ClassVar = "tolerance"
    repeat: ClassVar = True
    rules: ClassVar = (
        *(AddAdd(), AddSub(), SubAdd(), SubSub()),
        *(MulMul(), MulDiv(), DivMul(), DivDiv()),
        MatMulMatMul(),
    )
