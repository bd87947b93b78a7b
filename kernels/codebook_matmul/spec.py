"""CodebookMatMul: x times the transpose of a matrix whose values are indices into codebooks."""

from __future__ import annotations

from onnx.defs import OpSchema

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

SCHEMA = OpSchema(
    "CodebookMatMul",
    "llmc",
    1,
    "y = x · Wᵀ with W[n, k] = codebook[n // (N/R), k // (K/C), index[n, k]]. Indices of a row stand in words of 32 "
    "bits, 32 // bits in each, from the low bits up; what is left of the last word is ignored.",
    inputs=[
        OpSchema.FormalParameter("x", "T", "[..., K]"),
        OpSchema.FormalParameter("packed", "tensor(int32)", "[N, ceil(K / (32 // bits))]"),
        OpSchema.FormalParameter("codebook", "T", "[R, C, 2^bits]; R divides N, and C divides K."),
    ],
    outputs=[OpSchema.FormalParameter("y", "T", "[..., N]")],
    type_constraints=[("T", _FLOATS, "Activations, and the values of the weight.")],
    attributes=[OpSchema.Attribute("bits", OpSchema.AttrType.INT, "Bits of an index: 2, 3, 4 or 8.", required=True)],
)

BODY = """
<domain: "llmc", opset_import: ["" : 15]>
CodebookMatMul <bits> (x, packed, codebook) => (y)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    single = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    row_of_words = Constant <value_ints = [0, -1]> ()
    two = Constant <value_float = 2.0> ()
    word = Constant <value_int = 32> ()
    bits = Constant <value_int: int = @bits> ()

    bits_float = Cast <to = 1> (bits)
    levels_float = Pow (two, bits_float)
    levels = Cast <to = 6> (levels_float)
    fields_of_word = Div (word, bits)
    field = Range (zero, fields_of_word, one)
    shift = Mul (field, bits)
    shift_float = Cast <to = 1> (shift)
    divisor_float = Pow (two, shift_float)
    divisor = Cast <to = 6> (divisor_float)

    words = Unsqueeze (packed, rest)
    below = Mod (words, divisor)
    above = Sub (words, below)
    shifted = Div (above, divisor)
    fields = Mod (shifted, levels)
    padded = Reshape (fields, row_of_words)
    depth = Shape <start = -1> (x)
    indices = Slice (padded, first, depth, single)

    rows = Shape <start = 0, end = 1> (packed)
    groups = Shape <start = 0, end = 1> (codebook)
    blocks = Shape <start = 1, end = 2> (codebook)
    entries = Shape <start = 2> (codebook)
    rows_of_group = Div (rows, groups)
    depth_of_block = Div (depth, blocks)
    in_blocks = Concat <axis = 0> (groups, rows_of_group, blocks, depth_of_block)
    indices_in_blocks = Reshape (indices, in_blocks)
    books = Mul (groups, blocks)
    count = Squeeze (books)
    book = Range (zero, count, one)
    book_entry = Mul (book, entries)
    book_entry_int = Cast <to = 6> (book_entry)
    beside_blocks = Concat <axis = 0> (groups, single, blocks, single)
    offset = Reshape (book_entry_int, beside_blocks)
    entry = Add (indices_in_blocks, offset)
    table = Reshape (codebook, rest)
    values = Gather <axis = 0> (table, entry)
    shape = Concat <axis = 0> (rows, depth)
    weight = Reshape (values, shape)
    transposed = Transpose <perm = [1, 0]> (weight)
    y = MatMul (x, transposed)
}
"""
"""Standard operators that compute the same; what the sign bit of a word holds is an index like the others, so each
field is shifted down after what is below it has been taken away."""
