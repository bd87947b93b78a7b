"""`x[mask] = value`, which exporters write with the places where the mask is true."""

from __future__ import annotations

import numpy as np

from llmc.passes.graph import Tensor, shape_of
from llmc.passes.simplify.local_rules import Instead, Outcome, Rules, Site, StaysError
from llmc.passes.simplify.proven_shapes import equal_shapes

rule = MASKS = Rules()


@rule("ScatterND")
def masked_fill(at: Site) -> Outcome:
    """ScatterND(x, Transpose(NonZero(mask)), Expand(value, …)) → Where(mask, value, x)."""
    data, indices, updates = at.inputs
    places, filled = _made_by(indices, "Transpose", at), _made_by(updates, "Expand", at)
    found = _made_by(places.inputs[0], "NonZero", at) if places is not None else None
    if places is None or found is None or filled is None or at.attributes.get("reduction", "none") != "none":
        return None
    mask, value = found.inputs[0], filled.inputs[0]
    shape, one = shape_of(data), shape_of(value)
    if mask.dtype != np.bool_ or list(places.attributes.get("perm", (1, 0))) != [1, 0]:
        return None
    if shape is None or one is None or len(one) > len(shape) or any(size != 1 for size in one):
        return None
    if not equal_shapes(shape_of(mask), shape):
        raise StaysError(f"the mask '{mask.name}' is not known to have the shape of '{data.name}'")
    return Instead("Where", (mask, value, data))


def _made_by(tensor: Tensor, operator: str, at: Site) -> Site | None:
    """The node that makes a tensor, where it is this operator of ONNX."""
    node = tensor.inputs[0] if tensor.inputs else None
    return Site(node, at.opset) if node is not None and node.op == operator and not node.domain else None
