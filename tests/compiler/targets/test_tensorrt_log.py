"""TensorRT's words, as it says them, and what is made of them."""

from __future__ import annotations

import pytest

from llmc.compiler.targets.tensorrt_log import advise, clean, layers, memory, reasons, type_name

TYPES_DIFFER = (
    "Invalid Node - add\n"
    "ITensor::getDimensions: Error Code 4: API Usage Error (add: ElementWiseOperation SUM must have same input types. "
    "But they are of types Half and Float. In validateTypes at /_src/optimizer/common/nodes/elementWiseNode.cpp:40)\n"
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient))"
)
TURING = (
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot "
    "compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported. In compileGraph at "
    "/_src/optimizer/myelin/codeGenerator.cpp:2012)"
)


@pytest.mark.parametrize(
    ("said", "cleaned"),
    [
        (TURING, "Cannot compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported."),
        (
            TYPES_DIFFER,
            "add: ElementWiseOperation SUM must have same input types. But they are of types Half and Float.",
        ),
        (
            "Assertion failed: creator && getVersion(creator) == CreatorVersion::kV3ONE: NonZero plugin was not found.",
            "NonZero plugin was not found.",
        ),
        ('softcap == 0.0 && "Setting softcap is not supported."', "Setting softcap is not supported."),
        (
            "Failed to import initializer: In node -1 with name:  and operator:  (importInitializers): "
            "UNSUPPORTED_NODE: Assertion failed: ctx->convert(initializer): Failed to import initializer: w",
            "Failed to import initializer: w",
        ),
        ("WeightsContext.cpp:203: Failed to open file: /models/a.data", "Failed to open file: /models/a.data"),
    ],
)
def test_a_message_is_freed_of_where_it_was_raised(said: str, cleaned: str) -> None:
    assert clean(said) == cleaned


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (clean(TURING), "convert the model to float16, or leave SM75 out"),
        (clean(TYPES_DIFFER), "add a Cast"),
        ("false", "TensorRT has no such operator: rewrite it in standard ONNX operators"),
        ("Plugin not found, are the plugin name, version, and namespace correct?", "TensorRT has no such operator"),
    ],
)
def test_a_message_says_what_to_do(text: str, advice: str) -> None:
    assert advice in advise(text)


def test_a_message_without_advice_stays() -> None:
    assert advise("Nothing is known of this.") == "Nothing is known of this."


def test_reasons_leave_out_boilerplate_and_what_is_known() -> None:
    said = [
        'ModelImporter.cpp:140: While parsing node number 0 [Foo -> "a"]:',
        "ModelImporter.cpp:142: --- Begin node ---\nNode name: foo",
        "ModelImporter.cpp:1071: Make sure input x has Int64 binding.",
        "ModelImporter.cpp:151: ERROR: onnxOpCheckers.cpp:998 In function checkFallbackPluginImporter:\n[6] false",
        "WeightsContext.cpp:203: Failed to open file: /models/a.data",
        "WeightsContext.cpp:203: Failed to open file: /models/a.data",
        "IBuilder::build: Error Code 4: API Usage Error (add: types differ In validate at /_src/x.cpp:40)",
    ]
    assert reasons(said, known=["add: types differ: add a Cast"]) == ["Failed to open file: /models/a.data"]


def test_memory_is_the_largest_of_each_kind() -> None:
    said = [
        "Total Weights Memory: 4096 bytes",
        "Total Activation Memory: 512 bytes",
        "Total Activation Memory: 1024 bytes",
        "Max Scratch Memory: 0 bytes",
        "Engine generation completed in 1.2 seconds.",
    ]
    assert memory(said) == {"weights_bytes": 4096, "activation_bytes": 1024, "scratch_bytes": 0}


GEMM = (
    "Name: mm_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [8,64], Strides: [64,1], Datatype: Int8, "
    "Format: Row }], Constants: [ { Name: w, Dimensions: [64,64], Datatype: Int8, Format: Row }, { Name: alpha, "
    "Dimensions: [1], Datatype: Float, Format: Row }], Outputs: [ { Name: y, Dimensions: [8,64], Datatype: Half, "
    "Format: Row }], TacticName: stub, StreamId: 0, "
    "Metadata: [ONNX Layer: mm]\x1f[ONNX Layer: a[0]]\x1f[ONNX Layer: mm]"
)
SHAPE = (
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: s, Location: "
    "Device, Dimensions: [1], Datatype: Int64, Format: N/A }], ParameterType: ShapeH2D, StreamId: 0, Metadata: "
)


def test_layers_have_their_types_and_sources() -> None:
    assert layers(f"Layers:\n{GEMM}\n{SHAPE}\n\nI/O Tensors:\n Name: x, IOMode: Input") == [
        {
            "name": "mm_myl0_1",
            "kind": "gemm",
            "dtype": "int8",
            "inputs": ["int8"],
            "outputs": ["float16"],
            "product": "int8",
            "nodes": ["mm", "a[0]"],
        },
        {
            "name": "[ShapeHostToDeviceCopy 0]",
            "kind": "ShapeHostToDevice",
            "dtype": "int64",
            "inputs": [],
            "outputs": ["int64"],
            "product": "",
            "nodes": [],
        },
    ]


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "product"),
    [
        ("conv_myl0_2", "correlation", ["Int8"], "int8"),
        ("conv_myl0_2", "deconv", ["Half"], "float16"),
        ("product_myl0_2", "gemm", ["FP8"], "float8_e4m3fn"),
        ("product_myl0_2", "gemm", ["BFloat16", "Half"], "bfloat16"),  # the second is a residual
        ("_gemm_mha_v2_myl0_7", "kgen", ["Half"], "float16"),
        ("__myl_FcAddDivCastErfCastAddMulMul_myl0_11", "runtime_fusion", ["Half"], "float16"),
        ("__myl_FcMulAdd_myl0_11", "runtime_fusion", ["Int8", "Half"], "int8"),
        # an INT8 product that TensorRT-RTX 1.7 did in float16, and INT8 weights as it reads them
        ("__myl_CastMulFc_myl0_3", "runtime_fusion", ["Int8", "Half"], "float16"),
        ("__myl_CastMulCastFc_myl0_1", "runtime_fusion", ["Half"], "float16"),
        ("__myl_CastMulFc_myl0_3", "runtime_fusion", ["Int8"], "float16"),  # as its output
        ("__myl_MulMinMaxRounCast_myl0_1", "kgen", ["Half"], ""),
        ("__myl_AddFcosMul_myl0_1", "kgen", ["Half"], ""),
    ],
)
def test_the_type_that_a_layer_multiplies_in(name: str, kind: str, inputs: list[str], product: str) -> None:
    tensors = ", ".join(
        f"{{ Name: t{n}, Dimensions: [8,8], Datatype: {t}, Format: Row }}" for n, t in enumerate(inputs)
    )
    line = (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors}], Constants: [], Outputs: [ {{ Name: y, Datatype: Half, "
        "Format: Row }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: a]"
    )
    assert layers(f"Layers:\n{line}\n\n")[0]["product"] == product


def test_layers_that_cannot_all_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be read: Something else"):
        layers(f"Layers:\n{GEMM}\nSomething else")
    with pytest.raises(ValueError, match="it gives none"):
        layers("")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Half", "float16"),
        ("HALF", "float16"),
        ("FP8", "float8_e4m3fn"),
        ("FP4E2M1", "float4_e2m1fn"),
        ("E8M0", "E8M0"),
    ],
)
def test_types_are_named_as_in_reports(said: str, name: str) -> None:
    assert type_name(said) == name
