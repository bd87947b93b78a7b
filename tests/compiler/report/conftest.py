"""Reports as a compile makes them, small, and with names that try to break out of every rendering."""

from __future__ import annotations

import pytest

from llmc.compiler.report import (
    ActivationLine,
    DtypeWeights,
    GraphReport,
    LayerPrecision,
    NearMissLine,
    OutputNumerics,
    PassReport,
    Report,
    RewriteLine,
    SourceReport,
    TargetReport,
    TensorLine,
    Timings,
    TradeOffLine,
    Verification,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b\\|c\\",
    "[red]x[/red] [link=https://example.com]y[/link]",
    "`code` ``x` *bold* __init__ ~~no~~ ![i](https://example.com/i.png)",
    '" onload="alert(1)',
    "</style><img src=x>",
    "\x1b[31mred\x1b[0m\x07",
    "one\ntwo\r\n# three",
    "rtl\u202etxt",
    "&lt;b&gt; &amp; &#60;",
    "$x$ @someone #1",
)


def make_report(name: str) -> Report:
    """A report of every part, in which `name` stands wherever a model, a recipe or a tool can put text."""
    loaded, fused = {"Mul": 12, "Add": 6, name: 3}, {"Mul": 6, "Gelu": 3, name: 3}
    numerics = OutputNumerics(output=name, max_abs=2e-3, relative_l2=8e-4, cosine=0.99998, sqnr_db=61.3, finite=True)
    misses = [NearMissLine(rule=name, node=name, module=module, reason=name) for module in (name, "", name)]
    return Report(
        llmc="0.1.0",
        status="done",
        source=SourceReport(kind="onnx", name=name, sha256="0" * 64, task=name, exporter=name, notes=[name]),
        recipe=name,
        passes=[
            PassReport(index=0, key="load", nodes_after=loaded, weight_bytes_after=4000, numerics=[numerics]),
            PassReport(
                index=1,
                key="fuse-gelu",
                parameters={"option": name},
                nodes_before=loaded,
                nodes_after=fused,
                weight_bytes_after=4000,
                rewrites=[RewriteLine(number=1, rule=name, node=name, module=name, detail=name)],
                near_misses=misses,
                kept={name: name},
                frontier=[
                    TradeOffLine(
                        layers=3 - left,
                        left=[name] * left,
                        cosine=0.9985 + left / 1000,
                        relative_l2=0.05 / (1 + left),
                        cosine_bound=0.998 + left / 1000,
                        relative_l2_bound=0.06 / (1 + left),
                        weight_bytes=4000 + 1000 * left,
                        time=0.25 + left / 4,
                        chosen=left == 1,
                    )
                    for left in range(2)
                ],
                activations=[
                    ActivationLine(tensor="known", scale=0.02, clip=2.54, amax=2.6),
                    ActivationLine(
                        tensor=name,
                        scale=0.01,
                        clip=1.27,
                        amax=1.9,
                        saturated=0.00125,
                        values=8000,
                        zeros=984,
                        bin_width=0.5,
                        counts=[7000, 0, 6, 10],
                    ),
                ],
                clipped_weights={"known": 0.0, name: 0.0125},
                weight_scales={-9: 3, -7: 1},
                numerics=[numerics],
                warnings=[f"pass {name}"],
            ),
            PassReport(
                index=2, key="eliminate-dead", status="skipped", reason=name, nodes_before=fused, nodes_after=fused
            ),
        ],
        graph=GraphReport(
            opset=20,
            nodes=fused,
            inputs=[TensorLine(name=name, dtype="int64", shape=[name, None, 3])],
            outputs=[TensorLine(name=name, dtype="float32", shape=None)],
            weights={"float16": DtypeWeights(parameters=2000, bytes=4000)},
            flops=2_868_903_936,
            flops_uncounted=2,
            sizes={name: 128},
        ),
        precision=[
            LayerPrecision(
                node=name, op="MatMul", module=name, asked="int8", found="int8", engine="float16", reason=name
            ),
            LayerPrecision(node=f"{name} 2", op="MatMul", asked="int8", found="int8"),
        ],
        verification=Verification(
            reference="torch", inputs=name, samples=10, budgets={"cosine": 0.999, "max_abs": 0.1}
        ),
        target=TargetReport(
            kind="tensorrt-rtx",
            files={"model.engine": 46_812_352},
            facts={"builder": name, name: [80, 89], "activation_bytes": 9_437_184, "refittable": False},
            profiles=[{name: (1, 8, 16)}],
            layers=[{"name": name, "dtype": "Half", "source": [name, name]}],
            warnings=[f"target {name}"],
        ),
        warnings=[name],
        versions={"onnx": "1.23.2", name: name},
        timings=Timings(total=41.2, steps={"load": 19.4, "1 fuse-gelu": 0.16, "build": 7.6}),
    )


@pytest.fixture
def report() -> Report:
    """A report with ordinary names."""
    return make_report("encoder.layer.0/MatMul_1")


@pytest.fixture(params=HOSTILE, ids=range(len(HOSTILE)))
def hostile(request: pytest.FixtureRequest) -> tuple[str, Report]:
    """A name that means something to a terminal, a page or Markdown, and a report full of it."""
    return request.param, make_report(request.param)
