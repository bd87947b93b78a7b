"""What each layer of a precision pass costs alone, and what is left where the worst keep their old precision."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence

from llmc.compiler.blame.replay import Done, Replay
from llmc.compiler.blame.report import LayerError, Remaining, Sensitivity
from llmc.compiler.blame.search import badness
from llmc.compiler.session import Session
from llmc.compiler.verification import Verifier, breaches
from llmc.passes.base import Applied, Ledger

PARAMETERS = ("exclude", "keep")
"""Parameters of precision passes that name nodes to leave alone."""
NODES = 128
"""With more nodes than this, those of one module are one layer."""

Refused = set[tuple[str, str]]


def rank(
    replay: Replay,
    done: Done,
    verifier: Verifier,
    metric: str,
    budget: Mapping[str, float],
    begin: Callable[[str], None] = lambda _phase: None,
) -> Sensitivity:
    """Do the rewrites of each layer of a precision pass alone, then all but those of the worst k; measure each time.

    A layer alone is compared with the graph that the pass was given; what remains, with the truth of `verifier`.
    Passes before this one have run, those after it have not. What only moves values goes with its neighbours, and is
    no layer.
    """
    key = done.step.key()
    given = Verifier(Session(done.before).run_each, verifier.samples)
    groups = _layers(done)
    every = {(rewrite.rule, rewrite.node) for rewrite in done.result.rewrites}
    ops = {node.name: node.op for node in done.before.nodes}
    layers: list[LayerError] = []
    for number, (name, rewrites) in enumerate(groups.items(), 1):
        begin(f"{key}: layer {number} of {len(groups)} alone")
        numerics = given.measure(replay.again(done, Ledger(refused=every - _names(rewrites))))
        layers.append(
            LayerError(
                number=replay.start(done) + done.result.rewrites.index(rewrites[0]) + 1,
                layer=name,
                op=ops.get(name, ""),
                module=rewrites[0].module,
                nodes=[rewrite.node for rewrite in rewrites],
                numerics=numerics,
            )
        )
    layers.sort(key=lambda layer: (-badness(layer.numerics, metric), layer.number))
    remaining: list[Remaining] = []
    for kept in _counts(len(layers)):
        begin(f"{key}: all but the worst {kept}")
        refused = {name for layer in layers[:kept] for name in _names(groups[layer.layer])}
        numerics = verifier.measure(replay.again(done, Ledger(refused=refused)))
        remaining.append(Remaining(kept=kept, numerics=numerics, holds=not breaches(numerics, budget)))
    enough = next((point.kept for point in remaining if point.holds), None)
    return Sensitivity(
        key=key,
        metric=metric,
        layers=layers,
        remaining=remaining,
        enough=enough,
        setting=_setting(done, layers[: enough or 0]),
    )


def _layers(done: Done) -> dict[str, list[Applied]]:
    """Layer → its rewrites, in graph order: one at each node with arithmetic, or those of one module."""
    rewrites = [rewrite for rewrite in done.result.rewrites if rewrite.node in done.result.asked]
    by_module = len(rewrites) > NODES and len({rewrite.module for rewrite in rewrites}) > 1
    layers: dict[str, list[Applied]] = {}
    for rewrite in rewrites:
        name = rewrite.module if by_module and rewrite.module else rewrite.node
        layers.setdefault(name, []).append(rewrite)
    return layers


def _names(rewrites: Sequence[Applied]) -> Refused:
    return {(rewrite.rule, rewrite.node) for rewrite in rewrites}


def _counts(layers: int) -> list[int]:
    """0 to 8, then doubled, and all."""
    counts = [*range(9), *(16 << power for power in range(layers.bit_length()))]
    return sorted({min(count, layers) for count in counts})


def _setting(done: Done, layers: Sequence[LayerError]) -> dict[str, list[str]]:
    """The parameter of the pass that leaves those layers alone, by pattern."""
    parameter = next((name for name in PARAMETERS if name in type(done.step).model_fields), None)
    nodes = [glob.escape(node) for layer in layers for node in layer.nodes]
    return {parameter: nodes} if parameter is not None and nodes else {}
