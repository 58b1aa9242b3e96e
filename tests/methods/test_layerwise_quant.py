"""Layer-wise quantization: the numbered properties of its specification."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfq
from hfq.allocation import greedy
from hfq.allocation.sensitivity import InputModification, input_modifications, zscore_share
from hfq.config import HfqConfig
from hfq.errors import ConfigError
from hfq.evaluation.perplexity import perplexity
from hfq.methods.gptq import GPTQConfig
from hfq.methods.layerwise_quant import LayerwiseQuantConfig
from hfq.methods.rsq import RSQConfig
from hfq.methods.rtn import RTNConfig

COMMON: dict[str, Any] = {"group_size": 32, "calibration_samples": 8, "calibration_seqlen": 24, "progress": False}
BLOCKS = 5


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for i, layer in enumerate(model.model.layers):  # blocks that turn their input more and more
        for parameter in layer.parameters():
            parameter.data *= 1 + i if parameter.ndim == 2 else 1
    return model


def ids(samples: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(1))


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("qweight", "scale", "zero_point"))}


def run(config: HfqConfig, data: Any = None) -> tuple[Any, Any]:
    model = tiny()
    return model, hfq.quantize(model, config, ids() if data is None else data)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.must_hold("layerwise_quant", 1, 10)
@pytest.mark.parametrize("backend", ["rtn", "gptq"])
def test_uniform_targets_are_the_backend_alone(backend: str) -> None:
    for bits in (4, 2):
        model, report = run(LayerwiseQuantConfig(backend={"method": backend}, target_bits=float(bits), **COMMON))
        alone, _ = run(HfqConfig(method=backend, bits=bits, **COMMON))
        assert same(packed(model), packed(alone))
        assert report.totals["average_bits"]["nominal"] == bits


@pytest.mark.must_hold("layerwise_quant", 2)
def test_forty_equal_blocks_at_three_and_a_half_bits() -> None:
    names = [f"model.layers.{i}" for i in range(40)]
    draw = random.Random(0)
    importance = {name: draw.random() for name in names}
    chosen = greedy.walk(importance, {name: {2: 2e6, 4: 4e6} for name in names}, (4, 2), 3.5 * 40e6)
    assert sorted(chosen.values()) == [2] * 10 + [4] * 30
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=40, num_attention_heads=2, vocab_size=8)
        )
    from hfq.methods import layerwise_quant as method

    config = LayerwiseQuantConfig(backend={"method": "rtn"}, target_bits=3.5)
    blocks = [block for block in config.plan(model).blocks if block.sites]
    from hfq.report import Report

    assert list(method._allocate(blocks, importance, config, Report()).values()) == list(chosen.values())


@pytest.mark.must_hold("layerwise_quant", 3)
@pytest.mark.parametrize("metadata", [False, True])
def test_the_target_is_never_exceeded_and_only_promotes(metadata: bool) -> None:
    from hfq.methods import layerwise_quant as method
    from hfq.report import Report

    model = tiny()
    draw, before = random.Random(0), {}
    importance = {f"model.layers.{i}": draw.random() for i in range(BLOCKS)}
    extra = (16 + 8) / 32 if metadata else 0  # scale and zero point of 32 weights
    for step in range(41):
        target = 2 + extra + step / 20
        config = LayerwiseQuantConfig(
            backend={"method": "rtn"}, target_bits=target, count_metadata=metadata, mid_bits=3, group_size=32
        )
        blocks = [block for block in config.plan(model).blocks if block.sites]
        chosen = method._allocate(blocks, importance, config, Report())
        assert sum(chosen.values()) / BLOCKS + extra <= target + 1e-6
        assert all(chosen[name] >= before.get(name, 0) for name in chosen)
        before = chosen
    assert set(before.values()) == {4}


@pytest.mark.must_hold("layerwise_quant", 4)
def test_modification_is_minus_one_for_a_silent_block_and_invariant_to_scale() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    plan = LayerwiseQuantConfig(target_bits=3.0).plan(model)
    scores = input_modifications(plan, [{"input_ids": ids()}])
    assert scores["model.layers.2"] == pytest.approx(-1, abs=1e-6)
    assert greedy.ranking(scores)[-1] == "model.layers.2"
    assert all(-1 - 1e-6 <= value <= 1 + 1e-6 for value in scores.values())
    measure = [InputModification(), InputModification()]
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    measure[0].update(x, y)
    measure[1].update(30 * x, 0.2 * y)
    assert measure[0].value == pytest.approx(measure[1].value, abs=1e-6)


@pytest.mark.must_hold("layerwise_quant", 5)
def test_share_of_large_weights() -> None:
    w = [torch.randn(400, 300), torch.randn(300, 500)]
    assert zscore_share(w) == pytest.approx(0.1587, rel=0.02)
    assert zscore_share(w, two_sided=True) == pytest.approx(0.3173, rel=0.02)
    assert zscore_share([1e-3 * x for x in w]) == pytest.approx(zscore_share(w), abs=1e-4)


@pytest.mark.must_hold("layerwise_quant", 6)
def test_the_weight_score_needs_no_forward_pass() -> None:
    model = tiny()

    def no_forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run")

    model.forward = model.model.forward = no_forward
    config = LayerwiseQuantConfig(backend={"method": "rtn"}, score="zd", target_bits=3.0, **COMMON)
    assert not config.needs_calibration
    report = hfq.quantize(model, config)
    assert len(config.scores["values"]) == BLOCKS
    assert sorted(config.bit_map.values()) == [2, 2, 2, 4, 4]
    assert report.totals["average_bits"]["nominal"] == pytest.approx(2.8)
    assert LayerwiseQuantConfig(score="zd", target_bits=3.0).needs_calibration  # GPTQ does
    # One block at a time: nothing but the block in hand is materialised.
    held: list[nn.Module] = []

    class Placed:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

        def __enter__(self) -> None:
            held.append(self.module)
            assert len(held) == 1

        def __exit__(self, *_: Any) -> None:
            held.pop()

    from hfq.allocation.sensitivity import zscore_shares

    blocks = [block for block in config.plan(tiny()).blocks if block.sites]
    assert zscore_shares(blocks, Placed) == config.scores["values"]


@pytest.mark.must_hold("layerwise_quant", 7)
@pytest.mark.parametrize("reduce", ["token", "flatten"])
def test_padding_does_not_change_the_modification(reduce: str) -> None:
    plan = LayerwiseQuantConfig(target_bits=3.0).plan(tiny())
    data = ids(4, 12)
    padded = torch.cat([data, torch.full((4, 5), 7)], 1)
    mask = torch.cat([torch.ones(4, 12), torch.zeros(4, 5)], 1).long()
    plain = input_modifications(plan, [{"input_ids": data}], reduce=reduce)
    with_mask = input_modifications(plan, [{"input_ids": padded, "attention_mask": mask}], reduce=reduce)
    without = input_modifications(plan, [{"input_ids": padded}], reduce=reduce)
    assert with_mask == pytest.approx(plain, abs=1e-5)
    assert without != pytest.approx(plain, abs=1e-5)


@pytest.mark.must_hold("layerwise_quant", 8)
def test_save_and_reload_without_data(tmp_path: Path) -> None:
    config = LayerwiseQuantConfig(backend={"method": "gptq", "percdamp": 0.02}, target_bits=3.0, **COMMON)
    model, _ = run(config)
    with torch.no_grad():
        expected = model(ids(2)).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(2)).logits, expected)
    saved = again.config.quantization_config
    assert isinstance(saved, LayerwiseQuantConfig)
    assert saved.bit_map == config.bit_map and saved.scores == config.scores
    assert saved.average_bits == config.average_bits
    assert saved.backend == {"method": "gptq", "percdamp": 0.02}
    widths = {name.split(".mlp")[0].split(".self_attn")[0]: entry for name, entry in _widths(again).items()}
    assert widths == config.bit_map


def _widths(model: Any) -> dict[str, int]:
    from hfq.layers.packed import PackedModule

    return {name: module.spec.bits for name, module in model.named_modules() if isinstance(module, PackedModule)}


@pytest.mark.must_hold("layerwise_quant", 9)
@pytest.mark.slow
def test_order_matters_on_a_language_model(small_lm: Any) -> None:
    test = small_lm.windows(12)
    data = [{"input_ids": torch.tensor(w)} for w in small_lm.windows(8, part="train", seed=0)]
    names = [f"model.layers.{i}" for i in range(4)]

    def quality(**options: Any) -> float:
        model = small_lm.make()
        config = LayerwiseQuantConfig(
            backend={"method": "rtn"}, target_bits=3.0, group_size=64, calibration_seqlen=128, calibration_samples=8,
            progress=False, **options,
        )  # fmt: skip
        hfq.quantize(model, config, data)
        assert sorted(config.bit_map.values()) == [2, 2, 4, 4]
        if options.get("score") == "lim":
            reverse.update({name: -value for name, value in config.scores["values"].items()})
        return perplexity(model, test, batch_size=12)

    reverse: dict[str, float] = {}
    by_modification, by_weights = quality(score="lim"), quality(score="zd")
    draw = random.Random(0)
    orders = [{name: draw.random() for name in names} for _ in range(5)]
    mean = sum(quality(importance=order) for order in orders) / 5
    backwards = quality(importance=reverse)
    assert by_modification <= mean and by_modification < backwards
    assert by_weights <= mean and by_weights < backwards


@pytest.mark.must_hold("layerwise_quant", 11)
def test_impossible_configs_are_refused_before_anything_starts() -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            LayerwiseQuantConfig(**options)

    refused("high_bits=9", high_bits=9, target_bits=3.0)
    refused("exactly one")
    refused("exactly one", target_bits=3.0, num_low_layers=2)
    refused("each has to be below", high_bits=2, low_bits=4, target_bits=3.0)
    refused("each has to be below", high_bits=4, low_bits=2, mid_bits=4, target_bits=3.0)
    refused("at least low_bits=2", target_bits=1.5)
    refused("its own backend", backend={"method": "layerwise_quant"}, target_bits=3.0)
    refused("unknown field 'percdump'", backend={"method": "gptq", "percdump": 1}, target_bits=3.0)
    refused("'nothing'", backend={"method": "nothing"}, target_bits=3.0)
    refused("with 'method'", backend="gptq", target_bits=3.0)
    refused("say it once", backend=GPTQConfig(group_size=64), group_size=32, target_bits=3.0)
    refused("static_groups", backend={"method": "gptq", "act_order": True}, group_size=64, target_bits=3.0)
    refused("activation_bits", backend={"method": "rtn"}, activation_bits=8, target_bits=3.0)


class _Narrow(RTNConfig):
    """A backend with only two widths."""

    def check(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"bits={self.bits}: this backend has 4 and 8")


@pytest.mark.must_hold("layerwise_quant", 11)
def test_a_width_that_the_backend_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfq import methods

    monkeypatch.setattr(methods, "config_class", lambda slug: _Narrow)
    LayerwiseQuantConfig(backend={"method": "rtn"}, high_bits=8, low_bits=4, target_bits=6.0)
    with pytest.raises(ConfigError, match="bits=2: this backend"):
        LayerwiseQuantConfig(backend={"method": "rtn"}, high_bits=4, low_bits=2, target_bits=3.0)


def test_direction_of_both_scores() -> None:
    """Later blocks turn their input more; one block gets heavy tails on one side."""
    model = tiny()
    for layer in model.model.layers:
        for p in layer.parameters():
            if p.ndim == 2:
                p.data = torch.randn_like(p) * 0.02
    heavy = model.model.layers[3]
    heavy.mlp.up_proj.weight.data[:, :10] = 1.0  # few huge weights: a small share is above the mean by a deviation
    by_weights = LayerwiseQuantConfig(backend={"method": "rtn"}, score="zd", num_low_layers=4, **COMMON)
    hfq.quantize(model, by_weights)
    assert by_weights.bit_map["model.layers.3"] == 4
    by_modification = LayerwiseQuantConfig(backend={"method": "rtn"}, num_low_layers=2, **COMMON)
    run(by_modification)
    order = greedy.ranking(by_modification.scores["values"])
    assert [by_modification.bit_map[name] for name in order] == [4, 4, 4, 2, 2]


def test_counts_and_shares_of_low_blocks() -> None:
    for options, low in (({"num_low_layers": 2}, 2), ({"fraction_low": 0.4}, 2), ({"fraction_low": 0.0}, 0)):
        config = LayerwiseQuantConfig(backend={"method": "rtn"}, **options, **COMMON)
        run(config)
        assert sum(bits == 2 for bits in config.bit_map.values()) == low
    with pytest.raises(ConfigError, match="num_low_layers=9"):
        run(LayerwiseQuantConfig(backend={"method": "rtn"}, num_low_layers=9, **COMMON))


def test_a_given_map_and_overrides() -> None:
    chosen = {f"model.layers.{i}": 3 + i % 2 for i in range(BLOCKS)}
    config = LayerwiseQuantConfig(
        backend={"method": "rtn"}, bit_map=chosen, overrides={"model.layers.0.mlp.*": {"bits": 8}}, **COMMON
    )
    assert not config.needs_calibration
    model = tiny()
    hfq.quantize(model, config)
    widths = _widths(model)
    assert widths["model.layers.0.mlp.up_proj"] == 8 and widths["model.layers.0.self_attn.q_proj"] == 3
    assert widths["model.layers.1.mlp.up_proj"] == 4
    with pytest.raises(ConfigError, match=r"layers\.4"):
        hfq.quantize(tiny(), LayerwiseQuantConfig(bit_map={k: 4 for k in list(chosen)[:4]}, backend={"method": "rtn"}))


def test_low_averages_are_noted_and_the_average_is_stored() -> None:
    _, report = run(LayerwiseQuantConfig(backend={"method": "rtn"}, target_bits=2.2, **COMMON))
    assert any("2.5 bits" in note for note in report.notes)
    totals = report.totals["average_bits"]
    assert totals["nominal"] == 2.0
    assert totals["stored"] == pytest.approx(report.bits_per_weight(), rel=1e-6)


def test_a_config_as_backend() -> None:
    config = LayerwiseQuantConfig(backend=GPTQConfig(group_size=32, percdamp=0.05, symmetric=True), target_bits=3.0)
    assert (config.group_size, config.symmetric) == (32, True)
    assert config.backend == {"method": "gptq", "percdamp": 0.05}
    again = HfqConfig.from_dict(config.to_dict())
    assert isinstance(again, LayerwiseQuantConfig) and again.backend == config.backend
    assert again.backend_config({}).percdamp == 0.05


@pytest.mark.parametrize("form", ["dict", "config"])
def test_what_nobody_says_is_the_backends_default(form: str) -> None:
    """RSQ is symmetric by default: with a uniform map it gives the same codes inside as alone."""
    small = {name: value for name, value in COMMON.items() if name != "group_size"}
    backend = {"method": "rsq"} if form == "dict" else RSQConfig(**small)
    config = LayerwiseQuantConfig(backend=backend, target_bits=4.0, **(small if form == "dict" else {}))
    assert (config.symmetric, config.bits, config.calibration_samples) == (True, 3, 8)
    assert HfqConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    model, _ = run(config)
    alone, _ = run(RSQConfig(bits=4, **small))
    assert same(packed(model), packed(alone))
    here = LayerwiseQuantConfig(backend={"method": "rsq"}, target_bits=4.0, symmetric=False)
    assert here.backend_config().symmetric is False
    with pytest.raises(ConfigError, match="symmetric=False here and True"):
        LayerwiseQuantConfig(backend=RSQConfig(symmetric=True), target_bits=4.0, symmetric=False)


def test_one_config_for_two_models() -> None:
    """The map that a run filled in belongs to its model: another model gets its own."""
    config = LayerwiseQuantConfig(backend={"method": "rtn"}, score="zd", num_low_layers=1, **COMMON)
    maps = []
    for heavy in (1, 3):
        model = tiny()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.up_proj.weight, std=1.0)
        torch.nn.init.uniform_(model.model.layers[heavy].mlp.up_proj.weight, -9.0, 9.0)  # many above one deviation
        hfq.quantize(model, config)
        maps.append(dict(config.bit_map))
    assert [min(one, key=one.get) for one in maps] == ["model.layers.1", "model.layers.3"]
    again = HfqConfig.from_dict(config.to_dict())  # one that was read back is kept
    assert not again.needs_calibration and again.fixed
