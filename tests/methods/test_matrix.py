"""What every method owes its users, one row a method. A method's own file holds its special properties."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfq
from hfq import kernels
from hfq.calibration.step import Step
from hfq.errors import ConfigError
from hfq.layers import swap
from hfq.layers.packed import PackedModule


@dataclass(frozen=True)
class Row:
    """A method with options that make it quick on a toy model.

    ``better`` are the options with which it is compared with rounding to nearest on a trained model, at 3 bits or at
    those given.
    """

    slug: str
    options: dict[str, Any] = field(default_factory=dict)
    better: dict[str, Any] = field(default_factory=dict)


ROWS = {
    row.slug: row
    for row in (
        Row("rtn"),
        Row("gptq"),
        Row("affinequant", {"epochs": 2, "batch_size": 4, "ln_matrix": False, "shift": False},
            {"bits": 2, "epochs": 4, "batch_size": 4, "ln_matrix": False, "shift": False}),
        Row("ostquant", {"steps": 2, "batch_size": 4, "symmetric": False},
            {"steps": 4, "micro_batch": 8, "symmetric": False, "train_weights": False}),
        Row("crossquant", {}, {"bits": 2, "solver": "gptq", "symmetric": False, "clip": "mse"}),
        Row("rsq", {"symmetric": False}, {"symmetric": False, "r_min": 0.1}),
        Row("flexround", {"steps": 6, "lr": 5e-3, "batch_size": 4}, {"steps": 40, "lr": 5e-3, "batch_size": 8}),
        Row("cbq", {"steps": 4, "batch_size": 4, "lr": 1e-2, "scale_lr": 1e-3},
            {"bits": 2, "steps": 24, "batch_size": 4, "lr": 1e-2, "scale_lr": 1e-3, "straight": True,
             "rounding": "full"}),
        Row("layerwise_quant", {"target_bits": 3.0, "backend": {"method": "rtn"}},
            {"target_bits": 3.0, "backend": {"method": "gptq"}}),
    )
}
CALIBRATED = [slug for slug in ROWS if slug != "rtn"]
# Without layers that stay float or can be packed one by one: their own files hold these checks in another form.
INTEGER_ONLY = {"i_llm"}
# Has nothing to do for a language model, and says so; its own file holds these checks for convolutions.
CONVOLUTIONAL = {"cfws"}
# Made for images: their rows are in test_matrix_vision.py, or in a method's own file.
VISION = {"repquant", "noisyquant", "aphq_vit", "lrp_qvit", "mptq_vit", "adaquant"}
# Made for diffusion models: their rows are in test_matrix_diffusion.py, or these checks are in a method's own file
# (transformers only; a text with a first token).
DIFFUSION = {"q_diffusion", "mixdq", "vidit_q", "dgq", "efficientdm", "quest", "qvgen"}
# Leaves weights alone; every method can carry it.
CACHES = {"kvquant"}
COMMON = {"group_size": 32, "calibration_samples": 12, "calibration_seqlen": 16, "progress": False}


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def ids(samples: int = 12) -> torch.Tensor:
    return torch.randint(0, 128, (samples, 16), generator=torch.Generator().manual_seed(3))


def config_of(slug: str, **more: Any) -> Any:
    return hfq.HfqConfig(method=slug, **{**COMMON, **ROWS[slug].options, **more})


def quantized(slug: str, **more: Any) -> tuple[Any, Any]:
    model, config = tiny(), config_of(slug, **more)
    return model, hfq.quantize(model, config, ids() if config.needs_calibration else None)


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(2)).logits


def test_every_available_method_has_a_row() -> None:
    available = {slug for slug, method in hfq.methods().items() if method.available}
    assert set(ROWS) | INTEGER_ONLY | CACHES | CONVOLUTIONAL | VISION | DIFFUSION == available


@pytest.mark.parametrize("slug", ROWS)
def test_sixteen_bits_change_nothing(slug: str) -> None:
    before = logits(tiny())
    model, report = quantized(slug, bits=16, overrides={"*": {"bits": 16}})
    assert not report.packed and not [m for m in model.modules() if isinstance(m, PackedModule)]
    assert (logits(model) - before).norm() <= 1e-4 * before.norm()


@pytest.mark.parametrize("slug", ROWS)
def test_the_report_is_complete(slug: str) -> None:
    model, report = quantized(slug)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    assert {row.module for row in report.packed} == set(packed) and len(packed) == 14
    for row in report.packed:
        layer = packed[row.module]
        stored = sum(t.nbytes for name, t in layer.state_dict().items() if name != "bias")
        assert row.bits == pytest.approx(8 * stored / row.numel) and row.numel == layer.in_features * layer.out_features
        assert row.error is not None and 0 < row.error < 1 and row.kernel == swap.kernel_of(layer) != "reference"
        assert row.tokens == ids().numel() or not config_of(slug).needs_calibration or slug == "layerwise_quant"
    assert report.rows["lm_head"].status == "float" and report.rows["lm_head"].reason
    assert {"seconds", "peak_memory_bytes", "bits_per_weight", "packed_bytes", "seed", "versions"} <= set(report.totals)
    assert report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()
    assert model.hfq_report is report


@pytest.mark.parametrize("slug", ROWS)
def test_skip_patterns_and_overrides(slug: str) -> None:
    model, report = quantized(slug, modules_to_not_convert=["*.down_proj", "model.layers.0.self_attn.q_proj"])
    left = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {f"model.layers.{i}.mlp.down_proj" for i in range(2)} | {"model.layers.0.self_attn.q_proj", "lm_head"}
    assert left == wanted and all(report.rows[name].status == "float" for name in wanted)
    model, _ = quantized(slug, overrides={"*.v_proj": {"bits": 8, "group_size": 16}})
    spec = model.model.layers[1].self_attn.v_proj.spec
    assert (spec.bits, spec.group_size) == (8, 16) and model.model.layers[1].self_attn.k_proj.spec.group_size == 32


@pytest.mark.parametrize("slug", ROWS)
def test_wrong_options_are_named(slug: str) -> None:
    supported = [name for name in ("activation_bits", "kv_bits") if getattr(config_of(slug), f"supports_{name}")]
    for wrong in ({"bitz": 4}, {"bits": 9}, {"bits": "4"}, {"group_size": -2}, {"activation_bits": 8}, {"kv_bits": 4}):
        if next(iter(wrong)) in supported:
            wrong = {next(iter(wrong)): 9}
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            config_of(slug, **wrong)
    with pytest.raises(ConfigError, match="group_size=4096 fits no layer"):
        quantized(slug, group_size=4096)


@pytest.mark.parametrize("slug", ROWS)
def test_same_seed_same_bytes(slug: str) -> None:
    assert digest(quantized(slug)[0]) == digest(quantized(slug)[0])


@pytest.mark.parametrize("slug", ROWS)
def test_the_fast_kernel_computes_what_the_reference_does(slug: str) -> None:
    model, _ = quantized(slug)
    fast = logits(model)
    with kernels.use(wna16="reference", wnan="reference"):
        exact = logits(model)
    assert 0 < (fast - exact).norm() <= 2e-2 * exact.norm()  # 16-bit products in fourteen layers
    assert (exact - logits(tiny())).norm() > 5 * (fast - exact).norm()


@pytest.mark.parametrize("slug", ROWS)
def test_any_method_carries_a_cache(slug: str, tmp_path: Path) -> None:
    model, config = tiny(), config_of(slug, kv_cache={"kv_bits": 3, "outliers": 0.05})
    report = hfq.quantize(model, config, ids())
    assert {row.module for row in report.packed if row.kind == "cache"} == {
        f"model.layers.{i}.self_attn.hfq_attention" for i in range(2)}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        found, wanted = (m(ids(2), use_cache=False).logits for m in (loaded, model))
        assert torch.equal(found, wanted)
        part = model.model.layers[0].self_attn._modules.pop("hfq_attention")
        assert not torch.equal(model(ids(2), use_cache=False).logits, wanted)  # the cache rounds
        model.model.layers[0].self_attn.add_module("hfq_attention", part)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids(2), **options), model.generate(ids(2), **options))


@pytest.mark.parametrize("slug", CALIBRATED)
def test_stopped_and_resumed_is_uninterrupted(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(quantized(slug)[0])
    if slug == "layerwise_quant":
        backend = {"backend": {"method": "gptq"}}  # its own work is done before the walk of the backend
        whole = digest(quantized(slug, **backend)[0])
    else:
        backend = {}
    own, seen = Step.swap, []
    with killed(after=9):  # in the second block
        quantized(slug, work_dir=tmp_path, **backend)
    monkeypatch.setattr(Step, "swap", lambda self, site, *a, **k: seen.append(site) or own(self, site, *a, **k))
    model, report = quantized(slug, work_dir=tmp_path, **backend)
    assert len(seen) == 7  # the first block was not done again
    assert digest(model) == whole and len(report.packed) == 14


def test_saved_models_load_bit_exactly_in_a_new_process(tmp_path: Path) -> None:
    wanted = {}
    for slug in ROWS:
        model, _ = quantized(slug)
        model.save_pretrained(tmp_path / slug)
        wanted[slug] = logits(model).tolist()
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / slug)), logits(model))
    torch.save(ids(2), tmp_path / "ids.pt")
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "ids = torch.load(sys.argv[1] + '/ids.pt')\n"
        "load = AutoModelForCausalLM.from_pretrained\n"
        "with torch.no_grad():\n"
        "    found = {m: load(sys.argv[1] + '/' + m)(ids).logits.tolist() for m in sys.argv[3:]}\n"
        "engine = {'hfq.calibration.walk', 'hfq.rounding.nearest', 'hfq.reconstruction.columns'}\n"
        "assert not engine & set(sys.modules), 'loading needs no method and no calibration code'\n"
        "print(json.dumps(found))\n"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path), str(torch.get_num_threads()), *ROWS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


@pytest.mark.parametrize("slug", CALIBRATED)
def test_better_than_rounding_to_nearest(slug: str, small_lm: Any) -> None:
    from hfq.evaluation.perplexity import perplexity

    windows, data = small_lm.windows(10), torch.tensor(small_lm.windows(16, part="train", seed=0))
    common = {"bits": 3, "group_size": 64, "progress": False, "calibration_samples": 16, "calibration_seqlen": 128}
    results = []
    # Layer-wise quantization is compared at the same mean width: half of the blocks at 4 bits, half at 2.
    nearest = hfq.RTNConfig(bits=ROWS[slug].better.get("bits", 3), group_size=64, progress=False)
    for config in (nearest, hfq.HfqConfig(method=slug, **{**common, **ROWS[slug].better})):
        model = small_lm.make()
        report = hfq.quantize(model, config, data if config.needs_calibration else None)
        results.append((perplexity(model, windows), report.bits_per_weight()))
    (base, base_bits), (ours, our_bits) = results
    assert ours < base and our_bits <= base_bits + 0.05, results
