"""DequantGemv: x times the transpose of INT4 weights with a scale for each block of a row."""

from __future__ import annotations

from onnx.defs import OpSchema

SCHEMA = OpSchema(
    "DequantGemv",
    "llmc",
    1,
    "y = x · Wᵀ with W[n, k] = weight[n, k] · scale[n, k // block].",
    inputs=[
        OpSchema.FormalParameter("x", "T", "[..., K]; 1 to 16 rows are what the kernel is made for."),
        OpSchema.FormalParameter("weight", "tensor(int4)", "[N, K], K even."),
        OpSchema.FormalParameter("scale", "T", "[N, K / block]"),
    ],
    outputs=[OpSchema.FormalParameter("y", "T", "[..., N]")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations and scales.")],
    attributes=[OpSchema.Attribute("block", OpSchema.AttrType.INT, "Values of a row with one scale.", required=True)],
)

BODY = """
<domain: "llmc", opset_import: ["" : 21]>
DequantGemv <block> (x, weight, scale) => (y)
{
    values = DequantizeLinear <axis = 1, block_size: int = @block> (weight, scale)
    transposed = Transpose <perm = [1, 0]> (values)
    y = MatMul (x, transposed)
}
"""
