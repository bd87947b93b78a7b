"""What each product loses by quantization, on calibration data, while all before it is float.

Matrix products are worked out from the rows that they multiply (`matrix_losses.py`); others get a quantized twin beside
them in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmc.passes.base import Activations, Measured
from llmc.passes.graph import Array, Graph, Node, Variable, fresh_names
from llmc.passes.precision.insert_qdq import Inserter
from llmc.passes.precision.levels import Levels
from llmc.passes.precision.matrix_losses import ROWS, MatrixProduct, Sums, is_matrix_product
from llmc.passes.precision.products import Product


@dataclass
class Loss:
    """How far a quantized product is from the same in float, all before it being float."""

    channels: int | None
    """The axis of the result that a bias runs along."""
    values: int = 0
    signal: float = 0.0
    """Sum of squares of the float result."""
    noise: float = 0.0
    """Sum of squares of the difference."""
    total: Array | None = field(default=None, repr=False)
    """Sum of the difference over all but the channels: [channels]."""

    def add(self, exact: Array, rounded: Array) -> None:
        """Take in the results on one sample."""
        off = exact.astype(np.float64) - rounded.astype(np.float64)
        self.signal += float(np.square(exact, dtype=np.float64).sum())
        self.noise += float(np.square(off).sum())
        self.values += off.size
        if self.channels is not None:
            sums = np.moveaxis(off, self.channels, -1).reshape(-1, off.shape[self.channels]).sum(axis=0)
            self.total = sums if self.total is None else self.total + sums

    def take(self, sums: Sums) -> None:
        """Take in the results on some rows."""
        self.values += sums.values
        self.signal += sums.signal
        self.noise += sums.noise
        self.total = sums.total if self.total is None else self.total + sums.total

    def measured(self) -> Measured:
        """All of it, as arrays; an empty total stands for none."""
        total = np.empty(0) if self.total is None else self.total
        return {"sums": np.array([self.values, self.signal, self.noise]), "total": total}

    @classmethod
    def of(cls, channels: int | None, measured: Measured) -> Loss:
        """What `measured` was made of."""
        values, signal, noise = measured["sums"]
        total = measured["total"] if measured["total"].size else None
        return cls(channels, int(values), float(signal), float(noise), total)

    @property
    def bias(self) -> Array | None:
        """What it lacks on average: [channels]."""
        if self.total is None or not self.values:
            return None
        return self.total * (self.total.size / self.values)

    @property
    def relative(self) -> float:
        """Norm of the difference over that of the float result."""
        return float(np.sqrt(self.noise / self.signal)) if self.signal else 0.0


def losses(
    graph: Graph,
    products: Sequence[Product],
    levels: Levels,
    amax: Mapping[str, float],
    activations: Activations,
    samples: int,
) -> list[Loss]:
    """What each of the products of `graph` loses, in their order. `graph` is a copy to spoil: twins are put into it."""
    found = [Loss(product.channels) for product in products]
    rest = [(product, loss) for product, loss in zip(products, found, strict=True) if not is_matrix_product(product)]
    pairs = _twins(graph, [product for product, _ in rest], levels, amax)
    waiting = _Waiting(
        [
            (MatrixProduct(product, levels, amax), loss)
            for product, loss in zip(products, found, strict=True)
            if is_matrix_product(product)
        ]
    )
    names = [*waiting.products, *(name for pair in pairs for name in pair)]
    for _, values in activations.stream(graph, names, samples):
        for (_, loss), (exact, rounded) in zip(rest, pairs, strict=True):
            loss.add(values[exact], values[rounded])
        waiting.add(values)
    waiting.finish()
    return found


class _Waiting:
    """Rows of activations, each until there are enough of it to read the weights that multiply them."""

    def __init__(self, products: Sequence[tuple[MatrixProduct, Loss]]) -> None:
        self.products: dict[str, list[tuple[MatrixProduct, Loss]]] = {}
        for product, loss in products:
            self.products.setdefault(product.activation, []).append((product, loss))
        self.rows: dict[str, list[Array]] = {name: [] for name in self.products}

    def add(self, values: Mapping[str, Array]) -> None:
        """Take in what the activations are on one sample."""
        for name, rows in self.rows.items():
            rows.append(values[name].reshape(-1, values[name].shape[-1]))
            if sum(map(len, rows)) >= ROWS:
                self._multiply(name)

    def finish(self) -> None:
        """Let the losses have what still waits."""
        for name, rows in self.rows.items():
            if rows:
                self._multiply(name)

    def _multiply(self, name: str) -> None:
        rows = np.concatenate(self.rows[name])
        self.rows[name].clear()
        for product, loss in self.products[name]:
            loss.take(product.sums(rows))


def _twins(
    graph: Graph, products: Sequence[Product], levels: Levels, amax: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Put a quantized twin beside each product: the names of what both give."""
    if not products:
        return []
    inserter, fresh = Inserter(graph, levels), fresh_names(graph)
    pairs = []
    after: dict[int, Node] = {}
    for product in products:
        node = product.node
        made = Variable(fresh(f"{node.outputs[0].name}_twin"), node.outputs[0].dtype, node.outputs[0].shape)
        twin = Node(node.op, fresh(f"{node.name}_twin"), dict(node.attrs), list(node.inputs), [made])
        after[id(node)] = twin
        pairs.append((node.outputs[0].name, made.name))
    graph.nodes = [new for node in graph.nodes for new in (node, *([after[id(node)]] if id(node) in after else []))]
    for product in products:
        inserter.quantize(replace(product, node=after[id(product.node)]), amax)
    inserter.finish()
    return pairs
