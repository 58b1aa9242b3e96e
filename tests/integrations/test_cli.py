"""The command line: every command on a tiny saved model, and errors as one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hfq
from hfq.integrations.cli.app import app
from hfq.integrations.cli.quantize import grid_of, options_of
from hfq.integrations.cli.table import markdown
from hfq.methods import METHODS

TEXT = "\n\n".join(f"Article {i}. The {w} is near the {w} of the town, and the river is {i} miles long."
                   for i, w in enumerate(["bridge", "tower", "market", "church", "school"] * 60))


def run(*args: object, status: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "NO_COLOR": "1"})
    shown = result.output + result.stderr
    assert result.exit_code == status, f"{shown}\n{result.exception!r}"
    return result


def failed(*args: object) -> str:
    """The one line of an expected error."""
    result = run(*args, status=1)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny float model with a tokenizer, and a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cli")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def packed(files):
    run("quantize", files / "float", "--method", "rtn", "-b", 4, "-g", 32, "-o", files / "rtn")
    return files / "rtn"


def test_help_has_examples():
    for command in ("quantize", "eval", "compare", "explain", "card", "push", "methods"):
        assert f"hfq {command}" in run(command, "--help").output.partition("Usage")[2].partition("\n")[2]
    for command in ("kernels", "methods", "speed"):
        usage, _, rest = run("bench", command, "--help").output.partition("Usage")[2].partition("\n")
        assert f"hfq bench {command} " in rest, usage


def test_methods():
    output = run("methods").output
    for method in METHODS.values():
        assert (method.config in output) == method.available
    table = run("methods", "--markdown").output
    assert all(f"| `{slug}` |" in table for slug in METHODS)


def test_the_readme_has_this_table():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    table = text.partition("<!-- methods: begin -->")[2].partition("<!-- methods: end -->")[0].strip()
    assert table == markdown(), "write the output of `hfq methods --markdown` into README.md"


def test_version():
    assert run("--version").output.strip() == f"hfq {hfq.__version__}"


def test_quantize(packed):
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "hfq_report.json"} <= {
        path.name for path in packed.iterdir()
    }
    saved = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (saved["method"], saved["bits"], saved["group_size"]) == ("rtn", 4, 32)
    assert "base_model" not in (packed / "README.md").read_text().split("---")[1]  # a folder is no Hub id


def test_quantize_with_data_is_what_python_does(files, tmp_path):
    from transformers import AutoModelForCausalLM

    from hfq.integrations.measure import load_tokenizer

    run("quantize", files / "float", "-m", "gptq", "-b", 3, "-g", 32, "-d", files / "text.txt", "--samples", 4,
        "--seqlen", 32, "-o", tmp_path / "out", "--set", "act_order=true", "--set", "static_groups=true")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert saved["act_order"] is True and saved["bits"] == 3
    assert not list(tmp_path.glob(".out*")), "the progress of a finished run is left behind"
    model = AutoModelForCausalLM.from_pretrained(files / "float")
    config = hfq.GPTQConfig(bits=3, group_size=32, act_order=True, static_groups=True, calibration_samples=4,
                            calibration_seqlen=32, processor=load_tokenizer(files / "float"))
    hfq.quantize(model, config, str(files / "text.txt"))
    ids = torch.arange(16)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_eval_keeps_numbers_for_the_card(files, packed):
    args = ("--data", files / "text.txt", "--windows", 4, "--length", 32)
    output = run("eval", packed, *args, "--reference", files / "float", "--speed", "--save").output
    rows = json.loads((packed / "hfq_results.json").read_text())["rows"]
    assert len(rows) == 2 and rows[1]["this"] and rows[0]["decode_ratio"] == 1
    assert 200 < rows[1]["perplexity"] < 400 and 0 < rows[1]["kl"] < 0.1
    assert f"{rows[1]['perplexity']:.2f}" in output
    run("card", packed, "--repo-id", "me/tiny")
    card = (packed / "README.md").read_text()
    assert f"{rows[1]['perplexity']:.2f}" in card and 'from_pretrained("me/tiny")' in card
    assert run("card", packed, "--repo-id", "me/tiny", "--show").output.strip() == card.strip()


def test_compare_and_plot(files, packed, tmp_path):
    args = ("--data", files / "text.txt", "--windows", 2, "--length", 32)
    output = run("compare", files / "float", packed, *args, "--plot", tmp_path / "plot.png").output
    assert "float" in output and "rtn" in output and "KL to float" in output
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_explain(packed):
    output = run("explain", packed).output
    assert "QLinear" in output and "64×64" in output and "lm_head: float" in output
    output = run("explain", packed, "--module", "model.layers.0.mlp.down_proj").output
    assert "→" in output


def test_bench_kernels(tmp_path):
    args = ("bench", "kernels", "--quick", "--only", "w4 M1 576x1536", "--rounds", 1, "--device", "cpu")
    assert "F.linear" in run(*args, "-o", tmp_path / "k.json").output
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert rows and all(row["ratio"] > 0 for row in rows)


def test_bench_speed_of_image_models(tmp_path):
    args = ("bench", "speed", "resnet:128x1", "--rows", "w8a8", "--batch", 2, "--rounds", 1, "-o", tmp_path / "s.json")
    run(*args)
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "weights and inputs of 8 bits"]
    assert rows[0]["speed_ratio"] == 1 and rows[1]["speed_ratio"] > 0 and rows[1]["kernel"]
    assert "dequant" not in rows[1]["kernel"]
    assert all(0 < sum(row["shares"].values()) <= 1 for row in rows) and "qconv" in " ".join(rows[1]["shares"])


def test_bench_speed(tmp_path):
    args = ("bench", "speed", "random:256x1", "--rows", "w8a8,kv4", "--prompt", 16, "--context", 40, "--new-tokens", 2,
            "--rounds", 1)
    shown = run(*args, "-o", tmp_path / "rows.json").output
    assert "weights and inputs of 8 bits" in shown and "decode after 40" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["decode_ratio"] for row in rows][0] == 1 and len(rows) == 3
    assert 8 <= rows[1]["bits_per_weight"] < 8.2 and 4 <= rows[2]["cache_bits"] < 5


def test_bench_methods(files, tmp_path):
    args = ("bench", "methods", files / "float", "--methods", "rtn", "--bits", "4", "-g", 32, "--data",
            files / "text.txt", "--windows", 2, "--seqlen", 32, "-o", tmp_path / "m.json")
    assert "rtn, 4 bits" in run(*args).output
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "rtn, 4 bits"] and rows[1]["bits_per_weight"] > 4


@pytest.mark.parametrize(("pairs", "expected"), [
    (["a=1"], {"a": 1}), (["a=true", "b=False"], {"a": True, "b": False}), (["a-b=x=y"], {"a_b": "x=y"}),
    (['a={"p": {"bits": 8}}'], {"a": {"p": {"bits": 8}}}), (["a=mse"], {"a": "mse"}), (["a=None"], {"a": None}),
])
def test_set(pairs, expected):
    assert options_of(pairs) == expected


def test_defaults_are_for_methods_that_have_them():
    assert grid_of(hfq.RTNConfig, bits=None, group_size=None) == {"bits": 4, "group_size": 64}
    assert grid_of(hfq.RTNConfig, bits=3, group_size=-1) == {"bits": 3, "group_size": -1}
    assert grid_of(hfq.KVQuantConfig, bits=None, group_size=None) == {}
    assert grid_of(hfq.CFWSConfig, bits=8, group_size=None) == {"bits": 8}


@pytest.mark.parametrize(("args", "match"), [
    (("--method", "nope"), "'nope' is not known"),
    (("--method", "rtn", "--bits", 9), "bits=9"),
    (("--method", "rtn", "--group-size", 4096), "group_size=4096 fits no layer"),
    (("--method", "rtn", "--set", "clp=mse"), "did you mean 'clip'"),
    (("--method", "rtn", "--set", "clip"), "write key=value"),
    (("--method", "rtn", "--set", "seed=1", "--set", "seed=2"), "given twice"),
    (("--method", "rtn", "--set", "activation_bits=9"), "activation_bits=9"),
    (("--method", "rtn", "--set", "activation_bits=8"), "needs calibration data"),
    (("--method", "gptq"), "needs calibration data: pass --data"),
    (("--method", "gptq", "--data", "missing.txt"), "missing.txt"),
])
def test_quantize_errors(files, tmp_path, args, match):
    out = tmp_path / "out"
    assert re.search(match, failed("quantize", files / "float", "-o", out, *args))
    assert not out.exists()


def test_output_is_never_overwritten_unasked(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    args = ("quantize", files / "float", "--method", "rtn", "-g", 32, "-o", out)
    assert "is not empty" in failed(*args)
    assert (out / "mine.txt").read_text() == "precious"
    run(*args, "--overwrite")
    assert (out / "config.json").exists() and not (out / "mine.txt").exists()


def test_unfinished_runs_are_not_lost(files, tmp_path):
    (tmp_path / ".out.progress").mkdir()
    (tmp_path / ".out.progress" / "block").write_text("hours of work")
    args = ("quantize", files / "float", "--method", "rtn", "-g", 32, "-o", tmp_path / "out")
    assert "continue it with --resume" in failed(*args)
    assert (tmp_path / ".out.progress" / "block").exists()


@pytest.mark.parametrize(("args", "match"), [
    (("eval", "{files}/nothing-here", "--data", "{files}/text.txt"), "no"),
    (("eval", "{files}", "--data", "{files}/text.txt"), "no"),
    (("explain", "{files}/float"), "no packed layers"),
    (("card", "{files}/float"), "no model packed by hfq"),
    (("card", "{files}"), "config.json"),
    (("compare", "{files}/float"), "at least two"),
    (("compare", "a", "b", "--plot", "x.bmp"), "end the name in .png"),
    (("bench", "kernels", "--quick", "--only", "w9"), "matches no row"),
    (("bench", "methods", "demo", "--table", "nope"), "are the tables"),
    (("bench", "speed", "random:100x1"), "multiple of 256"),
    (("bench", "speed", "random:256x1", "--rows", "w9"), "are the rows"),
    (("bench", "speed", "resnet:100x1"), "multiple of 128"),
    (("bench", "speed", "resnet:128x1", "--rows", "kv4"), "are the rows of such models"),
    (("eval", "{files}/float", "--data", "{files}/text.txt", "--length", "100000"), "windows of 100000 tokens"),
])
def test_other_errors(files, args, match):
    assert match in failed(*(arg.format(files=files) for arg in args))


def test_debug_shows_the_trace(files):
    result = CliRunner().invoke(app, ["card", str(files), "--debug"])
    assert result.exit_code == 1 and type(result.exception).__name__ == "CheckpointError"


def test_help_is_quick():
    code = """
import sys
sys.argv = ["hfq", "--help"]
from hfq.integrations.cli import main
try:
    main()
except SystemExit:
    print([m for m in ("torch", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", "help imports " + done.stdout.splitlines()[-1]
