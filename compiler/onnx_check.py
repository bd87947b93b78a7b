"""ONNX's checker on models whose large weights it needs not see."""

from __future__ import annotations

from collections.abc import Container

import onnx


def check_without(model: onnx.ModelProto, left_out: Container[str]) -> None:
    """Check a model whose initializers of these names are taken as inputs: their types count, not their values.

    Raises onnx.checker.ValidationError.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    proto = copy.graph
    declared = {info.name for info in proto.input}
    inline = [tensor for tensor in proto.initializer if tensor.name not in left_out]
    for tensor in proto.initializer:
        if tensor.name in left_out and tensor.name not in declared:
            proto.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del proto.initializer[:]
    proto.initializer.extend(inline)
    onnx.checker.check_model(copy)
