"""Decoders as onnxruntime-genai's model builder writes them, rebuilt node by node, optimized, counted and compared.

The truth for numerics is ONNX Runtime on the graph as it was written, which has kernels for com.microsoft.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, PassResult, Skip
from llmc.passes.cache.scatter_kv_cache import ScatterKvCache
from llmc.passes.decompose.decompose_contrib import DecomposeContrib
from llmc.passes.graph import Array, Graph, copy_graph, from_model, scopes, to_model

HIDDEN, HEADS, SIZE, INNER, VOCABULARY, PLACES = 64, 4, 16, 96, 48, 32
MICROSOFT = "com.microsoft"
TOLERANCE = 2e-5
"""Of the largest value: some dozens of dependent float32 roundings, 2^-24 each."""
BLOCK, SHORT = 32, 6
BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class Decoder:
    """What the builder makes of a configuration.

    `rotary_inside`: RotaryEmbedding as a part of GroupQueryAttention, which then needs no positions. `packed`: queries,
    keys and values of one product. `grouped`: by GroupQueryAttention; else MultiHeadAttention, with a mask of its own
    and keys and values repeated for their groups. `shared`: past and present of one length, as
    they are where they share their memory. `long_rope`: one table of cosines and sines up to `SHORT` tokens, another
    for more of them, chosen by If.
    """

    layers: int = 2
    key_value_heads: int = 2
    grouped: bool = True
    rotary_inside: bool = True
    packed: bool = True
    biases: bool = False
    head_norms: bool = False
    window: int = -1
    gelu: bool = False
    embedding_scale: float = 0.0
    int4: bool = False
    shared: bool = False
    long_rope: bool = False


def tables(places: int, factor: float) -> tuple[Array, Array]:
    """Cosines and sines, [places, SIZE / 2] each, of angles `factor` times as small."""
    angles = np.outer(np.arange(places), 100.0 ** -(np.arange(SIZE // 2) / (SIZE // 2))) / factor
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass
class Written:
    """A graph as it is being written."""

    decoder: Decoder
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    infos: list[onnx.ValueInfoProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def node(
        self, op: str, name: str, *inputs: str, shape: Any = None, dtype: int = TensorProto.FLOAT, **how: Any
    ) -> str:
        """Its first output; `outputs` names them all where there are more."""
        outputs = how.pop("outputs", [f"{name}/output_0"])
        domain = how.pop("domain", "")
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **how))
        if shape is not None:
            self.infos.append(helper.make_tensor_value_info(outputs[0], dtype, shape))
        return str(outputs[0])

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        """The builder shares its constants, named after type and value."""
        made = np.asarray(values, dtype)
        name = f"/model/constants/{made.dtype}/{made.ndim}D/{made.tolist()}"
        self.weights[name] = made
        return name

    def weight(self, name: str, *shape: int, near: float = 0.0) -> str:
        values = near + self.rng.standard_normal(shape) / (np.sqrt(shape[0]) if len(shape) > 1 else 5)
        self.weights[name] = values.astype(np.float32)
        return name

    # The layers

    def product(self, name: str, x: str, depth: int, width: int, bias: bool = False) -> str:
        shape = [BATCH, NEW, width]
        if self.decoder.int4:
            packed = self.rng.integers(0, 256, (width, depth // BLOCK, BLOCK // 2), dtype=np.uint8)
            self.weights[f"{name}.qweight"] = packed
            scales = (1 + self.rng.random(width * depth // BLOCK)) / 8 / np.sqrt(depth)
            self.weights[f"{name}.scales"] = scales.astype(np.float32)
            how = {"bits": 4, "block_size": BLOCK, "K": depth, "N": width}
            given = (x, f"{name}.qweight", f"{name}.scales")
            made = self.node("MatMulNBits", f"{name}/MatMul_Q4", *given, shape=shape, domain=MICROSOFT, **how)
        else:
            made = self.node("MatMul", f"{name}/MatMul", x, self.weight(f"{name}.weight", depth, width), shape=shape)
        if bias:
            made = self.node("Add", f"{name}/Add", made, self.weight(f"{name}.bias", width), shape=shape)
        return made

    def norm(self, name: str, x: str, skip: str | None, last: bool = False) -> tuple[str, str]:
        """The norm of x (+ skip), and x (+ skip)."""
        weight, shape = self.weight(f"{name}.weight", HIDDEN, near=1), [BATCH, NEW, HIDDEN]
        if skip is None:
            how = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
            return self.node("SimplifiedLayerNormalization", f"{name}/LayerNorm", x, weight, shape=shape, **how), x
        total = f"{name}/SkipLayerNorm/output_3"
        made = f"{name}/SkipLayerNorm/output_0"
        names = [made] if last else [made, "", "", total]
        how = {"epsilon": 1e-5, "domain": MICROSOFT, "outputs": names}
        self.node("SkipSimplifiedLayerNormalization", f"{name}/SkipLayerNorm", x, skip, weight, shape=shape, **how)
        if not last:
            self.infos.append(helper.make_tensor_value_info(total, TensorProto.FLOAT, shape))
        return made, total

    def head_norm(self, name: str, x: str, heads: int) -> str:
        """Of each head alone, as Qwen3 has it."""
        rows = self.node(
            "Reshape", f"{name}/Reshape_1", x, self.constant([0, -1, SIZE]), shape=[BATCH, f"{NEW} * {heads}", SIZE]
        )
        how = {"axis": -1, "epsilon": 1e-6, "stash_type": 1, "shape": [BATCH, f"{NEW} * {heads}", SIZE]}
        weight = self.weight(f"{name}.weight", SIZE, near=1)
        normal = self.node("SimplifiedLayerNormalization", f"{name}/SimplifiedLayerNormalization", rows, weight, **how)
        back = self.constant([0, -1, heads * SIZE])
        return self.node("Reshape", f"{name}/Reshape_2", normal, back, shape=[BATCH, NEW, heads * SIZE])

    def rotary(self, name: str, x: str, heads: int) -> str:
        given, shape = (x, "position_ids", "cos_cache", "sin_cache"), [BATCH, NEW, heads * SIZE]
        return self.node(
            "RotaryEmbedding", f"{name}/RotaryEmbedding", *given, domain=MICROSOFT, interleaved=0, shape=shape
        )

    def attention(self, layer: int, x: str) -> str:
        d, at = self.decoder, f"/model/layers.{layer}/attn"
        wide = d.key_value_heads * SIZE
        if d.packed:
            parts = [self.product(f"{at}/qkv_proj", x, HIDDEN, HEADS * SIZE + 2 * wide, d.biases), "", ""]
        else:
            widths = {"q": HEADS * SIZE, "k": wide, "v": wide}
            parts = [self.product(f"{at}/{part}_proj", x, HIDDEN, width, d.biases) for part, width in widths.items()]
        if d.head_norms:
            parts[:2] = (
                self.head_norm(f"{at}/q_norm", parts[0], HEADS),
                self.head_norm(f"{at}/k_norm", parts[1], d.key_value_heads),
            )
        if not d.rotary_inside:
            parts[:2] = (
                self.rotary(f"{at}/q_rotary", parts[0], HEADS),
                self.rotary(f"{at}/k_rotary", parts[1], d.key_value_heads),
            )
        made = self.grouped(layer, parts) if d.grouped else self.repeated(layer, parts)
        return self.product(f"{at}/o_proj", made, HEADS * SIZE, HIDDEN)

    def grouped(self, layer: int, parts: list[str]) -> str:
        d, at = self.decoder, f"/model/layers.{layer}/attn"
        tables = ["cos_cache", "sin_cache"] if d.rotary_inside else ["", ""]
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        names = [f"{at}/GroupQueryAttention/output_0", *(f"present.{layer}.{kind}" for kind in ("key", "value"))]
        how: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": d.key_value_heads, "scale": SIZE**-0.5}
        how |= {
            "local_window_size": d.window,
            "softcap": 0.0,
            "do_rotary": int(d.rotary_inside),
            "rotary_interleaved": 0,
        }
        given = (*parts, *past, "seqlens_k", "total_seq_len", *tables)
        shape = [BATCH, NEW, HEADS * SIZE]
        how |= {"outputs": names, "domain": MICROSOFT, "shape": shape}
        return self.node("GroupQueryAttention", f"{at}/GroupQueryAttention", *given, **how)

    def mlp(self, layer: int, x: str) -> str:
        at, shape = f"/model/layers.{layer}/mlp", [BATCH, NEW, INNER]
        gate, up = (self.product(f"{at}/{part}_proj", x, HIDDEN, INNER) for part in ("gate", "up"))
        if self.decoder.gelu:
            active = self.node("FastGelu", f"{at}/act_fn/FastGelu", gate, domain=MICROSOFT, shape=shape)
        else:
            weight = self.node("Sigmoid", f"{at}/act_fn/Sigmoid", gate, shape=shape)
            active = self.node("Mul", f"{at}/act_fn/Mul", gate, weight, shape=shape)
        return self.product(f"{at}/down_proj", self.node("Mul", f"{at}/Mul", active, up, shape=shape), INNER, HIDDEN)

    # The masks

    def lengths(self) -> None:
        """Of each sequence less 1, and of the longest, from the mask."""
        at = "/model/attn_mask_reformat/attn_mask_subgraph"
        counted = self.node("ReduceSum", f"{at}/ReduceSum", "attention_mask", self.constant([1]))
        less = self.node("Sub", f"{at}/Sub", counted, self.constant([1]))
        self.node("Cast", f"{at}/Sub/Cast", less, to=TensorProto.INT32, outputs=["seqlens_k"])
        total = self.node(
            "Gather", f"{at}/Gather", self.node("Shape", f"{at}/Shape", "attention_mask"), self.constant(1)
        )
        self.node("Cast", f"{at}/Gather/Cast", total, to=TensorProto.INT32, outputs=["total_seq_len"])

    def gathered(self, name: str, x: str, index: int) -> str:
        return self.node(
            "Gather", f"{name}/Gather_{index}", self.node("Shape", f"{name}/Shape_{index}", x), self.constant(index)
        )

    def one(self, name: str, x: str) -> str:
        return self.node("Unsqueeze", name, x, self.constant([0]))

    def spread(self, name: str, x: str, sizes: list[str]) -> str:
        """Expand to sizes, of which none is -1, which the builder looks for all the same."""
        wanted = self.node("Concat", f"{name}/Concat", *sizes, axis=0)
        rank = self.node("Shape", f"{name}/Shape_3", wanted)
        ones = helper.make_tensor("value", TensorProto.INT64, [1], [1])
        ones = self.node("ConstantOfShape", f"{name}/ConstantOfShape", rank, value=ones)
        minus = self.node("Mul", f"{name}/Mul", ones, self.constant(-1))
        free = self.node("Equal", f"{name}/Equal", wanted, minus)
        return self.node("Expand", f"{name}/Expand", x, self.node("Where", f"{name}/Where_1", free, ones, wanted))

    def bias(self) -> None:
        """What MultiHeadAttention adds: a triangle, and the lowest number where the mask has 0, for each head."""
        at, lowest = "/model/attn_mask_reformat", float(np.finfo(np.float32).min)
        past = self.gathered(f"{at}/past_key_subgraph", "past_key_values.0.key", 2)
        ids, mask = f"{at}/input_ids_subgraph", f"{at}/attn_mask_subgraph"
        batch, new = (self.gathered(ids, "input_ids", axis) for axis in (0, 1))
        whole = self.one(f"{ids}/Unsqueeze_3", self.node("Add", f"{ids}/Add_1", new, past))
        square = self.node(
            "Concat", f"{ids}/Concat_2", *(self.one(f"{ids}/Unsqueeze_{n}", new) for n in (4, 5)), axis=0
        )
        low = helper.make_tensor("value", TensorProto.FLOAT, [1], [lowest])
        full = self.node("ConstantOfShape", f"{ids}/ConstantOfShape_2", square, value=low)
        ends = (self.constant([-1]), self.constant([np.iinfo(np.int64).max]), self.constant([0]))
        sizes = []
        for n in (1, 2):
            shape = self.node("Shape", f"{ids}/Shape_{n + 3}", full)
            last = self.node("Slice", f"{ids}/Slice_{n}", shape, *ends)
            sizes.append(self.node("Squeeze", f"{ids}/Squeeze_{n}", last, self.constant([0])))
        column = self.node(
            "Concat", f"{ids}/Concat_3", self.one(f"{ids}/Unsqueeze_7", sizes[0]), self.constant([1]), axis=0
        )
        order = self.node("Range", f"{ids}/Range", self.constant(0), sizes[1], self.constant(1))
        rows = self.node("Reshape", f"{ids}/Reshape", self.node("Add", f"{ids}/Add_2", order, self.constant(1)), column)
        seen = self.node("Less", f"{ids}/Less", order, rows)
        triangle = self.node("Where", f"{ids}/Where_2", seen, self.constant(0, np.float32), full)
        for n in (0, 1):
            triangle = self.node("Unsqueeze", f"{ids}/Unsqueeze_{8 + n}", triangle, self.constant([n]))
        wide = [self.one(f"{ids}/Unsqueeze_1", batch), self.constant([1]), self.one(f"{ids}/Unsqueeze_2", new), whole]
        triangle = self.spread(ids, triangle, wide)
        given = "attention_mask"
        for n in (1, 2):
            given = self.node("Unsqueeze", f"{mask}/Unsqueeze_{n + 2}", given, self.constant([n]))
        batch, total = (self.gathered(mask, "attention_mask", axis) for axis in (0, 1))
        wide = [
            self.one(f"{mask}/Unsqueeze_1", batch),
            self.constant([1]),
            self.one(f"{ids}/Unsqueeze_6", new),
            self.one(f"{mask}/Unsqueeze_2", total),
        ]
        kept = self.node("Cast", f"{mask}/Cast_1", self.spread(mask, given, wide), to=TensorProto.FLOAT)
        hidden = self.node("Sub", f"{mask}/Sub", self.constant(1, np.float32), kept)
        flag = self.node("Cast", f"{mask}/Cast_2", hidden, to=TensorProto.BOOL)
        padding = self.node("Where", f"{mask}/Where_2", flag, self.constant(lowest, np.float32), hidden)
        both = self.node("Add", f"{at}/Add", padding, triangle)
        self.node(
            "Tile",
            f"{at}/Tile",
            both,
            self.constant([1, HEADS, 1, 1]),
            outputs=["attention_bias"],
            shape=[BATCH, HEADS, NEW, TOTAL],
        )

    def repeated(self, layer: int, parts: list[str]) -> str:
        d, at = self.decoder, f"/model/layers.{layer}/attn"
        past, present = (
            [f"{side}.{layer}.{kind}" for kind in ("key", "value")] for side in ("past_key_values", "present")
        )
        names = [f"{at}/MultiHeadAttention/output_0", *present]
        given = (*parts, "", "", "attention_bias", *past)
        if d.key_value_heads != HEADS:
            wide = [
                self.repeat(f"{at}/{part}_proj/repeat_kv", parts[i], past[i - 1], present[i - 1])
                for i, part in ((1, "k"), (2, "v"))
            ]
            given, names = (parts[0], *wide, "", "", "attention_bias"), names[:1]
        how: dict[str, Any] = {"num_heads": HEADS, "scale": SIZE**-0.5, "domain": MICROSOFT, "outputs": names}
        return self.node(
            "MultiHeadAttention", f"{at}/MultiHeadAttention", *given, shape=[BATCH, NEW, HEADS * SIZE], **how
        )

    def repeat(self, name: str, x: str, past: str, present: str) -> str:
        """x [b, s, k·d] behind its past, each head as many times as there are queries to it: [b, t, h·d]."""
        d = self.decoder
        heads = self.node("Reshape", f"{name}/Reshape_1", x, self.constant([0, 0, d.key_value_heads, -1]))
        turned = self.node("Transpose", f"{name}/Transpose_1", heads, perm=[0, 2, 1, 3])
        self.node("Concat", f"{name}/Concat_1", past, turned, axis=2, outputs=[present])
        shape = self.node("Shape", f"{name}/Shape_1", present)
        sizes = [self.node("Gather", f"{name}/Gather_{n}", shape, self.constant(n)) for n in range(4)]
        one = [self.one(f"{name}/Unsqueeze_{n}", size) for n, size in enumerate(sizes)]
        group = HEADS // d.key_value_heads
        more = self.node("Mul", f"{name}/Mul_1", one[1], self.constant(group))
        flat = self.node("Concat", f"{name}/Concat_3", one[0], more, one[2], one[3], axis=0)
        outer = self.node("Unsqueeze", f"{name}/Unsqueeze_5", present, self.constant([2]))
        spread = self.spread(f"{name}/groups", outer, [one[0], one[1], self.constant([group]), one[2], one[3]])
        merged = self.node("Reshape", f"{name}/Reshape_3", spread, flat)
        back = self.node("Transpose", f"{name}/Transpose_2", merged, perm=[0, 2, 1, 3])
        return self.node(
            "Reshape",
            f"{name}/Reshape_4",
            back,
            self.constant([0, 0, HEADS * SIZE]),
            shape=[BATCH, TOTAL, HEADS * SIZE],
        )

    def chosen_tables(self) -> None:
        """Cosines and sines, by how many tokens the mask has in all."""
        at, total = "/model/rotemb_caches_subgraph", "/model/attn_mask_reformat/attn_mask_subgraph/Gather/output_0"
        long = self.node("Greater", f"{at}/Greater", total, self.constant(SHORT), shape=[], dtype=TensorProto.BOOL)
        branches = {}
        for branch, kind, places, factor in (("then", "large", PLACES, 3), ("else", "small", SHORT, 1)):
            made = dict(zip((f"cos_cache_{kind}", f"sin_cache_{kind}"), tables(places, factor), strict=True))
            nodes = [
                helper.make_node("Constant", [], [name], name=f"/{kind}/{name}", value=numpy_helper.from_array(values))
                for name, values in made.items()
            ]
            outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, v.shape) for name, v in made.items()]
            branches[f"{branch}_branch"] = helper.make_graph(nodes, f"{kind}_rotemb_caches_graph", [], outputs)
        names = ["cos_cache", "sin_cache"]
        self.node("If", f"{at}/If", long, outputs=names, **branches)
        shape = ["max_sequence_length", "head_dim / 2"]
        self.infos.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names)

    # The model

    def write(self) -> Graph:
        d = self.decoder
        if d.grouped:
            self.lengths()
        else:
            self.bias()
        if d.long_rope:
            self.chosen_tables()
        else:
            self.weights |= dict(zip(("cos_cache", "sin_cache"), tables(PLACES, 1), strict=True))
        table = self.weight("model.embed_tokens.weight", VOCABULARY, HIDDEN)
        x, skip = (
            self.node("Gather", "/model/embed_tokens/Gather", table, "input_ids", shape=[BATCH, NEW, HIDDEN]),
            None,
        )
        if d.embedding_scale:
            scale = self.constant(d.embedding_scale, np.float32)
            x = self.node("Mul", "/model/embed_tokens/Mul", x, scale, shape=[BATCH, NEW, HIDDEN])
        for layer in range(d.layers):
            at = f"/model/layers.{layer}"
            normal, x = self.norm(f"{at}/input_layernorm", x, skip)
            skip = self.attention(layer, normal)
            normal, x = self.norm(f"{at}/post_attention_layernorm", x, skip)
            skip = self.mlp(layer, normal)
        final, _ = self.norm(f"/model/layers.{d.layers}/final_norm_layernorm", x, skip, last=True)
        self.node(
            "MatMul", "/lm_head/MatMul", final, self.weight("lm_head.weight", HIDDEN, VOCABULARY), outputs=["logits"]
        )
        return self.graph()

    def graph(self) -> Graph:
        d, whole, value = self.decoder, TensorProto.INT64, helper.make_tensor_value_info
        inputs = [value("input_ids", whole, [BATCH, NEW]), value("attention_mask", whole, [BATCH, TOTAL])]
        if not d.rotary_inside:
            inputs.append(value("position_ids", whole, [BATCH, NEW]))
        outputs = [value("logits", TensorProto.FLOAT, [BATCH, NEW, VOCABULARY])]
        past, present = (PLACES, PLACES) if d.shared else (PAST, TOTAL)
        for layer in range(d.layers):
            for kind in ("key", "value"):
                heads = d.key_value_heads
                inputs.append(value(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, [BATCH, heads, past, SIZE]))
                outputs.append(value(f"present.{layer}.{kind}", TensorProto.FLOAT, [BATCH, heads, present, SIZE]))
        weights = [numpy_helper.from_array(values, name) for name, values in self.weights.items()]
        made = helper.make_graph(self.nodes, "main_graph", inputs, outputs, weights, value_info=self.infos)
        opsets = [helper.make_opsetid("", 14), helper.make_opsetid(MICROSOFT, 1)]
        return from_model(helper.make_model(made, opset_imports=opsets, ir_version=7))


LLAMA = Decoder()
QWEN3 = replace(LLAMA, packed=False, rotary_inside=False, head_norms=True)
DECODERS: dict[str, tuple[Decoder, int]] = {
    "llama": (LLAMA, 23),
    "llama-shared": (replace(LLAMA, shared=True), 21),
    "llama-int4": (replace(LLAMA, int4=True), 23),
    "llama-three-products": (replace(LLAMA, packed=False), 23),
    "llama-rotary-outside": (replace(LLAMA, packed=False, rotary_inside=False), 23),
    "phi3-long": (replace(LLAMA, long_rope=True), 23),
    "phi3-long-outside": (replace(LLAMA, long_rope=True, packed=False, rotary_inside=False, shared=True), 21),
    "mistral": (replace(LLAMA, window=3), 23),
    "mistral-shared": (replace(LLAMA, window=3, shared=True), 21),
    "qwen2": (replace(LLAMA, biases=True), 24),
    "qwen2-shared": (replace(LLAMA, biases=True, shared=True), 22),
    "qwen3": (QWEN3, 25),
    "qwen3-shared": (replace(QWEN3, shared=True), 23),
    "gemma": (replace(LLAMA, key_value_heads=1, gelu=True, embedding_scale=HIDDEN**0.5), 23),
    "phi3-multi-head": (replace(LLAMA, key_value_heads=4, grouped=False, packed=False, rotary_inside=False), 21),
    "llama-multi-head": (replace(LLAMA, grouped=False, packed=False, rotary_inside=False), 32),
}
"""And the nodes of a layer that the passes leave.

21; the bias of Qwen2 and the two norms of heads of Qwen3 are one and two more. Two more are the Pad of caches that grow
where sequences of a batch may differ in length: `padded: false` spares them (below). Where keys and values are repeated
for their groups, they stay so, which a near miss says.
"""


def optimize(graph: Graph, padded: bool = True) -> PassResult:
    """The passes of the recipe `optimize`, and their near misses."""
    result = PassResult()
    for step in (DecomposeContrib(padded=padded), *Recipe.load("optimize").passes):
        with suppress(Skip):
            result.near_misses.extend(step.run(graph, Context()).near_misses)
    return result


def layers(decoder: Decoder, padded: bool = True) -> tuple[Counter[str], int]:
    """Nodes that a layer adds, without weights dequantized; and those that do not depend on the number of layers."""
    graphs = [Written(replace(decoder, layers=number)).write() for number in (1, 2, 4)]
    for graph in graphs:
        optimize(graph, padded)
    one, two, four = (
        Counter(node.op for scope in scopes(graph) for node in scope.nodes if node.op != "DequantizeLinear")
        for graph in graphs
    )
    assert four.total() - two.total() == 2 * (two.total() - one.total())  # flat in the number of layers
    added = Counter({op: two[op] - one[op] for op in two if two[op] != one[op]})
    return added, one.total() - added.total()


def feeds(graph: Graph, lengths: list[int], new: int) -> dict[str, Array]:
    """Sequences of `lengths` tokens, the last `new` of them new; shorter ones padded behind."""
    rng, batch, total = np.random.default_rng(len(lengths)), len(lengths), max(lengths)
    ends = np.array(lengths)[:, None]
    given: dict[str, Array] = {}
    for tensor in graph.inputs:
        if tensor.name == "input_ids":
            given[tensor.name] = rng.integers(0, VOCABULARY, (batch, new))
        elif tensor.name == "attention_mask":
            given[tensor.name] = (np.arange(total) < ends).astype(np.int64)
        elif tensor.name == "position_ids":
            first = ends - new if total > new else 0 * ends
            given[tensor.name] = np.maximum(first + np.arange(new), 0)
        else:
            room = tensor.shape[2] if isinstance(tensor.shape[2], int) else total - new
            given[tensor.name] = rng.standard_normal((batch, tensor.shape[1], room, SIZE)).astype(np.float32)
    return given


EXPANDED = "the keys come from Expand"
RUNS = (([5, 5], 5), ([4, 4, 4], 1), ([6], 2))
RAGGED = (([5, 3, 1], 5), ([7, 4, 6], 1))
"""Lengths, and how many tokens are new. ONNX Runtime takes several new tokens behind a past for a batch of 1 alone."""


def compare(before: Graph, after: Graph, runs: Any) -> None:
    """What stands behind the end of a sequence has no meaning: neither its logits nor its caches."""
    onnx.checker.check_model(to_model(after), full_check=True)
    one, other = Session(before), Session(after)
    for lengths, new in runs:
        given = feeds(before, lengths, new)
        found, expected = other.run(given), one.run(given)
        for name, value in expected.items():
            assert found[name].shape == value.shape
            for row, length in enumerate(lengths):
                if name == "logits":
                    kept = slice(length if max(lengths) == new else None)
                    a, b = found[name][row, kept], value[row, kept]
                else:
                    a, b = found[name][row, :, :length], value[row, :, :length]
                scale = max(float(np.abs(b).max(initial=0)), 1.0)
                np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale, err_msg=f"{name} {lengths} {new}")


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str) -> None:
    decoder, nodes = DECODERS[name]
    before = Written(decoder).write()
    graph = copy_graph(before)
    misses = optimize(graph).near_misses
    compare(before, graph, (*RUNS, *RAGGED) if decoder.grouped else RUNS[:2])  # its mask is for prompts, and one token
    added, _ = layers(decoder)
    assert added.total() == nodes, added
    norms = 4 if decoder.head_norms else 2
    expected = {"Attention": 1, "RMSNormalization": norms, "RotaryEmbedding": 2, "Softmax": 0}
    assert {op: added[op] for op in expected} == expected
    assert bool(added["Pad"]) == any("`padded: false`" in miss.reason for miss in misses)
    assert bool(added["Expand"]) == any(EXPANDED in miss.reason for miss in misses), misses


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_without_padding_caches_grow_by_what_is_new(name: str) -> None:
    decoder, nodes = DECODERS[name]
    before = Written(decoder).write()
    graph = copy_graph(before)
    optimize(graph, padded=False)
    compare(before, graph, RUNS)
    added, _ = layers(decoder, padded=False)
    assert added.total() == nodes - 2
    assert (added["Pad"], added["TensorScatter"], added["Concat"]) == (0, 0, 2)
    result = ScatterKvCache(length=9).run(graph, Context())
    assert [rewrite.detail for rewrite in result.rewrites] == ["4 caches of 9 tokens"], result.near_misses
    compare(before, graph, RUNS)
