"""Rotations and scales on proven pairs: merged weights compute the same function, and settle into a model for good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hfq import graph
from hfq.api import environment
from hfq.errors import QuantizationError
from hfq.graph.proof import double_precision
from hfq.integrations.registration import install_environment
from hfq.report import Report
from hfq.training import learn
from hfq.training.student import Student
from hfq.transforms.learned import Sites, head_groups
from hfq.transforms.manifold import orthogonality_error
from hfq.transforms.settle import settle
from hfq.transforms.sites import Rotation, Scale, TransformSet

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def awake(model: Any) -> Any:
    """Gains and biases that matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5) if "norm" in name or "ln" in name else parameter.data.normal_()
    return model.eval()


def llama(**more: Any) -> Any:
    return awake(LlamaForCausalLM(LlamaConfig(**SIZES, **more)))


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "biased": lambda: awake(Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "one plus gain": lambda: awake(GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16))),
    "layer norm, fused": lambda: awake(GPT2LMHeadModel(GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32, bos_token_id=1, eos_token_id=2))),
    "experts": lambda: awake(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))),
}  # fmt: skip
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def prepared(model: Any, sites: Sites | None = None, report: Report | None = None) -> tuple[Any, learn.Prepared]:
    plan = graph.read(model)
    return plan, learn.prepare(model, plan, lambda: model(IDS), sites or Sites(), report=report)


@torch.no_grad()
def shaken(transforms: TransformSet) -> TransformSet:
    """Random positive scales; the rotations are random enough."""
    for module in transforms.transforms.values():
        if isinstance(module, Scale):
            module.values.uniform_(0.5, 2.0)
    return transforms


def student(model: Any, plan: Any, transforms: TransformSet) -> Student:
    return Student(model, [(block.name, block.module) for block in plan.blocks], transforms)


def run(one: Student) -> torch.Tensor:
    with torch.no_grad():
        one.start()
        with one.running():
            return one({"input_ids": IDS})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_transforms_leave_the_function_alone_merged_and_settled(name: str) -> None:
    install_environment()
    model, report = MODELS[name](), Report()
    wanted = logits(model)
    plan, made = prepared(model, report=report)
    shaken(made.transforms)
    assert made.transforms.streams and {type(m) for m in made.transforms.transforms.values()} == {Rotation, Scale}
    merged = run(student(model, plan, made.transforms))
    assert error(merged, wanted) < 1e-5 and error(logits(model), wanted) < 1e-5
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    untie = environment().untie
    settle(model, plan, made.transforms, call=lambda: model(IDS), ends=made.ends, untie=untie, report=report)
    assert error(logits(model), wanted) < 1e-5
    # Something did change, the head included, and no rotation is left in the model.
    changed = {n for n, p in model.named_parameters() if not torch.allclose(p, before[n], atol=1e-3)}
    assert any("lm_head" in n for n in changed) and len(changed) > 12
    assert not [n for n, _ in model.named_parameters() if "rotation" in n], report.notes


def test_in_double_precision_the_identity_is_exact() -> None:
    model = llama().double()
    plan, made = prepared(model)
    shaken(made.transforms)
    with double_precision():
        wanted = model(IDS).logits
        merged = run(student(model, plan, made.transforms))
    assert error(merged, wanted) < 1e-8
    # Forgetting one of two sides is no small change.
    made.transforms.edits["model.layers.0.mlp.down_proj.weight"].pop(0)
    with double_precision():
        assert error(run(student(model, plan, made.transforms)), wanted) > 1e-3


def test_query_and_key_scales_of_single_channels_are_another_function_under_rotary_embeddings() -> None:
    results = {}
    for queries in ("tied", "free"):
        torch.manual_seed(0)
        model = llama()
        wanted = logits(model)
        plan, made = prepared(model, Sites(queries=queries))
        (site,) = (m for k, m in made.transforms.transforms.items() if k.startswith("queries/model/layers/0"))
        shaken(made.transforms)
        results[queries] = error(run(student(model, plan, made.transforms)), wanted), site.values.numel()
    assert results["tied"][0] < 1e-5 and results["tied"][1] == 2 * 16 // 2
    assert results["free"][0] > 1e-3 and results["free"][1] == 2 * 16


def test_every_key_value_head_has_a_rotation_that_its_query_heads_share() -> None:
    model = llama()
    plan, made = prepared(model)
    (site,) = (m for k, m in made.transforms.transforms.items() if k.startswith("heads/model/layers/1"))
    assert site.matrices.shape == (2, 16, 16)
    (edit,) = (e for e in made.transforms.edits["model.layers.1.self_attn.o_proj.weight"] if e.stage == "heads")
    assert edit.owner.tolist() == [0, 0, 1, 1] and edit.index.flatten().tolist() == list(range(64))
    assert head_groups(made.pairs) == {f"model.layers.{i}.self_attn.o_proj": 16 for i in range(2)}


def test_scales_through_the_activation_of_a_gated_unit() -> None:
    install_environment()
    model = llama()
    wanted = logits(model)
    plan, made = prepared(model, Sites(gates=True))
    assert len(made.transforms.activations) == 2
    shaken(made.transforms)
    assert error(run(student(model, plan, made.transforms)), wanted) < 1e-5
    settle(model, plan, made.transforms, call=lambda: model(IDS))
    assert error(logits(model), wanted) < 1e-5
    assert type(model.model.layers[0].mlp.act_fn).__name__ == "ScaledSiLU"


def test_the_covariance_of_the_readers_is_even_in_the_rotated_stream() -> None:
    model = llama()
    _, made = prepared(model)
    q = made.transforms.rotation(made.transforms.streams[0], torch.float64).detach()
    reading = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
    rows = torch.cat([p.detach() for n, p in model.named_parameters() if n.endswith(reading)])
    diagonal = torch.diagonal(q.T @ torch.cov(rows.double().t(), correction=0) @ q)
    assert float(diagonal.max() / diagonal.min()) - 1 < 1e-6
    plain = torch.diagonal(torch.cov(rows.double().t(), correction=0))
    assert float(plain.max() / plain.min()) - 1 > 1e-2


def test_what_cannot_be_proven_is_left_out_and_said() -> None:
    report = Report()
    model = MODELS["layer norm, fused"]()
    _, made = prepared(model, report=report)
    assert not any(key.startswith("hidden") for key in made.transforms.transforms)
    assert any("between up and down" in note and "and 1 more" in note for note in report.notes)
    rotation = made.transforms.transforms[made.transforms.streams[0].site]
    assert rotation.fix_ones and rotation.matrices.shape == (1, 63, 63)
    ones = torch.ones(64, dtype=torch.float64)
    torch.testing.assert_close(ones @ rotation(torch.float64)[0], ones)


def test_without_ends_or_without_a_head_the_stream_is_turned_by_hooks() -> None:
    model = llama(tie_word_embeddings=True)
    wanted = logits(model)
    plan, made = prepared(model)
    settle(model, plan, shaken(made.transforms), call=lambda: model(IDS))
    assert error(logits(model), wanted) < 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert orthogonality_error(model.model.layers[0].hfq_rotation_in.matrix) < 1e-5
    headless, report = awake(LlamaModel(LlamaConfig(**SIZES))), Report()
    with torch.no_grad():
        wanted = headless(IDS).last_hidden_state
    plan, made = prepared(headless, report=report)
    settle(headless, plan, shaken(made.transforms), call=lambda: headless(IDS), ends=made.ends, report=report)
    with torch.no_grad():
        assert error(headless(IDS).last_hidden_state, wanted) < 1e-5
    assert any("not folded into embedding and head" in note for note in report.notes)


def test_a_tied_head_that_cannot_be_untied_keeps_the_hooks() -> None:
    model, report = llama(tie_word_embeddings=True), Report()
    wanted = logits(model)
    plan, made = prepared(model)
    settle(model, plan, shaken(made.transforms), call=lambda: model(IDS), ends=made.ends, report=report)
    assert error(logits(model), wanted) < 1e-5 and model.lm_head.weight is model.model.embed_tokens.weight
    assert any("belongs to another module" in note for note in report.notes)


def test_ends_that_do_not_work_are_rolled_back() -> None:
    model, report = llama(), Report()
    wanted, head = logits(model), model.lm_head.weight.detach().clone()
    plan, made = prepared(model)
    made.ends["model.layers"].writers.clear()  # the embedding is forgotten
    settle(model, plan, shaken(made.transforms), call=lambda: model(IDS), ends=made.ends, report=report)
    assert error(logits(model), wanted) < 1e-5 and torch.equal(model.lm_head.weight, head)
    assert any("changes the model's output" in note for note in report.notes)


def test_a_changed_function_is_an_error() -> None:
    model = llama()
    plan, made = prepared(model, Sites(queries="free"))
    with pytest.raises(QuantizationError, match="change the model's output"):
        settle(model, plan, shaken(made.transforms), call=lambda: model(IDS))


def test_options_are_checked() -> None:
    for wrong in (Sites(queries="all"), Sites(online="everything")):
        with pytest.raises(QuantizationError, match="is needed"):
            prepared(llama(), wrong)
