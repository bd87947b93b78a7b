"""llmc: compiles models to TensorRT engines, and proves every step.

from llmc.compiler import compile, load, verify
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmc.compiler.driver import compile as compile  # noqa: A004 - the field's word for it
    from llmc.compiler.errors import BudgetError as BudgetError
    from llmc.compiler.errors import LlmcError as LlmcError
    from llmc.compiler.errors import TargetError as TargetError
    from llmc.compiler.loaders import load as load
    from llmc.compiler.planning import plan as plan
    from llmc.compiler.recipe import Recipe as Recipe
    from llmc.compiler.verification import verify as verify

_HOMES = {
    "compile": "driver",
    "plan": "planning",
    "BudgetError": "errors",
    "LlmcError": "errors",
    "TargetError": "errors",
    "load": "loaders",
    "Recipe": "recipe",
    "verify": "verification",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that the command line starts at once."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
