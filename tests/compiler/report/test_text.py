"""Names and quantities in words."""

from __future__ import annotations

import pytest

from llmc.compiler.report import OutputNumerics, text


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1 kB"),
        (45_400_000, "B", "45.4 MB"),
        (999_999, "B", "1 MB"),
        (2_868_903_936, "FLOP", "2.87 GFLOP"),
        (7.1e12, "FLOP", "7.1 TFLOP"),
        (22_600_000, "", "22.6 M"),
        (12, "", "12"),
    ],
)
def test_scaled(value: float, unit: str, expected: str) -> None:
    assert text.scaled(value, unit) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ""), (0.004, "0.00 s"), (41.23, "41.2 s"), (59.99, "60.0 s"), (125.9, "2 min 5 s")]
)
def test_seconds(value: float | None, expected: str) -> None:
    assert text.seconds(value) == expected


def test_differences() -> None:
    assert [text.difference(v) for v in (None, 0.0, 1.26e-6, float("inf"), float("nan"))] == [
        "",
        "0",
        "1.3e-06",
        "inf",
        "nan",
    ]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ""), (0.0, "0"), (0.012345, "1.2 %"), (1.5e-6, "0.00015 %"), (3e-9, "< 0.0001 %")]
)
def test_shares(value: float | None, expected: str) -> None:
    assert text.share(value) == expected


def test_bars_of_text_are_as_high_as_logarithms() -> None:
    """Two counts a bar: log2(1 + n) of 255, 15, 1, 0 and 1 is 8, 4, 1, 0 and 1, of 8 heights."""
    assert text.bars([200, 55, 15, 0, 0, 1, 0, 0, 1]) == "█▄▁·▁"
    assert text.bars([]) == ""


@pytest.mark.parametrize(
    ("sqnr", "max_abs", "expected"), [(61.27, 1e-3, "61.3 dB"), (None, 0.0, "equal"), (None, float("inf"), "–")]
)
def test_decibels(sqnr: float | None, max_abs: float, expected: str) -> None:
    line = OutputNumerics(output="y", max_abs=max_abs, relative_l2=0, cosine=1, sqnr_db=sqnr, finite=True)
    assert text.decibels(line) == expected


def test_shapes() -> None:
    assert [text.shape(s) for s in (None, [], ["batch", None, 3])] == ["?", "scalar", "batch × ? × 3"]


def test_plurals() -> None:
    words = [text.plural(1, "layer"), text.plural(2, "layer"), text.plural(2, "near miss"), text.plural(1234, "node")]
    assert words == ["1 layer", "2 layers", "2 near misses", "1,234 nodes"]


def test_facts_in_words() -> None:
    facts = {
        "strongly_typed": True,
        "compute_capabilities": [80, 89],
        "activation_bytes": 9_437_184,
        "memory": {"weights_bytes": 45_000_000, "layers": 7},
        "gpu": None,
    }
    assert {text.label(key): text.fact(key, value) for key, value in facts.items()} == {
        "strongly typed": "yes",
        "compute capabilities": "80, 89",
        "activation": "9.44 MB",
        "memory": "weights 45 MB, layers 7",
        "gpu": "–",
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder/layer.0", "encoder/layer.0"),
        ("Schicht_ä  β", "Schicht_ä  β"),
        ("one \r\n  two\tthree", "one two three"),
        ("\x1b[31mred", "�[31mred"),
        ("abc\u202edef\u200b", "abc�def�"),
    ],
)
def test_printable(name: str, expected: str) -> None:
    assert text.printable(name) == expected
