"""torch → Graph: exported rung by rung, each proved against torch before it is trusted."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler.data import random_feeds
from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders import Feeds
from llmc.compiler.loaders.generated import generated, prove_tokens
from llmc.compiler.loaders.key_values import PAST
from llmc.compiler.loaders.mapped import MappedFiles
from llmc.compiler.loaders.quiet import quiet
from llmc.compiler.loaders.signature import Signature, run_torch
from llmc.compiler.loaders.tasks import TEXT_GENERATION
from llmc.compiler.loaders.widened import Widened
from llmc.compiler.progress import Progress
from llmc.compiler.session import Session
from llmc.passes.graph import SMALL, Array, Graph, Structure, Weights, from_structure

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = range(18, 25)
"""What torch.onnx writes rightly: its operators begin at 18, and from 25 on it mislabels the file."""

TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float16): 2e-2}
"""How far an output may be from torch's, as a part of its largest magnitude.

Both sides round each of some hundred dependent operations: by 2^-24 in float32, which was seen to add up to some 1e-6,
and by 2^-11 in float16. A mask that was dropped, or a position that is one off, shows as 1e-2 and more.
"""


@dataclass(frozen=True)
class Rung:
    """One way to export."""

    opset: int
    attention: str

    def __str__(self) -> str:
        return f"opset {self.opset}, {self.attention}"


@dataclass(frozen=True)
class Export:
    """A graph that gives what torch gives."""

    graph: Graph
    rung: Rung
    parameters: frozenset[str]
    """Names of the model's parameters and buffers that the graph depends on."""


@dataclass(frozen=True)
class Exported:
    """A graph that nobody has proved yet."""

    graph: Graph
    attention: str
    """That the model really had."""
    parameters: frozenset[str]
    """As in `Export`."""


Exporter = Callable[[Rung], Exported]


def exporter_of(model: Any, signature: Signature, weights: Widened) -> Exporter:
    """Exports `model` in this process."""

    def exported(rung: Rung) -> Exported:
        with quiet(), _implementations(model, rung.attention) as attention:
            graph, parameters = _export(model, signature, rung.opset, weights.files)
        return Exported(graph, attention, parameters)

    return exported


def export(
    model: Any,
    signature: Signature,
    task: str,
    opset: int | None,
    progress: Progress,
    weights: Widened,
    exporter: Exporter | None = None,
) -> Export:
    """Export `model` by the first rung whose graph proves right at every size of `signature.checks`.

    The graph's weights stay in files where `weights`, the model's own, have them there, and are else in the model's
    memory, under the model's names ('.T' behind transposed ones). `exporter` (by default in this process) makes the
    graphs. Raises LlmcError with each rung's reason where none will do.
    """
    exporter = exporter or exporter_of(model, signature, weights)
    decodes = PAST in signature.sample
    ladder = _ladder(decodes or task == TEXT_GENERATION, opset)
    expected = weights.settled(lambda: _expectations(model, signature))
    answers = weights.settled(lambda: generated(model, signature)) if decodes else None
    failures = []

    def proved(rung: Rung) -> Export:
        progress(f"exporting at opset {rung.opset} with {rung.attention} attention")
        made = exporter(rung)
        progress("comparing with torch")
        session = Session(made.graph)
        _prove(session, expected)
        if answers is not None:
            prove_tokens(made.graph, session, answers)
        return Export(made.graph, Rung(rung.opset, made.attention), made.parameters)

    for rung in ladder:
        try:
            return weights.settled(partial(proved, rung))
        except Exception as error:  # whatever goes wrong inside the exporter, the next rung may do
            failures.append(f"{rung}: {explain(error)}")
    raise LlmcError(f"{type(model).__name__} cannot be exported to ONNX:\n  " + "\n  ".join(failures))


def _ladder(decodes: bool, opset: int | None) -> list[Rung]:
    """Attention is one node from opset 23 on. At 23 exactly the exporter also fuses norms and rotary embeddings, the
    latter wrongly for a batch over 1: decoders start at 24, and others end up there where 23 does not prove right."""
    if opset is not None:
        if opset not in OPSETS:
            raise LlmcError(f"models are exported at opset {OPSETS.start} to {OPSETS[-1]}, not {opset}")
        return [Rung(opset, attention) for attention in (("sdpa", "eager") if opset > 22 else ("eager", "sdpa"))]
    native = [Rung(24, "sdpa")] if decodes else [Rung(23, "sdpa"), Rung(24, "sdpa")]
    return [*native, Rung(20, "eager")]


def _expectations(model: Any, signature: Signature) -> list[tuple[Feeds, dict[str, Array]]]:
    rng = np.random.default_rng(0)
    samples = [random_feeds(signature.inputs, sizes, signature.bounds, rng) for sizes in signature.checks]
    expected: list[tuple[Feeds, dict[str, Array]]]
    try:
        expected = [(feeds, run_torch(model, signature, feeds)) for feeds in samples]
    except LlmcError:
        raise
    except Exception as error:  # the model's own code
        given = ", ".join(variable.name for variable in signature.inputs)
        raise LlmcError(f"{type(model).__name__} does not run in torch on {given}: {explain(error)}") from error
    for _, outputs in expected:
        for name, value in outputs.items():
            if np.isnan(value).any():
                raise LlmcError(f"{type(model).__name__} gives NaN for '{name}' in torch itself, as {value.dtype}")
    return expected


def _prove(session: Session, expected: Sequence[tuple[Feeds, dict[str, Array]]]) -> None:
    found_of_each = session.run_each(feeds for feeds, _ in expected)
    for (feeds, outputs), found in zip(expected, found_of_each, strict=True):
        for name, reference in outputs.items():
            shape = tuple(next(iter(feeds.values())).shape)
            if found[name].shape != reference.shape:
                raise LlmcError(f"'{name}' is {found[name].shape} for inputs of {shape}, torch's is {reference.shape}")
            scale = float(np.abs(reference).max(initial=0)) or 1.0
            difference = float(np.abs(found[name].astype(np.float64) - reference).max(initial=0)) / scale
            if not difference <= TOLERANCE[reference.dtype]:
                raise LlmcError(
                    f"'{name}' differs from torch's by {difference:.2g} of its largest value for inputs of {shape}"
                )


@contextmanager
def _implementations(model: Any, attention: str) -> Iterator[str]:
    """The model with this attention, and experts as plain products; gives the attention that it really has then."""
    attention_before, experts_before = model.config._attn_implementation, model.config._experts_implementation
    model.set_attn_implementation(attention)
    if experts_before == "grouped_mm":
        model.set_experts_implementation("batched_mm")
    try:
        yield model.config._attn_implementation
    finally:
        model.set_attn_implementation(attention_before)
        if experts_before == "grouped_mm":
            model.set_experts_implementation(experts_before)


def _export(model: Any, signature: Signature, opset: int, files: MappedFiles) -> tuple[Graph, frozenset[str]]:
    import torch

    feeds = random_feeds(signature.inputs, signature.sample, signature.bounds, np.random.default_rng(0))
    names = list(feeds)
    axes = {
        _parameter(variable.name): {
            axis: _dynamic(size) for axis, size in enumerate(variable.shape) if isinstance(size, str)
        }
        for variable in signature.inputs
    }
    with _forward_as(model, signature):
        program = torch.onnx.export(
            model,
            kwargs={_parameter(name): torch.from_numpy(array) for name, array in feeds.items()},
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=list(signature.outputs),
            dynamic_shapes=axes,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    parameters = frozenset(program.model.graph.initializers)
    with _rules_where_they_fit():
        program.optimize()
    written = program.model.opset_imports[""]
    if written != opset:
        raise LlmcError(f"torch.onnx wrote opset {written}")
    graph = to_graph(program.model, _parameter_names(model), files)
    for tensor, variable in zip(graph.inputs, signature.inputs, strict=True):
        tensor.shape = list(variable.shape)
    return graph, parameters


@contextmanager
def _rules_where_they_fit() -> Iterator[None]:
    """onnxscript asks each of its rules at every node, and one of two results lists the whole graph each time: of a
    decoder of 32 layers that was half of the export. Here a rule is asked where its (first) result may be made."""
    from onnxscript.rewriter.pattern import RewriteRule

    ask = RewriteRule.try_rewrite

    def ask_where_it_fits(rule: RewriteRule, model: Any, graph: Any, node: ir.Node, **settings: Any) -> Any:
        made_by = rule._target_pattern.output_nodes[0].op_identifier()
        return ask(rule, model, graph, node, **settings) if made_by in (None, node.op_identifier()) else None

    RewriteRule.try_rewrite = ask_where_it_fits
    try:
        yield
    finally:
        RewriteRule.try_rewrite = ask


def _dynamic(size: str) -> Any:
    """How torch.export is told of a symbolic dimension: by its name, or for a sum that it follows from others."""
    import torch

    return size if size.isidentifier() else torch.export.Dim.DYNAMIC


def _parameter(name: str) -> str:
    """An input's name, as Python allows it for a parameter."""
    return name.replace(".", "_")


@contextmanager
def _forward_as(model: Any, signature: Signature) -> Iterator[None]:
    """The model with the signature's inputs and outputs; a wrapper module would put its name before all others."""
    forward = model.forward
    names = [variable.name for variable in signature.inputs]

    def call(*values: Any, **inputs: Any) -> tuple[Any, ...]:
        named = {name: inputs[_parameter(name)] for name in names[len(values) :]}
        return signature.call(forward, **dict(zip(names, values, strict=False)), **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature([inspect.Parameter(_parameter(name), kind) for name in names])  # type: ignore[attr-defined]
    model.forward = call
    try:
        yield
    finally:
        del model.forward


# onnx_ir → Graph

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""The scope that torch puts where a node comes from no module."""


def to_graph(model: ir.Model, names: Mapping[tuple[int, int], str], files: MappedFiles | None = None) -> Graph:
    """The exporter's model as a Graph that shares its weights; `names` has the parameters by address and size."""
    import onnx_ir as ir

    weights: dict[str, Array | Weights] = {}
    for given, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SMALL:
            continue
        array = tensor.numpy().view()
        array.flags.writeable = False
        name = _weight_name(array, given, names, model.graph.initializers)
        value.name = name
        weights[name] = files.placed(array) if files is not None else array
        value.const_value = ir.ExternalTensor(
            "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
        )
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = str([s for s in ast.literal_eval(scopes) if s != NO_MODULE])
        node.doc_string = None
    return from_structure(Structure(ir.to_proto(model), weights))


def _parameter_names(model: Any) -> dict[tuple[int, int], str]:
    """Address and bytes of a parameter's memory → its name; the first of tied ones."""
    names: dict[tuple[int, int], str] = {}
    for name, parameter in model.named_parameters():
        names.setdefault((parameter.data_ptr(), parameter.nbytes), name)
    return names


def _weight_name(array: Array, given: str, names: Mapping[tuple[int, int], str], taken: Mapping[str, Any]) -> str:
    name = names.get((array.__array_interface__["data"][0], array.nbytes))
    if name is None:
        return given
    if not array.flags.c_contiguous:
        name += ".T"
    return given if name in taken else name


# Reasons

_REASONS = (
    (r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", r"the operator \1 has no ONNX form"),
    (
        r"GuardOnDataDependentSymNode|Could not guard on data-dependent expression",
        r"a branch in the model's code depends on the values of tensors",
    ),
    (
        r"static shape of (\d+) for (?:dimension )?inputs\['(\w+)'\]\.shape\[(\d+)\]",
        r"the model's code fixes axis \3 of '\2' at \1, the size it was tried with",
    ),
    (r"does not support an attention implementation", r"the model has no such attention"),
)
"""Pattern of a root cause, and what it means."""


def explain(error: BaseException) -> str:
    """The root cause in one line, in plain words where it is a known one."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in reversed(chain):
        for pattern, reason in _REASONS:
            if match := re.search(pattern, f"{type(link).__name__}: {link}"):
                return match.expand(reason)
    root = chain[-1]
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    return line if isinstance(root, LlmcError) else f"{type(root).__name__}: {line}"
