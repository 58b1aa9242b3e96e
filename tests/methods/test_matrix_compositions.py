"""Methods that carry one another: quantized, saved, and loaded in a new process, bit by bit the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfq
from hfq.errors import ConfigError
from hfq.evaluation.rescale import widen_channels
from hfq.layers import ChannelScale, attention
from hfq.layers.packed import PackedModule

COMMON: dict[str, Any] = {"calibration_samples": 8, "calibration_seqlen": 16, "progress": False}
# Few steps, large ones: what is learned differs from where it starts.
LEARNED: dict[str, Any] = {"bits": 4, "symmetric": False, "steps": 4, "batch_size": 4, "lr": 1e-2, "scale_lr": 3e-3}


def tiny() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1,
    )).eval()  # fmt: skip
    return widen_channels(model, [3, 20], 30.0)


def ids(rows: int = 8) -> torch.Tensor:
    return torch.randint(3, 128, (rows, 16), generator=torch.Generator().manual_seed(4))


def logits(model: Any) -> torch.Tensor:
    """Every key and value that is stored is rounded: there is no cache object."""
    with torch.no_grad():
        return model(ids(2), use_cache=False).logits


def ostquant_with_kvquant() -> Any:
    cache = hfq.KVQuantConfig(kv_bits=4, outliers=0.05)
    return hfq.OSTQuantConfig(**COMMON, activation_bits=4, steps=2, batch_size=4, kv_cache=cache)


def cbq_on_crossquant(**more: Any) -> Any:
    return hfq.CrossQuantConfig(**COMMON, activation_bits=8, backend=hfq.CBQConfig(**LEARNED), **more)


def everything() -> Any:
    return cbq_on_crossquant(fold=False, kv_cache=hfq.KVQuantConfig(kv_bits=3))


MADE = {"ostquant with kvquant": ostquant_with_kvquant, "cbq on crossquant": cbq_on_crossquant,
        "cbq on crossquant with kvquant": everything}  # fmt: skip


def test_compositions_load_bit_exactly_in_a_new_process(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {}
    plain = logits(tiny())
    for name, make in MADE.items():
        model = tiny()
        report = hfq.quantize(model, make(), ids())
        assert len([row for row in report.packed if row.kind == "linear"]) == 14
        assert 1e-3 < (logits(model) - plain).norm() / plain.norm() < 0.7
        model.save_pretrained(tmp_path / name)
        wanted[name] = logits(model).tolist()
        wanted[f"{name}, generated"] = _generated(model)
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "ids, found = torch.tensor(json.loads(sys.argv[2])), {}\n"
        "for name in sys.argv[4:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(f'{sys.argv[3]}/{name}')\n"
        "    with torch.no_grad():\n"
        "        found[name] = model(ids, use_cache=False).logits.tolist()\n"
        "        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)\n"
        "    found[f'{name}, generated'] = tokens.tolist()\n"
        "assert not {'hfq.calibration.walk', 'hfq.rounding.lowrank', 'hfq.training.loop'} & set(sys.modules)\n"
        "print(json.dumps(found))\n"
    )
    threads, tokens = str(torch.get_num_threads()), json.dumps(ids(2).tolist())
    command = [sys.executable, "-P", "-c", script, threads, tokens, str(tmp_path), *MADE]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def _generated(model: Any) -> Any:
    with torch.no_grad():
        return model.generate(ids(2), max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()


def test_each_part_of_a_composition_does_its_share(tmp_path: Path) -> None:
    model, config = tiny(), everything()
    report = hfq.quantize(model, config, ids())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    assert len(layers) == 14 and all(isinstance(layer.online, ChannelScale) for layer in layers.values())
    assert all(layer.activation.bits == 8 and layer.activation.factor for layer in layers.values())
    assert all(part.kv.form.key.bits == 3 for part in attention.parts(model).values())
    for name in layers:  # both methods left their marks in one row
        extra = report.rows[name].extra
        assert extra["alpha"] == 0.15 and extra["moved_share"] > 0 and extra["zero_share"] < 0.2
    # Without the division the same learning ends elsewhere, and with it the stored numbers are others.
    alone = tiny()
    hfq.quantize(alone, hfq.CBQConfig(**COMMON, **LEARNED, activation_bits=8), ids())
    ratio = [float((alone.get_submodule(n).weight - layer.weight).norm() / layer.weight.norm())
             for n, layer in layers.items()]  # fmt: skip
    assert min(ratio) > 0.02
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config
    assert saved.backend["method"] == "cbq" and saved.backend["steps"] == 4 and saved.bits == 4
    assert saved.kv_cache["kv_bits"] == 3 and saved.to_dict() == config.to_dict()


@pytest.mark.parametrize("fold", [True, False])
def test_a_stopped_backend_goes_on_to_the_same_bytes(
    fold: bool, tmp_path: Path
) -> None:
    whole = tiny()
    hfq.quantize(whole, cbq_on_crossquant(fold=fold), ids())
    with killed(after=9):  # in the second block
        hfq.quantize(tiny(), cbq_on_crossquant(fold=fold, work_dir=tmp_path), ids())
    model = tiny()
    report = hfq.quantize(model, cbq_on_crossquant(fold=fold, work_dir=tmp_path), ids())
    ours, theirs = model.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(row.extra["alpha"] == 0.15 for row in report.packed)


@pytest.mark.parametrize("options, words", [
    ({"backend": {"method": "gptq"}}, "gptq does not quantize activations"),
    ({"backend": {"method": "cbq"}, "mode": "dynamic"}, "mode='dynamic' and backend='cbq'"),
    ({"backend": {"method": "cbq"}, "token_scale": "paper"}, "token_scale='paper'"),
    ({"backend": {"method": "cbq"}, "solver": "gptq"}, "solver='gptq' and backend='cbq'"),
    ({"backend": {"method": "cbq", "stepz": 3}}, "unknown field 'stepz' of CBQConfig"),
    ({"backend": {"method": "crossquant"}}, "its own backend"), ({"backend": "cbq"}, "backend='cbq'"),
    ({"backend": {"method": "cbq", "bits": 4}, "bits": 8}, "bits=8 here and 4 in the backend"),
])  # fmt: skip
def test_backends_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hfq.CrossQuantConfig(**options)
