"""What one node computes on constants: by ONNX's reference implementation, where that may be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
import onnx.shape_inference

from llmc.passes.graph import Array, Constant, constant_bytes, load_values, numpy_dtype, onnx_dtype

# fmt: off
MOVE = {
    "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "Identity", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Trilu",
    "Unsqueeze", "Where",
}
"""Operators that only move values: exact for every type that NumPy can hold."""
COMPUTE = {
    "Abs", "Add", "And", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Clip",
    "Cos", "CumSum", "Div", "Equal", "Exp", "EyeLike", "Floor", "Gemm", "Greater", "GreaterOrEqual", "IsInf",
    "IsNaN", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not",
    "Or", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "Relu", "Round", "ScatterElements", "ScatterND", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Sum",
    "Tanh", "Xor",
}
# fmt: on
"""Operators that NumPy computes as ONNX Runtime does: bit for bit on integers and booleans, float32 and float64 but
for the last places of functions and sums."""
CAST = {"Cast", "CastLike"}
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
KNOWN_VALUES = 1 << 16
"""Bytes up to which a constant is shown to shape inference: shapes are small."""


class RefusalError(Exception):
    """Why the value of a node is not computed."""


@dataclass(frozen=True)
class Size:
    """Type of a result, and how many elements it has; at most, where only computing it tells."""

    dtype: int
    count: int


def check_operator(op: str, inputs: Sequence[Constant]) -> None:
    """Raise RefusalError where the operator, or its arithmetic in the types of its inputs, is left to the runtime."""
    if op in RANDOM:
        raise RefusalError(f"{op} gives another result each time")
    if op not in MOVE and op not in COMPUTE:
        raise RefusalError(f"{op} is not among the operators that are computed ahead")
    for constant in inputs:
        dtype = onnx_dtype(constant)
        if dtype == onnx.TensorProto.STRING:
            raise RefusalError(f"'{constant.name}' is a string tensor")
        if op in COMPUTE - CAST and not _is_number(dtype):
            raise RefusalError(f"arithmetic in {constant.dtype.name} is left to the runtime")


def result_sizes(proto: onnx.NodeProto, inputs: Sequence[Constant], opset: int) -> dict[str, Size]:
    """Output name → its size, by ONNX's inference on these constants. Raises RefusalError where a size is unknown."""
    types, data = {}, {}
    for constant in inputs:
        types[constant.name] = onnx.helper.make_tensor_type_proto(onnx_dtype(constant), constant.shape)
        if constant_bytes(constant) <= KNOWN_VALUES and _is_number(onnx_dtype(constant)):
            data[constant.name] = onnx.numpy_helper.from_array(load_values(constant), constant.name)
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(proto.op_type, max_inclusive_version=opset),
            proto,
            types,
            data,
            opset_imports=[onnx.helper.make_opsetid("", opset)],
        )
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError) as error:
        raise RefusalError(f"ONNX finds it invalid: {str(error).strip().splitlines()[-1]}") from error
    if proto.op_type == "NonZero":  # at most every element, found by one index an axis
        (source,) = inputs
        return {proto.output[0]: Size(onnx.TensorProto.INT64, max(len(source.shape), 1) * prod(source.shape))}
    return {name: _size(declared.tensor_type) for name, declared in inferred.items()}


def _size(declared: onnx.TypeProto.Tensor) -> Size:
    if not declared.HasField("shape") or not all(d.HasField("dim_value") for d in declared.shape.dim):
        raise RefusalError("the size of its result is not known before it is computed")
    return Size(declared.elem_type, prod(d.dim_value for d in declared.shape.dim))


def compute(
    proto: onnx.NodeProto, inputs: Sequence[Constant], sizes: Mapping[str, Size], opset: int
) -> dict[str, Array]:
    """Output name → value. Raises RefusalError for values on which runtimes differ, or that ONNX leaves undefined."""
    values = {constant.name: load_values(constant) for constant in inputs}
    check_values(proto, values, sizes)
    arrays = evaluate(proto, values, opset)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or name not in sizes or array.dtype != numpy_dtype(sizes[name].dtype):
            raise RefusalError(f"the reference implementation does not give '{name}' the type that ONNX says it has")
        if proto.op_type in COMPUTE and array.dtype.kind == "f" and np.isnan(np.min(array, initial=0)):
            raise RefusalError("its result has NaN")
    return arrays


def evaluate(proto: onnx.NodeProto, values: Mapping[str, Array], opset: int) -> dict[str, Array]:
    """Output name → value, unchecked; the arrays may view those of `values`."""
    from onnx.reference import ReferenceEvaluator

    made = [name for name in proto.output if name]
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [onnx.ValueInfoProto(name=name) for name in values],
        [onnx.ValueInfoProto(name=name) for name in made],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(model).run(None, dict(values))
    except Exception as error:  # each operator fails in its own way on what its specification does not allow
        raise RefusalError(f"computing it fails: {error}") from error
    return dict(zip(made, found, strict=True))


def _is_number(dtype: int) -> bool:
    """Whether NumPy's arithmetic is the runtime's: booleans, integers of 8 bits and more, float32, float64."""
    return numpy_dtype(dtype).kind in "biuf" and dtype != onnx.TensorProto.FLOAT16


def check_values(proto: onnx.NodeProto, values: Mapping[str, Array], sizes: Mapping[str, Size]) -> None:
    """Raise RefusalError where runtimes differ on the result, or ONNX leaves it undefined."""
    operands = [values[name] for name in proto.input if name]
    kind = operands[0].dtype.kind if operands else ""
    if proto.op_type in CAST:
        _check_cast(operands[0], sizes[proto.output[0]].dtype)
    elif proto.op_type in ("Div", "Mod") and kind in "iu":
        dividend, divisor = operands
        if not divisor.all():
            raise RefusalError("it divides by zero")
        if proto.op_type == "Div" and (((dividend < 0) != (divisor < 0)) & (dividend % divisor != 0)).any():
            raise RefusalError("it divides integers with a negative remainder")
    elif proto.op_type == "Pow" and kind in "iu":
        raise RefusalError("powers of integers are left to the runtime")
    elif proto.op_type == "ReduceProd" and kind in "iu":
        if np.prod(np.maximum(np.abs(operands[0].astype(np.float64)), 1)) > np.iinfo(operands[0].dtype).max:
            raise RefusalError("its product may overflow")
    elif proto.op_type == "Slice" and len(proto.input) == 5 and proto.input[4]:
        starts, ends, steps = (values[proto.input[i]] for i in (1, 2, 4))
        # Where these leave the axis, ONNX, NumPy and ONNX Runtime clamp each in its own way.
        if ((steps < 0) & ((starts < -1) | (ends >= np.iinfo(np.int32).max))).any():
            raise RefusalError("runtimes differ on slices backwards from or to outside of an axis")
    elif proto.op_type == "Range" and kind == "f" and any(v != np.rint(v) or abs(v) > 1 << 24 for v in operands):
        raise RefusalError("its steps are rounded")


def _check_cast(values: Array, to: int) -> None:
    source, target = int(onnx.helper.np_dtype_to_tensor_dtype(values.dtype)), numpy_dtype(to)
    for dtype, other in ((source, to), (to, source)):
        if not _is_number(dtype) and dtype != other and not (dtype in HALF and other == onnx.TensorProto.FLOAT):
            raise RefusalError(f"a cast from {values.dtype.name} to {target.name} is left to the runtime")
    if values.dtype.kind == "f" and target.kind in "iu" and values.size:
        limits = np.iinfo(target)
        if not (np.min(values) > float(limits.min) - 1 and np.max(values) < float(limits.max) + 1):
            raise RefusalError(f"its values leave the range of {target.name}")
