"""llmc's own operators: found by their folders in kernels/, and carried by every model that uses them.

An operator of the domain `llmc` has a body of standard operators, which models hold as an ONNX function: whatever runs
ONNX runs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType

import onnx
import onnx.inliner
import onnx.parser

from llmc.passes.graph.nodes import Node

DOMAIN = "llmc"
KERNELS = Path(__file__).parents[2] / "kernels"


@cache
def specs() -> Mapping[str, ModuleType]:
    """Operator → the module `spec` in its folder."""
    folders = sorted(path.parent.name for path in KERNELS.glob("*/spec.py"))
    modules = [importlib.import_module(f"llmc.kernels.{folder}.spec") for folder in folders]
    return MappingProxyType({module.SCHEMA.name: module for module in modules})


@cache
def body(operator: str, opset: int) -> onnx.FunctionProto:
    """The body of one of llmc's operators, in a model of this opset. Raises ValueError where it needs a newer one."""
    function = onnx.parser.parse_function(specs()[operator].BODY)
    (standard,) = function.opset_import
    if opset < standard.version:
        raise ValueError(f"{DOMAIN}::{operator} needs opset {standard.version}, the graph has {opset}")
    standard.version = opset
    return function


def is_own(node: Node) -> bool:
    """Whether a node is one of llmc's operators."""
    return node.domain == DOMAIN and node.op in specs()


def bodies(nodes: Iterable[Node], opset: int) -> list[onnx.FunctionProto]:
    """The bodies of those operators of llmc that the nodes use."""
    return [body(operator, opset) for operator in sorted({node.op for node in nodes if is_own(node)})]


def inline_all(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in standard operators alone."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def inline_foreign(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every function inlined but the bodies of llmc's operators, just as they are written here."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    foreign = [(f.domain, f.name) for f in model.functions if not _is_own_body(f, opset)]
    return onnx.inliner.inline_selected_functions(model, foreign) if foreign else model


def _is_own_body(function: onnx.FunctionProto, opset: int) -> bool:
    if function.domain != DOMAIN or function.name not in specs():
        return False
    try:
        return bool(function == body(function.name, opset))
    except ValueError:
        return False
