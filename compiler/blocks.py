"""Runs a model block by block: of its weights no more is in memory than one block reads.

A block is a run of nodes, in topological order, whose weights stay under a limit. Its session is made when it is
reached and given up when it is done; between blocks stand only the values that a later one reads. What is computed
from constants alone (a dequantized weight) moves into the block of the node that reads it first. Several samples go
through a block together, so that its weights are read and widened once; what is asked for waits on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import onnx

from llmc.compiler.parts import by_what_they_read, element_types, part_of, reads
from llmc.compiler.peak import give_back, trim
from llmc.compiler.runner import Runner
from llmc.compiler.spill import Spill
from llmc.passes.graph import Array, Structure

BLOCK_BYTES = 256 << 20
"""Of weights that one block reads, in float32, unless a single node reads more."""
WHOLE_BYTES = 512 << 20
"""Of weights, in float32, up to which a model runs as a whole: quicker, where a model is run often."""
GROUP = 16
"""Samples that go through a block together, at most."""
GROUP_BYTES = 1 << 30
"""Of what is asked for that a group may leave on disk, unless a single sample leaves more."""

Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Part:
    """Some nodes as a model, the tensors that it reads, and those that it hands on."""

    structure: Structure
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def ready(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """From OrtValues to OrtValues, by name; the session lives as long as this."""
        runner = Runner(self.structure, lean=True)

        def run(values: Mapping[str, Any]) -> dict[str, Any]:
            made = runner.run_values({name: values[name] for name in self.inputs}, self.outputs)
            return dict(zip(self.outputs, made, strict=True))

        return run


@dataclass(frozen=True)
class Block:
    """What depends on constants alone, and is the same for all samples; the rest; and what nobody reads later."""

    fixed: Part | None
    body: Part
    done: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """A model in blocks, ready to run."""

    blocks: Sequence[Block]

    def run_each(self, samples: Iterable[Feeds], outputs: Sequence[str]) -> Iterator[list[Array]]:
        """For each sample the values of `outputs`. Raises LlmcError with the reason where ONNX Runtime fails.

        The first sample goes alone: it tells how many go together.
        """
        given, size = iter(samples), 1
        while group := list(islice(given, size)):
            made = self._run_group(group, outputs)
            yield from made
            most = max(sum(value.nbytes for value in values) for values in made)
            size = max(1, min(GROUP, GROUP_BYTES // max(most, 1)))

    def _needed(self, wanted: Collection[str]) -> int:
        """How many blocks there are up to the last that makes something wanted."""
        made = ({*block.body.outputs, *(block.fixed.outputs if block.fixed else ())} for block in self.blocks)
        return max((number for number, names in enumerate(made, 1) if not names.isdisjoint(wanted)), default=0)

    def _run_group(self, group: Sequence[Feeds], outputs: Sequence[str]) -> list[list[Array]]:
        import onnxruntime as ort

        give_back()  # a block takes what there is
        wanted, spill = set(outputs), Spill()
        kept: list[dict[str, int]] = [{} for _ in group]
        values = [
            {name: ort.OrtValue.ortvalue_from_numpy(np.asarray(value, order="C")) for name, value in feeds.items()}
            for feeds in group
        ]
        for feeds, places in zip(group, kept, strict=True):
            places |= {name: spill.put(feeds[name]) for name in wanted & feeds.keys()}
        for block in self.blocks[: self._needed(wanted)]:
            fixed = block.fixed.ready()({}) if block.fixed else {}
            run = block.body.ready()
            for here, places in zip(values, kept, strict=True):
                here |= fixed
                made = fixed | run(here)
                places |= {name: spill.put(made[name].numpy()) for name in sorted(wanted & made.keys())}
                here |= made
                for name in block.done:
                    here.pop(name, None)
            del fixed, run, made  # before the next block's are made
            trim()
        found = spill.values()
        return [[found[places[name]] for name in outputs] for places in kept]


def blocks_of(structure: Structure, whole: int = WHOLE_BYTES, limit: int = BLOCK_BYTES) -> Blocks | None:
    """The model in blocks; None for one of at most `whole` bytes of weights, or one that cannot be cut.

    A cut goes only through tensors whose element type is known. Raises LlmcError where ONNX Runtime cannot run a block.
    """
    if _bytes(structure, structure.weights) <= whole:
        return None
    give_back()
    graph = structure.model.graph
    types = element_types(structure)
    groups = _groups(structure, limit, types)
    outputs = [info.name for info in graph.output]
    if len(groups) < 2 or any(info.type.WhichOneof("value") == "sequence_type" for info in graph.output):
        return None
    constants = {tensor.name for tensor in graph.initializer}
    read = [{name for node in group for name in reads(node)} - constants for group in groups]
    last = {name: index for index, names in enumerate(read) for name in names}
    blocks = []
    for index, group in enumerate(groups):
        later = {name for name, end in last.items() if end > index}.union(outputs)
        fixed, rest = by_what_they_read(group, constants)
        if not rest:
            fixed, rest = [], fixed
        blocks.append(
            Block(
                _part(structure, types, fixed, later.union(*map(reads, rest))) if fixed else None,
                _part(structure, types, rest, later),
                tuple(sorted(name for name, end in last.items() if end == index)),
            )
        )
    return Blocks(blocks)


def _part(
    structure: Structure, types: Mapping[str, int], nodes: Sequence[onnx.NodeProto], wanted: Collection[str]
) -> Part:
    """The nodes, with what is wanted of theirs. Raises LlmcError where ONNX Runtime cannot run them."""
    outputs = sorted(name for node in nodes for name in node.output if name in wanted)
    part = part_of(structure, nodes, types, outputs)
    found = Part(part, tuple(info.name for info in part.model.graph.input), tuple(outputs))
    found.ready()  # what it takes to run is known from the start
    return found


def _groups(structure: Structure, limit: int, types: Mapping[str, int]) -> list[list[onnx.NodeProto]]:
    """The nodes in order, cut where the weights of the next one would be too much."""
    order = _just_in_time(structure)
    last = {name: index for index, node in enumerate(order) for name in reads(node)}
    groups: list[list[onnx.NodeProto]] = [[]]
    handed_on: set[str] = set()
    here: set[str] = set()
    for index, node in enumerate(order):
        weights = {name for name in reads(node) if name in structure.weights}
        handed_on = {name for name in handed_on if last[name] >= index}
        full = _bytes(structure, here | weights) > limit and groups[-1] and not weights <= here
        if full and all(name in types for name in handed_on):
            groups.append([])
            here = set()
        groups[-1].append(node)
        here |= weights
        handed_on |= {name for name in node.output if name in last}
    return groups


def _bytes(structure: Structure, names: Iterable[str]) -> int:
    """As wide as sessions make them: what is narrower is multiplied in float32."""
    held = (structure.weights[name] for name in names)
    return sum(max(4 * prod(weight.shape), weight.nbytes) for weight in held)


def _just_in_time(structure: Structure) -> list[onnx.NodeProto]:
    """The nodes in topological order, those that depend on constants alone right before the first that reads them."""
    known = {tensor.name for tensor in structure.model.graph.initializer}
    waiting: dict[str, onnx.NodeProto] = {}
    order: list[onnx.NodeProto] = []
    placed: set[int] = set()

    def place(node: onnx.NodeProto) -> None:
        if id(node) in placed:
            return
        placed.add(id(node))
        for name in reads(node):
            if name in waiting:
                place(waiting[name])
        order.append(node)

    for node in structure.model.graph.node:
        if all(name in known for name in reads(node)):
            known.update(node.output)
            waiting |= dict.fromkeys(node.output, node)
        else:
            place(node)
    for node in waiting.values():
        place(node)
    return order
