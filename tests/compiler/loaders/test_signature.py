"""What graphs take and give, read off models and their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmc.compiler.errors import LlmcError
from llmc.compiler.loaders.signature import Signature, signature_of
from llmc.passes.graph import shape_of


class Model(torch.nn.Module):
    """A stand-in with a configuration."""

    dtype = torch.float32

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=99, **config)
        self.config.get_text_config = lambda: self.config


class Text(Model):
    def forward(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, use_cache: Any = None
    ) -> Any: ...


class Image(Model):
    def forward(self, pixel_values: Any) -> Any: ...


class TextAndImage(Model):
    def forward(self, input_ids: Any, pixel_values: Any) -> Any: ...


class Spectrum(Model):
    def forward(self, input_features: Any) -> Any: ...


class Sound(Model):
    def forward(self, input_values: Any, attention_mask: Any = None) -> Any: ...


def signature(model: Model, folder: Path = Path("nowhere")) -> Signature:
    return signature_of(model, "feature-extraction", None, folder)


@pytest.mark.parametrize(("types", "taken"), [(2, True), (1, False), (0, False), (None, False)])
def test_segments_are_an_input_where_there_are_several(types: int | None, taken: bool) -> None:
    model = Text(max_position_embeddings=8, **({} if types is None else {"type_vocab_size": types}))
    assert ("token_type_ids" in [tensor.name for tensor in signature(model).inputs]) is taken


def test_sizes_stay_within_what_the_model_allows() -> None:
    found = signature(Text(max_position_embeddings=4))
    assert found.limits == {"sequence": 4}
    assert max(sizes["sequence"] for sizes in (found.sample, *found.checks)) == 4
    assert min(found.sample.values()) >= 2


@pytest.mark.parametrize("config", [{}, {"max_position_embeddings": None}, {"max_position_embeddings": -1}])
def test_no_limit(config: dict[str, Any]) -> None:
    assert signature(Text(**config)).limits == {}


@pytest.mark.parametrize(("padding", "limit"), [(None, 40), (1, 38), (0, 39)])
def test_positions_kept_for_padding_do_not_count(padding: int | None, limit: int) -> None:
    model = Text(max_position_embeddings=40)
    model.position_embeddings = torch.nn.Embedding(40, 2, padding_idx=padding)
    assert signature(model).limits == {"sequence": limit}


@pytest.mark.parametrize(
    ("config", "processor", "size"),
    [
        ({"image_size": 32}, None, (32, 32)),
        ({"image_size": [16, 24]}, None, (16, 24)),
        ({"image_size": 32}, {"size": 64}, (32, 32)),
        ({}, {"size": {"height": 16, "width": 24}}, (16, 24)),
        ({}, {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, (224, 224)),
        ({}, {"crop_size": 48, "size": 64}, (48, 48)),
        ({}, {"size": {"shortest_edge": 40}}, (40, 40)),
    ],
)
def test_image_size(tmp_path: Path, config: dict[str, Any], processor: Any, size: tuple[int, int]) -> None:
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = signature(Image(num_channels=1, **config), tmp_path)
    assert shape_of(found.inputs[0]) == ("batch", 1, *size)
    assert not found.notes


def test_assumed_image_size_is_told(tmp_path: Path) -> None:
    found = signature(Image(), tmp_path)
    assert shape_of(found.inputs[0]) == ("batch", 3, 224, 224)
    assert found.notes == ("the configuration gives no image size: exported for 224 x 224 pixels",)


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (TextAndImage, "input_ids and pixel_values"),
        (Spectrum, "input_features"),
        (Sound, "input_values"),
        (Model, "none"),
    ],
)
def test_other_inputs_are_refused(model: type[Model], taken: str) -> None:
    with pytest.raises(LlmcError, match=f"{model.__name__} takes {taken}"):
        signature(model())


@pytest.mark.parametrize(
    ("kernels", "strides"),
    [((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)), ((10, 3, 2), (5, 2, 2)), ((4,), (4,)), ((1, 5), (3, 1))],
)
def test_the_least_of_a_sound_makes_one_frame(kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """torch's convolutions themselves are the truth: one sample fewer is refused."""
    model = Sound(conv_kernel=kernels, conv_stride=strides, feat_extract_norm="group")
    found = signature(model)
    assert [tensor.name for tensor in found.inputs] == ["input_values"]
    assert shape_of(found.inputs[0]) == ("batch", "samples")
    layers = torch.nn.Sequential(
        *(torch.nn.Conv1d(1, 1, kernel, stride) for kernel, stride in zip(kernels, strides, strict=True))
    )
    least = found.least["samples"]
    assert layers(torch.zeros(1, 1, least)).shape[-1] == 1
    with pytest.raises(RuntimeError):
        layers(torch.zeros(1, 1, least - 1))
    assert {sizes["samples"] for sizes in found.checks} >= {least}
    assert layers(torch.zeros(1, 1, found.sample["samples"])).shape[-1] >= 2


def test_a_mask_for_sound_where_the_model_was_trained_with_one() -> None:
    model = Sound(conv_kernel=(4,), conv_stride=(2,), feat_extract_norm="layer")
    assert [tensor.name for tensor in signature(model).inputs] == ["input_values", "attention_mask"]


def test_images_and_texts_have_batches_of_their_own() -> None:
    model = TextAndImage(max_position_embeddings=16)
    model.config.vision_config = SimpleNamespace(image_size=8)
    found = signature_of(model, "zero-shot-image-classification", None, Path("nowhere"))
    assert {tensor.name: shape_of(tensor) for tensor in found.inputs} == {
        "pixel_values": ("image_batch", 3, 8, 8),
        "input_ids": ("text_batch", "sequence"),
        "attention_mask": ("text_batch", "sequence"),
    }
    assert found.outputs == ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")
    assert found.limits == {"sequence": 16}


def test_output_that_the_model_does_not_give() -> None:
    with pytest.raises(LlmcError, match="Image gives no 'last_hidden_state', only: logits"):
        signature(Image(image_size=8)).call(lambda **_: {"logits": 1}, pixel_values=0)
