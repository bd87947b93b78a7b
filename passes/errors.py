"""What can go wrong, by whose fault it is."""

from __future__ import annotations

from typing import ClassVar


class LlmcError(Exception):
    """Bad input: the message says what is wrong, where, and what to do. Exit code 2."""

    exit_code: ClassVar[int] = 2


class PassError(Exception):
    """A pass met a graph that breaks ONNX's rules; the message names the node."""


class Skip(Exception):  # noqa: N818 - not an error: the pass has nothing to do here
    """The pass does not apply to this graph; the message is the reason that the report gives."""
