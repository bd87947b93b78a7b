"""The ONNX graph of a Llama decoder with a key-value cache, in the words of torch's exporter, by rule: no weight is
there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
EPSILON = 1e-5
THETA = 10000.0
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which torch's exporter leaves the module of a node."""
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def decoder_graph(
    *,
    hidden: int,
    intermediate: int,
    heads: int,
    key_value_heads: int,
    layers: int,
    vocabulary: int,
    tied: bool,
    dtype: str,
) -> onnx.ModelProto:
    """input_ids, position_ids int64[batch, sequence], attention_mask over past and new tokens, and keys and values
    [batch, heads, past_sequence, width] → logits, and the keys and values of all tokens.

    Its weights are initializers without data, under torch's names; '.T' behind those that stand as [in, out].
    """
    kind = TYPES[dtype]
    graph = _Builder(kind, hidden // heads)
    graph.weight("model.embed_tokens.weight", (vocabulary, hidden))
    mask = graph.mask()
    cosine, sine = graph.rotary()
    stream = graph.add("Gather", "model.embed_tokens.weight", "input_ids", module="model.embed_tokens")
    for layer in range(layers):
        at = f"model.layers.{layer}"
        normed = graph.norm(stream, f"{at}.input_layernorm", hidden)
        attention = f"{at}.self_attn"
        wide = hidden // heads * key_value_heads
        query = graph.rotated(graph.split(graph.linear(normed, f"{attention}.q_proj", hidden, hidden)), cosine, sine)
        key = graph.rotated(graph.split(graph.linear(normed, f"{attention}.k_proj", hidden, wide)), cosine, sine)
        value = graph.split(graph.linear(normed, f"{attention}.v_proj", hidden, wide))
        keys = graph.grown(key, f"{layer}.key", key_value_heads)
        values = graph.grown(value, f"{layer}.value", key_value_heads)
        scale = float((hidden // heads) ** -0.5)
        attended = graph.add("Attention", query, keys, values, mask, module=attention, scale=scale)
        rows = graph.add("Transpose", attended, module=attention, perm=[0, 2, 1, 3])
        rows = graph.add("Reshape", rows, graph.integers(0, 0, -1), module=attention)
        stream = graph.add("Add", stream, graph.linear(rows, f"{attention}.o_proj", hidden, hidden), module=at)
        normed = graph.norm(stream, f"{at}.post_attention_layernorm", hidden)
        gate = graph.linear(normed, f"{at}.mlp.gate_proj", hidden, intermediate)
        gate = graph.add("Mul", gate, graph.add("Sigmoid", gate, module=f"{at}.mlp"), module=f"{at}.mlp")
        gated = graph.add("Mul", gate, graph.linear(normed, f"{at}.mlp.up_proj", hidden, intermediate), module=at)
        stream = graph.add("Add", stream, graph.linear(gated, f"{at}.mlp.down_proj", intermediate, hidden), module=at)
    normed = graph.norm(stream, "model.norm", hidden)
    if tied:
        head = graph.add("Transpose", "model.embed_tokens.weight", module="lm_head", perm=[1, 0])
        graph.add("MatMul", normed, head, module="lm_head", output="logits")
    else:
        graph.linear(normed, "lm_head", hidden, vocabulary, output="logits")
    graph.outputs.insert(0, helper.make_tensor_value_info("logits", kind, ["batch", "sequence", vocabulary]))
    return graph.model()


class _Builder:
    """A graph in the making; tensors go by their names."""

    def __init__(self, kind: int, width: int) -> None:
        self.kind, self.width = kind, width
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        rows, total = ["batch", "sequence"], ["batch", "past_sequence + sequence"]
        self.inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, rows),
            helper.make_tensor_value_info("position_ids", TensorProto.INT64, rows),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, total),
        ]
        self.outputs: list[onnx.ValueInfoProto] = []

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "main_graph", self.inputs, self.outputs, initializer=list(self.initializers.values())
        )
        opset = helper.make_opsetid("", OPSET)
        ir_version = helper.find_min_ir_version_for([opset])
        return helper.make_model(graph, opset_imports=[opset], ir_version=ir_version, producer_name="llmc-bench")

    def add(self, op: str, *inputs: str, module: str = "model", output: str = "", **attributes: Any) -> str:
        """A node with one result, whose name it gives."""
        made = output or f"{op.lower()}_{len(self.nodes)}"
        node = helper.make_node(op, inputs, [made], name=f"node_{made}", **attributes)
        parts = module.split(".")
        scopes = ["", *(".".join(parts[:end]) for end in range(1, len(parts) + 1)), made]
        node.metadata_props.add(key=SCOPES, value=str(scopes))
        self.nodes.append(node)
        return made

    def weight(self, name: str, shape: Sequence[int]) -> str:
        self.initializers[name] = TensorProto(name=name, data_type=self.kind, dims=shape)
        return name

    def constant(self, name: str, values: np.ndarray[Any, Any]) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant("sizes_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def cast(self, tensor: str, kind: int, module: str = "model") -> str:
        """A Cast, where the weights' type is another."""
        return tensor if self.kind == TensorProto.FLOAT else self.add("Cast", tensor, module=module, to=kind)

    def linear(self, tensor: str, module: str, depth: int, rows: int, output: str = "") -> str:
        weight = self.weight(f"{module}.weight.T", (depth, rows))
        return self.add("MatMul", tensor, weight, module=module, output=output)

    def norm(self, tensor: str, module: str, hidden: int) -> str:
        """RMSNorm, in float32: x / sqrt(mean(x²) + ε) · w."""
        two, epsilon = (self.constant(f"scalar_{v:g}", np.array(v, np.float32)) for v in (2.0, EPSILON))
        wide = self.cast(tensor, TensorProto.FLOAT, module)
        squares = self.add("Pow", wide, two, module=module)
        mean = self.add("ReduceMean", squares, self.integers(-1), module=module, keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, epsilon, module=module), module=module)
        normed = self.add("Mul", wide, self.add("Reciprocal", root, module=module), module=module)
        normed = self.cast(normed, self.kind, module)
        return self.add("Mul", self.weight(f"{module}.weight", (hidden,)), normed, module=module)

    def split(self, tensor: str) -> str:
        """[batch, sequence, heads · width] → [batch, heads, sequence, width]."""
        heads = self.add("Reshape", tensor, self.integers(0, 0, -1, self.width))
        return self.add("Transpose", heads, perm=[0, 2, 1, 3])

    def rotary(self) -> tuple[str, str]:
        """Cosines and sines of every position's angles, [batch, 1, sequence, width]."""
        exponents = np.arange(0, self.width, 2, dtype=np.float32) / self.width
        rates = self.constant("model.rotary_emb.inv_freq", (1.0 / THETA**exponents).astype(np.float32)[None, None])
        at = "model.rotary_emb"
        places = self.add("Cast", "position_ids", module=at, to=TensorProto.FLOAT)
        places = self.add("Unsqueeze", places, self.integers(2), module=at)
        angles = self.add("Mul", places, rates, module=at)
        angles = self.add("Concat", angles, angles, module=at, axis=-1)
        found = [self.cast(self.add(op, angles, module=at), self.kind, at) for op in ("Cos", "Sin")]
        cosine, sine = (self.add("Unsqueeze", values, self.integers(1), module=at) for values in found)
        return cosine, sine

    def rotated(self, tensor: str, cosine: str, sine: str) -> str:
        """x · cos + (-x₂, x₁) · sin."""
        half, end = self.width // 2, np.iinfo(np.int64).max
        axis = self.integers(3)
        first = self.add("Slice", tensor, self.integers(0), self.integers(half), axis)
        second = self.add("Slice", tensor, self.integers(half), self.integers(int(end)), axis)
        turned = self.add("Concat", self.add("Neg", second), first, axis=-1)
        return self.add("Add", self.add("Mul", tensor, cosine), self.add("Mul", turned, sine))

    def grown(self, tensor: str, part: str, heads: int) -> str:
        """The cache's part with what is new behind it, which the graph gives back too."""
        past, present = f"past_key_values.{part}", f"present.{part}"
        shapes = ["batch", heads, "past_sequence", self.width], ["batch", heads, "past_sequence + sequence", self.width]
        self.inputs.append(helper.make_tensor_value_info(past, self.kind, shapes[0]))
        self.outputs.append(helper.make_tensor_value_info(present, self.kind, shapes[1]))
        return self.add("Concat", past, tensor, output=present, axis=2)

    def mask(self) -> str:
        """Which keys a query sees: those up to itself that are no padding; bool [batch, 1, sequence, total]."""
        zero, one = (self.constant(f"scalar_{v}", np.array(v, np.int64)) for v in (0, 1))

        def length(tensor: str, axis: int) -> str:
            return self.add("Squeeze", self.add("Shape", tensor, start=axis, end=axis + 1))

        past = length("past_key_values.0.key", 2)
        total = length("attention_mask", 1)
        queries = self.add("Add", self.add("Range", zero, length("input_ids", 1), one), past)
        queries = self.add("Unsqueeze", queries, self.integers(0, 1, 3))
        keys = self.add("Unsqueeze", self.add("Range", zero, total, one), self.integers(0, 1, 2))
        there = self.add("Cast", "attention_mask", to=TensorProto.BOOL)
        there = self.add("Unsqueeze", there, self.integers(1, 2))
        return self.add("And", self.add("LessOrEqual", keys, queries), there)
