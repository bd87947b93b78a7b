"""AddLayerNormQuantize: the sum of two activations, and its layer normalization in 8 bits."""

from __future__ import annotations

from onnx.defs import OpSchema

SCHEMA = OpSchema(
    "AddLayerNormQuantize",
    "llmc",
    1,
    "sum = x + residual, rounded to T; c = sum - mean(sum); quantized = QuantizeLinear(c / sqrt(mean(c²) + epsilon) · "
    "weight + bias, scale, zero_point), means over the last axis, all after the sum in float32.",
    inputs=[
        OpSchema.FormalParameter("x", "T", "[..., D]"),
        OpSchema.FormalParameter("residual", "T", "[..., D]"),
        OpSchema.FormalParameter("weight", "T", "[D]"),
        OpSchema.FormalParameter("bias", "T", "[D]"),
        OpSchema.FormalParameter("scale", "tensor(float)", "Scalar."),
        OpSchema.FormalParameter("zero_point", "Q", "Scalar 0: its type is that of the result."),
    ],
    outputs=[
        OpSchema.FormalParameter("sum", "T", "[..., D]"),
        OpSchema.FormalParameter("quantized", "Q", "[..., D]"),
    ],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations."),
        ("Q", ["tensor(int8)", "tensor(float8e4m3fn)"], "What is quantized to."),
    ],
    attributes=[OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT, "Added to the variance.", required=True)],
)

BODY = """
<domain: "llmc", opset_import: ["" : 19]>
AddLayerNormQuantize <epsilon> (x, residual, weight, bias, scale, zero_point) => (sum, quantized)
{
    last = Constant <value_ints = [-1]> ()
    epsilon = Constant <value_float: float = @epsilon> ()
    sum = Add (x, residual)
    wide = Cast <to = 1> (sum)
    wide_weight = Cast <to = 1> (weight)
    wide_bias = Cast <to = 1> (bias)
    mean = ReduceMean <keepdims = 1> (wide, last)
    centred = Sub (wide, mean)
    square = Mul (centred, centred)
    variance = ReduceMean <keepdims = 1> (square, last)
    shifted = Add (variance, epsilon)
    root = Sqrt (shifted)
    normal = Div (centred, root)
    scaled = Mul (normal, wide_weight)
    moved = Add (scaled, wide_bias)
    quantized = QuantizeLinear (moved, scale, zero_point)
}
"""
