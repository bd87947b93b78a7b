"""The command line: parses, calls, prints. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from llmc.compiler.interruption import Interruption
from llmc.compiler.progress import error_console, shown

BROKEN, INTERRUPTED = 3, 130
FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTION = "interrupted; nothing half-built was left behind"
app = typer.Typer(
    name="llmc",
    help="Compile Hugging Face and ONNX models to TensorRT engines, and prove every step.",
    epilog="Exit codes: 0 done, 1 a bug of llmc, 2 bad input, 3 budget broken, 4 the target cannot build it, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="List, check and describe recipes.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
caches = typer.Typer(help="See what is cached, and make room.", no_args_is_help=True)
app.add_typer(caches, name="cache")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="ONNX file, Hugging Face directory, or hub id.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        from llmc.compiler.versions import llmc_version

        typer.echo(f"llmc {llmc_version()}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile Hugging Face and ONNX models to TensorRT engines, and prove every step."""


@app.command("compile")
def compile_command(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or the name of one that ships.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artifact directory.  [default: build/RECIPE]")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="tensorrt, tensorrt-rtx, onnxruntime, onnx or auto, in place of the recipe's.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="Calibration data: folder of .npz or images, or text, one sample a line."),
    ] = None,
    verify_inputs: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Verification data, as for --calibration.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tokenizer for text data, where the model brings none.")
    ] = None,
    link_weights: Annotated[
        bool, typer.Option("--link-weights", help="Leave unchanged weights in the source's files, linked, not copied.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, build nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output even if it is no artifact.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
    lock: Annotated[
        bool, typer.Option("--lock", help="Begin llmc.lock beside the recipe; it is kept from then on.")
    ] = False,
    locked: Annotated[bool, typer.Option("--locked", help="Refuse what would differ from llmc.lock.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do everything anew, and keep nothing of it.")] = False,
    stop_after_rewrite: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Do no rewrite after number N.")
    ] = None,
    dump_passes: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after each pass, weights once.")
    ] = None,
    print_changed: Annotated[
        bool, typer.Option("--print-changed", help="Print what each pass changed, on the error stream.")
    ] = False,
    time_passes: Annotated[
        bool, typer.Option("--time-passes", help="Print the seconds of each pass, on the error stream.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile MODEL as a recipe says, verify every pass, and leave an artifact with its report."""
    from llmc.compiler.driver import compile as run_compile
    from llmc.compiler.planning import plans, summary_of, with_options
    from llmc.compiler.recipe import Recipe

    chosen = Recipe.load(recipe).with_settings(settings or [])
    chosen = with_options(
        chosen, target=target, calibration=calibration, verify_inputs=verify_inputs, link_weights=link_weights
    )
    place = output or Path("build") / chosen.name
    with shown() as progress:
        if dry_run:
            made = summary_of(plans(model, chosen, tokenizer=tokenizer, offline=offline, progress=progress))
        else:
            report = run_compile(
                model,
                chosen,
                place,
                force=force,
                tokenizer=tokenizer,
                offline=offline,
                stop_after_rewrite=stop_after_rewrite,
                cached=not no_cache,
                lock=_lock(recipe, model, lock, locked, stop_after_rewrite is not None),
                listeners=_listeners(dump_passes, model, print_changed),
                progress=progress,
            )
    if dry_run:
        _print(made, as_json, lambda console: console.print_json(data=made))
        return
    from llmc.compiler.report import times
    from llmc.compiler.report.terminal import render

    if time_passes:
        times.render(report.timings, error_console())
    _print(report.model_dump(mode="json"), as_json, lambda console: render(report, console, place))


def _lock(recipe: str, model: str, wanted: bool, locked: bool, partial: bool) -> Any:
    """The lock entry of this compile, where it is to be written, kept or obeyed."""
    from llmc.compiler.errors import LlmcError
    from llmc.compiler.lock import Lock

    if partial and (wanted or locked):
        raise LlmcError("--stop-after-rewrite makes no whole compile: leave out --lock and --locked")
    entry = Lock.of(recipe, model, refuses=locked)
    return entry if wanted or locked or (not partial and entry.exists()) else None


def _listeners(dump: Path | None, model: str, print_changed: bool) -> list[Callable[[Any], None]]:
    """What looks on at every step, as the options ask for."""
    from llmc.compiler.changes import ChangePrinter
    from llmc.compiler.dump import PassDump

    found: list[Callable[[Any], None]] = []
    if dump is not None:
        found.append(PassDump(dump, model))
    if print_changed:
        found.append(ChangePrinter(error_console()))
    return found


@app.command("bisect")
def bisect_command(
    given: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT", help="A model, or what a compile left.", show_default=False)
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A recipe.  [default: the artifact's]", show_default=False)
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="MODEL", help="What the artifact was made of.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="cosine, sqnr_db, max_abs or relative_l2.  [default: the recipe's budgets]")
    ] = None,
    at_least: Annotated[float | None, typer.Option(metavar="X", help="What cosine or sqnr_db must reach.")] = None,
    at_most: Annotated[float | None, typer.Option(metavar="X", help="What max_abs or relative_l2 may reach.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank the layers of INT8 and FP16 passes by what each alone costs.")
    ] = False,
    scan: Annotated[
        bool, typer.Option("--scan", help="Measure after every rewrite instead of bisecting: slow, and sure.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the findings go.  [default: build/RECIPE.blame]")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for compile.")] = None,
    calibration: Annotated[Path | None, typer.Option(metavar="DATA", help="As for compile.")] = None,
    verify_inputs: Annotated[Path | None, typer.Option(metavar="DATA", help="As for compile.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="As for compile.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output even if it is no artifact.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
    as_json: Json = False,
) -> None:
    """Find the first rewrite that breaks a budget, the layer it is in, and the smallest graph that shows it.

    Exit code 0 where no rewrite does, 3 where one is found.
    """
    from llmc.compiler.blame import bisect
    from llmc.compiler.blame.subject import budget, resolve
    from llmc.compiler.blame.terminal import render
    from llmc.compiler.planning import plan, with_options

    asked = budget(metric, at_least, at_most)
    subject = resolve(given, recipe, source)
    chosen = subject.recipe.with_settings(settings or [])
    chosen = with_options(chosen, target="onnx", calibration=calibration, verify_inputs=verify_inputs)
    place = output or Path("build") / f"{chosen.name}.blame"
    with shown() as progress:
        made = plan(subject.model, chosen, tokenizer=tokenizer, offline=offline, progress=progress)
        subject.check(made)
        blame = bisect(made, place, budget=asked, sensitivity=sensitivity, scan=scan, force=force, progress=progress)
    _print(blame.model_dump(mode="json"), as_json, lambda console: render(blame, console, place))
    if blame.status != "holds":
        raise typer.Exit(BROKEN)


@app.command("reproduce")
def reproduce_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A reproducer that bisect wrote.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Run a reproducer: exit code 3 where the error is still there, 0 where it is not."""
    from llmc.compiler.blame.reproducer import reproduce
    from llmc.compiler.blame.terminal import render_reproduction

    found = reproduce(folder)
    _print(found.model_dump(mode="json"), as_json, lambda console: render_reproduction(found, console))
    if found.breaches:
        raise typer.Exit(BROKEN)


@app.command("passes")
def passes_command(
    name: Annotated[str | None, typer.Argument(help="Key of a pass: describe it in full.", show_default=False)] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the catalogue page, docs/passes.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the passes, or describe one: what it does, how safe it is, its parameters."""
    from llmc.compiler import catalogue

    if as_markdown:
        typer.echo(catalogue.markdown(), nl=False)
    elif name is None:
        _print(catalogue.as_json(), as_json, catalogue.render_list)
    else:
        kind = catalogue.find(name)
        _print(catalogue.describe(kind), as_json, lambda console: catalogue.render_pass(kind, console))


@app.command("explain")
def explain_command(
    model: Model,
    key: Annotated[str, typer.Option("--pass", metavar="PASS", help="Key of the pass.", show_default=False)],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Its passes run first, up to this one.")] = "optimize",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for compile.")] = None,
    as_json: Json = False,
) -> None:
    """Show every place where a pass fired or came close, and the first thing that stopped it."""
    from llmc.compiler.explain import as_json as plain
    from llmc.compiler.explain import explain, render
    from llmc.compiler.recipe import Recipe

    with shown() as progress:
        progress(f"running the passes up to {key}")
        found = explain(model, key, Recipe.load(recipe).with_settings(settings or []))
    _print(plain(found), as_json, lambda console: render(found, console))


@app.command("generate")
def generate_command(
    artifact: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="Of a decoder, or its ONNX file; of both halves.", show_default=False),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to go on from.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A prompt a line, answered side by side.")
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", metavar="FILE", help="What an encoder reads: .wav, or .npz by input; repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option("--tokens", "-n", min=1, help="The most new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; more draws more freely.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the K likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw among the fewest tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the model's chat template out.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="In place of the artifact's own.")] = None,
    as_json: Json = False,
) -> None:
    """Generate text with a compiled decoder, or encoder-decoder, in ONNX Runtime."""
    from llmc.compiler.generation.choosing import greedy, sampler
    from llmc.compiler.generation.generate import open_generator, read_prompts, render
    from llmc.passes.errors import LlmcError

    if sum(map(bool, (prompt is not None, prompts, inputs))) != 1:
        raise LlmcError("give one of --prompt TEXT, --prompts FILE and --input FILE")
    names = read_prompts(prompts) if prompts is not None else [prompt or ""]
    choose = sampler(temperature, top_k, top_p, seed) if temperature else greedy
    with shown() as progress:
        progress("loading the model")
        generator = open_generator(artifact, tokenizer=tokenizer, limit=limit, raw=raw, choose=choose)
        asked, names = generator.read(inputs) if inputs else (names, names)
    if as_json or prompts is not None or len(names) > 1:
        with shown() as progress:
            progress("generating")
            answers = generator.answers(asked)
        found = [{"prompt": name, "answer": answer} for name, answer in zip(names, answers, strict=True)]
        _print(found, as_json, lambda console: render(found, console))
    else:
        for piece in generator.stream(asked if isinstance(asked, Mapping) else asked[0]):
            typer.echo(piece, nl=False)
        typer.echo()
    typer.echo(str(generator.speed), err=True)


@app.command("eval")
def eval_command(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="Of a decoder; or its ONNX file.", show_default=False)
    ],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to predict.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare logits and greedy answers with it.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are predicted from each other.")] = 256,
    tokenizer: Annotated[Path | None, typer.Option(metavar="DIR", help="In place of the artifact's own.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a compiled decoder: perplexity of a text, and how far it is from its source."""
    from llmc.compiler.generation.evaluate import evaluate, render

    with shown() as progress:
        found = evaluate(artifact, text, window=window, against=against, tokenizer=tokenizer, progress=progress)
    _print(found.model_dump(mode="json"), as_json, lambda console: render(found, console))


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="MODEL|ENGINE|ARTIFACT", show_default=False)],
    sizes: Annotated[
        list[str] | None, typer.Option("--size", metavar="DIM=N", help="Of a symbolic dimension, to count FLOPs at.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is in an ONNX model, an engine, or an artifact directory."""
    from llmc.compiler.inspect import inspect, parse_sizes, render

    found = inspect(path, parse_sizes(sizes or []))
    _print(found.model_dump(mode="json"), as_json, lambda console: render(found, console))


@app.command("check")
def check_command(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", show_default=False)], as_json: Json = False
) -> None:
    """Check that every file of an artifact is as it was written."""
    from llmc.compiler.artifact import check_artifact

    with shown() as progress:
        files = check_artifact(artifact, progress)
    _print(files, as_json, lambda console: console.print(f"{artifact}: {len(files)} files, all as they were written"))


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Say what this machine can build, and what to install for more."""
    from llmc.compiler.doctor import examine, render

    found = examine()
    _print(found.model_dump(mode="json"), as_json, lambda console: render(found, console))


@recipes.command("list")
def recipe_list(as_json: Json = False) -> None:
    """List the recipes that ship with llmc."""
    from llmc.compiler.recipe import shipped

    found = shipped()

    def render(console: Any) -> None:
        width = max(len(name) for name, _ in found)
        for name, description in found:
            console.print(f"{name:<{width}}  {description}", markup=False, highlight=False, soft_wrap=True)

    _print([{"name": name, "description": description} for name, description in found], as_json, render)


@recipes.command("check")
def recipe_check(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for compile.")] = None,
) -> None:
    """Check a recipe and print it as resolved, every default written out."""
    from llmc.compiler.recipe import Recipe

    checked = Recipe.load(recipe).with_settings(settings or [])
    checked.check_data()
    typer.echo(checked.resolved_yaml(), nl=False)


@recipes.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from llmc.compiler.recipe.schema import schema_text

    typer.echo(schema_text(), nl=False)


@caches.command("ls")
def cache_list(as_json: Json = False) -> None:
    """List what the cache holds, by kind."""
    from llmc.compiler.cache import collect, open_store

    with open_store() as store:
        found = collect.survey(store)
    _print(asdict(found), as_json, lambda console: collect.render(found, console))


@caches.command("gc")
def cache_collect(
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="As in 5GiB.  [default: LLMC_CACHE_LIMIT, or 10GiB]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove what was used longest ago, until the rest fits the limit."""
    _remove_cached(limit, as_json)


@caches.command("clear")
def cache_clear(as_json: Json = False) -> None:
    """Remove everything that no running compile uses."""
    _remove_cached("0", as_json)


def _remove_cached(limit: str | None, as_json: bool) -> None:
    from llmc.compiler.cache import collect, limit_of, open_store

    with open_store() as store:
        removed = collect.collect(store, limit_of(limit, "--limit"))
    _print(asdict(removed), as_json, lambda console: collect.render_removed(removed, console))


def _print(value: object, as_json: bool, render: Callable[[Any], None]) -> None:
    if as_json:
        typer.echo(json.dumps(value, indent=2))
        return
    from rich.console import Console

    render(Console())


def main() -> NoReturn:
    """Run the command line: one message on the error stream for what the user can mend, a traceback for our bugs."""
    from llmc.passes.errors import LlmcError, PassError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets '?' for what it cannot show
    interruption = Interruption()
    try:
        interruption.listen()
        app()
    except KeyboardInterrupt:
        _stop(INTERRUPTION, INTERRUPTED)
    except LlmcError as error:
        if interruption.seen:
            _stop(INTERRUPTION, INTERRUPTED)
        _stop(str(error), error.exit_code)
    except PassError as error:
        _stop(str(error), LlmcError.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            _stop(INTERRUPTION, INTERRUPTED)
        raise
    except Exception as error:
        if interruption.seen:
            _stop(INTERRUPTION, INTERRUPTED)
        if isinstance(error, OSError) and error.errno in FULL:
            _stop(f"no space left on the disk{f' of {error.filename}' if error.filename else ''}", LlmcError.exit_code)
        raise
    finally:
        interruption.end()
    raise AssertionError("typer ends the process by itself")


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
