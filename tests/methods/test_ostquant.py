"""OSTQuant: the numbered properties of its specification, and what its options do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfq
from hfq import graph
from hfq.errors import ConfigError, QuantizationError
from hfq.evaluation.agreement import agreement
from hfq.evaluation.space_utilisation import space_utilisation
from hfq.formats import ActivationSpec
from hfq.graph.proof import double_precision
from hfq.layers import attention
from hfq.layers.packed import PackedModule
from hfq.training import learn, loop
from hfq.training.distill import Distillation
from hfq.training.losses import top_divergence
from hfq.training.progress import Saved
from hfq.training.student import Student
from hfq.transforms import init
from hfq.transforms.learned import Sites
from hfq.transforms.manifold import ManifoldAdam, orthogonality_error, parameter_groups
from hfq.transforms.settle import settle
from hfq.transforms.sites import Rotation, Scale

COMMON = {"calibration_samples": 12, "calibration_seqlen": 16, "progress": False}
IDS = torch.randint(0, 128, (12, 16), generator=torch.Generator().manual_seed(3))


def tiny(tied: bool = True, **more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, **more,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2.0)
    return model


class Trial:
    """A model with random transforms and the student that computes with them."""

    def __init__(self, model: Any, sites: Sites | None = None, bits: int = 16) -> None:
        self.model, self.plan = model, graph.read(model)
        made = learn.prepare(model, self.plan, lambda: model(IDS[:1]), sites or Sites(start="random"))
        self.transforms, self.ends, self.pairs = made.transforms, made.ends, made.pairs
        inputs = {site.module: None if bits == 16 else ActivationSpec(bits) for site in self.plan.sites}
        blocks = [(block.name, block.module) for block in self.plan.blocks]
        self.student = Student(model, blocks, self.transforms, inputs=lambda: learn.quantized(model, inputs, {}))

    @torch.no_grad()
    def shaken(self) -> Trial:
        for module in self.transforms.transforms.values():
            if isinstance(module, Scale):
                module.values.uniform_(0.5, 2.0)
        return self

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        self.student.start()
        with self.student.running():
            return self.student({"input_ids": IDS})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.norm())


def quantized(model: Any, **more: Any) -> tuple[Any, Any]:
    config = hfq.OSTQuantConfig(**{**COMMON, "steps": 2, **more})
    return model, hfq.quantize(model, config, IDS)


@pytest.mark.must_hold("ostquant", 1)
def test_random_rotations_and_scales_keep_the_logits() -> None:
    model = tiny()
    wanted = logits(model)
    assert error(Trial(model).shaken().logits(), wanted) < 1e-4
    model = tiny().double()
    trial = Trial(model).shaken()
    with double_precision():
        wanted = model(IDS).logits
        assert error(trial.logits(), wanted) < 1e-8
        # A scale on one side only is no small thing.
        next(m for k, m in trial.transforms.transforms.items() if k.startswith("heads")).matrices[0, 0] *= 1.1
        assert error(trial.logits(), wanted) > 1e-4


@pytest.mark.must_hold("ostquant", 2)
def test_free_query_and_key_scales_are_no_equivalence() -> None:
    wanted = logits(tiny())
    for queries, holds in (("tied", True), ("free", False)):
        found = error(Trial(tiny(), Sites(queries=queries)).shaken().logits(), wanted)
        assert (found < 1e-4) == holds
    # Without rotary angles it would be one: this is what breaks it.
    still = tiny()
    still.model.rotary_emb.inv_freq.zero_()
    wanted = logits(still)
    assert error(Trial(still, Sites(queries="free")).shaken().logits(), wanted) < 1e-4


@pytest.mark.must_hold("ostquant", 3)
@pytest.mark.must_hold("ostquant", 7)
def test_training_stays_on_the_manifold_and_lowers_the_loss() -> None:
    trial = Trial(tiny(), Sites(), bits=3)
    rotations = [m for m in trial.transforms.transforms.values() if isinstance(m, Rotation)]
    signs = [torch.linalg.det(m.matrices.detach()).sign() for m in rotations]
    started = [m.matrices.detach().clone() for m in rotations]
    worst, smallest = [], []

    def look() -> None:
        trial.transforms.keep_positive()
        worst.append(max(orthogonality_error(m.matrices) for m in rotations))
        smallest.append(trial.transforms.smallest_scale())

    objective = Distillation(trial.student, lambda s, t: top_divergence(s, t, 50))
    adam = ManifoldAdam(parameter_groups(trial.transforms, rotation_lr=0.05, lr=0.005))
    batches = [{"input_ids": IDS}]
    before = objective.mean(batches)
    loop.fit(objective, adam, batches, steps=25, batch_size=12, micro_batch=12, after=look)
    assert objective.mean(batches) < 0.9 * before
    assert len(worst) == 25 and max(worst) < 1e-4 and min(smallest) > 1e-3
    assert all(torch.equal(torch.linalg.det(m.matrices.detach()).sign(), s)
               for m, s in zip(rotations, signs, strict=True))
    assert all((m.matrices - old).abs().max() > 1e-3 for m, old in zip(rotations, started, strict=True))


@pytest.mark.must_hold("ostquant", 4)
def test_the_start_spreads_the_covariance_evenly() -> None:
    trial = Trial(tiny(), Sites(start="womi"))
    q = trial.transforms.rotation(trial.transforms.streams[0], torch.float64).detach()
    reading = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
    rows = torch.cat([p.detach().double() for n, p in trial.model.named_parameters() if n.endswith(reading)])
    cov = torch.cov(rows.t(), correction=0)
    diagonal = torch.diagonal(q.T @ cov @ q)
    assert float((diagonal / (torch.trace(cov) / 64) - 1).abs().max()) < 1e-6
    (heads,) = (m for k, m in trial.transforms.transforms.items() if k.startswith("heads/model/layers/0"))
    with torch.no_grad():
        turned = heads(torch.float64)
    columns = trial.model.model.layers[0].self_attn.o_proj.weight.detach().double().view(64, 2, 2, 16)
    for head in range(2):
        cov = torch.cov(columns[:, head].reshape(-1, 16).t(), correction=0)
        diagonal = torch.diagonal(turned[head].T @ cov @ turned[head])
        assert float((diagonal / (torch.trace(cov) / 16) - 1).abs().max()) < 1e-6


@pytest.mark.must_hold("ostquant", 5)
@pytest.mark.parametrize("mode", ["partial", "renorm"])
def test_top_divergence(mode: str) -> None:
    student, teacher = (3 * torch.randn(4, 30, dtype=torch.float64) for _ in range(2))
    full = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    found = top_divergence(student, teacher, 30, mode)
    torch.testing.assert_close(found, full)
    assert (found >= 0).all() and torch.equal(top_divergence(teacher, teacher, 9, mode), torch.zeros_like(full))
    student.requires_grad_()
    top_divergence(student, teacher, 9, mode).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    inside = torch.zeros_like(p).scatter_(-1, teacher.topk(9).indices, 1.0)
    if mode == "renorm":
        p, q = (t * inside / (t * inside).sum(-1, keepdim=True) for t in (p, q))
    torch.testing.assert_close(student.grad, (p * inside).sum(-1, keepdim=True) * q - p * inside)


@pytest.mark.must_hold("ostquant", 6)
def test_the_merged_model_is_the_transformed_one() -> None:
    trial = Trial(tiny(), Sites(gates=True)).shaken()
    before, wanted = trial.logits(), logits(trial.model)
    weight = trial.model.model.layers[0].mlp.down_proj.weight.detach().clone()
    settle(trial.model, trial.plan, trial.transforms, call=lambda: trial.model(IDS), ends=trial.ends)
    assert error(logits(trial.model), before) < 1e-4 and error(before, wanted) < 1e-4
    assert error(trial.model.model.layers[0].mlp.down_proj.weight, weight) > 0.1


@pytest.mark.must_hold("ostquant", 8)
def test_grouped_heads_share_the_rotation_of_their_key_value_head() -> None:
    trial = Trial(tiny())
    (heads,) = (m for k, m in trial.transforms.transforms.items() if k.startswith("heads/model/layers/1"))
    assert heads.matrices.shape[0] == 2  # of four query heads
    layer = trial.model.model.layers[1].self_attn
    with torch.no_grad():
        turned = heads(torch.float64)
        merged = trial.transforms(dtype=torch.float64)
        q = trial.transforms.rotation(trial.transforms.streams[0], torch.float64)
    o = (q.T @ layer.o_proj.weight.detach().double()).view(64, 4, 16)
    expected = torch.stack([o[:, head] @ turned[head // 2] for head in range(4)], 1).reshape(64, 64)
    torch.testing.assert_close(merged["model.layers.1.self_attn.o_proj.weight"], expected)
    v = (layer.v_proj.weight.detach().double() @ q).view(2, 16, 64)
    torch.testing.assert_close(merged["model.layers.1.self_attn.v_proj.weight"],
                               torch.cat([turned[head].T @ v[head] for head in range(2)]))


@pytest.mark.must_hold("ostquant", 9)
def test_training_beats_the_same_pipeline_untrained(small_lm: Any) -> None:
    calibration = small_lm.windows(12, 64, part="train", seed=0)
    # Rounded to nearest: with so little data the solver's noise would be as large as what is looked for.
    common = {"bits": 4, "activation_bits": 4, "kv_bits": 4, "calibration_samples": 12, "calibration_seqlen": 64,
              "batch_size": 4, "micro_batch": 4, "rotate_lr": 0.05, "scale_lr": 0.005, "rounding": "nearest",
              "progress": False}  # fmt: skip
    found = {}
    for name, more in {"womi": {"steps": 0}, "hadamard": {"steps": 0, "start": "hadamard"}, "trained": {"steps": 20},
                       "nothing": {"steps": 0, "rotate": False, "rotate_heads": False, "online": "none"}}.items():
        model = small_lm.make()
        hfq.quantize(model, hfq.OSTQuantConfig(**common, **more), torch.tensor(calibration))
        found[name] = agreement(small_lm.make(), model, calibration).kl
    assert found["trained"] < 0.99 * min(found["womi"], found["hadamard"]), found
    assert max(found["womi"], found["hadamard"]) < 0.3 * found["nothing"], found


@pytest.mark.must_hold("ostquant", 10)
@pytest.mark.parametrize("tied", [True, False])
def test_reloading_gives_the_same_logits_and_no_rotation_is_stored(tied: bool, tmp_path: Path) -> None:
    model, report = quantized(tiny(tied), activation_bits=4, kv_bits=4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.tie_word_embeddings is False and set(attention.parts(again)) == set(attention.parts(model))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedModule)}
    leaves = {key.rpartition(".")[2] for key in tensors if key.rpartition(".")[0] in packed}
    assert leaves == {"weight", "scale"}
    others = {key for key in tensors if key.rpartition(".")[0] not in packed}
    assert others == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} | {
        f"model.layers.{i}.{n}_layernorm.weight" for i in range(2) for n in ("input", "post_attention")}
    assert not report.notes


@pytest.mark.must_hold("ostquant", 11)
def test_space_utilisation_rises_with_every_step() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, 1.5, 24, dtype=torch.float64)
    x = torch.randn(20_000, 24, generator=generator, dtype=torch.float64) * scales
    mixed = x @ torch.linalg.matrix_exp(0.1 * torch.randn(24, 24, generator=generator, dtype=torch.float64))
    cov = init.covariance([mixed])
    raw, rotated = space_utilisation(mixed), space_utilisation(mixed @ init.even_basis(cov, generator))
    main = mixed @ init.eigenbasis(cov)
    both = space_utilisation(main / main.std(0))
    assert raw < 0.8 * rotated < 0.8 * 0.8 * both


def test_the_rotation_can_stay_beside_tied_embeddings(tmp_path: Path) -> None:
    model, report = quantized(tiny(), activation_bits=8, fold_rotation=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and again.config.tie_word_embeddings
    assert hasattr(again.model.layers[0], "hfq_rotation_in")
    parts = report.attached  # what is stored for it is counted
    assert sum(row.numel for row in parts) == 2 * 64 * 64 and {row.bits for row in parts} == {32.0}
    assert report.bits_per_weight() > quantized(tiny(), activation_bits=8)[1].bits_per_weight() + 1


@pytest.mark.parametrize("options", [
    {}, {"activation_bits": 8}, {"bits": 8, "activation_bits": 8}, {"activation_bits": 4, "kv_bits": 4},
    {"activation_bits": 4, "activation_symmetric": True, "online": "all"}, {"kv_bits": 4, "online": "none"},
    {"scale_gates": True, "smooth": 0.5}, {"renormalise": True, "schedule": "linear", "mixed_precision": True},
    {"rounding": "nearest", "start": "klt"}, {"scale_queries": "none", "recompute": False, "train_weights": False},
], ids=str)  # fmt: skip
def test_every_option_runs_and_says_what_it_did(options: dict[str, Any]) -> None:
    wanted = logits(tiny())
    model, report = quantized(tiny(), **options)
    assert error(logits(model), wanted) < 0.5 and len(report.curves["transforms"]) == 2
    layers = [module for module in model.modules() if isinstance(module, PackedModule)]
    bits = options.get("activation_bits", 16)
    assert len(layers) == 14 and {16 if m.activation is None else m.activation.bits for m in layers} == {bits}
    rows = [row for row in report.packed if row.kind == "linear"]
    assert len(rows) == 14 and all(row.asked.get("activation", {}).get("bits", 16) == bits for row in rows)
    assert len(attention.parts(model)) == (2 if "kv_bits" in options else 0)
    heads = [m.activation for n, m in model.named_modules() if n.endswith("o_proj") and bits != 16]
    assert all(a.group_size == (-1 if options.get("online") == "all" else 16) for a in heads)


def test_offloaded_models_can_be_transformed_and_not_trained(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    options = {"steps": 0, "activation_bits": 8, "kv_bits": 8}
    wanted, _ = quantized(tiny(False), **options)
    offloaded = tiny(False)
    accelerate.disk_offload(offloaded, str(tmp_path), torch.device("cpu"))
    _, report = quantized(offloaded, **options)
    assert not report.notes and error(logits(offloaded), logits(wanted)) < 1e-2
    assert all(p.is_meta for p in offloaded.parameters())
    offloaded = tiny(False)
    accelerate.cpu_offload(offloaded, torch.device("cpu"))
    with pytest.raises(QuantizationError, match="steps=0"):
        quantized(offloaded, **{**options, "steps": 1})


def test_a_carried_cache_replaces_the_own_one(tmp_path: Path) -> None:
    model, report = quantized(tiny(), activation_bits=8, kv_cache={"method": "kvquant", "kv_bits": 4})
    assert all(part.cache is not None and part.key is None for part in attention.parts(model).values())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_training_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 5, "activation_bits": 4, "kv_bits": 4, "batch_size": 4}
    whole, first = quantized(tiny(), **options)
    add, seen = Distillation.add, []

    def stop(self: Distillation, batch: Any) -> Any:
        seen.append(1)
        if len(seen) == 4 * 3:
            raise KeyboardInterrupt
        return add(self, batch)

    monkeypatch.setattr(Distillation, "add", stop)
    monkeypatch.setattr(Saved, "EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny(), **options, work_dir=tmp_path)
    monkeypatch.setattr(Distillation, "add", lambda self, batch: seen.append(1) or add(self, batch))
    again, second = quantized(tiny(), **options, work_dir=tmp_path)
    assert len(seen) == 12 + 3 * 4  # steps 0 and 1 were not done again
    assert second.curves == first.curves
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_queries_and_keys_get_their_transform_only_with_a_quantized_cache() -> None:
    model, _ = quantized(tiny(), kv_bits=3)
    part = attention.parts(model)["model.layers.0.self_attn"]
    assert part.hadamard and part.key.bits == part.value.bits == 3 and not part.key.symmetric
    model, _ = quantized(tiny(), kv_bits=3, online="none")
    assert not attention.parts(model)["model.layers.0.self_attn"].hadamard


def test_only_the_cache() -> None:
    wanted = logits(tiny())
    model, report = quantized(tiny(), kv_bits=4, bits=16)
    assert {row.kind for row in report.packed} == {"cache"} and len(report.packed) == 2
    assert all(row.bits == 4 + 32 / 16 for row in report.packed)  # heads of 16 with a scale and a zero point
    assert 1e-4 < error(logits(model), wanted) < 0.2
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight)


@pytest.mark.parametrize("wrong", [{"start": "qr"}, {"kv_bits": 1}, {"steps": -1}, {"scale_queries": "both"},
                                   {"act_order": True, "group_size": 32}, {"top_k": 0}])  # fmt: skip
def test_impossible_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        hfq.OSTQuantConfig(**wrong)


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_bits=16"):
        quantized(torch.nn.Sequential(Blocks()), kv_bits=4)


class Blocks(torch.nn.Module):
    """A stack without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x
