"""AddRMSNormQuantize: the sum of two activations, and its RMS normalization in 8 bits."""

from __future__ import annotations

from onnx.defs import OpSchema

SCHEMA = OpSchema(
    "AddRMSNormQuantize",
    "llmc",
    1,
    "sum = x + residual, rounded to T; quantized = QuantizeLinear(sum / sqrt(mean(sum²) + epsilon) · weight, scale, "
    "zero_point), the mean over the last axis, all after the sum in float32.",
    inputs=[
        OpSchema.FormalParameter("x", "T", "[..., D]"),
        OpSchema.FormalParameter("residual", "T", "[..., D]"),
        OpSchema.FormalParameter("weight", "T", "[D]"),
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
    attributes=[OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT, "Added to the mean square.", required=True)],
)

BODY = """
<domain: "llmc", opset_import: ["" : 19]>
AddRMSNormQuantize <epsilon> (x, residual, weight, scale, zero_point) => (sum, quantized)
{
    last = Constant <value_ints = [-1]> ()
    epsilon = Constant <value_float: float = @epsilon> ()
    sum = Add (x, residual)
    wide = Cast <to = 1> (sum)
    wide_weight = Cast <to = 1> (weight)
    square = Mul (wide, wide)
    mean = ReduceMean <keepdims = 1> (square, last)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    normal = Div (wide, root)
    scaled = Mul (normal, wide_weight)
    quantized = QuantizeLinear (scaled, scale, zero_point)
}
"""
