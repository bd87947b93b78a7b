"""Models as their exporters write them, and passes that are wrong at one place."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from llmc.compiler.blame.replay import Replay
from llmc.compiler.calibrate import SampledActivations
from llmc.compiler.pipeline import PassCrash
from llmc.compiler.planning import Plan, plan
from llmc.compiler.recipe import Recipe
from llmc.compiler.session import Session
from llmc.compiler.verification import verify
from llmc.passes.base import Context, Ledger, Need, Pass, PassResult
from llmc.passes.fuse.fuse_attention import FuseAttention
from llmc.passes.fuse.fuse_batch_norm import FuseBatchNorm
from llmc.passes.fuse.fuse_gelu import FuseGelu
from llmc.passes.fuse.fuse_rms_norm import FuseRMSNorm
from llmc.passes.fuse.merge_projections import MergeProjections
from llmc.passes.graph import (
    Constant,
    Graph,
    Node,
    Tensor,
    Variable,
    load_model,
    load_values,
    module_of,
    save_model,
)
from llmc.passes.precision.calibration import Clipping
from llmc.passes.precision.convert_fp16 import ConvertFp16
from llmc.passes.precision.quantize_int8 import QuantizeInt8

# Models


def torch_model(name: str, size: str) -> Any:
    """A model with random weights: a BERT of some size, a small Llama, ResNet-18. Biases and norms are random too."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "bert":
        width, layers, heads = {"base": (768, 12, 12), "small": (64, 2, 4)}[size]
        sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        sizes |= {"intermediate_size": 4 * width, "vocab_size": 512}
        attention = "eager" if size == "small" else "sdpa"
        config = transformers.BertConfig(**sizes, initializer_range=1.5 * width**-0.5, attn_implementation=attention)
        model = transformers.BertModel(config, add_pooling_layer=False)
    elif name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, use_cache=False, pad_token_id=0, initializer_range=1.5 / 8, attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.LlamaModel(config)
    else:
        config = transformers.ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], embedding_size=64, layer_type="basic"
        )
        model = transformers.ResNetModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1 and "inv_freq" not in key:
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def export(model: Any, name: str, size: str, path: Path) -> None:
    """By torch's newer exporter, with metadata; small ones, and those with BatchNormalization, by the older one."""
    import torch

    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    if name == "resnet":
        inputs = {"pixel_values": torch.ones(2, 3, 64, 64)}  # 2 x 2 in the last stage, where a filter still has sides

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Any) -> Any:
            return self.model(**dict(zip(inputs, given, strict=True))).last_hidden_state

    axes = {key: {0: "batch", **({1: "sequence"} if value.ndim == 2 else {})} for key, value in inputs.items()}
    options: dict[str, Any] = {"dynamo": True, "opset_version": 18, "dynamic_shapes": {"given": tuple(axes.values())}}
    options |= {"external_data": False}
    if name == "resnet" or size == "small":
        options = {"dynamo": False, "opset_version": 17, "dynamic_axes": {**axes, "output": axes[next(iter(axes))]}}
        options |= {"training": torch.onnx.TrainingMode.PRESERVE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        logging.disable(logging.WARNING)
        torch.onnx.export(
            Named(), tuple(inputs.values()), str(path), verbose=False, input_names=list(inputs),
            output_names=["output"], **options,
        )  # fmt: skip
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The ONNX file of a model, exported once."""
    folder = tmp_path_factory.mktemp("exported")

    def exported(name: str, size: str) -> Path:
        path = folder / f"{name}-{size}.onnx"
        if not path.exists():
            export(torch_model(name, size), name, size, path)
        return path

    return exported


# Faults


def upstream(tensor: Tensor, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest node that a tensor is made by, through what only adds and moves."""
    while tensor.inputs:
        node = tensor.inputs[0]
        if wanted(node):
            return node
        tensor = next((t for t in node.inputs if not isinstance(t, Constant)), Variable.empty())
    return None


def tanh_gelu(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    node = upstream(output, lambda n: n.op == "Gelu")
    if node is not None:
        node.attrs["approximate"] = "tanh"
    return node is not None


def large_epsilon(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    node = upstream(output, lambda n: n.op == "RMSNormalization")
    if node is not None:
        node.attrs["epsilon"] = 0.1
    return node is not None


def no_mask(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    node = upstream(output, lambda n: n.op == "Attention")
    if node is None or len(node.inputs) < 4:
        return False
    node.inputs.pop(3)
    return True


def transposed_weight(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    """Of a merged projection the first square block; of a convolution each filter."""
    node = upstream(output, lambda n: n.op in ("MatMul", "Conv") and isinstance(n.inputs[1], Constant))
    if node is None:
        return False
    weight = node.inputs[1]
    values = np.array(load_values(weight))
    if node.op == "Conv":
        if values.shape[-1] == 1:
            return False
        values = values.swapaxes(-1, -2).copy()
    else:
        values[:, : len(values)] = values[:, : len(values)].T.copy()
    node.inputs[1] = Constant(weight.name, values)
    return True


def shifted_padding(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    node = upstream(output, lambda n: n.op == "Conv")
    if node is None or not any(node.attrs.get("pads", ())):
        return False
    top, left, bottom, right = node.attrs["pads"]
    node.attrs["pads"] = [0, 0, top + bottom, left + right]
    return True


def no_bias(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    node = upstream(output, lambda n: n.op == "Conv")
    if node is None or len(node.inputs) < 3:
        return False
    bias = node.inputs[2]
    node.inputs[2] = Constant(bias.name, np.zeros_like(load_values(bias)))
    return True


def bad_scale(graph: Graph, output: Tensor) -> bool:  # noqa: ARG001
    """The INT8 weight's scale is 16 times what it should be."""
    node = upstream(output, lambda n: n.op in ("MatMul", "Gemm", "Conv"))
    assert node is not None
    dequantize = next(
        t.inputs[0]
        for t in node.inputs
        if t.inputs and t.inputs[0].op == "DequantizeLinear" and isinstance(t.inputs[0].inputs[0], Constant)
    )
    scale = dequantize.inputs[1]
    dequantize.inputs[1] = Constant(scale.name, 16 * load_values(scale))
    return True


FAULTS = {
    "bert": ("tanh-gelu", "no-mask", "transposed-weight", "overflow", "bad-scale"),
    "llama": ("large-epsilon", "no-mask", "transposed-weight", "overflow", "bad-scale"),
    "resnet": ("no-bias", "shifted-padding", "transposed-filter", "overflow", "bad-scale"),
}
"""Kind of model → the faults that are planted in it."""
ALLOWED = 3
"""The budget, in errors of the same compile without the fault: rounding that comes in another order is far below."""


class NoPlaceError(Exception):
    """The fault has no place at this rewrite: the pass itself is not at fault."""


WRAPPED: dict[str, tuple[Pass, Callable[[Graph, Tensor], bool]]] = {
    "tanh-gelu": (FuseGelu(), tanh_gelu),
    "large-epsilon": (FuseRMSNorm(), large_epsilon),
    "no-mask": (FuseAttention(), no_mask),
    "transposed-weight": (MergeProjections(), transposed_weight),
    "transposed-filter": (FuseBatchNorm(), transposed_weight),
    "shifted-padding": (FuseBatchNorm(), shifted_padding),
    "no-bias": (FuseBatchNorm(), no_bias),
    "bad-scale": (QuantizeInt8(calibration=Clipping(method="minmax")), bad_scale),
}
"""Fault → the pass that is wrong, and what its rewrite does to the graph beside its work, by what the rewrite makes."""


def results(node: Node) -> list[str]:
    """What a node makes, and what is made of that: of what a rewrite replaces, one of them keeps its name."""
    return [node.outputs[0].name, *(user.outputs[0].name for user in node.outputs[0].outputs)]


class Planted(Pass):
    """A real pass that goes wrong at one of its rewrites."""

    safety: ClassVar = "lossy"
    needs: ClassVar[tuple[Need, ...]] = ("activations",)
    fault: str
    site: int
    """The number of the rewrite in its pass, from 1; 0: none."""

    def run(self, graph: Graph, context: Context) -> PassResult:
        wrapped, corrupt = WRAPPED[self.fault]
        ledger, result = context.ledger, PassResult()
        end, start = ledger.stop_after, ledger.taken
        made: dict[str, list[str]] = {}
        for stop in (self.site - 1, self.site, None):  # up to the fault, the fault, and what comes after it
            wanted = [n for n in (end, None if stop is None else start + max(stop, 0)) if n is not None]
            ledger.stop_after = min(wanted, default=None)
            done = wrapped.run(graph, context)
            result.rewrites += done.rewrites
            result.asked |= done.asked
            if stop == self.site and len(result.rewrites) == self.site > 0:
                tensors = graph.tensors()
                output = next((name for name in made.get(done.rewrites[0].node, ()) if name in tensors), None)
                if output is None or not corrupt(graph, tensors[output]):
                    raise NoPlaceError(done.rewrites[0].node)
            made = {node.name: results(node) for node in graph.nodes}
        ledger.stop_after = end
        return result


class Unmeasured(Pass):
    """convert-fp16 that looks at no activations: what overflows does."""

    safety: ClassVar = "lossy"

    def run(self, graph: Graph, context: Context) -> PassResult:
        return ConvertFp16().run(graph, Context(context.ledger, None))


@dataclasses.dataclass
class Case:
    """A compile with one fault in it, and what must be found."""

    plan: Plan
    sound_error: float
    """The relative L2 error of the same compile without the fault."""
    number: int
    node: str
    module: str
    overflows: str = ""
    """The tensor that must be the first to be infinite, if one must."""


def compile_plan(model: Path, passes: Callable[[Recipe], tuple[Pass, ...]]) -> Plan:
    """The recipe `optimize` with other passes, on two samples with padding."""
    sizes = {"batch": 2} if "resnet" in model.name else {"batch": 2, "sequence": 8}
    recipe = Recipe.load("optimize").with_values(
        {"target.kind": "onnx", "verify.samples": 2, "model.dimensions": sizes}
    )
    return plan(str(model), dataclasses.replace(recipe, passes=passes(recipe)))


def replaced(fault: str, site: int) -> Callable[[Recipe], tuple[Pass, ...]]:
    """The recipe with the wrong pass in the place of the right one; behind the others where it changes precision."""
    planted, key = Planted(fault=fault, site=site), WRAPPED[fault][0].key()

    def passes(recipe: Recipe) -> tuple[Pass, ...]:
        steps = tuple(planted if step.key() == key else step for step in recipe.passes)
        return steps if planted in steps else (*steps, planted)

    return passes


def provider(made: Plan) -> Callable[[Pass], SampledActivations]:
    return lambda step: SampledActivations(made.calibration[step.key()])


def error_of(made: Plan, replay: Replay) -> float:
    """The largest relative L2 error of a compile's outputs."""
    lines = verify(replay.final(), made.loaded.graph, made.verification)
    return max(line.relative_l2 for line in lines if line.relative_l2 is not None)


def moved(graph: Graph, made: Plan) -> float:
    """How far a graph's outputs are from those of the loaded one: the largest relative L2 distance of a sample."""
    session, reference = Session(graph), Session(made.loaded.graph)
    found = 0.0
    for sample in made.verification:
        outputs, expected = session.run(sample), reference.run(sample)
        for name, value in expected.items():
            right = value.astype(np.float64)
            found = max(found, float(np.linalg.norm(outputs[name] - right) / np.linalg.norm(right)))
    return found


def plant(model: Path, fault: str, seed: int, folder: Path) -> Case:
    """A fault at a random place of a model where it is one; `folder` is for a changed model.

    At some places nothing can show it: in the deep layers of a BERT with random weights all positions are alike, and
    whatever attention weighs them by, their mean is the same. Such a rewrite is wrong, and its result is right.
    """
    rng = np.random.default_rng(seed)
    if fault == "overflow":
        return overflowing(model, rng, folder / f"{seed}-{model.name}")
    clean = compile_plan(model, replaced(fault, 0))
    replay = Replay(clean.loaded.graph, clean.recipe.passes, provider(clean))
    done = next(done for done in replay.done if isinstance(done.step, Planted))
    sound = error_of(clean, replay)
    for site in rng.permutation(len(done.result.rewrites)) + 1:
        planted = dataclasses.replace(done, step=Planted(fault=fault, site=int(site)))
        try:
            wrong = replay.again(planted, Ledger())
        except PassCrash as crash:
            if isinstance(crash.__cause__, NoPlaceError):
                continue
            raise
        if not moved(wrong, clean) > (ALLOWED + 1) * sound:  # the passes that follow may give back one `sound`
            continue
        rewrite = done.result.rewrites[site - 1]
        return Case(
            compile_plan(model, replaced(fault, int(site))),
            sound,
            replay.start(done) + int(site),
            rewrite.node,
            rewrite.module,
        )
    raise AssertionError(f"{model.name} has no place for {fault}")


PAIRS = {
    "bert": ("self.value", "output.dense"),
    "llama": ("mlp.up_proj", "mlp.down_proj"),
    "resnet": ("layer.0.convolution", "layer.1.convolution"),
}
"""Two products with nothing but linear or positively homogeneous functions between them."""


def overflowing(model: Path, rng: np.random.Generator, path: Path) -> Case:
    """The same function with one layer that makes numbers beyond float16, and the next one that makes them small."""
    clean = compile_plan(model, lambda recipe: (*recipe.passes, Unmeasured()))
    graph = load_model(model)
    first, second = PAIRS[model.name.partition("-")[0]]
    products = [n for n in graph.nodes if n.op in ("MatMul", "Conv") and isinstance(n.inputs[1], Constant)]
    pairs = [
        (one, other)
        for one in products
        if module_of(one).endswith(first)
        for other in products
        if module_of(other) == module_of(one).removesuffix(first) + second
    ]
    one, other = pairs[rng.integers(len(pairs))]
    norm = one.outputs[0].outputs[0]  # the bias, or BatchNormalization
    scaled = [(one, [1]), (norm, [i for i, t in enumerate(norm.inputs) if isinstance(t, Constant)])]
    result = norm.outputs[0] if norm.op in ("Add", "BatchNormalization") else one.outputs[0]
    if norm.op == "BatchNormalization":
        scaled = [(norm, [1, 2])]
    elif norm.op != "Add":
        scaled = scaled[:1]
    peak = max(
        np.abs(Session(graph, [result.name]).run(s, [result.name])[result.name]).max() for s in clean.verification
    )
    power = float(2.0 ** np.ceil(np.log2(2 * 65504 / peak)))
    for node, indices in (*scaled, (other, [1])):
        for index in indices:
            constant = node.inputs[index]
            factor = power if node is not other else 1 / power
            node.inputs[index] = Constant(
                f"{constant.name}_scaled", (load_values(constant) * factor).astype(np.float32)
            )
    save_model(graph, path)
    changed = compile_plan(path, lambda recipe: (*recipe.passes, Unmeasured()))
    replay = Replay(changed.loaded.graph, changed.recipe.passes, lambda _: None)
    done, before = replay.done[-1], replay.done[-1].before
    made = {node.name: node.outputs[0].name for node in before.nodes}
    masks = {node.name for node in before.nodes if node.op == "Where"}  # their -3e38 is a mark, not a number
    known = before.tensors()
    rewrites = [r for r in done.result.rewrites if r.node not in masks and known[made[r.node]].dtype == np.float32]
    names = [made[rewrite.node] for rewrite in rewrites]
    values = [Session(before, names).run(sample, names) for sample in changed.verification]
    guilty = next(r for r in rewrites if max(np.abs(v[made[r.node]]).max() for v in values) > 65504)
    number = replay.start(done) + done.result.rewrites.index(guilty) + 1
    sound = Replay(clean.loaded.graph, clean.recipe.passes, lambda _: None)
    return Case(changed, error_of(clean, sound), number, guilty.node, guilty.module, made[guilty.node])


@pytest.fixture(scope="session")
def planted(exported: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """`planted("bert", "tanh-gelu", seed, size="small")`."""
    folder = tmp_path_factory.mktemp("planted")

    def planted(name: str, fault: str, seed: int, size: str = "small") -> Case:
        return plant(exported(name, size), fault, seed, folder)

    return planted
