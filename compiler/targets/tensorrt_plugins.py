"""llmc's own operators as plugins of full TensorRT: their Triton kernels, compiled ahead of time into the engine.

TensorRT calls these "quickly deployable plugins" (TensorRT documentation, tensorrt.plugin). Each operator's `plugin.py`
gives the shapes of its outputs and how its kernel is launched; all that TensorRT wants to hear of that is said here.
TensorRT-RTX has no such plugins.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import GenericAlias, ModuleType
from typing import Any

import onnx

from llmc.passes.graph import DOMAIN, KERNELS, specs

NAMES = (DOMAIN,)
"""Libraries of plugins that a recipe may ask for."""
POINTERS = {
    "FLOAT": "*fp32",
    "HALF": "*fp16",
    "BF16": "*bf16",
    "INT8": "*i8",
    "FP8": "*fp8e4nv",
    "INT32": "*i32",
}
"""TensorRT's name of a type → Triton's of a pointer to it."""


def operators() -> list[str]:
    """Those of llmc's operators that have a plugin."""
    return [name for name, spec in specs().items() if (KERNELS / _folder(spec) / "plugin.py").is_file()]


def for_parser(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model, as TensorRT's parser finds plugins: without the bodies of the operators that have one.

    4-bit constants that they read are handed over as INT8, the last axis half as long: the same bytes.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = set(operators())
    kept = [function for function in copy.functions if function.domain != DOMAIN or function.name not in names]
    del copy.functions[:]
    copy.functions.extend(kept)
    four_bit = {t.name: t for t in copy.graph.initializer if t.data_type == onnx.TensorProto.INT4}
    for graph in _graphs(copy.graph):
        for node in graph.node:
            if node.domain == DOMAIN and node.op_type in names:
                node.domain = ""
                node.attribute.append(onnx.helper.make_attribute("plugin_namespace", DOMAIN))
                for tensor in (four_bit.pop(name) for name in set(node.input) & set(four_bit)):
                    tensor.data_type = onnx.TensorProto.INT8
                    tensor.dims[-1] //= 2
    return copy


def register(trt: Any, capability: int) -> None:
    """Make the plugins known to TensorRT, their kernels for the GPU of this compute capability (89 for SM89)."""
    trtp = importlib.import_module(f"{trt.__name__}.plugin")
    for name in operators():
        spec = specs()[name]
        plugin = importlib.import_module(f"llmc.kernels.{_folder(spec)}.plugin")
        _Plugin(trt, trtp, spec.SCHEMA, plugin, capability).register()


@dataclass(frozen=True)
class Size:
    """A size that may be symbolic: TensorRT's expressions know no numbers on their left."""

    expression: Any
    make: Callable[[int], Any]
    """A symbolic expression of a number."""

    def __add__(self, other: Size | int) -> Size:
        return self._with(self.expression + self._of(other))

    def __sub__(self, other: Size | int) -> Size:
        return self._with(self.expression - self._of(other))

    def __mul__(self, other: Size | int) -> Size:
        return self._with(self.expression * self._of(other))

    def __floordiv__(self, other: Size | int) -> Size:
        return self._with(self.expression // self._of(other))

    __radd__, __rmul__ = __add__, __mul__

    def __index__(self) -> int:
        """Raises ValueError where the size is not fixed."""
        if not self.expression.is_constant:
            raise ValueError("a size that a kernel is compiled for is dynamic")
        return int(self.expression.constant_value())

    def _of(self, other: Size | int) -> Any:
        return other.expression if isinstance(other, Size) else self.make(other)

    def _with(self, expression: Any) -> Size:
        return Size(expression, self.make)


@dataclass(frozen=True)
class _Plugin:
    """One operator, and what TensorRT asks of a plugin."""

    trt: Any
    trtp: Any
    schema: onnx.defs.OpSchema
    plugin: ModuleType
    capability: int

    def register(self) -> None:
        name = f"{DOMAIN}::{self.schema.name}"
        desc, trtp = self.trtp.TensorDesc, self.trtp
        inputs = [(formal.name, desc) for formal in self.schema.inputs]
        attributes = [(name, _python_type(given)) for name, given in sorted(self.schema.attributes.items())]
        many = _tuple_of(*[desc] * len(self.schema.outputs))
        describe = _with_signature(self.describe, [*inputs, *attributes], many)
        trtp.register(name)(describe)
        made = _tuple_of(str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs)
        parameters = [*inputs, *attributes, ("outputs", many), ("tactic", int)]
        trtp.aot_impl(name)(_with_signature(self.compile, parameters, made))

    def describe(self, *inputs: Any, **_attributes: Any) -> tuple[Any, ...]:
        """Descriptions of the outputs, of those of the inputs."""
        shapes = self.plugin.results(*map(self._sizes, inputs))
        of_type = dict(zip((formal.type_str for formal in self.schema.inputs), inputs, strict=True))
        return tuple(
            self.trtp.from_shape_expr(tuple(size.expression for size in shape), of_type[formal.type_str].dtype)
            for formal, shape in zip(self.schema.outputs, shapes, strict=True)
        )

    def compile(self, *given: Any) -> tuple[str, str, Any, Any]:
        """The kernel's name and PTX, its launch, and the numbers between its inputs and its outputs.

        Given are the inputs, the attributes by their names' order, the outputs, and a tactic, of which there is one.
        """
        *given_first, outputs, _ = given
        count = len(self.schema.inputs)
        inputs, values = given_first[:count], given_first[count:]
        attributes = dict(zip(sorted(self.schema.attributes), values, strict=True))
        grid, numbers, constants, options = self.plugin.launch(*map(self._sizes, inputs), **attributes)
        types = [POINTERS[tensor.dtype.name] for tensor in (*inputs, *outputs)]
        signature = (*types[:count], *["i32"] * len(numbers), *types[count:])
        name, ptx, threads, shared = compiled(self.plugin.KERNEL, signature, constants, options, self.capability)
        launch = self.trtp.KernelLaunchParams()
        for axis, size in zip("xyz", grid, strict=False):
            setattr(launch, f"grid_{axis}", self._number(size))
        launch.block_x, launch.shared_mem = threads, shared
        extra = self.trtp.SymIntExprs.from_tuple([self._number(number) for number in numbers])
        return name, ptx, launch, extra

    def _sizes(self, tensor: Any) -> list[Size]:
        return [Size(expression, self.trtp.ShapeExpr) for expression in tensor.shape_expr]

    def _number(self, size: Size | int) -> Any:
        return self.trtp.SymInt32(size.expression if isinstance(size, Size) else size)


def compiled(
    kernel: Any, signature: Sequence[str], constants: dict[str, Any], options: dict[str, int], capability: int
) -> tuple[str, str, int, int]:
    """A Triton kernel for a GPU that need not be here: its name, its PTX, threads of a block, bytes of shared memory.

    Raises ValueError where the kernel asks for scratch memory, which TensorRT has none of.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    types = dict(zip(names, signature, strict=True)) | dict.fromkeys(constants, "constexpr")
    chosen = {**options, "enable_fp_fusion": True}  # as Triton did before it asked
    made = triton.compile(
        ASTSource(kernel, types, constexprs=constants), target=GPUTarget("cuda", capability, 32), options=chosen
    )
    facts = made.metadata
    if facts.global_scratch_size or facts.profile_scratch_size:
        raise ValueError(f"{facts.name} needs scratch memory")
    return facts.name, without_scratch(made.asm["ptx"], len(names)), facts.num_warps * 32, facts.shared


def without_scratch(ptx: str, arguments: int) -> str:
    """The PTX of a kernel with these arguments alone: Triton adds pointers to scratch memory, used or not.

    TensorRT hands over the arguments that it knows of, and nothing for those. Raises ValueError where one is read.
    """
    entry = re.search(r"\.entry (\w+)\(\n(.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("Triton's PTX has no entry that could be read")
    declared = entry[2].split(",\n")
    if any(ptx.count(f"{entry[1]}_param_{index}]") for index in range(arguments, len(declared))):
        raise ValueError(f"{entry[1]} reads its scratch memory")
    return ptx[: entry.start(2)] + ",\n".join(declared[:arguments]) + ptx[entry.end(2) :]


def _python_type(attribute: onnx.defs.OpSchema.Attribute) -> type:
    return {onnx.defs.OpSchema.AttrType.INT: int, onnx.defs.OpSchema.AttrType.FLOAT: float}[attribute.type]


def _tuple_of(*types: Any) -> Any:
    """`tuple[...]` of types that are known at run time alone."""
    return GenericAlias(tuple, types)


def _with_signature(
    function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], returns: Any
) -> Callable[..., Any]:
    """The function, with the signature that TensorRT reads off it."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=returns,
    )
    return called


def _folder(spec: ModuleType) -> str:
    return spec.__name__.split(".")[-2]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)
