"""Runs a model block by block: of its weights no more is in memory than one block reads.

A block is a run of nodes, in topological order, whose weights stay under a limit. Its session is made when it is
reached and given up when it is done; between blocks stand only the values that a later one reads. What is computed
from constants alone (a dequantized weight) moves into the block of the node that reads it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from llmc.compiler.parts import element_types, part_of, reads
from llmc.compiler.runner import Runner
from llmc.passes.graph import Array, Structure

BLOCK_BYTES = 128 << 20
"""Of weights that one block reads, unless a single node reads more."""
WHOLE_BYTES = 512 << 20
"""Of weights up to which a model runs as a whole: quicker, where a model is run often."""


@dataclass(frozen=True)
class Block:
    """Some nodes as a model, the tensors that it reads, those that it hands on, and those that nobody reads later."""

    structure: Structure
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """A model in blocks, ready to run."""

    blocks: Sequence[Block]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The values of `outputs`. Raises LlmcError with the reason where ONNX Runtime fails."""
        import onnxruntime as ort

        wanted = set(outputs)
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.asarray(value, order="C")) for name, value in feeds.items()}
        found = {name: feeds[name] for name in wanted & feeds.keys()}
        for block in self.blocks:
            given = {name: values[name] for name in block.inputs}
            made = Runner(block.structure, lean=True).run_values(given, block.outputs)
            values |= zip(block.outputs, made, strict=True)
            del given, made
            for name in wanted.intersection(block.outputs):
                found[name] = values[name].numpy()
            for name in block.done:
                values.pop(name, None)
        return [found[name] for name in outputs]


def blocks_of(structure: Structure, whole: int = WHOLE_BYTES, limit: int = BLOCK_BYTES) -> Blocks | None:
    """The model in blocks; None for one of at most `whole` bytes of weights, or one that cannot be cut.

    A cut goes only through tensors whose element type is known. Raises LlmcError where ONNX Runtime cannot run a block.
    """
    if sum(held.nbytes for held in structure.weights.values()) <= whole:
        return None
    graph = structure.model.graph
    types = element_types(structure)
    groups = _groups(structure, limit, types)
    outputs = [info.name for info in graph.output]
    if len(groups) < 2 or any(info.type.WhichOneof("value") == "sequence_type" for info in graph.output):
        return None
    constants = {tensor.name for tensor in graph.initializer}
    read = [{name for node in group for name in reads(node)} - constants for group in groups]
    made = [{name for node in group for name in node.output if name} for group in groups]
    last = {name: index for index, names in enumerate(read) for name in names}
    blocks = []
    for index, group in enumerate(groups):
        handed_on = sorted(n for n in made[index] if last.get(n, -1) > index or n in outputs)
        done = sorted(name for name, end in last.items() if end == index)
        taken = sorted(read[index] - made[index])
        blocks.append(Block(part_of(structure, group, types, handed_on), tuple(taken), tuple(handed_on), tuple(done)))
        Runner(blocks[-1].structure)  # what it takes to run is known from the start
    return Blocks(blocks)


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
    return sum(structure.weights[name].nbytes for name in names)


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
