"""How a run can end badly, and the exit code that says so to a script."""

from __future__ import annotations

from llmc.passes.errors import LlmcError

__all__ = ["BudgetError", "InternalError", "LlmcError", "PrecisionError", "TargetError", "TwoGraphsError"]


class InternalError(LlmcError):
    """A bug of llmc, with all that is needed to look into it written beside the output."""

    exit_code = 1


class BudgetError(LlmcError):
    """A step moved the outputs further from the loaded model than the recipe's budget allows."""

    exit_code = 3


class TwoGraphsError(LlmcError):
    """An encoder-decoder makes two graphs, and nothing says which is wanted."""


class TargetError(LlmcError):
    """The target cannot build this graph; every reason found is in the message, with the nodes."""

    exit_code = 4


class PrecisionError(TargetError):
    """A layer came out in another precision than was asked for, and no pass said why."""
