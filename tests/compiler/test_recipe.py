"""Recipes: what is accepted, how everything else is refused, and that what is written loads back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

import llmc.compiler.recipe
import llmc.compiler.recipe.schema
from llmc.compiler.errors import LlmcError
from llmc.compiler.recipe import Recipe, shipped
from llmc.compiler.recipe.schema import json_schema, schema_text
from llmc.compiler.recipe.sections import AT_LEAST, Budgets, Metric, VerifySection
from llmc.compiler.recipe.source import dump, parse
from llmc.compiler.report import OutputNumerics
from llmc.compiler.targets import Range
from llmc.passes.base import Context, Pass, PassResult
from llmc.passes.graph import Graph

CONFIGS = Path(__file__).parents[2] / "configs"


class Inner(BaseModel):
    """Parameters below a parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: Path | None = None
    samples: int = Field(8, gt=0)
    method: Literal["minmax", "entropy"] = "minmax"


class Plain(Pass):
    """A pass without parameters."""

    safety: ClassVar = "exact"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Not run here."""
        raise NotImplementedError


class RoundWeights(Plain):
    """A pass with parameters."""

    after: ClassVar = ("plain",)

    bits: int = Field(8, ge=2, le=8)
    names: tuple[str, ...] = ()
    ratio: float = 0.5
    level: int | str = 0
    inner: Inner = Inner()


@pytest.fixture
def own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of our own, so that a test says nothing about those that llmc has."""
    own = {"plain": Plain, "round-weights": RoundWeights}
    monkeypatch.setattr(llmc.compiler.recipe, "find", own.get)
    for module in (llmc.compiler.recipe, llmc.compiler.recipe.schema):
        monkeypatch.setattr(module, "discover", lambda: own)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_passes: None) -> Callable[[str], Path]:  # noqa: ARG001
    """Write text to `r.yaml` in the working directory, where only our own passes are known."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return Path("r.yaml")

    return write


RICH = """
model:
  task: feature-extraction
  opset: 20
  dimensions: {batch: [1, 8, 32], sequence: 128, width: {min: 2, opt: 3, max: 4}}
  inputs: {input_ids: [batch, sequence], image: [batch, 3, width]}
passes:
  - plain
  - plain:
  - round-weights: {bits: 4, names: [a, on, 1e3x], ratio: 1e-3, level: auto, inner: {data: cal/x.txt}}
target:
  kind: tensorrt-rtx
  compute_capabilities: [sm80, 86, SM120]
  profiles: [{batch: 1}, {batch: [2, 4, 8], width: 4}]
  workspace: 1.5GiB
verify:
  inputs: llmc:sentences.txt
  budgets: {cosine: 0.999}
  pass_budgets: {round-weights: {cosine: 0.9, max_abs: 2}}
  on_failure: warn
"""


def test_values_mean_what_they_say(write: Callable[[str], Path]) -> None:
    recipe = Recipe.load(write(RICH))
    assert recipe.name == "r"
    assert recipe.model.dimensions == {
        "batch": Range(1, 8, 32),
        "sequence": Range(128, 128, 128),
        "width": Range(2, 3, 4),
    }
    assert recipe.model.inputs["image"] == ("batch", 3, "width")
    assert [step.key() for step in recipe.passes] == ["plain", "plain", "round-weights"]
    rounding = recipe.passes[2]
    assert isinstance(rounding, RoundWeights)
    assert (rounding.bits, rounding.names, rounding.ratio, rounding.level) == (4, ("a", "on", "1e3x"), 1e-3, "auto")
    assert recipe.target.compute_capabilities == (80, 86, 120)
    assert recipe.target.workspace == 3 << 29
    assert recipe.verify.limits() == {"cosine": 0.999}
    assert recipe.verify.limits("round-weights") == {"cosine": 0.9, "max_abs": 2}
    assert recipe.where("passes", 2) == "r.yaml:10"
    assert recipe.where("verify", "budgets", "cosine") == "r.yaml:18"


def test_profiles_stand_over_the_dimensions_of_the_model(write: Callable[[str], Path]) -> None:
    recipe = Recipe.load(write(RICH))
    sequence = Range(128, 128, 128)
    assert recipe.profiles == (
        {"batch": Range(1, 1, 1), "sequence": sequence, "width": Range(2, 3, 4)},
        {"batch": Range(2, 4, 8), "sequence": sequence, "width": Range(4, 4, 4)},
    )
    assert Recipe.load(write("passes: []")).profiles == ({},)


@pytest.mark.usefixtures("own_passes")
def test_paths_start_from_the_folder_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "r.yaml").write_text(RICH, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("recipes/r.yaml")
    rounding = recipe.passes[2]
    assert isinstance(rounding, RoundWeights)
    assert rounding.inner.data == folder / "cal" / "x.txt"
    assert recipe.verify.inputs == CONFIGS / "sentences.txt"
    set_here = recipe.with_settings(["passes.round-weights.inner.data=cal/x.txt"]).passes[2]
    assert isinstance(set_here, RoundWeights)
    assert set_here.inner.data == tmp_path / "cal" / "x.txt"


def test_missing_data_is_named_with_its_line(write: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.load(write(RICH))
    with pytest.raises(LlmcError) as error:
        recipe.check_data()
    place = "r.yaml:10: passes.round-weights.inner.data"
    assert str(error.value) == f"{place}: no such file or folder: {tmp_path / 'cal' / 'x.txt'}"
    recipe.with_values({"passes.3.inner.data": CONFIGS}).check_data()


NOT_A_PASS = "r.yaml:1: passes.1: a pass is its name, or its name and a colon with the parameters indented below"
BAD = [
    ("", "r.yaml:1: a recipe is a mapping of model, passes, target, verify"),
    ("- plain", "r.yaml:1: a recipe is a mapping of model, passes, target, verify"),
    ("model: {}", "r.yaml:1: passes: is missing"),
    ("passes:", "r.yaml:1: passes: should be a list, got nothing"),
    ("passes: {plain: }", "r.yaml:1: passes: should be a list, got a mapping"),
    ("passes: []\nmodle: {}", "r.yaml:2: modle: unknown key; did you mean 'model'?"),
    ("passes: []\nbudgets: {}", "r.yaml:2: budgets: unknown key; it belongs in 'verify'"),
    ("passes: []\nzzz: 1", "r.yaml:2: zzz: unknown key; known: model, passes, target, verify"),
    ("passes: []\npasses: []", "r.yaml:1: passes: stands twice: on line 1 and on line 2"),
    ("passes: []\n? [a]\n: 1", "r.yaml:1: the key on line 2 is not a word"),
    ("passes:\n  - plan", "r.yaml:2: passes.1: no pass is called 'plan'; did you mean 'plain'?"),
    ("passes:\n  - xyz", "r.yaml:2: passes.1: no pass is called 'xyz'; known: plain, round-weights"),
    ("passes: [plain: {bits: 1}]", "r.yaml:1: passes.plain.bits: unknown key; there are none here"),
    ("passes: [round-weights: 3]", "r.yaml:1: passes.round-weights: should be a mapping, got 3"),
    (
        "passes:\n  - round-weights:\n    bits: 4",
        "r.yaml:2: passes.1: a pass is its name, or its name and a colon with the parameters indented below",
    ),
    (
        "passes:\n  - round-weights:\n      inner:\n        sampels: 4",
        "r.yaml:4: passes.round-weights.inner.sampels: unknown key; did you mean 'samples'?",
    ),
    (
        "passes: [round-weights: {bits: '4'}]",
        "r.yaml:1: passes.round-weights.bits: should be a whole number, got '4'",
    ),
    ("passes: [round-weights: {bits: 9}]", "r.yaml:1: passes.round-weights.bits: should be at most 8, got 9"),
    (
        "passes: [round-weights: {level: 1.5}]",
        "r.yaml:1: passes.round-weights.level: should be a whole number or text, got 1.5",
    ),
    (
        "passes: [round-weights: {names: [a, 1]}]",
        "r.yaml:1: passes.round-weights.names.2: should be text, got 1",
    ),
    (
        "passes: [round-weights: {inner: {method: minmx}}]",
        "r.yaml:1: passes.round-weights.inner.method: should be one of 'minmax' or 'entropy', got 'minmx'; "
        "did you mean 'minmax'?",
    ),
    ("passes:\n  - round-weights\n  - plain", "r.yaml:2: passes.1: round-weights must stand after plain (line 3)"),
    (
        "passes: []\nmodel: {trust_remote_code: yes}",
        "r.yaml:2: model.trust_remote_code: should be true or false, got 'yes'",
    ),
    (
        "passes: []\nmodel:\n  dimensions:\n    batch: [1, 8]",
        "r.yaml:4: model.dimensions.batch: should be one size (8), [min, opt, max], or {min: 1, opt: 8, max: 32}",
    ),
    (
        "passes: []\nmodel: {dimensions: {batch: [4, 2, 8]}}",
        "r.yaml:2: model.dimensions.batch: sizes must rise: 0 ≤ min 4 ≤ opt 2 ≤ max 8 does not hold",
    ),
    (
        "passes: []\nmodel: {dimensions: {batch: 0}}",
        "r.yaml:2: model.dimensions.batch: the largest size must be at least 1",
    ),
    (
        "passes: []\nmodel: {dimensions: {batch: 1}, inputs: {ids: [bacth]}}",
        "r.yaml:2: model.inputs.ids.1: model.dimensions has no 'bacth'; did you mean 'batch'?",
    ),
    (
        "passes: []\ntarget: {profiles: [{batch: 1}, {size: 1}]}",
        "r.yaml:2: target.profiles.1.batch: has no sizes in model.dimensions or other profiles\n"
        "r.yaml:2: target.profiles.2.size: has no sizes in model.dimensions or other profiles",
    ),
    (
        "passes: []\ntarget: {kind: onxx}",
        "r.yaml:2: target.kind: should be one of 'auto', 'tensorrt', 'tensorrt-rtx', 'onnxruntime' or 'onnx', "
        "got 'onxx'; did you mean 'onnx'?",
    ),
    (
        "passes: []\ntarget: {compute_capabilities: [8.9]}",
        "r.yaml:2: target.compute_capabilities.1: should be written without the dot: 89, not 8.9",
    ),
    (
        "passes: []\ntarget: {compute_capabilities: [8]}",
        "r.yaml:2: target.compute_capabilities.1: should be at least 50, got 8",
    ),
    (
        "passes: []\ntarget: {compute_capabilities: [80, sm80]}",
        "r.yaml:2: target: compute_capabilities names one twice",
    ),
    (
        "passes: []\ntarget: {workspace: 2GiBs}",
        "r.yaml:2: target.workspace: should be a number of bytes, or one with a unit ('512MiB', '2GiB'), got '2GiBs'",
    ),
    ("passes: []\nverify: {samples: 0}", "r.yaml:2: verify.samples: should be at least 1, got 0"),
    (
        "passes: []\nverify: {budgets: {max_abs: .nan}}",
        "r.yaml:2: verify.budgets.max_abs: should be a finite number, got nan",
    ),
    (
        "passes: []\nverify: {metrics: [cosine], budgets: {max_abs: 1}}",
        "r.yaml:2: verify: has a budget for max_abs, which metrics leaves out",
    ),
    (
        "passes: [plain]\nverify:\n  pass_budgets:\n    plian: {cosine: 1}",
        "r.yaml:4: verify.pass_budgets.plian: this recipe has no such pass; did you mean 'plain'?",
    ),
    (
        "passes: [!!python/name:os.system x]",
        "r.yaml:1: passes.1: the tag 'python/name:os.system' has no meaning here\n" + NOT_A_PASS,
    ),
    ("passes: &a [*a]", "r.yaml:1: passes.1: this alias stands inside the value that it repeats\n" + NOT_A_PASS),
    ("passes: [", "r.yaml:1: not YAML: expected the node content, but found '<stream end>'"),
    ("a: 1\n\tb: 2", "r.yaml:2: not YAML: found character '\\t' that cannot start any token"),
    ("passes: []\n---\npasses: []", "r.yaml:2: not YAML: but found another document"),
    ("[" * 5000, "r.yaml: nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:40] for text, _ in BAD])
def test_what_is_wrong_is_said_with_file_line_and_key(write: Callable[[str], Path], text: str, message: str) -> None:
    with pytest.raises(LlmcError) as error:
        Recipe.load(write(text))
    assert str(error.value) == message


def test_all_faults_are_told_at_once_in_the_order_of_the_file(write: Callable[[str], Path]) -> None:
    text = "passes:\n  - plian\n  - round-weights: {bits: 1, names: 3}\nverify:\n  samples: 0\n  smaples: 1\n"
    text += "model:\n  opset: x\n"
    with pytest.raises(LlmcError) as error:
        Recipe.load(write(text))
    places = [line.split(": ")[:2] for line in str(error.value).split("\n")]
    assert places == [
        ["r.yaml:2", "passes.1"],
        ["r.yaml:3", "passes.round-weights.bits"],
        ["r.yaml:3", "passes.round-weights.names"],
        ["r.yaml:5", "verify.samples"],
        ["r.yaml:6", "verify.smaples"],
        ["r.yaml:8", "model.opset"],
    ]


def test_a_file_that_cannot_be_read_is_one_clear_line(write: Callable[[str], Path], tmp_path: Path) -> None:
    write("").write_bytes(b"\xff\xfe passes")
    for name, message in {
        "none.yaml": "none.yaml: no such file",
        str(tmp_path): f"{tmp_path}: cannot be read: Is a directory",
        "r.yaml": "r.yaml: not a text file (UTF-8 is needed)",
    }.items():
        with pytest.raises(LlmcError) as error:
            Recipe.load(Path(name))
        assert str(error.value) == message


def test_an_unknown_bare_name_suggests_a_shipped_recipe() -> None:
    with pytest.raises(LlmcError, match=r"no recipe called 'fp61' ships with llmc; did you mean 'fp16'\?"):
        Recipe.load("fp61")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("True", True),
        ("1e-3", 0.001),
        ("1.0e+20", 1e20),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    assert parse(text, "x").value == value


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.sampled_from(["1e3", "on", "~"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_what_is_dumped_is_read_back(value: object) -> None:
    assert parse(dump(value, header=["one", "two"]), "x").value == value


def test_a_resolved_recipe_loads_back_equal_from_anywhere(write: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.load(write(RICH))
    elsewhere = tmp_path / "artifact"
    elsewhere.mkdir()
    (elsewhere / "recipe.yaml").write_text(recipe.resolved_yaml(), encoding="utf-8")
    again = Recipe.load(elsewhere / "recipe.yaml")
    assert again == recipe
    assert again.resolved_yaml().split("\n")[1:] == recipe.resolved_yaml().split("\n")[1:]
    assert again.digest() == recipe.digest()
    assert "llmc:sentences.txt" in recipe.resolved_yaml()


def test_every_default_is_written_out(write: Callable[[str], Path]) -> None:
    document = yaml.safe_load(Recipe.load(write("passes: [plain, round-weights]")).resolved_yaml())
    assert document["passes"][0] == "plain"
    assert document["passes"][1]["round-weights"]["inner"] == {"data": None, "samples": 8, "method": "minmax"}
    assert set(document["verify"]) == set(VerifySection.model_fields)
    assert set(document["verify"]["budgets"]) == set(get_args(Metric))


@pytest.mark.usefixtures("own_passes")
def test_the_digest_is_of_what_is_asked_for(tmp_path: Path) -> None:
    digests = []
    for folder, text in {
        "a": RICH,
        "b": "# another folder, and a comment\n" + RICH,
        "c": RICH.replace("bits: 4", "bits: 5"),
        "d": RICH.replace("cal/x.txt", "cal/y.txt"),
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.yaml").write_text(text, encoding="utf-8")
        digests.append(Recipe.load(tmp_path / folder / "r.yaml").digest())
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


ROUND_TO_4_BITS = RoundWeights(bits=4).model_dump() | {"names": []}
SETTINGS = [
    ("passes.round-weights.inner.samples=64", ["passes", 2, "round-weights", "inner", "samples"], 64),
    ("passes.3.ratio=1e-2", ["passes", 2, "round-weights", "ratio"], 0.01),
    ("passes.round-weights.names=[x, y]", ["passes", 2, "round-weights", "names"], ["x", "y"]),
    ("passes=[plain, round-weights: {bits: 4}]", ["passes"], ["plain", {"round-weights": ROUND_TO_4_BITS}]),
    ("target.kind=onnx", ["target", "kind"], "onnx"),
    ("target.workspace=2GiB", ["target", "workspace"], 2 << 30),
    ("target.workspace=", ["target", "workspace"], None),
    ("target.profiles.2.batch=7", ["target", "profiles", 1, "batch"], {"min": 7, "opt": 7, "max": 7}),
    ("model.dimensions.batch.max=64", ["model", "dimensions", "batch"], {"min": 1, "opt": 8, "max": 64}),
    ("verify.budgets.cosine=0.5", ["verify", "budgets", "cosine"], 0.5),
    ("verify.pass_budgets.plain.sqnr_db=30", ["verify", "pass_budgets", "plain"], Budgets(sqnr_db=30).model_dump()),
]


@pytest.mark.parametrize(("setting", "place", "value"), SETTINGS, ids=[setting for setting, _, _ in SETTINGS])
def test_a_setting_changes_one_value_and_nothing_else(
    write: Callable[[str], Path], setting: str, place: list[str | int], value: object
) -> None:
    recipe = Recipe.load(write(RICH))
    expected: Any = recipe.document()
    *way, last = place
    container = expected
    for part in way:
        container = container[part]
    assert container.get(last, ...) != value
    container[last] = value
    assert recipe.with_settings([setting]).document() == expected


BAD_SETTINGS = [
    ("passes.round-weights.bits=x", "--set: passes.round-weights.bits: should be a whole number, got 'x'"),
    (
        "passes.round-weigths.bits=4",
        "--set: passes.round-weigths.bits: this recipe has no pass 'round-weigths'; did you mean 'round-weights'?",
    ),
    ("passes.round-weights.bist=4", "--set: passes.round-weights.bist: unknown key; did you mean 'bits'?"),
    ("passes.plain.x=1", "--set: passes.plain.x: 'plain' stands 2 times in this recipe: say passes.1 or passes.2"),
    ("passes.0.x=1", "--set: passes.0.x: 'passes' has 3 items, counted from 1; got '0'"),
    ("target.kind.x=1", "--set: target.kind.x: 'target.kind' is a single value, nothing stands below it"),
    ("targt.kind=onnx", "--set: targt: unknown key; did you mean 'target'?"),
    ("verify.samples", "--set verify.samples: should be KEY=VALUE, such as verify.samples=4"),
    ("verify.samples=[", "--set verify.samples=[: not YAML: expected the node content, but found '<stream end>'"),
    (
        "model.dimensions.batch.max=2",
        "--set: model.dimensions.batch: sizes must rise: 0 ≤ min 1 ≤ opt 8 ≤ max 2 does not hold",
    ),
]


@pytest.mark.parametrize(("setting", "message"), BAD_SETTINGS, ids=[setting for setting, _ in BAD_SETTINGS])
def test_a_setting_that_leads_nowhere_says_so(write: Callable[[str], Path], setting: str, message: str) -> None:
    recipe = Recipe.load(write(RICH))
    with pytest.raises(LlmcError) as error:
        recipe.with_settings([setting])
    assert str(error.value) == message


def test_settings_apply_in_order_and_name_the_option(write: Callable[[str], Path]) -> None:
    recipe = Recipe.load(write("passes: []"))
    in_order = ["verify.seed=1", "verify={samples: 3}", "verify.seed=2", "passes=[plain]", "passes.plain={}"]
    changed = recipe.with_settings(in_order)
    assert (changed.verify.seed, changed.verify.samples, len(changed.passes)) == (2, 3, 1)
    assert recipe.with_settings(in_order[:2]).verify.seed == 0
    assert recipe.with_settings([]) == recipe
    with pytest.raises(LlmcError, match=r"^--target: target\.kind: should be one of"):
        recipe.with_values({"target.kind": "gpu"}, option="--target")


def test_every_metric_has_a_sense_and_is_reported() -> None:
    assert set(get_args(Metric)) == set(OutputNumerics.model_fields) - {"output", "finite", "custom"}
    assert set(get_args(Metric)) >= AT_LEAST


def test_the_schema_accepts_what_loads_and_refuses_what_does_not(write: Callable[[str], Path]) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = parse(RICH, "x").value
    assert validator.is_valid(document)
    assert validator.is_valid(Recipe.load(write(RICH)).document())
    for text in (
        "passes: [plan]",
        "passes: []\nmodle: {}",
        "passes: [round-weights: {bits: 9}]",
        "passes: [plain: {a: 1}]",
    ):
        assert not validator.is_valid(parse(text, "x").value), text
    assert schema["$defs"]["RoundWeights"]["properties"]["bits"]["maximum"] == 8


def test_the_committed_schema_is_fresh() -> None:
    committed = (CONFIGS / "recipe.schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json.loads(schema_text()), "stale: run `make schema`"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_with_its_data_and_teaches(path: Path) -> None:
    recipe = Recipe.load(path.stem)
    assert recipe == Recipe.load(path)
    recipe.check_data()
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert (path.parent / "recipe.schema.json").is_file()
    assert dict(shipped())[path.stem].endswith(".")
    assert f"--recipe {path.stem} " in text or "`make demo`" in text or path.stem == "minilm-int8"
    jsonschema.validate(
        parse(text, path.name).value, json.loads((CONFIGS / "recipe.schema.json").read_text(encoding="utf-8"))
    )


def test_calibration_and_verification_sentences_are_different_and_enough() -> None:
    calibration, verification = (
        (CONFIGS / name).read_text(encoding="utf-8").splitlines() for name in ("calibration.txt", "sentences.txt")
    )
    assert len(set(verification)) == len(verification) >= 10
    assert len(set(calibration)) == len(calibration) >= 128
    assert not set(calibration) & set(verification)


def test_a_recipe_takes_all_passes_of_another_but_some(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "passes:\n  - recipe: optimize\n    without: [merge-projections, fold-constants]\n  - convert-fp16\n"
    )
    keys = [step.key() for step in Recipe.load(path).passes]
    whole = [step.key() for step in Recipe.load("optimize").passes]
    assert keys == [key for key in whole if key not in ("merge-projections", "fold-constants")] + ["convert-fp16"]


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("fuse-gelu", "r.yaml:2: passes.1: 'without' takes a list of passes, as in 'without: [fuse-gelu]'"),
        ("[fuse-gleu]", "r.yaml:2: passes.1: recipe 'optimize' has no pass 'fuse-gleu'; did you mean 'fuse-gelu'?"),
    ],
)
def test_what_is_left_out_must_be_there(without: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"passes:\n  - recipe: optimize\n    without: {without}\n")
    with pytest.raises(LlmcError) as error:
        Recipe.load(tmp_path / "r.yaml")
    assert message in str(error.value)
