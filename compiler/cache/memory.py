"""What a compile asks before it computes: results by all that they depend on, and graphs that share their weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeVar

import onnx

from llmc.compiler.cache import limit_of, place
from llmc.compiler.cache.collect import collect
from llmc.compiler.cache.keys import key_of
from llmc.compiler.cache.scratch import Scratch
from llmc.compiler.cache.store import Record, Store
from llmc.compiler.disk import same_disk
from llmc.compiler.progress import Counted, Progress, quiet
from llmc.compiler.report.statistics import count_operators, weights_by_dtype
from llmc.passes.graph import (
    Array,
    FileRegion,
    Graph,
    Structure,
    Weights,
    from_structure,
    raw_blocks,
    stored_bytes,
    to_structure,
)
from llmc.passes.graph.in_parts import on_every_core

T = TypeVar("T")
_LOGGER = logging.getLogger("llmc.cache")


@dataclass(frozen=True)
class WeightRef:
    """One large weight: its bytes by their digest, and how they are read."""

    sha256: str
    """Of the bytes; of a weight in a file of the user's, whose digest is known, of that and of its place there."""
    dtype: int
    """ONNX element type."""
    shape: tuple[int, ...]


class KeptWeights(Weights):
    """Values in the cache, their bytes verified when they are read first."""

    def __init__(self, store: Store, ref: WeightRef) -> None:
        super().__init__(ref.dtype, ref.shape, FileRegion(store.path(ref.sha256), 0))
        self.store, self.sha256 = store, ref.sha256

    def check(self) -> None:
        """Raises DamagedError."""
        self.store.blob(self.sha256)

    def load(self) -> Array:
        """The values. Raises DamagedError."""
        self.check()
        return super().load()


@dataclass(frozen=True)
class GraphRef:
    """A graph in the cache: the digest of its proto, and its large weights by name."""

    model: str
    weights: Mapping[str, WeightRef]

    @property
    def digest(self) -> str:
        """SHA-256 of the whole."""
        lines = sorted(f"{name} {w.sha256} {w.dtype} {w.shape}" for name, w in self.weights.items())
        return hashlib.sha256("\n".join([self.model, *lines]).encode()).hexdigest()

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> GraphRef:
        """From the plain values that `asdict` gives, as they come back from JSON."""
        weights = {name: WeightRef(w["sha256"], w["dtype"], tuple(w["shape"])) for name, w in value["weights"].items()}
        return cls(value["model"], weights)


@dataclass(frozen=True)
class Statistics:
    """What reports say of every graph on the way."""

    operators: Mapping[str, int]
    """Operator → count."""
    weight_bytes: int

    @classmethod
    def of(cls, graph: Graph) -> Statistics:
        """Count."""
        return cls(count_operators(graph), sum(weights.bytes for weights in weights_by_dtype(graph).values()))


class State:
    """A graph as it stands between two steps. Read from the cache only where somebody looks at it."""

    def __init__(
        self, read: Callable[[], Structure], ref: GraphRef | None = None, statistics: Statistics | None = None
    ) -> None:
        self.ref = ref
        """None where the graph is not in the cache."""
        self._read = read
        self._graph: Graph | None = None
        self._statistics = statistics
        self.since_inference: int | None = None
        """Rewrites since shapes were inferred; None where they never were."""

    @cached_property
    def digest(self) -> str:
        """Of the graph, weights included; '' where it is not in the cache."""
        return self.ref.digest if self.ref else ""

    @cached_property
    def structure(self) -> Structure:
        """The graph as ONNX, its large weights beside it. Raises DamagedError."""
        return self._read()

    @property
    def graph(self) -> Graph:
        """The graph, to be looked at. Made of `structure` every time: what comes next does not depend on the cache."""
        if self._graph is None:
            self._graph = from_structure(self.structure)
        return self._graph

    @property
    def statistics(self) -> Statistics:
        """What the graph has; known without looking at one from the cache."""
        if self._statistics is None:
            self._statistics = Statistics.of(self.graph)
        return self._statistics

    def take(self) -> Graph:
        """The graph, to be changed; who asks for it later gets it as it was."""
        graph, self._graph = self.graph, None
        return graph

    def still(self, graph: Graph, structure: Structure) -> bool:
        """Whether what was taken, `structure` by now, is as it was; then it is put back."""
        before = self.structure
        same = before.weights.keys() == structure.weights.keys() and all(
            structure.weights[name] is held for name, held in before.weights.items()
        )
        if not same or _bytes(before.model) != _bytes(structure.model):
            return False
        self.put_back(graph)
        return True

    def put_back(self, graph: Graph) -> None:
        """Have again what was taken, and is as it was."""
        self._graph = graph


Origins = Callable[[Mapping[str, Any], Mapping[str, WeightRef]], Mapping[str, Weights]]
FoundState = tuple[Mapping[str, Any], State]
"""A record, and its graph."""


class Memory:
    """Results of earlier compiles. Without a store it knows nothing and keeps nothing."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store
        self._progress: Progress = quiet
        self._phase = ""
        self._made: Counted | None = None
        self._scratch = Scratch()
        self._full = store is None
        self._known: dict[int, tuple[Array | Weights, str]] = {}
        """id of weights → they (so that the id stays theirs) and the digest of their bytes."""
        self._origins: dict[WeightRef, Array | Weights] = {}
        """Weights that stand in the user's own file, which are not kept a second time."""

    @contextmanager
    def telling(self, progress: Progress, phase: str) -> Iterator[None]:
        """Inside, `progress` hears how many bytes of what `phase` makes have been kept."""
        self._progress, self._phase, self._made = progress, phase, None
        try:
            yield
        finally:
            self._progress, self._phase, self._made = quiet, "", None

    # Results

    def find(self, kind: str, *parts: object) -> Record | None:
        """What was kept for these parts."""
        return self.store.find(kind, key_of(kind, *parts)) if self.store else None

    def keep(self, kind: str, parts: Sequence[object], value: Mapping[str, Any], blobs: Sequence[str] = ()) -> None:
        """Keep plain values, which may refer to blobs."""
        self._write(lambda store: store.keep(kind, key_of(kind, *parts), value, blobs))

    def add(self, data: bytes) -> str | None:
        """Keep bytes; their digest, or None where they cannot be kept."""
        return self._write(lambda store: store.add(data))

    def add_files(self, files: Sequence[Path]) -> dict[str, str] | None:
        """Keep copies of files: name → digest, or None where they cannot be kept."""
        return self._write(lambda store: {file.name: store.add_file(file) for file in files})

    def add_written(self, write: Callable[[IO[bytes]], None]) -> str | None:
        """Keep what `write` writes to a file; its digest, or None where it cannot be kept."""
        return self._write(lambda store: store.add_written(write))

    def leave(self, size: int, place: Path) -> None:
        """Leave this room on the disk, in bytes, where the cache is on the same one as `place`."""
        if self.store is not None and same_disk(self.store.root, place):
            self.store.left = size

    def hold(self, dtype: int, shape: tuple[int, ...], raw: memoryview) -> Weights:
        """A large tensor that a pass has made, on disk: in the cache, else in a file that this compile alone sees.

        Implements `passes.base.Storage`. Raises LlmcError where the disk is full.
        """
        digest = self._write(lambda store: store.add(raw))
        self._made = self._made or Counted(self._progress, self._phase, None, None, "weight")
        self._made(f"{self._made.reached + 1}", len(raw))
        if digest is None or self.store is None:
            return Weights(dtype, shape, self._scratch.add(raw))
        held = KeptWeights(self.store, WeightRef(digest, dtype, shape))
        self._known[id(held)] = (held, digest)
        return held

    # Graphs

    def state(
        self, structure: Structure, *, stays: Collection[str] = (), files: Mapping[Path, str] = MappingProxyType({})
    ) -> State:
        """A graph that has just been made, kept where that can be; the weights `stays` are in the user's own files.

        `files` are those of them whose digests are known: a weight that stands in one is named by it, and not read.
        """

        def write(store: Store) -> State:
            on_every_core(lambda name: self._origin(structure.weights[name], files), stays)
            told = self._keeping(structure)
            weights = {}
            for name, held in structure.weights.items():
                known = id(held) in self._known
                weights[name] = self._reference(held, partial(_add, store))
                if not known:
                    told(name, held.nbytes)
            model = store.add(_bytes(structure.model))
            return self._state(store, GraphRef(model, weights))

        return self._write(write) or State(lambda: structure)

    def _keeping(self, structure: Structure) -> Counted:
        """Counts the weights that are not kept yet."""
        sizes = [held.nbytes for held in structure.weights.values() if id(held) not in self._known]
        phase = f"{self._phase}: keeping its weights" if sizes else self._phase
        return Counted(self._progress, phase, sum(sizes), len(sizes), "weight")

    def digest(self, graph: Graph) -> str:
        """Of a graph, weights included, as `State.digest`; nothing is kept."""
        structure = to_structure(graph)
        weights = {name: self._reference(held, _sha256) for name, held in structure.weights.items()}
        return GraphRef(_sha256([_bytes(structure.model)]), weights).digest

    def find_state(self, kind: str, *parts: object, origins: Origins | None = None) -> FoundState | None:
        """The record that `keep_state` wrote, and its graph.

        `origins` gives, of the record and the weights by name, those that stand in the user's own files.
        """
        record = self.find(kind, *parts)
        if record is None or self.store is None:
            return None
        ref = GraphRef.read(record.value["graph"])
        for name, held in (origins(record.value, ref.weights) if origins else {}).items():
            self._stays(ref.weights[name], held)
        elsewhere = (w for w in ref.weights.values() if w not in self._origins and w.sha256 not in record.blobs)
        if not all(self.store.has(weight.sha256) for weight in elsewhere):
            return None
        state = self._state(self.store, ref, Statistics(**record.value["statistics"]))
        state.since_inference = record.value["since_inference"]
        return record.value, state

    def keep_state(self, kind: str, parts: Sequence[object], value: Mapping[str, Any], state: State) -> None:
        """Keep plain values together with a graph."""
        if state.ref is not None:
            stored = [w.sha256 for w in state.ref.weights.values() if w not in self._origins]
            about = {
                "graph": asdict(state.ref),
                "statistics": asdict(state.statistics),
                "since_inference": state.since_inference,
            }
            self.keep(kind, parts, {**value, **about}, [state.ref.model, *stored])

    def _state(self, store: Store, ref: GraphRef, statistics: Statistics | None = None) -> State:
        def read() -> Structure:
            weights = {name: self._read(store, weight) for name, weight in ref.weights.items()}
            return Structure(onnx.ModelProto.FromString(store.blob(ref.model).read_bytes()), weights)

        return State(read, ref, statistics)

    def _read(self, store: Store, ref: WeightRef) -> Array | Weights:
        held = self._origins.get(ref)
        if held is None:
            held = KeptWeights(store, ref)
            self._known[id(held)] = (held, ref.sha256)
        return held

    def _origin(self, held: Array | Weights, files: Mapping[Path, str]) -> None:
        """Remember a weight that stands in the user's own file."""
        if id(held) in self._known:
            return
        place = held.origin() if isinstance(held, Weights) else None
        file = files.get(place[0].path.resolve()) if place else None
        name = _sha256([f"{file} {place[0].offset} {held.nbytes} {place[1]}".encode()]) if place and file else None
        self._stays(self._reference(held, lambda blocks, size: name or _sha256(blocks, size)), held)

    def _stays(self, ref: WeightRef, held: Array | Weights) -> None:
        """What is read where a graph has this weight."""
        self._known[id(held)] = (held, ref.sha256)
        self._origins[ref] = held

    def _reference(self, held: Array | Weights, digest: Callable[[Iterable[memoryview], int], str]) -> WeightRef:
        """A weight by the digest that is known of it, or else by what `digest` gives for its bytes, so many."""
        dtype = int(onnx.helper.np_dtype_to_tensor_dtype(held.dtype))
        known = self._known.get(id(held))
        size = stored_bytes(dtype, prod(held.shape))
        return WeightRef(known[1] if known else digest(raw_blocks(held, dtype), size), dtype, tuple(held.shape))

    def _write(self, work: Callable[[Store], T]) -> T | None:
        """Do what writes to the store; None where that cannot be done, which is said once: a compile needs no cache."""
        if self.store is None or self._full:
            return None
        try:
            return work(self.store)
        except OSError as error:
            self._full = True
            _LOGGER.warning("nothing more is cached in %s: %s", self.store.root, error.strerror or error)
            return None


def _add(store: Store, blocks: Iterable[memoryview], size: int) -> str:
    """Keep the bytes: those of one block only where they are not there yet."""
    rest = iter(blocks)
    first = next(rest)
    return store.add(first) if len(first) == size else store.add_blocks(chain([first], rest), size)


def _sha256(blocks: Iterable[bytes | memoryview], _size: int = 0) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _bytes(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


NOTHING = Memory()
"""Remembers nothing."""


@contextmanager
def open_memory(wanted: bool = True) -> Iterator[Memory]:
    """The user's cache, for one compile; cut to its limit afterwards. Where it cannot be used, that is said once."""
    if not wanted:
        yield Memory()
        return
    store = Store(place(), limit_of())
    try:
        store.open()
    except OSError as error:
        _LOGGER.warning("the cache at %s is not used: %s", store.root, error.strerror)
        yield Memory()
        return
    try:
        yield Memory(store)
    finally:
        store.close()
        if store.written:
            collect(store, store.limit)
