"""The cache: what a compile has worked out, by the digests of all that it depends on.

Records (`store.py`) say what was found; blobs hold the bytes that they refer to, each once, by its SHA-256. A key
(`keys.py`) has everything that has a say in a result, so that an entry is never out of date: only unused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.compiler.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.cache.store import Store

DEFAULT_LIMIT = 10 << 30
"""Bytes."""
_VARIABLE = "LLMC_CACHE_LIMIT"


def place() -> Path:
    """Where the cache stands: $LLMC_CACHE, or llmc in $XDG_CACHE_HOME, or ~/.cache/llmc."""
    if named := os.environ.get("LLMC_CACHE"):
        return Path(named).expanduser().absolute()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))  # to be ignored where it is not absolute
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "llmc"


def limit_of(given: str | None = None, option: str = "") -> int:
    """Bytes: what an option gives ('20GiB'), else $LLMC_CACHE_LIMIT, else the default. Raises LlmcError."""
    from llmc.compiler.recipe.sections import byte_count

    text, named = (given, option) if given is not None else (os.environ.get(_VARIABLE, "").strip(), _VARIABLE)
    if not text:
        return DEFAULT_LIMIT
    try:
        return byte_count(text)
    except ValueError as error:
        raise LlmcError(f"{named}: {error}") from error


@contextmanager
def open_store() -> Iterator[Store]:
    """The cache's store, in use by this process inside. Raises LlmcError where its place cannot be written."""
    from llmc.compiler.cache.store import Store

    store = Store(place(), limit_of())
    try:
        store.open()
    except OSError as error:
        raise LlmcError(f"the cache at {store.root} cannot be used: {error.strerror}; set LLMC_CACHE") from error
    try:
        yield store
    finally:
        store.close()
