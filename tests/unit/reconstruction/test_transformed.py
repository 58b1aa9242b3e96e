"""Transforms of a block: exact in float, learned with the rounding, frozen without a difference."""

import pytest
import torch
import transformers as tf
from torch.func import functional_call

from hfq import graph
from hfq.calibration.walk import walk
from hfq.errors import ConfigError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, affine
from hfq.graph.gates import discover_gates
from hfq.graph.pairs import discover
from hfq.layers.attached import CHILD, ScaledSiLU
from hfq.reconstruction.build import _randomise
from hfq.reconstruction.maps import BlockMap, MatrixMap
from hfq.reconstruction.transformed import BlockTransform, Options, fit_transformed, targets_of_stream
from hfq.transforms.affine import RotaryBlocks

TEXT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GQA = dict(TEXT, num_key_value_heads=2, head_dim=8)
EVERYTHING = Options(norm="matrix", value="matrix", query="matrix", product="vector", gate="vector", factor=0.1)
SPEC = QuantSpec(3, -1)


def build(name):
    torch.manual_seed(0)
    if name == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))
    elif name == "qwen3":
        model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA))
    elif name == "mixtral":
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2))
    elif name == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                                 bos_token_id=1, eos_token_id=2))
    else:
        text = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
        model = tf.OPTForCausalLM(tf.OPTConfig(**text, ffn_dim=48, word_embed_proj_dim=32))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def batches(samples=4, length=12):
    ids = torch.randint(3, 97, (samples, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]


def first_step(model, **options):
    """The first block of a walk, and the pairs of the model."""
    data = batches()
    plan = graph.read(model)

    def call():
        with torch.no_grad():
            model(**data[0], use_cache=False)

    pairs = [*discover(plan, call), *discover_gates(plan, call)]
    step = next(iter(walk(plan, data, streams=("quantized", "float"), **options)))
    return step, pairs, call


def transform_of(model, options=EVERYTHING, spec=SPEC):
    step, pairs, _ = first_step(model)
    return step, BlockTransform(step, pairs, lambda name: spec, options)


def randomise(transform, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in transform.maps:
            _randomise(one, generator)


def run(step, values, dtype=torch.float32, i=0):
    args, kwargs = step.inputs[i]
    if dtype == torch.float64:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs))
    with torch.no_grad():
        found = functional_call(step.block.module, values, args, kwargs)
    return found[0] if isinstance(found, tuple) else found


def change(step, transform, dtype=torch.float32):
    """How far random maps on all pairs move the block's output, nothing quantized."""
    before = step.call(0)
    randomise(transform)
    if dtype == torch.float64:
        step.block.module.double()
    with torch.no_grad():
        moved = run(step, transform(dtype, quantized=False), dtype)
    if dtype == torch.float64:
        before = run(step, {}, dtype)
    return float((moved - before).norm() / before.norm())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_random_maps_on_every_pair_leave_the_block_as_it_is(name):
    step, transform = transform_of(build(name))
    kinds = sorted(one.pair.kind for one in transform.maps)
    assert kinds == {
        "llama": ["gate", "norm", "norm", "qk", "updown", "vo"], "qwen3": ["gate", "norm", "norm", "updown", "vo"],
        "gpt2": ["norm", "norm", "qk", "vo"], "opt": ["norm", "norm", "qk", "updown", "vo"],
    }[name]
    assert sum(one.shift is not None for one in transform.maps) == 3
    assert change(step, transform) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_same_in_float64(name):
    step, transform = transform_of(build(name))
    assert change(step, transform, torch.float64) < 1e-9


@pytest.mark.parametrize("options", [
    Options(norm="vector", value="vector", query="vector", product="vector", gate="vector"),
    Options(norm="matrix", value="off"), Options(norm="off", value="matrix", shift=False),
    Options(norm="off", value="off", query="matrix"), Options(norm="off", value="off", gate="vector"),
])
def test_any_subset_of_sites(options):
    step, transform = transform_of(build("llama"), options)
    assert change(step, transform) < 1e-4


def test_shared_heads_have_one_matrix_and_rotary_pairs_one_block():
    step, transform = transform_of(build("llama"))
    maps = {one.pair.kind: one for one in transform.maps}
    assert maps["vo"].map.raw.shape == (2, 8, 8)
    assert isinstance(maps["qk"].map, RotaryBlocks) and maps["qk"].map.a.shape == (8,)  # 2 key heads of 4 pairs
    _, plain = transform_of(build("opt"))
    maps = {one.pair.kind: one for one in plain.maps}
    assert maps["qk"].map.raw.shape == (4, 8, 8)  # without rotation a full matrix a head


@pytest.mark.parametrize("query", ["matrix", "vector"])
def test_free_queries_under_rotary_embeddings_are_no_equivalence_and_say_so(query):
    options = Options(norm="off", value="off", query=query, rotary="free", factor=0.1)
    step, transform = transform_of(build("llama"), options)
    assert any("not equivalent" in reason for reason in transform.reasons.values())
    assert change(step, transform) > 1e-2
    step, transform = transform_of(build("opt"), options)  # no rotation: free is exact
    assert not transform.reasons and change(step, transform) < 1e-4


def test_normalised_queries_are_left_out_with_the_reason():
    _, transform = transform_of(build("qwen3"))
    assert any("normalised" in reason for key, reason in transform.reasons.items() if key.startswith("qk"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_frozen_is_the_same_function_and_the_codes_are_of_the_frozen_weights(name):
    model = build(name)
    step, transform = transform_of(model)
    before = step.call(0)
    randomise(transform)
    codes = transform.freeze()
    step._outputs = None
    after = step.call(0)
    assert (after - before).norm() < 1e-4 * before.norm()
    assert set(codes) == {site.name for site in step.block.sites}
    for site in step.block.sites:
        weight = site.weight.detach().t() if site.kind == "transposed" else site.weight.detach()
        error = (affine.dequantize(codes[site.name]) - weight).norm() / weight.norm()
        assert 0 < error < 0.4


def test_the_stored_matrix_is_the_inverse_of_the_masked_one():
    step, transform = transform_of(build("llama"), Options(norm="matrix", value="off", factor=0.3))
    randomise(transform)
    norms = [one for one in transform.maps if isinstance(one, MatrixMap)]
    wanted = [torch.linalg.inv(one.map.effective(torch.float64))[0] for one in norms]
    raw = [torch.linalg.inv(one.map.raw.detach().double())[0] for one in norms]
    transform.freeze()
    for one, inverse, unmasked in zip(norms, wanted, raw, strict=True):
        part = one.pair.sources[0].part.module._modules[CHILD]
        assert part.matrix.dtype == torch.float16
        assert torch.allclose(part.matrix.double(), inverse.detach(), atol=2e-3 * float(inverse.detach().abs().max()))
        assert (part.matrix.double() - unmasked).norm() > 0.05 * unmasked.norm()


def test_training_lowers_the_loss_and_never_ends_above_the_start():
    for options in (EVERYTHING, Options(norm="vector", value="vector", query="vector", product="vector")):
        step, transform = transform_of(build("llama"), options)
        seen = []
        fit = fit_transformed(step, transform, epochs=6, watch=lambda t, seen=seen: seen.append(t.condition()))
        assert fit.final < 0.95 * fit.initial and len(fit.curve) == 6 and fit.epoch >= 0 and not fit.retries
        assert len(seen) == 24 and max(seen) < 1e6
        fit = fit_transformed(step, transform, epochs=2, lr=10.0, clip_lr=10.0, most_condition=float("inf"))
        assert fit.final <= fit.initial


def test_what_was_trained_is_what_is_packed():
    step, transform = transform_of(build("llama"), Options(norm="matrix", value="matrix", query="matrix"))
    fit = fit_transformed(step, transform, epochs=4)
    codes = transform.freeze()
    targets = step.outputs
    for name, one in codes.items():
        step.swap(name, one)
    lost = torch.stack([(step.call(i) - targets[i]).square().mean() for i in range(2)]).mean()
    assert float(lost) == pytest.approx(fit.final, rel=0.02)  # matrices are stored in float16


def test_without_damping_the_matrix_is_a_vector():
    results = []
    for options in (Options(norm="vector", value="vector"), Options(norm="matrix", value="matrix", factor=0.0)):
        step, transform = transform_of(build("llama"), options)
        fit_transformed(step, transform, epochs=3)
        with torch.no_grad():
            values = transform()
        results.append({name: value for name, value in values.items() if name.endswith("proj.weight")})
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-3 * float(value.abs().max())), name


def test_the_second_loss_uses_the_same_inputs():
    step, transform = transform_of(build("llama"))
    second = targets_of_stream(step)
    alone, both = (fit_transformed(step, transform, epochs=0, second=s) for s in (None, second))
    # In the first block both streams are the same: the second target equals the first.
    assert both.initial == pytest.approx(2 * alone.initial, rel=1e-5)


def test_activations_are_quantized_while_training():
    step, transform = transform_of(build("llama"), Options())
    plain = fit_transformed(step, transform, epochs=0).initial
    activations = {site.module: ActivationSpec(bits=4) for site in step.block.sites}
    noisy = fit_transformed(step, transform, epochs=0, activations=activations).initial
    assert noisy > 1.2 * plain


def test_an_unstable_run_is_given_up_and_starts_again_with_less_damping():
    step, transform = transform_of(build("llama"), Options(norm="matrix", value="off", factor=1.0))
    fit = fit_transformed(step, transform, epochs=6, lr=0.3, most_condition=10.0)
    assert fit.retries and "condition" in fit.retries[0]
    assert fit.factor < 1.0 and fit.condition <= 10.0 and fit.final <= fit.initial
    step, transform = transform_of(build("llama"), Options(norm="matrix", value="off", factor=1.0))
    with pytest.raises(QuantizationError, match="cannot be learned"):
        fit_transformed(step, transform, epochs=2, most_condition=1.0)


def test_gates_take_their_scale_into_the_activation():
    model = build("llama")
    step, transform = transform_of(model, Options(norm="off", value="off", gate="vector"))
    before = step.call(0)
    randomise(transform)
    transform.freeze()
    part = model.model.layers[0].mlp.act_fn
    assert isinstance(part, ScaledSiLU) and (part.scale - 1).abs().max() > 0.1
    assert (step.call(0) - before).norm() < 1e-4 * before.norm()


def test_a_zero_channel_and_a_constant_row_stay_finite():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[4] = 0
        model.model.layers[0].self_attn.q_proj.weight[3] = 0.25
        model.model.layers[0].self_attn.k_proj.weight[:, 5] = 0
    step, transform = transform_of(model)
    fit = fit_transformed(step, transform, epochs=3)
    codes = transform.freeze()
    assert fit.final <= fit.initial and all(torch.isfinite(one.scale).all() for one in codes.values())
    assert all(torch.isfinite(p).all() for p in step.block.module.parameters())


def test_skipped_readers_move_along_and_take_no_shift():
    model = build("llama")
    plan = graph.read(model, skip=["*.k_proj"])
    data = batches()

    def call():
        with torch.no_grad():
            model(**data[0], use_cache=False)

    pairs = list(discover(plan, call))
    step = next(iter(walk(plan, data, streams=("quantized", "float"))))
    transform = BlockTransform(step, pairs, lambda name: SPEC, Options(norm="matrix", value="off"))
    assert any("k_proj stays float" in reason for reason in transform.reasons.values())
    before, weight = step.call(0), model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    randomise(transform)
    assert "model.layers.0.self_attn.k_proj" not in transform.freeze()
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.weight, weight)
    assert (step.call(0) - before).norm() < 1e-4 * before.norm()


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="product"):
        Options(product="matrix")
    step, transform = transform_of(build("llama"), Options())
    for wrong in ({"epochs": -1}, {"epochs": 1, "batch_size": 0}, {"epochs": 1, "autocast": torch.float16}):
        with pytest.raises(ConfigError):
            fit_transformed(step, transform, **wrong)
    assert not any(isinstance(one, BlockMap) and one.exact is False for one in transform.maps)
