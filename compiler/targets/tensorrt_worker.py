"""The process that TensorRT runs in, so that neither an abort in it nor Ctrl-C can take llmc down or leave it hanging.

One job comes in as a line of JSON on standard input; events go out as lines of JSON on standard output: `phase`
any number of times, then `done`, `refused` or `unwritable`. TensorRT's log goes to standard error. The process ends
when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from llmc.compiler.child import end_with_parent
from llmc.compiler.peak import peak_bytes
from llmc.compiler.targets import tensorrt_log
from llmc.compiler.targets.input_shapes import Shapes
from llmc.compiler.targets.tensorrt_import import PRODUCT, Kind, load

Phase = Callable[[str], None]


class BuildJob(TypedDict):
    """Build `engine` from the ONNX file `model`. `workspace` in bytes; an empty list of capabilities: the default."""

    kind: Kind
    model: str
    engine: str
    profiles: list[Shapes]
    compute_capabilities: list[int]
    workspace: int | None
    plugins: list[str]


class OperatorsJob(TypedDict):
    """Which of these operators has the ONNX parser no importer for?"""

    kind: Kind
    operators: list[str]


class Problem(TypedDict):
    """A reason not to build; node and operator are empty where TensorRT names none."""

    node: str
    operator: str
    text: str


class RefusedError(Exception):
    """TensorRT cannot build this; says why."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


class UnwritableError(Exception):
    """The engine cannot be written; the message is the system's."""


@dataclass
class Log:
    """What TensorRT said, by severity; of its verbose messages only the one that lists the layers."""

    messages: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    layers: str = ""

    def add(self, severity: str, text: str) -> None:
        if text.startswith(tensorrt_log.LAYERS):
            self.layers = text
        elif severity != "VERBOSE":
            self.messages[severity].append(text)
            print(f"[{severity}] {text}", file=sys.stderr, flush=True)

    def errors(self, known: list[Problem]) -> list[Problem]:
        """Reasons among the errors that `known` problems do not already give."""
        texts = tensorrt_log.reasons(
            [*self.messages["INTERNAL_ERROR"], *self.messages["ERROR"]], [problem["text"] for problem in known]
        )
        return [Problem(node="", operator="", text=tensorrt_log.advise(text)) for text in texts]


class EngineFile:
    """Where the builder writes its engine; errors are kept, because TensorRT ignores those of its callbacks."""

    def __init__(self, path: Path) -> None:
        # Made by `main`, and not anew here: it may be gone because the parent is, and then it must not come back.
        self.file = open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_CREAT))  # noqa: SIM115
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.bytes += self.file.write(data)
        except OSError as error:
            self.error = error
            return 0
        return len(data)

    def close(self) -> None:
        """Raises the OSError of any write."""
        with self.file:
            if self.error:
                raise self.error
            self.file.flush()
            os.fsync(self.file.fileno())


def main() -> None:
    """Do the one job that standard input names."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    job = json.loads(sys.stdin.buffer.readline())
    try:
        if "engine" in job:
            _make(Path(job["engine"]))
        end_with_parent(lambda: Path(job["engine"]).unlink(missing_ok=True) if "engine" in job else None)
        done = build(job, lambda text: say(phase=text)) if "model" in job else unsupported(job)
        say(done=done)
    except RefusedError as refused:
        say(refused=refused.problems)
    except UnwritableError as error:
        say(unwritable=str(error))
    os._exit(0)  # without tearing TensorRT down, which can crash, and takes time


def _make(engine: Path) -> None:
    try:
        engine.touch()
    except OSError as error:
        raise UnwritableError(error.strerror or str(error)) from error


def unsupported(job: OperatorsJob) -> list[str]:
    """Those operators of the job that the parser has no importer for."""
    trt = _load(job["kind"])
    logger = _logger(trt, Log())
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    return [operator for operator in job["operators"] if not parser.supports_operator(operator)]


def build(job: BuildJob, phase: Phase) -> dict[str, object]:
    """Build the engine; what is known about it, JSON-ready. Raises RefusedError or UnwritableError."""
    phase(f"loading {PRODUCT[job['kind']]}")
    trt = _load(job["kind"])
    log = Log()
    logger = _logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # what the bindings make of a null pointer
        raise RefusedError(log.errors([]) or [_problem("the builder does not start, and gives no reason")]) from None
    builder.max_threads = 1  # more of them make the engine's bytes differ from build to build
    if job["plugins"]:
        phase("compiling kernels for plugins")
        _register_plugins(trt, job["compute_capabilities"][0])
    network = builder.create_network(_network_flags(trt, bool(job["plugins"])))
    parser = trt.OnnxParser(network, logger)
    phase(f"parsing {Path(job['model']).name}")
    _parse(parser, network, job, log)
    config = _configure(trt, job, builder, network)
    names = ", ".join(f"SM{sm}" for sm in job["compute_capabilities"])
    phase(f"building for {names}")
    try:
        size = _write(trt, builder, network, config, EngineFile(Path(job["engine"])), log)
    except OSError as error:
        raise UnwritableError(error.strerror or str(error)) from error
    facts = {"version": trt.__version__, "engine_bytes": size, **_network_facts(trt, network), **_log_facts(log)}
    facts["peak_bytes"] = peak_bytes()
    del parser  # before the network, into which it points; not earlier, because it owns the weights
    return facts


def _load(kind: Kind) -> Any:
    try:
        return load(kind)
    except (ImportError, OSError) as error:
        raise RefusedError([_problem(f"{PRODUCT[kind]} is installed, but does not load: {error}")]) from error


def _register_plugins(trt: Any, capability: int) -> None:
    from llmc.compiler.targets import tensorrt_plugins

    try:
        tensorrt_plugins.register(trt, capability)
    except ImportError as error:
        text = f"plugins need {error.name}: pip install 'llmc-compiler[kernels]', or leave target.plugins out"
        raise RefusedError([_problem(text)]) from error


def _parse(parser: Any, network: Any, job: BuildJob, log: Log) -> None:
    if job["plugins"]:
        import onnx

        from llmc.compiler.targets.tensorrt_plugins import for_parser

        model = for_parser(onnx.load(job["model"], load_external_data=False))
        parsed = parser.parse(model.SerializeToString(), job["model"])
    else:
        parsed = parser.parse_from_file(job["model"])
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    problems = [
        Problem(
            node=error.node_name(),
            operator=error.node_operator(),
            text=tensorrt_log.advise(tensorrt_log.clean(error.desc())),
        )
        for error in errors
    ]
    if not parsed or problems:
        problems += log.errors(problems)
        raise RefusedError(problems or [_problem("the ONNX parser refuses it, and gives no reason")])
    for tensor in map(network.get_input, range(network.num_inputs)):
        if tensor.is_shape_tensor:
            problems.append(
                _problem(f"input '{tensor.name}' is used as a shape, not as data: make it a constant of the graph")
            )
    if problems:
        raise RefusedError(problems)


def _configure(trt: Any, job: BuildJob, builder: Any, network: Any) -> Any:
    """The builder's configuration, and attention that may be computed in parts where no fused kernel exists."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(job["kind"] == "tensorrt-rtx"))
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile, SetDecomposableAttentions
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    options: dict[str, Any] = {
        "profiles": [_profile(Profile(), shapes) for shapes in job["profiles"] if shapes],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if job["workspace"] is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job["workspace"]}
    try:
        SetDecomposableAttentions((builder, network))()
        if job["kind"] == "tensorrt-rtx":
            capabilities = [divmod(sm, 10) for sm in job["compute_capabilities"]]
            config = CreateConfigRTX(compute_capabilities=capabilities, **options)(builder, network)
        else:
            config = CreateConfig(**options)(builder, network)
    except PolygraphyException as error:
        raise RefusedError([_problem(str(error))]) from error
    config.clear_flag(trt.BuilderFlag.TF32)
    if config.num_optimization_profiles != len(options["profiles"]):
        raise RefusedError([_problem("the builder refuses an optimization profile")])
    return config


def _profile(profile: Any, shapes: Shapes) -> Any:
    for name, (least, best, largest) in shapes.items():
        profile.add(name, least, best, largest)
    return profile


def _write(trt: Any, builder: Any, network: Any, config: Any, engine: EngineFile, log: Log) -> int:
    """Build into `engine`; bytes written. The builder calls it done even where nothing could be written."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return engine.write(data)

    built = builder.build_serialized_network_to_stream(network, config, Writer())
    engine.close()
    if not built or not engine.bytes:
        raise RefusedError(log.errors([]) or [_problem("the builder fails, and gives no reason")])
    return engine.bytes


def _network_facts(trt: Any, network: Any) -> dict[str, object]:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    attentions = [layer.name for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    return {
        "network_layers": network.num_layers,
        "attentions": [name.removesuffix("_AttentionInput") for name in attentions],
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
    }


def _tensor(tensor: Any) -> Mapping[str, object]:
    return {"name": tensor.name, "dtype": tensorrt_log.type_name(tensor.dtype.name), "shape": list(tensor.shape)}


def _log_facts(log: Log) -> dict[str, object]:
    warnings = tensorrt_log.reasons(log.messages["WARNING"])
    layers: list[dict[str, object]] = []
    try:
        layers = tensorrt_log.layers(log.layers)
    except ValueError as error:
        warnings.append(f"the builder's list of engine layers is not known: {error}")
    return {"memory": tensorrt_log.memory(log.messages["INFO"]), "layers": layers, "warnings": warnings}


def _logger(trt: Any, log: Log) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.add(severity.name, text)

    return Logger()


def _network_flags(trt: Any, plugins: bool) -> int:
    """Strongly typed, where that still has to be asked for; plugins compiled ahead of time, where there are any."""
    names = ["STRONGLY_TYPED", *["PREFER_AOT_PYTHON_PLUGINS"] * plugins]
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def _problem(text: str) -> Problem:
    return Problem(node="", operator="", text=text)


if __name__ == "__main__":
    main()
