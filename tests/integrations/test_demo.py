"""The example scripts on the small trained model: the same steps, minutes shorter."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from hfq.errors import ConfigError, HfqError

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "llm" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return script("demo")


@pytest.mark.slow
def test_demo(demo, small_lm, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 1)
    rows = demo.run(argparse.Namespace(
        model=str(small_lm.folder), data="demo", output=tmp_path / "out", bits=4, group_size=64, samples=4, length=64,
        windows=4))
    assert [row["name"] for row in rows] == ["float", "round to nearest", "RSQ"]
    stored = 4 + (16 + 8) / 64  # code, scale and zero point
    assert rows[1]["bits_per_weight"] == pytest.approx(stored)
    assert stored < rows[2]["bits_per_weight"] < stored + 0.05  # the signs of the online transforms
    for row in rows[1:]:
        assert row["disk_bytes"] < 0.4 * rows[0]["disk_bytes"]
        assert row["perplexity"] < 1.15 * rows[0]["perplexity"]
        assert row["quantize_seconds"] > 0 and row["decode"] > 0 and row["kernel"]
    shown = capfd.readouterr().out
    assert shown.count("identical") == 2
    card = (tmp_path / "out" / "rsq-4bit" / "README.md").read_text()
    assert f"{rows[2]['perplexity']:.2f}" in card and "RSQConfig" in card
    assert str(tmp_path) not in card and "base_model" not in card.split("---")[1]


def test_another_model_in_a_new_process_is_noticed(demo, small_lm, tmp_path):
    """The comparison of logits is a comparison: other weights in the folder make it fail."""
    import hfq
    from hfq.integrations import saving

    saved, other = small_lm.make(), small_lm.make()
    hfq.quantize(saved, hfq.RTNConfig(bits=4, group_size=64))
    hfq.quantize(other, hfq.RTNConfig(bits=3, group_size=64))
    saving.save(saved, tmp_path / "model")
    demo.check_reload(saved, tmp_path / "model", list(range(12)))
    with pytest.raises(HfqError, match="other logits"):
        demo.check_reload(other, tmp_path / "model", list(range(12)))


def test_only_earlier_results_are_replaced(demo, tmp_path):
    demo.check_output(tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        demo.check_output(tmp_path)


@pytest.mark.slow
def test_integers(small_lm, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "llm"))
    integers = script("integers")
    monkeypatch.setattr(integers.os, "cpu_count", lambda: 1)
    rows = integers.run(argparse.Namespace(
        model=str(small_lm.folder), data="demo", output=tmp_path / "out", samples=4, length=64, windows=4,
        new_tokens=4))
    assert [row["name"] for row in rows][1:] == ["8-bit weights and inputs", "the same, 4-bit cache", "integers only"]
    for row in rows[1:]:
        assert 8 <= row["bits_per_weight"] < 8.5 and row["decode"] > 0
        assert row["perplexity"] < 1.05 * rows[0]["perplexity"]
    assert rows[2]["perplexity"] != rows[1]["perplexity"], "without a cache, keys and values are rounded all the same"
    assert capfd.readouterr().out.count("identical") == 3
    assert "ILLMConfig" in (tmp_path / "out" / "integers" / "README.md").read_text()
