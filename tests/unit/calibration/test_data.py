"""Every form of calibration data gives the same kind of batches; bad data gives one clear error."""

from __future__ import annotations

import json
import random

import pytest
import torch

from hfq.calibration import data
from hfq.errors import DataError


class Words:
    """A tokenizer of one number a word; 7 marks the special token."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        ids = [10 + int(word) for word in text.split()]
        return {"input_ids": [7, *ids] if add_special_tokens else ids}


TEXTS = [" ".join(str(i + j) for j in range(10)) for i in range(0, 200, 10)]  # 200 tokens: 10, 11, ...


def texts(given, **options):
    options = {"processor": Words(), "samples": 4, "seqlen": 16, "batch_size": 3, **options}
    return data.normalise(given, **options)


def test_concatenated_text_follows_the_protocol():
    found = texts(TEXTS, seed=5)
    chosen = random.Random(5).sample(range(200 // 16), 4)
    expected = [[10 + 16 * c + k for k in range(16)] for c in chosen]
    assert torch.cat([b["input_ids"] for b in found]).tolist() == expected
    assert [len(b["input_ids"]) for b in found] == [3, 1]
    assert all(set(b) == {"input_ids"} for b in found)
    assert found.samples == 4 and found.tokens == 64


def test_truncated_text_is_padded_with_a_mask():
    found = texts(["1 2 3", "4", "", " ".join(map(str, range(40)))], packing="truncate", samples=9, batch_size=2)
    assert found[0]["input_ids"].tolist() == [[7, 11, 12, 13], [7, 14, 0, 0]]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert found.tokens == 4 + 2 + 1 + 16
    assert max(b["input_ids"].shape[1] for b in found) == 16


def same(a, b):
    assert [sorted(x) for x in a] == [sorted(x) for x in b]
    assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_all_forms_of_text_agree(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    (tmp_path / "b.json").write_text(json.dumps({f"{i:03}": t for i, t in enumerate(TEXTS)}))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t, "id": i}) for i, t in enumerate(TEXTS)))
    import datasets

    folder = str(tmp_path)
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": list(range(len(TEXTS)))})
    forms = [
        [{"text": t, "title": "x"} for t in TEXTS], (t for t in TEXTS), lambda: iter(TEXTS), tmp_path / "a.txt",
        f"{folder}/a.json", f"{folder}/b.json", f"{folder}/a.jsonl", table, table.to_iterable_dataset(),
    ]  # fmt: skip
    first = texts(TEXTS)
    for form in forms:
        same(texts(form), first)
    same(texts("someone/corpus", load_hub=lambda name: table if name == "someone/corpus" else None), first)
    same(texts([{"x": t, "y": t} for t in TEXTS], text_column="y"), first)


def test_all_forms_of_tokens_agree():
    import datasets
    from transformers import BatchEncoding

    ids = torch.arange(60).reshape(6, 10)
    rows = [{"input_ids": row} for row in ids]
    table = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    forms = [
        ids, list(ids), rows, [{"input_ids": row.tolist(), "labels": [1]} for row in ids], {"input_ids": ids},
        BatchEncoding({"input_ids": ids}), [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}],
        torch.utils.data.TensorDataset(ids), torch.utils.data.DataLoader(rows, batch_size=5),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2), table,
        table.with_format("torch"),
        lambda: list(ids), lambda: torch.utils.data.TensorDataset(ids),
    ]  # fmt: skip
    first = data.normalise(ids, samples=5, seqlen=8, batch_size=2)
    assert torch.equal(torch.cat([b["input_ids"] for b in first]), ids[:5, :8])
    for form in forms:
        same(data.normalise(form, samples=5, seqlen=8, batch_size=2), first)


def test_images_and_labels():
    images = torch.randn(5, 3, 4, 4)
    pairs = [(image, 3) for image in images]
    for form in (images, pairs, torch.utils.data.TensorDataset(images, torch.arange(5)), {"pixel_values": images}):
        found = data.normalise(form, samples=4, batch_size=4)
        assert len(found) == 1 and torch.equal(found[0]["pixel_values"], images[:4])


def test_given_masks_are_kept_and_padded():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1]}, {"input_ids": [8], "attention_mask": [1]}]
    found = data.normalise(rows, batch_size=2, processor=Words())
    assert found[0]["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]] and found.tokens == 3


def test_recorded_calls_stay_as_they_are():
    calls = [
        {"sample": torch.randn(2, 4), "timestep": torch.tensor(t), "added": {"x": torch.ones(2)}} for t in (1, 2, 3)
    ]
    found = data.normalise(calls, samples=2, batch_size=7)
    assert (
        len(found) == 2 and torch.equal(found[1]["sample"], calls[1]["sample"]) and found[0]["added"]["x"].shape == (2,)
    )


def test_only_accepted_columns_are_kept():
    rows = [{"input_ids": [1, 2], "labels": [1, 2], "token_type_ids": [0, 0]}]
    assert set(data.normalise(rows, accepted=["input_ids", "labels"])[0]) == {"input_ids", "labels"}
    assert set(data.normalise(rows)[0]) == {"input_ids", "token_type_ids"}


def test_descriptor_is_small_and_depends_on_the_content():
    a, b = texts(TEXTS), texts(TEXTS, seed=1)
    assert json.loads(json.dumps(a.descriptor)) == a.descriptor
    assert a.descriptor["count"] == 4 and a.descriptor["length"] == 16 and a.descriptor["tokens"] == 64
    assert a.descriptor["sha256"] == texts(list(TEXTS)).descriptor["sha256"] != b.descriptor["sha256"]
    assert (
        data.normalise("x/y", processor=Words(), seqlen=4, samples=2, load_hub=lambda _: TEXTS).descriptor["source"]
        == "x/y"
    )


def used_generator():
    made = (t for t in TEXTS)
    next(made)
    return made


def exhausted_iterator():
    made = iter(TEXTS)
    list(made)
    return made


NAN = torch.tensor([[1.0, float("nan")]] * 3).reshape(3, 1, 2, 1)
BAD = {
    "nothing": (None, {}, "needs calibration data"),
    "empty list": ([], {}, "empty"),
    "empty table": ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, {}, "empty"),
    "too short": (["1 2 3"], {}, "found 3 tokens, 64 are needed"),
    "too short truncated": (["1 2 3"], {"packing": "truncate"}, "found 4 tokens, at least 16"),
    "wrong keys": ([{"image": [1, 2], "label": 3}], {}, r"keys \['image', 'label'\].*accepted: .*input_ids"),
    "not accepted": (
        [{"input_ids": [1]}],
        {"accepted": ["pixel_values"]},
        r"\['input_ids'\].*accepted: \['pixel_values'\]",
    ),
    "missing column": ([{"text": "1"}], {"text_column": "body"}, r"'body'.*\['text'\]"),
    "two columns": ([{"a": "1", "b": "2"}], {}, "text_column"),
    "mixed texts": (["1", 5], {}, "int"),
    "row without text": ([{"text": "1"}, {"text": None}], {}, "'text'"),
    "no tokenizer": (TEXTS, {"processor": None}, "tokenizer"),
    "no length": (TEXTS, {"seqlen": None}, "seqlen"),
    "used generator": (used_generator, {}, "used before"),
    "used iterator": (exhausted_iterator, {}, "used before"),
    "nan": (NAN, {}, "sample 0: pixel_values has NaN"),
    "nan in a call": ([{"sample": torch.tensor([float("inf")])}], {}, "sample has NaN or infinite"),
    "bad callable": (lambda: lambda: None, {}, "returned None"),
    "number": (lambda: 5, {}, "not understood"),
    "bool tensor": ([torch.tensor([True])], {}, "not understood"),
    "rank": (torch.zeros(2, 3, 4, dtype=torch.long), {}, "axes"),
    "no such file": (lambda: "nowhere.txt", {}, "neither a file"),
    "no samples": (TEXTS, {"samples": 0}, "samples=0"),
    "no batch": (TEXTS, {"batch_size": 0}, "batch_size=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data(name):
    given, options, message = BAD[name]
    given = given() if callable(given) and not isinstance(given, type) else given
    with pytest.raises(DataError, match=message):
        texts(given, **options)


@pytest.mark.parametrize("suffix, content", [(".json", "{"), (".json", "3"), (".jsonl", "{}\n{"), (".txt", "")])
def test_bad_files(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_text(content)
    with pytest.raises(DataError):
        texts(str(path))


def test_a_generator_serves_once():
    made = (t for t in TEXTS)
    texts(made)
    with pytest.raises(DataError, match="used before"):
        texts(made)


def test_endless_streams_are_read_only_as_far_as_needed():
    def endless():
        while True:
            yield "1 2 3 4"

    assert texts(endless).samples == 4
    assert data.normalise(lambda: ({"input_ids": [1, 2]} for _ in iter(int, 1)), samples=3).samples == 3
