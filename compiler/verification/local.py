"""Only what a step changed: its regions on values that real inputs gave them, before and after.

The values of all tensors are captured once, by one run of the graph on each captured sample. From then on a step costs
what its own nodes cost: the new nodes of its regions run on the captured values that they read, and what they make is
compared with what was captured there, and takes its place. Large weights that are computed from constants (widened,
dequantized) are not captured: what reads them computes them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from llmc.compiler.loaders import Feeds
from llmc.compiler.parts import computed_weights, element_types, part_of, reads
from llmc.compiler.report import OutputNumerics, RegionReport
from llmc.compiler.session import Session
from llmc.compiler.verification.metrics import compare
from llmc.compiler.verification.regions import Region, Side, changed_regions
from llmc.passes.base import LlmcError
from llmc.passes.graph import Array, Structure, from_structure, loaded, module_in

CAPTURED_SAMPLES = 2
"""How many samples are captured, where they fit."""
CAPTURED_BYTES = 1 << 30
"""Of captured values, beyond which no further sample is captured."""
LARGEST_PART = 0.5
"""Of a graph's nodes; where a step changes more of them, its regions would cost what the whole graph costs."""
NODES_SHOWN = 8
"""Of a region, in reports."""
ROUNDING = 1e-5
"""Relative L2 error of a region up to which float32, summed in another order, explains the difference."""
HALF_ROUNDING = {onnx.TensorProto.FLOAT16: 4 * 2.0**-11, onnx.TensorProto.BFLOAT16: 4 * 2.0**-8}
"""The same of the halves: that some operators round and others do not, four times at most by half a unit."""


@dataclass
class LocalComparison:
    """What a step did to the values of its regions, the worst first."""

    regions: list[RegionReport]
    made: list[dict[str, Array]] | None = None
    """For each captured sample, what the new nodes make; None where that is not known any more."""

    def is_rounding(self, rounding: float = ROUNDING) -> bool:
        """Whether no region moved further than rounding explains."""
        return all(region.relative_l2 <= rounding for region in self.regions)

    @property
    def is_exact(self) -> bool:
        """Whether every region makes the same bits as before."""
        return all(region.relative_l2 == 0 for region in self.regions)


@dataclass
class LocalVerifier:
    """Compares the regions that steps change; the captured values follow the graph from step to step."""

    samples: Iterable[Feeds]
    values: list[dict[str, Array]] = field(default_factory=list)
    """For each captured sample, the value of every tensor of the graph that was accepted last."""

    _sides: list[Side] = field(default_factory=list)

    def compare(self, before: Structure, after: Structure) -> LocalComparison | None:
        """The regions in which the graphs differ, on the captured values; None where that is most of the graph.

        Raises LlmcError where a region cannot run.
        """
        old, new = self._side(before), self._side(after)
        regions = changed_regions(old, new)
        if not any(region.outputs for region in regions):
            return LocalComparison([], [{} for _ in self.values])
        if sum(len(region.new) for region in regions) > LARGEST_PART * len(after.model.graph.node):
            return None
        if not self.values:
            self._capture(before)
        moved: set[str] = set()
        while True:
            regions = changed_regions(old, new, moved, self._equal)
            made = self._run(after, regions)
            misfits = self._misfits(before, after, regions, made) - moved
            if not misfits:
                return LocalComparison(self._numerics(before, after, regions, made), made)
            moved |= misfits

    def _side(self, structure: Structure) -> Side:
        """What a graph is compared by; that of the last step's is the next one's too."""
        known = next((side for side in self._sides if side.structure is structure), None)
        self._sides = [*self._sides[-1:], known or Side(structure)]
        return self._sides[-1]

    def _equal(self, one: str, other: str) -> bool:
        return all(one in v and other in v and np.array_equal(v[one], v[other]) for v in self.values)

    def _run(self, after: Structure, regions: Sequence[Region]) -> list[dict[str, Array]]:
        run = _NewNodes(after, [node for region in regions for node in region.new], self.values[0])
        return run.values(self.values)

    def _numerics(
        self, before: Structure, after: Structure, regions: Sequence[Region], made: Sequence[Mapping[str, Array]]
    ) -> list[RegionReport]:
        old, new = _Constants(before), _Constants(after)
        found = []
        for region in (region for region in regions if region.outputs):
            pairs = [
                (old.pick(region.outputs, values), new.pick(region.outputs, now))
                for values, now in zip(self.values, made, strict=True)
            ]
            found.append(_report(region, compare(pairs)))
        return sorted(found, key=lambda moved: -moved.relative_l2)

    def _misfits(
        self, before: Structure, after: Structure, regions: Sequence[Region], made: Sequence[Mapping[str, Array]]
    ) -> set[str]:
        """Tensors of another shape than before, or of values that are not kept: what reads them joins the region."""
        names = [name for region in regions for name in region.outputs]
        old, new = _Constants(before).pick(names, self.values[0]), _Constants(after).pick(names, made[0])
        return {name for name in names if name not in old.keys() & new.keys() or old[name].shape != new[name].shape}

    def accept(self, after: Structure, comparison: LocalComparison | None) -> None:
        """Go on from the graph `after`; without its comparison everything is captured anew when it is needed."""
        if comparison is None or comparison.made is None:
            self.values.clear()
            return
        there = {name for node in after.model.graph.node for name in node.output}
        there |= {info.name for info in after.model.graph.input}
        for values, made in zip(self.values, comparison.made, strict=True):
            values |= made
            for name in values.keys() - there:
                del values[name]

    def _capture(self, structure: Structure) -> None:
        weights = computed_weights(structure)
        names = [name for node in structure.model.graph.node for name in node.output if name and name not in weights]
        session = Session(from_structure(structure), names)
        size = per_element = 0.0
        for sample in _most_telling(self.samples):
            elements = _elements(sample)
            if self.values and (len(self.values) == CAPTURED_SAMPLES or size + per_element * elements > CAPTURED_BYTES):
                continue
            values = {**sample, **session.run(sample, names)}
            taken = sum(value.nbytes for value in values.values())
            per_element = max(per_element, taken / max(elements, 1))
            size += taken
            self.values.append(values)
        if not self.values:
            raise LlmcError("there is no sample to verify on")


def rounding_of(structure: Structure) -> float:
    """Relative L2 error of a region up to which rounding explains the difference, in the types of the graph."""
    kinds = set(element_types(structure).values())
    return max([ROUNDING, *(error for kind, error in HALF_ROUNDING.items() if kind in kinds)])


def _most_telling(samples: Iterable[Feeds]) -> list[Feeds]:
    """The first sample, then those no larger than it: first one with padding, if that has none."""
    first, *others = list(samples) or [{}]
    rest = [sample for sample in others if _elements(sample) <= _elements(first)]
    padded = [] if _is_padded(first) else [sample for sample in rest if _is_padded(sample)][:1]
    return [first, *padded, *(sample for sample in rest if not any(sample is p for p in padded))] if first else []


def _is_padded(sample: Feeds) -> bool:
    return any("mask" in name and not np.all(value) for name, value in sample.items())


def _elements(sample: Feeds) -> int:
    return sum(value.size for value in sample.values())


def _report(region: Region, outputs: list[OutputNumerics]) -> RegionReport:
    modules = (module_in(node.name, {e.key: e.value for e in node.metadata_props}) for node in region.new)
    return RegionReport(
        nodes=[node.name for node in region.new][:NODES_SHOWN],
        replaced=[node.name for node in region.gone][:NODES_SHOWN],
        module=next(filter(None, modules), ""),
        outputs=outputs,
    )


class _NewNodes:
    """The new nodes of all regions, ready to run on captured values."""

    def __init__(self, after: Structure, nodes: Sequence[onnx.NodeProto], captured: Mapping[str, Array]) -> None:
        weights = computed_weights(after)
        self.made = [name for node in nodes for name in node.output if name and name not in weights]
        given = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in captured.items()}
        chosen = {id(node) for node in nodes}
        wanted = {name for node in nodes for name in reads(node)}
        ordered = []
        for node in reversed(after.model.graph.node):
            if id(node) in chosen or not wanted.isdisjoint(weights.keys() & set(node.output)):
                ordered.append(node)
                wanted.update(reads(node))
        ordered.reverse()
        part = part_of(after, ordered, given | element_types(after))
        self.session = Session(from_structure(part), self.made) if self.made else None

    def values(self, captured: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        return list(self.session.run_each(captured, self.made)) if self.session else [{} for _ in captured]


class _Constants:
    """The constants of a graph by name."""

    def __init__(self, structure: Structure) -> None:
        self.tensors = {tensor.name: tensor for tensor in structure.model.graph.initializer}
        self.weights = structure.weights

    def pick(self, names: Sequence[str], values: Mapping[str, Array]) -> dict[str, Array]:
        """The named constants, and of other names those `values`; without those that are in neither."""
        known = (name for name in names if name in self.tensors or name in values)
        return {name: self._constant(name) if name in self.tensors else values[name] for name in known}

    def _constant(self, name: str) -> Array:
        held = self.weights.get(name)
        if held is None:
            return onnx.numpy_helper.to_array(self.tensors[name])
        return loaded(held)
