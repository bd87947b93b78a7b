"""Graphs as exporters that are not installed here write them, rebuilt node by node, optimized, counted and compared.

Taken from tf2onnx 1.17 (transformers' TFBertModel) and optimum 1.24 (LlamaForCausalLM with past, GPT2LMHeadModel,
T5ForConditionalGeneration's decoders without and with past, alone and merged to the branches of an If).
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest

from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.passes.base import Context, Skip
from llmc.passes.cache.scatter_kv_cache import ScatterKvCache
from llmc.passes.graph import Array, Constant, Graph, copy_graph, infer_shapes, scopes, to_model

TOLERANCE = 1e-5
"""Of the largest value, about 1: some dozens of dependent float32 roundings, 2^-24 each."""
SIZES = ((2, 5, 3), (3, 1, 4), (2, 4, 0))
"""Batch, new tokens, and tokens in the cache where there is one."""

# Keras BERT through tf2onnx: dense layers on rows, LayerNormalization as x·k + (bias − mean·k)

MEAN = {18: "ReduceMean<noop_with_empty_axes = 1>({}, last)", 13: "GlobalAveragePool({})"}


def keras_norm(x: str, y: str, mean: str) -> str:
    """tf.nn.batch_normalization, which keras.layers.LayerNormalization calls."""
    return f"""
    {y}_m = {mean.format(x)} {y}_d = Sub({x}, {y}_m) {y}_q = Mul({y}_d, {y}_d) {y}_v = {mean.format(y + "_q")}
    {y}_e = Add({y}_v, epsilon) {y}_r = Sqrt({y}_e) {y}_i = Reciprocal({y}_r) {y}_k = Mul({y}_i, scale)
    {y}_a = Mul({x}, {y}_k) {y}_b = Mul({y}_m, {y}_k) {y}_c = Sub(shift, {y}_b) {y} = Add({y}_a, {y}_c)"""


def keras_dense(x: str, y: str, weight: str, width: int, rows: str = "") -> str:
    """tf.tensordot and a bias; `rows` are x as rows where they are there already."""
    flat = rows or f"{y}_rows"
    made = "" if rows else f"{flat} = Reshape({x}, {'rows64' if weight == 'w64' else 'rows32'})"
    return f"""
    {y}_s = Shape({x}) {y}_t = Cast<to = 6>({y}_s) {y}_u = Gather({y}_t, front)
    {y}_n = Constant<value = int32[1] {{{width}}}>() {y}_o = Concat<axis = 0>({y}_u, {y}_n) {y}_p = Cast<to = 7>({y}_o)
    {made} {y}_x = MatMul({flat}, {weight}) {y}_y = Reshape({y}_x, {y}_p) {y} = Add({y}_y, b{width})"""


def keras_layer(opset: int) -> str:
    to_heads = "front1 = Slice(sizes, at0, at1, at0) parts = Concat<axis = 0>(front1, any32, four32, eight32)"
    merged = "merge = Concat<axis = 0>(front1, any32, wide32) merge64 = Cast<to = 7>(merge)"
    return f"""
    last = Constant<value_ints = [2]>() front = Constant<value_ints = [0, 1]>()
    epsilon = Constant<value_float = 1e-12>()
    rows32 = Constant<value_ints = [-1, 32]>() rows64 = Constant<value_ints = [-1, 64]>()
    at0 = Constant<value_ints = [0]>() at1 = Constant<value_ints = [1]>()
    any32 = Constant<value = int32[1] {{-1}}>() four32 = Constant<value = int32[1] {{4}}>()
    eight32 = Constant<value = int32[1] {{8}}>() wide32 = Constant<value = int32[1] {{32}}>()
    long = Shape(x) sizes = Cast<to = 6>(long) {to_heads} heads = Cast<to = 7>(parts) {merged}
    flat = Reshape(x, rows32)
    {keras_dense("x", "q", "wq", 32, "flat")} {keras_dense("x", "k", "wk", 32, "flat")}
    {keras_dense("x", "v", "wv", 32, "flat")}
    qr = Reshape(q, heads) qt = Transpose<perm = [0, 2, 1, 3]>(qr)
    kr = Reshape(k, heads) kt = Transpose<perm = [0, 2, 3, 1]>(kr)
    vr = Reshape(v, heads) vt = Transpose<perm = [0, 2, 1, 3]>(vr)
    scores = MatMul(qt, kt) scaled = Mul(scores, root)
    wide = Constant<value_ints = [0, 1, 1, -1]>() mask4 = Reshape(mask, wide) maskf = Cast<to = 1>(mask4)
    hidden = Sub(one, maskf) lowered = Mul(hidden, low) bias = Add(tiny, lowered) masked = Add(scaled, bias)
    weights = Softmax<axis = -1>(masked) read = MatMul(weights, vt) back = Transpose<perm = [0, 2, 1, 3]>(read)
    joined = Reshape(back, merge64) {keras_dense("joined", "out", "wo", 32)} first = Add(out, x)
    {keras_norm("first", "n", MEAN[opset])}
    {keras_dense("n", "up", "w32", 64)}
    g1 = Mul(up, invroot) g2 = Erf(g1) g3 = Add(one, g2) g4 = Mul(half, up) g5 = Mul(g4, g3)
    {keras_dense("g5", "down", "w64", 32)} second = Add(down, n) {keras_norm("second", "y", MEAN[opset])}"""


KERAS = "(float[batch,sequence,32] x, int32[batch,sequence] mask{weights}) => (float[b,s,32] y) "
KERAS += "<float[batch,sequence,32] first, float[batch,sequence,32] second, float root = {{0.35355338}}, "
KERAS += "float one = {{1}}, float low = {{-10000}}, float tiny = {{1e-9}}, "
KERAS += "float invroot = {{0.70710677}}, float half = {{0.5}}> {{ {body} }}"
KERAS_WEIGHTS = {"wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "wo": (32, 32), "w32": (32, 64), "w64": (64, 32)}
KERAS_WEIGHTS |= {"b32": (32,), "b64": (64,), "scale": (32,), "shift": (32,)}
KERAS_COUNTS = {"Attention": 1, "LayerNormalization": 2, "Gelu": 1, "MatMul": 4, "Softmax": 0, "Transpose": 0}

# Llama through optimum: torch's legacy exporter, a mask that is written into itself and cut to the cache's length

PLACES = """
    iota_b = Range(zero, batch, step) iota_s = Range(zero, new, step) cut_keys = Slice(keys, at0, width1, at0, at1)
    over_b = Constant<value_ints = [-1, 1, 1, 1]>() over_s = Constant<value_ints = [-1, 1]>()
    places_b = Reshape(iota_b, over_b) places_s = Reshape(iota_s, over_s) origin = Constant<value = int64[1,1,1] {0}>()
    sum1 = Add(places_b, origin) sum2 = Add(sum1, places_s) sum3 = Add(sum2, cut_keys) whole = Shape(sum3)
    e_b = Expand(places_b, whole) e_o = Expand(origin, whole) e_s = Expand(places_s, whole)
    e_k = Expand(cut_keys, whole) end = Constant<value_ints = [-1]>()
    u_b = Unsqueeze(e_b, end) u_o = Unsqueeze(e_o, end) u_s = Unsqueeze(e_s, end) u_k = Unsqueeze(e_k, end)
    places = Concat<axis = -1>(u_b, u_o, u_s, u_k)"""
CACHED = "shape_p = Shape(past_k) past = Gather(shape_p, two)"


def legacy_mask(
    past: str = CACHED, given: str = "", mask: str = "mask", upper: str = "Trilu<upper = 1>(full, step)"
) -> str:
    """transformers' causal mask, and what `mask` hides; `past` makes the number of tokens before, `given` the mask."""
    return f"""
    zero = Constant<value = int64 {{0}}>() step = Constant<value = int64 {{1}}>() two = Constant<value = int64 {{2}}>()
    at0 = Constant<value_ints = [0]>() at1 = Constant<value_ints = [1]>() at3 = Constant<value_ints = [3]>()
    {past} shape_x = Shape(x) new = Gather(shape_x, step)
    batch = Gather(shape_x, zero) total = Add(past, new) order = Range(past, total, step)
    batch1 = Unsqueeze(batch, at0) total1 = Unsqueeze(total, at0) {given}
    shape_m = Shape({mask}) width = Gather(shape_m, step) new1 = Unsqueeze(new, at0) width1 = Unsqueeze(width, at0)
    square = Concat<axis = 0>(new1, width1) full = ConstantOfShape<value = float[1] {{-3.4028235e38}}>(square)
    upper = {upper} keys = Range(zero, width, step) column = Constant<value_ints = [-1, 1]>()
    rows = Reshape(order, column) later = Greater(keys, rows) laterf = Cast<to = 1>(later) causal2 = Mul(upper, laterf)
    outer = Constant<value_ints = [0, 1]>() causal4 = Unsqueeze(causal2, outer)
    any = Constant<value_ints = [-1]>() wanted = Concat<axis = 0>(batch1, at1, any, any)
    minus = Constant<value_ints = [-1, -1, -1, -1]>() ones = Constant<value_ints = [1, 1, 1, 1]>()
    free = Equal(wanted, minus) target = Where(free, ones, wanted) causal = Expand(causal4, target)
    cut = Slice(causal, at0, width1, at3, at1) inner = Constant<value_ints = [1, 2]>() mask4 = Unsqueeze({mask}, inner)
    maskf = Cast<to = 1>(mask4) seen = Add(cut, maskf) nothing = Equal(seen, zerof) filled = Where(nothing, low, cut)
    {PLACES} bias = ScatterND(causal, places, filled)
    allowed = Slice(bias, at0, total1, at3, at1)"""


def legacy_rotary(x: str, y: str) -> str:
    return f"""
    {y}_a = Slice({x}, at0, at4, at3, at1) {y}_b = Slice({x}, at4, far, at3, at1) {y}_n = Neg({y}_b)
    {y}_c = Concat<axis = -1>({y}_n, {y}_a) {y}_d = Mul({x}, cos4) {y}_e = Mul({y}_c, sin4) {y} = Add({y}_d, {y}_e)"""


def legacy_repeat(x: str, y: str) -> str:
    """repeat_kv: [b, 2, t, 8] → [b, 4, t, 8]."""
    return f"""
    {y}_u = Unsqueeze({x}, at2) {y}_g = Constant<value_ints = [1, 1, 2, 1, 1]>() {y}_e = Expand({y}_u, {y}_g)
    {y}_t = Constant<value_ints = [0, 4, -1, 8]>() {y} = Reshape({y}_e, {y}_t)"""


LLAMA = f"""
    {legacy_mask()}
    at2 = Constant<value_ints = [2]>() at4 = Constant<value_ints = [4]>()
    far = Constant<value = int64[1] {{9223372036854775807}}>() placef = Cast<to = 1>(place)
    placeu = Unsqueeze(placef, at2) angle = Mul(placeu, inverse) angles = Concat<axis = -1>(angle, angle)
    cos = Cos(angles) sin = Sin(angles)
    cos4 = Unsqueeze(cos, at1) sin4 = Unsqueeze(sin, at1)
    hq = Constant<value_ints = [0, 0, 4, 8]>() hk = Constant<value_ints = [0, 0, 2, 8]>()
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) q3 = Reshape(q, hq) k3 = Reshape(k, hk) v3 = Reshape(v, hk)
    qt = Transpose<perm = [0, 2, 1, 3]>(q3) kt = Transpose<perm = [0, 2, 1, 3]>(k3)
    vt = Transpose<perm = [0, 2, 1, 3]>(v3) {legacy_rotary("qt", "qr")} {legacy_rotary("kt", "kr")}
    keys_now = Concat<axis = -2>(past_k, kr) values_now = Concat<axis = -2>(past_v, vt)
    {legacy_repeat("keys_now", "kg")} {legacy_repeat("values_now", "vg")}
    kgt = Transpose<perm = [0, 1, 3, 2]>(kg) qs = Mul(qr, root) ks = Mul(kgt, root) scores = MatMul(qs, ks)
    masked = Add(scores, allowed) weights = Softmax<axis = -1>(masked) read = MatMul(weights, vg)
    back = Transpose<perm = [0, 2, 1, 3]>(read) joins = Constant<value_ints = [0, 0, 32]>()
    joined = Reshape(back, joins) y = MatMul(joined, wo)"""
LLAMA_HEAD = "(float[batch,sequence,32] x, int64[batch,longer] mask, int64[batch,sequence] place, "
LLAMA_HEAD += "float[batch,2,past,8] past_k, float[batch,2,past,8] past_v{weights}) => (float[b,s,32] y, "
LLAMA_HEAD += "float[b,2,t,8] keys_now, float[b,2,t,8] values_now) "
LLAMA_HEAD += "<float root = {{0.59460354}}, float zerof = {{0}}, float low = {{-3.4028235e38}}> {{ {body} }}"
LLAMA_WEIGHTS = {"wq": (32, 32), "wk": (32, 16), "wv": (32, 16), "wo": (32, 32), "inverse": (4,)}
LLAMA_COUNTS = {"Attention": 1, "RotaryEmbedding": 2, "MatMul": 2, "Softmax": 0, "ScatterND": 0, "Transpose": 2}

# T5's decoder through optimum: a position bias that the first layer makes and the others share, keys and values of the
# encoder computed or given, and both decoders as the branches of an If

T5_ONES = "ones_shape = Concat<axis = 0>(batch1, total1) "
T5_ONES += "ones_mask = ConstantOfShape<value = float[1] {1}>(ones_shape)"
T5_SIZES = """
    at2 = Constant<value_ints = [2]>() four = Constant<value_ints = [4]>() eight = Constant<value_ints = [8]>()
    wide = Constant<value_ints = [32]>() far = Constant<value = int64[1] {9223372036854775807}>()
    end1 = Constant<value_ints = [-1]>()
    eighth = Constant<value = int64 {8}>() eightf = Constant<value_float = 8.0>()
    onef = Constant<value_float = 1.0>() twof = Constant<value_float = 2.0>() epsilon = Constant<value_float = 1e-6>()
    logf = Constant<value_float = 2.7725887>()"""


def t5_norm(x: str, y: str) -> str:
    return f"""
    {y}_p = Pow({x}, twof) {y}_m = ReduceMean<axes = [-1]>({y}_p) {y}_e = Add({y}_m, epsilon) {y}_r = Sqrt({y}_e)
    {y}_i = Div(onef, {y}_r) {y}_n = Mul({x}, {y}_i) {y} = Mul(scale, {y}_n)"""


def t5_heads(x: str, y: str, weight: str) -> str:
    """[b, s, 32] → [b, 4, s, 8]."""
    return f"""
    {y}_x = MatMul({x}, {weight}) {y}_s = Shape({x}) {y}_b = Gather({y}_s, zero) {y}_u = Unsqueeze({y}_b, at0)
    {y}_o = Concat<axis = 0>({y}_u, end1, four, eight) {y}_y = Reshape({y}_x, {y}_o)
    {y} = Transpose<perm = [0, 2, 1, 3]>({y}_y)"""


def t5_attention(x: str, y: str, keys: str, values: str, bias: str) -> str:
    """Of x, normalised as {y}_h, whose queries are {y}_q."""
    return f"""
    {y}_t = Transpose<perm = [0, 1, 3, 2]>({keys}) {y}_c = MatMul({y}_q, {y}_t) {y}_m = Add({y}_c, {bias})
    {y}_w = Softmax<axis = -1>({y}_m) {y}_r = MatMul({y}_w, {values}) {y}_k = Transpose<perm = [0, 2, 1, 3]>({y}_r)
    {y}_s = Shape({y}_h) {y}_b = Gather({y}_s, zero) {y}_u = Unsqueeze({y}_b, at0)
    {y}_f = Concat<axis = 0>({y}_u, end1, wide) {y}_j = Reshape({y}_k, {y}_f) {y}_o = MatMul({y}_j, wo)
    {y} = Add({x}, {y}_o)"""


def t5_bias(keys: str) -> str:
    """Of the distance to each key, one of 16 buckets; and of what comes later."""
    return f"""
    context = Unsqueeze(order, at1) length_s = Shape({keys}) length = Gather(length_s, two)
    memo = Range(zero, length, step) memory0 = Unsqueeze(memo, at0) relative = Sub(memory0, context)
    like = Shape(relative) nought = ConstantOfShape<value = int64[1] {{0}}>(like) least = Min(relative, nought)
    distance = Neg(least) small = Less(distance, eighth) distancef = Cast<to = 1>(distance)
    ratio = Div(distancef, eightf) logs = Log(ratio) share = Div(logs, logf) more = Mul(share, eightf)
    steps = Cast<to = 7>(more) large = Add(steps, eighth) like2 = Shape(large)
    most = ConstantOfShape<value = int64[1] {{15}}>(like2) capped = Min(large, most)
    bucket = Where(small, distance, capped) picked = Gather(table, bucket) turned = Transpose<perm = [2, 0, 1]>(picked)
    position = Unsqueeze(turned, at0) new_n = Neg(new) new_u = Unsqueeze(new_n, at0)
    last = Slice(position, new_u, far, at2, at1) length1 = Unsqueeze(length, at0)
    masks = Slice(allowed, at0, length1, at3, at1) bias_self = Add(last, masks)"""


def t5_cross_bias(keys: str) -> str:
    return f"""
    source_s = Shape({keys}) source_n = Gather(source_s, two) source1 = Unsqueeze(source_n, at0)
    grid = Concat<axis = 0>(at1, four, new1, source1) none = ConstantOfShape<value = float[1] {{0}}>(grid)
    inner2 = Constant<value_ints = [1, 2]>() seen4 = Unsqueeze(mask, inner2) seenf = Cast<to = 1>(seen4)
    hidden4 = Sub(onef, seenf) hiddenf = Mul(hidden4, low) bias_cross = Add(none, hiddenf)"""


def t5_layer(number: int, x: str, y: str, past: bool) -> str:
    n, c = f"s{number}", f"c{number}"
    own = t5_heads(f"{n}_h", f"{n}_nk", "wk") + t5_heads(f"{n}_h", f"{n}_nv", "wv")
    if past:
        own += f" keys{number} = Concat<axis = -2>(past_k{number}, {n}_nk)"
        own += f" values{number} = Concat<axis = -2>(past_v{number}, {n}_nv)"
        other, read = "", (f"cross_k{number}", f"cross_v{number}")
        other = f" cross_keys{number} = Constant<value = float[0,4,1,8] {{}}>()"
        other += f" cross_values{number} = Constant<value = float[0,4,1,8] {{}}>()"
    else:
        own = own.replace(f"{n}_nk =", f"keys{number} =").replace(f"{n}_nv =", f"values{number} =")
        read = (f"cross_keys{number}", f"cross_values{number}")
        other = t5_heads("memory", read[0], "uk") + t5_heads("memory", read[1], "uv")
    first = number == 0
    return f"""
    {t5_norm(x, f"{n}_h")} {t5_heads(f"{n}_h", f"{n}_q", "wq")} {own}
    {t5_bias("keys0") if first else ""} {t5_attention(x, n, f"keys{number}", f"values{number}", "bias_self")}
    {t5_norm(n, f"{c}_h")} {t5_heads(f"{c}_h", f"{c}_q", "uq")} {other}
    {t5_cross_bias(read[0]) if first else ""} {t5_attention(n, c, *read, "bias_cross")}
    {y} = Identity({c})"""


def t5_decoder(past: bool) -> str:
    if past:  # traced with one token, of which no triangle is made
        mask = legacy_mask(CACHED.replace("past_k", "past_k0"), T5_ONES, "ones_mask", "Identity(full)")
    else:
        mask = legacy_mask("past = Constant<value = int64 {0}>()", T5_ONES, "ones_mask")
    return mask + T5_SIZES + t5_layer(0, "x", "x1", past) + t5_layer(1, "x1", "x2", past) + t5_norm("x2", "y")


T5_PAST = ", ".join(
    f"float[batch,4,{size},8] {name}{number}"
    for number in (0, 1)
    for name, size in (("past_k", "past"), ("past_v", "past"), ("cross_k", "source"), ("cross_v", "source"))
)
T5_PRESENT = ", ".join(
    f"float[b,4,{size},8] {name}{number}"
    for number in (0, 1)
    for name, size in (("keys", "t"), ("values", "t"), ("cross_keys", "u"), ("cross_values", "u"))
)
T5_OUTPUTS = f"float[b,s,32] y, {T5_PRESENT}"
T5_TENSORS = "<float zerof = {{0}}, float low = {{-3.4028235e38}}>"
T5_HEAD = "(float[batch,sequence,32] x, float[batch,source,32] memory, int64[batch,source] mask{weights}) => "
T5_HEAD += f"({T5_OUTPUTS}) {T5_TENSORS} {{{{ {{body}} }}}}"
T5_PAST_HEAD = T5_HEAD.replace("{weights}", f", {T5_PAST}{{weights}}")
T5_MERGED_HEAD = T5_PAST_HEAD.replace("{weights}", ", bool[1] use_cache_branch{weights}")
T5_MERGED = f"""
    y, {", ".join(part.split()[-1] for part in T5_PRESENT.split(", "))} = If (use_cache_branch) <
        then_branch = with_past () => ({T5_OUTPUTS}) {{ {t5_decoder(True)} }},
        else_branch = no_past () => ({T5_OUTPUTS}) {{ {t5_decoder(False)} }}>"""
T5_WEIGHTS = dict.fromkeys(("wq", "wk", "wv", "wo", "uq", "uk", "uv"), (32, 32)) | {"table": (16, 4), "scale": (32,)}
T5_COUNTS = {"Attention": 4, "RMSNormalization": 5, "Softmax": 0, "ScatterND": 0}

SPELLINGS: dict[str, tuple[int, str, str, dict[str, tuple[int, ...]], dict[str, int]]] = {
    "keras-bert-18": (18, KERAS, keras_layer(18), KERAS_WEIGHTS, KERAS_COUNTS),
    "keras-bert-13": (13, KERAS, keras_layer(13), KERAS_WEIGHTS, KERAS_COUNTS),
    "optimum-llama": (14, LLAMA_HEAD, LLAMA, LLAMA_WEIGHTS, LLAMA_COUNTS),
    "optimum-t5": (14, T5_HEAD, t5_decoder(False), T5_WEIGHTS, T5_COUNTS),
    "optimum-t5-past": (14, T5_PAST_HEAD, t5_decoder(True), T5_WEIGHTS, T5_COUNTS),
    "optimum-t5-merged": (14, T5_MERGED_HEAD, T5_MERGED, T5_WEIGHTS, {op: 2 * n for op, n in T5_COUNTS.items()}),
}


def build(parse: Any, opset: int, head: str, body: str, weights: dict[str, tuple[int, ...]]) -> Graph:
    declared = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    if opset < 18:
        body = body.replace("last = Constant<value_ints = [2]>()", "")
    graph: Graph = parse(head.format(weights=declared, body=body), opset=opset)
    rng = np.random.default_rng(0)
    for tensor in [t for t in graph.inputs if t.name in weights]:
        tensor.to_constant((rng.standard_normal(tensor.shape) / 4).astype(np.float32))
    graph.inputs = [t for t in graph.inputs if not isinstance(t, Constant)]
    infer_shapes(graph)
    return graph


def feeds(graph: Graph, batch: int, new: int, past: int, branch: bool = True) -> dict[str, Array]:
    """Random, with a first token that is padding in each row but the first; a condition is `branch`."""
    rng = np.random.default_rng(past)
    sizes = {"batch": batch, "sequence": new, "past": past, "longer": past + new, "source": 6}
    given: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        if tensor.name == "mask":
            given["mask"] = np.ones(shape, tensor.dtype)
            given["mask"][1:, :1] = shape[1] == 1
        elif tensor.name == "place":
            given["place"] = np.broadcast_to(np.arange(past, past + new), shape).astype(np.int64)
        elif tensor.dtype == np.bool_:
            given[tensor.name] = np.full(shape, branch)
        else:
            given[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return given


def optimize(graph: Graph) -> None:
    for step in Recipe.load("optimize").passes:
        try:
            step.run(graph, Context())
        except Skip:
            continue


def given_names(graph: Graph) -> list[str]:
    return [tensor.name for tensor in graph.inputs]


def compare(before: Graph, after: Graph) -> None:
    onnx.checker.check_model(to_model(after), full_check=True)
    one, other = Session(before), Session(after)
    for sizes, branch in product(SIZES, (True, False) if "use_cache_branch" in given_names(before) else (True,)):
        given = feeds(before, *sizes, branch)
        found = other.run(given)
        for name, value in one.run(given).items():
            scale = max(float(np.abs(value).max(initial=0)), 1.0)
            where = f"{name} {sizes} {branch}"
            np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE * scale, err_msg=where)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, parse: Any) -> None:
    opset, head, body, weights, counts = SPELLINGS[name]
    graph = build(parse, opset, head, body, weights)
    optimized = copy_graph(graph)
    optimize(optimized)
    found = Counter(node.op for scope in scopes(optimized) for node in scope.nodes)
    assert {op: found[op] for op in counts} == counts
    compare(graph, optimized)


def test_the_cache_of_optimum_becomes_static(parse: Any) -> None:
    graph = build(parse, *SPELLINGS["optimum-llama"][:4])
    optimized = copy_graph(graph)
    optimize(optimized)
    result = ScatterKvCache(length=9, mask="mask").run(optimized, Context())
    assert [rewrite.detail for rewrite in result.rewrites] == ["2 caches of 9 tokens"], result.near_misses
    compare(graph, optimized)
