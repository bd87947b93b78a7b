"""SwiGLUQuantize: SiLU(gate) · up in 8 bits."""

from __future__ import annotations

from onnx.defs import OpSchema

SCHEMA = OpSchema(
    "SwiGLUQuantize",
    "llmc",
    1,
    "quantized = QuantizeLinear(gate · sigmoid(gate) · up, scale, zero_point), in float32.",
    inputs=[
        OpSchema.FormalParameter("gate", "T", "Any shape."),
        OpSchema.FormalParameter("up", "T", "The shape of gate."),
        OpSchema.FormalParameter("scale", "tensor(float)", "Scalar."),
        OpSchema.FormalParameter("zero_point", "Q", "Scalar 0: its type is that of the result."),
    ],
    outputs=[OpSchema.FormalParameter("quantized", "Q", "The shape of gate.")],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations."),
        ("Q", ["tensor(int8)", "tensor(float8e4m3fn)"], "What is quantized to."),
    ],
)

BODY = """
<domain: "llmc", opset_import: ["" : 19]>
SwiGLUQuantize (gate, up, scale, zero_point) => (quantized)
{
    wide_gate = Cast <to = 1> (gate)
    wide_up = Cast <to = 1> (up)
    open = Sigmoid (wide_gate)
    silu = Mul (wide_gate, open)
    product = Mul (silu, wide_up)
    quantized = QuantizeLinear (product, scale, zero_point)
}
"""
