"""Reads what TensorRT says: its log, its parser's errors, and the list of engine layers in its verbose log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from onnx import TensorProto

from llmc.passes.graph import dtype_name

LAYERS = "Layers:\n"
"""The message that lists the engine's layers begins with this."""

_MEMORY = {
    "Total Weights Memory": "weights_bytes",
    "Total Activation Memory": "activation_bytes",
    "Max Scratch Memory": "scratch_bytes",
    "Total Device Persistent Memory": "device_persistent_bytes",
    "Total Host Persistent Memory": "host_persistent_bytes",
}
_MEMORY_LINE = re.compile(r"^([\w ]+): (\d+) bytes$")

_TENSORS = r"\[\]|\[.*?\}\]"
_LAYER = re.compile(
    rf"^Name: (?P<name>.*?), LayerType: (?P<kind>\w*), Inputs: (?P<inputs>{_TENSORS})(?:, Constants: (?:{_TENSORS}))?, "
    rf"Outputs: (?P<outputs>{_TENSORS}), (?:.*, )?Metadata: (?P<sources>.*)$"
)
_TENSOR_TYPE = re.compile(r"Datatype: (\w+)")
_SOURCE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|$)")
_IN_FUNCTION = re.compile(r".* \| (.*) \(\w+\)")
"""A node of a function's body, then the node that calls the function, with the function's name."""
_TYPES = {
    "float": TensorProto.FLOAT,
    "half": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "fp4": TensorProto.FLOAT4E2M1,
    "fp4e2m1": TensorProto.FLOAT4E2M1,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

_KERNELS = {"gemm", "correlation", "deconv"}
"""Kinds of layers that are one product, whose operands have one type."""
_FUSED_PRODUCT = re.compile(r"_myl_((?:[A-Z][a-z]+)*?)Fc(?![a-z])")
"""Fused layers are called after the operations in them, four letters each: 'Fc' is the product."""
_FUSED_ATTENTION = re.compile(r"_mha_")
_REAL = {"bfloat16", "float16", "float32"}

_EXPECTED = re.compile(
    r"Make sure (?:in|out)put .* has Int64 binding|catchCudaError|Empty initializer .* Overriding data to nullptr"
)
"""Said of every model with integer inputs or tensors without elements, and of every error without a GPU."""
_BOILERPLATE = re.compile(r"While parsing node number|--- (?:Begin|End) node|ERROR: .* In function")
_ENVELOPE = re.compile(
    r"^Invalid Node - .*\n|(?:\w+::\w+: |\[[^\]\n]*\] )?Error Code \d+: [^(\n]*\(|\s*In \w+ at [^\s)]+\)?"
    r"|\[[\w./]+:\d+: \S+\] |^\w+\.cpp:\d+: "
)
"""What stands around a reason: where in TensorRT's own source it was raised."""
_ASSERTION = re.compile(
    r'^Assertion failed: .*?: (?=\S)|^.* && (?=".*"$)|^.*(?=Failed to import initializer: )', re.DOTALL
)
_NO_OPERATOR = re.compile(r"^false$|Plugin not found")
"""All that the parser says of an operator that it does not know."""

_ADVICE = (
    ("must have same input types", "the network is strongly typed: add a Cast before it, or convert the whole model"),
    ("FP32 GEMM is not supported", "convert the model to float16, or leave SM75 out"),
    ("HW-specific datatypes", "leave that compute capability out, or do not use this type"),
    ("zero point", "quantize symmetrically to int8"),
    ("workspace limit", "allow more workspace"),
)


def clean(text: str) -> str:
    """A message in one line, without the places in TensorRT's own source that it was raised at."""
    text = "\n".join(line for line in text.splitlines() if not _EXPECTED.search(line))
    text = _ASSERTION.sub("", _ENVELOPE.sub("", text)).strip().strip('"')
    return " ".join(text.split())


def reasons(messages: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """The messages that say something, cleaned, once each, without those that `known` problems already quote."""
    cleaned = (clean(text) for text in messages if not _BOILERPLATE.search(text) and not _EXPECTED.search(text))
    said = dict.fromkeys(text.rstrip(".") for text in cleaned)
    return [text for text in said if text and not any(text in problem for problem in known)]


def advise(text: str) -> str:
    """`text` with what to do about it, where that is known."""
    if _NO_OPERATOR.search(text):
        return "TensorRT has no such operator: rewrite it in standard ONNX operators"
    advice = next((advice for sign, advice in _ADVICE if sign in text), "")
    return f"{text.rstrip('.')}: {advice}" if advice else text


def memory(messages: Iterable[str]) -> dict[str, int]:
    """Bytes of memory that the engine will take, by kind; the largest where the builder names several."""
    found: dict[str, int] = {}
    for text in messages:
        line = _MEMORY_LINE.match(text)
        if line and line[1] in _MEMORY:
            key = _MEMORY[line[1]]
            found[key] = max(found.get(key, 0), int(line[2]))
    return found


def layers(message: str) -> list[dict[str, object]]:
    """The engine's layers: name, kind, dtype of the first operand, dtypes of inputs and outputs, ONNX source nodes.

    'product' is the dtype in which a layer multiplies matrices; '' where it does not, or does not say so.

    Raises ValueError where there is no list, or a line cannot be read: a part of it would be worse than none.
    """
    if not message.startswith(LAYERS):
        raise ValueError("it gives none")
    found: list[dict[str, object]] = []
    for line in message.removeprefix(LAYERS).partition("\n\n")[0].splitlines():
        match = _LAYER.match(line)
        if match is None:
            raise ValueError(f"layer that cannot be read: {line[:200]}")
        inputs, outputs = (_types(match[part]) for part in ("inputs", "outputs"))
        found.append(
            {
                "name": match["name"],
                "kind": match["kind"],
                "dtype": next(iter(inputs + outputs), ""),
                "inputs": inputs,
                "outputs": outputs,
                "product": _product(match["name"], match["kind"], inputs, outputs),
                "nodes": list(dict.fromkeys(map(_source, _SOURCE.findall(match["sources"])))),
            }
        )
    return found


def _source(text: str) -> str:
    """The node of the graph that a layer was made of; of a function's body, the node that calls the function."""
    inner = _IN_FUNCTION.fullmatch(text)
    return inner[1] if inner else text


def _product(name: str, kind: str, inputs: list[str], outputs: list[str]) -> str:
    operands = [*inputs, *outputs]
    fused = _FUSED_PRODUCT.search(name)
    if fused and "Cast" in fused[1]:  # an operand is dequantized first: 'CastMulFc'
        return next((dtype for dtype in operands if dtype in _REAL), "")
    if fused or kind in _KERNELS or _FUSED_ATTENTION.search(name):
        return next(iter(operands), "")
    return ""


def type_name(name: str) -> str:
    """'Half' or 'HALF' → 'float16': TensorRT's name of a type in the words of reports; unknown ones as they are."""
    dtype = _TYPES.get(name.lower())
    return dtype_name(dtype) if dtype is not None else name


def _types(tensors: str) -> list[str]:
    return [type_name(name) for name in dict.fromkeys(_TENSOR_TYPE.findall(tensors))]
