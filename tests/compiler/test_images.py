"""Images as samples: what transformers makes of them, compiles that are verified and calibrated on them, refusals."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from llmc.compiler.cli import app
from llmc.compiler.data import Samples, from_path
from llmc.compiler.data.images import is_image
from llmc.compiler.errors import BudgetError, LlmcError
from llmc.compiler.loaders.images import ImageProcessor
from llmc.compiler.loaders.quiet import quiet
from llmc.passes.graph import Array, Graph

GraphParser = Callable[..., Graph]
GRAPH = "(float[batch,3,8,8] pixel_values) => (float[batch,3,8,8] y) { y = Relu(pixel_values) }"
GRAY = "(float[batch,1,8,8] picture) => (float[batch,1,8,8] y) { y = Relu(picture) }"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "resample": 3,
    "image_mean": MEAN,
    "image_std": STD,
}
PROCESSORS = {
    "vit": VIT,
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 10}, "crop_size": 8},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}, "crop_pct": 0.875},
    "of a feature extractor": {**VIT, "feature_extractor_type": "ViTFeatureExtractor", "image_processor_type": None},
}


def processor(folder: Path, settings: dict[str, Any] = VIT) -> Path:
    """A folder with preprocessor_config.json."""
    folder.mkdir(exist_ok=True)
    given = {key: value for key, value in settings.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(given))
    return folder


def drawn(seed: int, size: tuple[int, int] = (23, 17), mode: str = "RGB") -> Image.Image:
    """Some shapes on noise."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        corners = [tuple(int(x) for x in rng.integers(0, size)) for _ in range(2)]
        (x0, x1), (y0, y1) = (sorted(axis) for axis in zip(*corners, strict=True))
        draw.ellipse((x0, y0, x1, y1), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return picture.convert(mode)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of every kind that pipelines meet."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, mode in enumerate(("RGB", "L", "P", "RGBA", "1")):
        drawn(seed, (9 + 5 * seed, 31 - 4 * seed), mode).save(folder / f"{seed}-{mode}.png")
    drawn(5, mode="CMYK").save(folder / "5-cmyk.jpeg")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees
    drawn(6).save(folder / "6-turned.JPG", exif=turned)
    (folder / "notes.txt").write_text("no picture")
    return folder


def pixels(samples: Samples) -> list[Array]:
    return [sample["pixel_values"] for sample in samples]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_that_transformers_gives(
    kind: str, pictures: Path, tmp_path: Path, parse: GraphParser
) -> None:
    folder = processor(tmp_path / "processor", PROCESSORS[kind])
    with quiet():
        import transformers
        from transformers.image_utils import load_image

        names = {"clip": "CLIPImageProcessorPil", "convnext": "ConvNextImageProcessorPil"}
        settings = {key: value for key, value in PROCESSORS[kind].items() if not key.endswith("_type")}
        made = getattr(transformers, names.get(kind, "ViTImageProcessorPil"))(**settings)
        files = sorted(path for path in pictures.iterdir() if path.suffix != ".txt")
        expected = [made(load_image(str(path)), return_tensors="np")["pixel_values"] for path in files]
    samples = from_path(pictures, parse(GRAPH), processor=folder)
    assert len(samples) == len(files) == 7
    assert all(value.dtype == np.float32 for value in pixels(samples))
    for found, wanted in zip(pixels(samples), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_pixels_by_hand(tmp_path: Path, parse: GraphParser) -> None:
    picture = drawn(0)
    picture.save(tmp_path / "one.png")
    (found,) = pixels(from_path(tmp_path / "one.png", parse(GRAPH), processor=processor(tmp_path / "processor")))
    resized = np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC), np.float64)
    expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    assert found.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # transformers computes in float32


def test_a_model_of_one_channel_takes_gray_pictures(tmp_path: Path, parse: GraphParser) -> None:
    folder = processor(tmp_path / "processor", {**VIT, "image_mean": [0.5], "image_std": [0.2]})
    for name, mode in (("a", "L"), ("b", "1"), ("c", "LA")):
        drawn(0, mode=mode).save(tmp_path / f"{name}.png")
    found = [sample["picture"] for sample in from_path(tmp_path, parse(GRAY), processor=folder)]
    resized = np.asarray(drawn(0, mode="L").resize((8, 8), Image.Resampling.BICUBIC), np.float64)
    np.testing.assert_allclose(found[0][0, 0], (resized / 255 - 0.5) / 0.2, rtol=1e-5, atol=1e-6)  # as above
    np.testing.assert_array_equal(found[0], found[2])
    assert found[1].shape == (1, 1, 8, 8)


def test_values_are_cast_to_the_type_of_the_input(tmp_path: Path, parse: GraphParser) -> None:
    drawn(0).save(tmp_path / "one.png")
    folder = processor(tmp_path / "processor")
    exact, rounded = (
        pixels(from_path(tmp_path / "one.png", parse(GRAPH.replace("float[", dtype)), processor=folder))[0]
        for dtype in ("float[", "float16[")
    )
    np.testing.assert_array_equal(rounded, exact.astype(np.float16))
    assert rounded.dtype == np.float16


def test_the_digest_covers_pictures_and_settings(pictures: Path, tmp_path: Path, parse: GraphParser) -> None:
    folder = processor(tmp_path / "processor")

    def digest() -> str:
        return from_path(pictures, parse(GRAPH), processor=folder).digest

    seen = [digest(), digest()]
    assert seen[0] == seen[1]
    drawn(9).save(pictures / "0-RGB.png")
    seen.append(digest())
    processor(folder, {**VIT, "resample": 2})
    seen.append(digest())
    (pictures / "5-cmyk.jpeg").unlink()
    seen.append(digest())
    assert len(set(seen)) == 4


# Refusals


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def text(path: Path) -> None:
    path.write_text("not a picture")


def deep(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)


@pytest.mark.parametrize(
    ("spoil", "graph", "settings", "reason"),
    [
        (damaged, GRAPH, VIT, r"one\.png is not an image that can be read: "),
        (text, GRAPH, VIT, r"one\.png is not an image that can be read: cannot identify image file"),
        (deep, GRAPH, VIT, r"one\.png has more than 8 bits a channel \(mode I;16\)"),
        (None, GRAY, VIT, r"one\.png is in colour \(mode RGB\), the model takes one channel"),
        (None, GRAPH.replace("3,8", "4,8"), VIT, r"pictures have 3 channels.*'pixel_values' has 4"),
        (None, GRAPH.replace("8,8", "6,6"), VIT, r"makes 'pixel_values' \[1, 3, 8, 8\], the model takes \[batch, 3, 6"),
        (None, GRAPH.replace("batch", "2"), VIT, "batch is fixed at 2"),
        (None, GRAPH.replace("float[", "int32["), VIT, "'pixel_values' float32, the model takes int32"),
        (
            None,
            GRAPH,
            {**VIT, "image_mean": [0.5]},
            r"one\.png: the image processor in .* cannot prepare it: mean",
        ),
        (None, GRAPH, {"image_processor_type": "NoSuch"}, "transformers cannot read its image processor: "),
        (
            None,
            "(float[batch,3,8,8] pixel_values, float[batch,4] more) => (float[batch,4] y) { y = Relu(more) }",
            VIT,
            r"makes pixel_values, which does not fill the model's input 'more'",
        ),
        (
            None,
            "(float[batch,4] a) => (float[batch,4] y) { y = Relu(a) }",
            VIT,
            r"of the model's inputs \(a\) not one has four dimensions",
        ),
    ],
)
def test_what_does_not_fit(
    spoil: Callable[[Path], None] | None, graph: str, settings: dict[str, Any], reason: str,
    tmp_path: Path, parse: GraphParser,
) -> None:  # fmt: skip
    path = tmp_path / "one.png"
    drawn(0).save(path)
    if spoil is not None:
        spoil(path)
    with pytest.raises(LlmcError, match=reason):
        list(from_path(path, parse(graph), processor=processor(tmp_path / "processor", settings)))


def test_without_a_configuration(tmp_path: Path, parse: GraphParser) -> None:
    drawn(0).save(tmp_path / "one.png")
    with pytest.raises(LlmcError, match=r"one\.png holds images; the model brings neither preprocessor_config\.json"):
        from_path(tmp_path / "one.png", parse(GRAPH))
    with pytest.raises(LlmcError, match=r"has neither preprocessor_config\.json nor .* in model\.processor of"):
        from_path(tmp_path / "one.png", parse(GRAPH), processor=tmp_path)
    processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(LlmcError, match="transformers cannot read its image processor"):
        list(from_path(tmp_path / "one.png", parse(GRAPH), processor=tmp_path))


# Compiles

CONV = """<ir_version: 10, opset_import: ["": 20]>
g (float[batch,3,8,8] image) => (float[batch,4] y) {
  c = Conv<pads = [1, 1, 1, 1]>(image, w)
  r = Relu(c)
  d = Conv<pads = [1, 1, 1, 1]>(r, v)
  m = GlobalAveragePool(d)
  y = Flatten(m)
}"""
RECIPE = """
model: {dimensions: {batch: [1, 2, 8]}, processor: processor}
passes: [quantize-int8: {calibration: {data: pictures, samples: 6}}]
target: {kind: onnx}
verify: {inputs: pictures, samples: 4, budgets: {cosine: 0.95}}
"""


@pytest.fixture
def convolutions(tmp_path: Path) -> Path:
    """An ONNX model of two convolutions, with six pictures, a processor and a recipe beside it."""
    model, rng = onnx.parser.parse_model(CONV), np.random.default_rng(0)
    for name, inputs in (("w", 3), ("v", 4)):
        values = rng.standard_normal((4, inputs, 3, 3)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "pictures").mkdir()
    for seed in range(6):
        drawn(seed).save(tmp_path / "pictures" / f"{seed}.png")
    processor(tmp_path / "processor")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def llmc(*words: object) -> str:
    """What a command prints. Raises what it ends with."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output


def compiled(folder: Path, output: str, *words: object) -> Path:
    llmc("compile", folder / "model.onnx", "--recipe", folder / "recipe.yaml", "-o", folder / output, *words)
    return folder / output


def clips(artifact: Path) -> dict[str, Any]:
    sections = json.loads((artifact / "calibration.json").read_bytes())["passes"]
    found: dict[str, Any] = sections[0]["tensors"]
    return found


def test_verified_and_calibrated_on_images(convolutions: Path, parse: GraphParser) -> None:
    report = json.loads((compiled(convolutions, "out") / "report.json").read_bytes())
    assert (report["verification"]["inputs"], report["verification"]["samples"]) == ("pictures", 4)
    assert {"pillow", "transformers"} <= report["versions"].keys()
    values = pixels(from_path(convolutions / "pictures", parse(GRAPH), processor=convolutions / "processor"))
    found = clips(convolutions / "out")
    assert found["image"]["amax"] == float(np.abs(values).max())
    assert {clip["samples"] for clip in found.values()} == {6}


def test_scales_depend_neither_on_the_order_nor_on_the_batch(convolutions: Path, parse: GraphParser) -> None:
    before = clips(compiled(convolutions, "out"))
    pictures = convolutions / "pictures"
    values = pixels(from_path(pictures, parse(GRAPH), processor=convolutions / "processor"))
    for seed in range(6):
        (pictures / f"{seed}.png").rename(pictures / f"{'dbface'[seed]}.png")
    assert clips(compiled(convolutions, "renamed")) == before
    (convolutions / "batches").mkdir()
    for number, rows in enumerate((values[4:], values[:4])):
        np.savez(convolutions / "batches" / f"{number}.npz", image=np.concatenate(rows))
    batches = clips(compiled(convolutions, "batches-out", "--calibration", convolutions / "batches"))
    assert {name: (clip["amax"], clip["clip"]) for name, clip in batches.items()} == {
        name: (clip["amax"], clip["clip"]) for name, clip in before.items()
    }


def test_an_unchanged_compile_reads_no_picture(convolutions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(convolutions, "out")

    def refuse(*_: object) -> None:
        pytest.fail("a picture was read")

    monkeypatch.setattr(ImageProcessor, "__call__", refuse)
    assert (compiled(convolutions, "again") / "model.onnx").read_bytes() == (first / "model.onnx").read_bytes()


def test_the_lock_covers_the_pictures(convolutions: Path) -> None:
    compiled(convolutions, "out", "--lock")
    compiled(convolutions, "again", "--locked")
    drawn(9).save(convolutions / "pictures/0.png")
    with pytest.raises(LlmcError, match=r"verification\.sha256: locked") as refused:
        compiled(convolutions, "third", "--locked")
    assert "calibration.quantize-int8.sha256: locked" in str(refused.value)


def test_the_evidence_of_a_breach_has_what_images_need(convolutions: Path) -> None:
    processor(convolutions)  # beside the model, where the evidence's own graph does not stand
    recipe = (convolutions / "recipe.yaml").read_text().replace(", processor: processor", "")
    (convolutions / "recipe.yaml").write_text(recipe.replace("0.95", "1.0"))
    with pytest.raises(BudgetError) as broken:
        compiled(convolutions, "out")
    command = str(broken.value).splitlines()[-1].removeprefix("  llmc ")
    with pytest.raises(BudgetError):
        llmc(*shlex.split(command))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_hugging_face_models_compile_on_images(kind: str, pictures: Path, tmp_path: Path) -> None:
    with quiet():
        import torch
        import transformers

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        if kind == "ViT":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
            sizes |= {"image_size": 32, "patch_size": 8}
        model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**sizes))
        model.eval().save_pretrained(tmp_path / "model")
        processor(tmp_path / "model", {**VIT, "size": {"height": 32, "width": 32}})
        made = transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "model")
        loaded = [transformers.image_utils.load_image(str(file)) for file in pictures.iterdir() if is_image(file)]
        wanted = [np.abs(made(picture, return_tensors="np")["pixel_values"]).max() for picture in loaded]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {dimensions: {batch: [1, 1, 4]}}\n"
        f"passes: [recipe: optimize, quantize-int8: {{calibration: {{data: {pictures}, method: minmax}}}}]\n"
        f"target: {{kind: onnxruntime}}\nverify: {{inputs: {pictures}, budgets: {{cosine: 0.95}}}}\n"
    )
    llmc("compile", tmp_path / "model", "--recipe", recipe, "-o", tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_bytes())
    assert report["verification"]["reference"] == "torch"
    assert report["verification"]["samples"] == 7
    assert clips(tmp_path / "out")["pixel_values"]["amax"] == float(max(wanted))
