"""KVQuant: the numbered properties of its specification, and its order against the caches that it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from codebooks import weighted_error
from transformers import LlamaConfig, LlamaForCausalLM

import hfq
from hfq.calibration import keys, progress
from hfq.calibration.data import normalise
from hfq.errors import CheckpointError, ConfigError
from hfq.evaluation.perplexity import perplexity
from hfq.formats import codebook, kv, kv_fit
from hfq.formats.kv import KVFormat, SideSpec, Tables
from hfq.layers import attention, kv_install
from hfq.layers.kv_store import KVStore
from hfq.methods import kvquant as method

COMMON = {"calibration_samples": 12, "calibration_seqlen": 40, "progress": False}
# The caches that the paper compares with, as options of the same Config.
TOKEN = {"datatype": "int", "key_axis": "token", "outliers": 0.0, "sink": 0, "pre_rope": False}
GROUPED = {"datatype": "int", "key_axis": "window", "outliers": 0.0, "sink": 0, "pre_rope": False, "value_group": 32}


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=128, attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
    return model


def ids(rows: int = 12, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def quantized(**more: Any) -> Any:
    model = tiny()
    hfq.quantize(model, hfq.KVQuantConfig(**{**COMMON, **more}), ids())
    return model


def logits(model: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, use_cache=False, **more).logits


def decoded(model: Any, x: torch.Tensor, prompt: int, step: int = 1, **more: Any) -> torch.Tensor:
    """Logits of a run with a cache: the prompt at once, then ``step`` tokens at a time."""
    cuts, cache, found = [0, *range(prompt, x.shape[1], step), x.shape[1]], None, []
    with torch.no_grad():
        for start, stop in zip(cuts, cuts[1:], strict=False):
            part = {name: value[:, :stop] if name == "attention_mask" else value[:, start:stop]
                    for name, value in more.items()}
            result = model(x[:, start:stop], past_key_values=cache, use_cache=True, **part)
            cache = result.past_key_values
            found.append(result.logits)
    return torch.cat(found, 1)


def generated(model: Any, x: torch.Tensor, **more: Any) -> Any:
    return model.generate(x, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
                          output_logits=True, **more)


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> bool:
    return bool((a - b).float().norm() <= limit * b.float().norm())


@pytest.mark.must_hold("kvquant", 1)
def test_without_quantization_outputs_are_those_of_the_own_cache() -> None:
    plain, x = tiny(), ids(2)
    model = quantized(kv_bits=16)
    assert not attention.parts(model) and torch.equal(logits(model, x), logits(plain, x))
    model = quantized(kv_bits=4)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        model, plain = model.to(dtype), plain.to(dtype)
        with attention.exact(model):
            assert close(logits(model, x), logits(plain, x), limit)
            assert close(decoded(model, x, 9, 4), decoded(plain, x, 9, 4), limit)
            assert torch.equal(generated(model, x).sequences, generated(plain, x).sequences)


@pytest.mark.must_hold("kvquant", 2)
def test_keys_without_positions_attend_as_those_with_them() -> None:
    """Stored before, rotated when read: the same for any positions, in any rows, after padding."""
    plain, model, x = tiny(), tiny(), ids(3, 24)
    form = KVFormat(SideSpec(16), SideSpec(16), pre_rope=True)
    for place in kv_install.places(model, lambda: model(x), pre_rope=True):
        assert place.rotary is not None
        kv_install.add(model, place, form)
    anywhere = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(3))
    assert close(decoded(model, x, 7, 3, position_ids=anywhere), decoded(plain, x, 7, 3, position_ids=anywhere), 1e-5)
    mask = torch.ones_like(x)
    mask[0, :5] = mask[1, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found, wanted = (decoded(m, x, 7, 2, position_ids=places, attention_mask=mask) for m in (model, plain))
    assert close(found[mask.bool()], wanted[mask.bool()], 1e-5)
    assert not close(found[mask.bool()], decoded(plain, x, 7, 2)[mask.bool()], 1e-3)  # positions do matter
    store = None
    with torch.no_grad():
        store = model(x, use_cache=True).past_key_values.layers[0].store
    kept, turned = store.sides["key"].blocks[0].packed[:, :, :24], store.rotate(
        store.sides["key"].blocks[0].packed[:, :, :24], 0, 24)
    assert not torch.allclose(kept[:, :, 1:], turned[:, :, 1:], atol=1e-3)


@pytest.mark.must_hold("kvquant", 3)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_any_number_of_tokens_come_back(bits: int) -> None:
    model = quantized(kv_bits=bits)
    part = attention.parts(model)["model.layers.0.self_attn"]
    x = torch.randn(2, 2, 131, 16, generator=torch.Generator().manual_seed(bits))
    still = torch.ones(1, 131, 16), torch.zeros(1, 131, 16)
    for tokens in (1, 5, 63, 64, 65, 131):
        store = KVStore(part.kv)
        store.append(x[:, :, :tokens], x[:, :, :tokens], tuple(t[:, :tokens] for t in still))
        for name, side in store.sides.items():
            run = kv.encode(x[:, :, :tokens], side.spec, part.kv.tables(name))
            from hfq.kernels import kv as kernels

            found = [kernels.read(side, block, a, b).codes for block, a, b, _ in side.tiles(tokens, 17)]
            assert torch.equal(torch.cat(found, 2), run.codes)


@pytest.mark.must_hold("kvquant", 4)
def test_outliers_are_exact_few_and_about_as_many_as_asked() -> None:
    share, model = 0.1, quantized(kv_bits=3, outliers=0.1)
    form = attention.parts(model)["model.layers.0.self_attn"].kv.form
    n, channels = form.key.side_slots(32), 32
    assert n == int(share / 2 * channels) + 1 == 2
    batches = normalise(ids(), samples=12, seqlen=40, batch_size=1)
    plain = tiny()
    places = kv_install.places(plain, lambda: plain(ids(1)), pre_rope=True)
    for name, found in keys.collect(plain, batches, places, gradients=False, drop=1).items():
        cache = attention.parts(model)[name].kv
        for side in ("key", "value"):
            x = getattr(found, side).unflatten(1, (2, 16)).transpose(0, 1)[None]
            stored = kv.encode(x, getattr(cache.form, side), cache.tables(side))
            read = kv.decode(stored, getattr(cache.form, side), cache.tables(side))
            used = stored.values != 0
            assert stored.values.shape[-1] == 2 * n and used.sum(-1).max() <= 2 * n
            error = (read - x).transpose(1, 2).flatten(2).abs().gather(-1, stored.index.long())[used]
            assert (error <= 2**-10 * stored.values.float().abs()[used] + 1e-7).all()
            counted = float(used.sum()) / x.numel()
            assert 0.5 * share <= counted <= (1.3 * share if side == "key" else 2 * n / channels)


@pytest.mark.must_hold("kvquant", 5)
@pytest.mark.parametrize("bits", [2, 3])
def test_codebooks_are_sorted_and_the_best_on_their_data(bits: int) -> None:
    model, plain = quantized(kv_bits=bits, qnorm=False), tiny()
    places = kv_install.places(plain, lambda: plain(ids(1)), pre_rope=True)
    batches = normalise(ids(), samples=12, seqlen=40, batch_size=1)
    for name, found in keys.collect(plain, batches, places, drop=1).items():
        cache = attention.parts(model)[name].kv
        for side in ("key", "value"):
            table, spec = getattr(cache, f"{side}_encode"), getattr(cache.form, side)
            assert table.shape == (2**bits,) and (table.diff() > 0).all() and table.abs().max() <= 1
            x, weight = getattr(found, side), getattr(found, f"{side}_weight")
            low, high = (cache.key_low, cache.key_high) if side == "key" else (None, None)
            scaled, scale, kept = kv_fit.normalised(x, spec, low, high)
            values, weights = scaled[kept], (weight * scale.square())[kept]
            assert weights.std() > 0.1 * weights.mean()  # gradients differ
            best = weighted_error(values, table, weights)
            assert best < min(weighted_error(values, other(bits), weights)
                              for other in (codebook.normal, codebook.even))
            ones = codebook.kmeans(values, 2**bits, torch.ones_like(values), seed=3)
            assert torch.equal(ones, codebook.kmeans(values, 2**bits, seed=3))
            assert weighted_error(values, table, weights) < weighted_error(values, ones, weights)


@pytest.mark.must_hold("kvquant", 6)
def test_channels_for_keys_and_tokens_for_values(small_lm: Any) -> None:
    """On a trained model with keys that have outlier channels, and in what attention makes of the values."""
    model = small_lm.make()
    data = normalise(torch.tensor(small_lm.windows(4, part="train", seed=0)), samples=4, seqlen=128, batch_size=1)
    call = hfq.KVQuantConfig(progress=False).one_call(model, data)
    places = kv_install.places(model, call, pre_rope=True)
    wins = []
    for found in keys.collect(model, data, places, gradients=False, drop=1).values():
        key = found.key.clone()
        key[:, ::17] *= 10  # channels that are large in every token
        errors = {}
        for axis in ("channel", "token"):
            spec = SideSpec(3, axis, 0)
            errors[axis] = _error(key, spec)
        assert errors["channel"] < 0.6 * errors["token"]
        weights = torch.rand(64, len(found.value), generator=torch.Generator().manual_seed(0)).log().mul(-3).softmax(-1)
        output = {axis: _error(found.value, SideSpec(3, axis, 0), weights) for axis in ("channel", "token")}
        wins.append(output["token"] / output["channel"])
    assert sum(wins) / len(wins) <= 1, wins


def _error(x: torch.Tensor, spec: SideSpec, weights: torch.Tensor | None = None) -> float:
    tables = Tables(*kv_fit.ends(x, 0.0)) if spec.axis == "channel" else Tables()
    wrong = kv.fake(x[None, None], spec, tables)[0, 0] - x
    return float(wrong.norm() if weights is None else (weights @ wrong).norm())


@pytest.mark.must_hold("kvquant", 7)
def test_more_bits_and_more_outliers_are_better() -> None:
    def error(**options: Any) -> float:
        report = hfq.quantize(tiny(), hfq.KVQuantConfig(**{**COMMON, "qnorm": False, **options}), ids())
        return sum(row.error for row in report if row.kind == "cache")

    by_bits = [error(kv_bits=bits) for bits in (2, 3, 4, 6)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 0.2 * by_bits[0]
    by_share = [error(kv_bits=3, outliers=share) for share in (0.0, 0.01, 0.1, 0.2)]
    assert by_share == sorted(by_share, reverse=True) and by_share[-1] < 0.9 * by_share[0]


@pytest.mark.must_hold("kvquant", 7)
def test_the_first_tokens_are_kept() -> None:
    model, x = quantized(kv_bits=2, sink=3, prefill="quantized"), ids(2)
    with torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
        exact = tiny()(x, use_cache=True).past_key_values
    assert all(torch.equal(kept, whole[:, :, :3]) for kept, whole in zip(
        cache.layers[0].store.sink, (exact.layers[0].keys, exact.layers[0].values), strict=True))
    assert torch.equal(logits(model, x[:, :3]), logits(tiny(), x[:, :3]))
    assert not torch.equal(logits(model, x[:, :4])[:, 3], logits(tiny(), x[:, :4])[:, 3])


@pytest.mark.must_hold("kvquant", 8)
@pytest.mark.parametrize("options", [{}, {"kv_bits": 2}, TOKEN], ids=["three bits", "two bits", "token"])
def test_token_by_token_is_all_at_once(options: dict[str, Any]) -> None:
    """Logits of a run with a cache are those without one, where every key and value is rounded."""
    model, x = quantized(**{"kv_bits": 3, "prefill": "quantized", **options}), ids(2)
    wanted = logits(model, x)
    assert not close(wanted, logits(tiny(), x), 1e-2)
    for prompt, step in ((1, 1), (13, 1), (13, 5)):
        assert close(decoded(model, x, prompt, step), wanted, 1e-4)
    exact = quantized(**{"kv_bits": 3, **options})
    assert close(decoded(exact, x, 13)[:, :13], logits(tiny(), x)[:, :13], 1e-6)  # the prompt sees itself exactly


@pytest.mark.must_hold("kvquant", 9)
def test_two_bits_keep_mean_and_spread() -> None:
    """Decoded numbers of the calibration data, as they are scaled, have their mean and standard deviation."""
    model, plain = quantized(kv_bits=2), tiny()
    without = quantized(kv_bits=2, qnorm=False)
    places = kv_install.places(plain, lambda: plain(ids(1)), pre_rope=True)
    batches = normalise(ids(), samples=12, seqlen=40, batch_size=1)
    for name, found in keys.collect(plain, batches, places, drop=1).items():
        cache, other = (attention.parts(m)[name].kv for m in (model, without))
        assert torch.equal(other.key_encode, other.key_decode) and torch.equal(cache.key_encode, other.key_encode)
        for side in ("key", "value"):
            low, high = (cache.key_low, cache.key_high) if side == "key" else (None, None)
            scaled, _, kept = kv_fit.normalised(getattr(found, side), getattr(cache.form, side), low, high)
            values = scaled[kept].double()
            codes = codebook.encode(values.float(), getattr(cache, f"{side}_encode"))
            read = codebook.decode(codes, getattr(cache, f"{side}_decode")).double()
            assert read.mean() == pytest.approx(float(values.mean()), abs=1e-4)
            assert read.std() == pytest.approx(float(values.std()), rel=1e-4)
            plainly = codebook.decode(codes, getattr(cache, f"{side}_encode")).double()
            assert abs(plainly.std() - values.std()) > 10 * abs(read.std() - values.std())


@pytest.mark.must_hold("kvquant", 10)
def test_constant_channels_and_empty_tokens() -> None:
    plain = tiny()
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.k_proj.weight[3] = 0.0
            layer.self_attn.v_proj.weight.zero_()
            layer.self_attn.v_proj.bias.zero_()
    wanted = logits(plain, ids(2))
    for bits in (2, 3, 4):
        model = tiny()
        model.load_state_dict(plain.state_dict())
        hfq.quantize(model, hfq.KVQuantConfig(**COMMON, kv_bits=bits, prefill="quantized"), ids())
        part = attention.parts(model)["model.layers.0.self_attn"].kv
        assert part.key_low[3] == part.key_high[3]
        x = torch.zeros(1, 2, 4, 16)
        x[:, 0, :, 3] = float(part.key_low[3])
        keys_, values = part.fake(x, torch.zeros_like(x), (torch.ones(1, 4, 16), torch.zeros(1, 4, 16)))
        assert torch.allclose(keys_[:, 0, :, 3], x[:, 0, :, 3], rtol=2e-3) and values.abs().max() < 1e-3
        found = decoded(model, ids(2), 5)
        assert torch.isfinite(found).all() and close(found, wanted, 1e-3)  # values are zero: keys do not matter


@pytest.mark.must_hold("kvquant", 11)
def test_generation_with_batches_beams_crops_and_resets() -> None:
    model, x = quantized(kv_bits=4, prefill="quantized"), ids(3, 20)
    single = [generated(model, x[i:i + 1]).sequences[0] for i in range(3)]
    assert all(torch.equal(row, one) for row, one in zip(generated(model, x).sequences, single, strict=True))
    beams = generated(model, x, num_beams=3)
    alone = generated(model, x[:1], num_beams=3)
    assert torch.equal(beams.sequences[0], alone.sequences[0]) and beams.past_key_values.layers[0].batch_size == 9
    with torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
        whole = model(ids(3, 6, seed=5), past_key_values=cache, use_cache=True).logits
        cache.crop(-6)
        assert cache.get_seq_length() == 20
        assert close(model(ids(3, 6, seed=5), past_key_values=cache, use_cache=True).logits, whole, 1e-5)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([1, 2]))
        assert cache.layers[0].batch_size == 2
        cache.reset()
        assert cache.get_seq_length() == 0
        assert close(model(x, past_key_values=cache, use_cache=True).logits, logits(model, x), 1e-5)


@pytest.mark.must_hold("kvquant", 11)
def test_memory_follows_the_formula() -> None:
    from hfq.integrations import kv_cache

    model = quantized(kv_bits=3)
    length = 8192 // 16  # what is checked does not depend on it, and attention over 8192 random tokens takes a while
    with torch.no_grad():
        cache = model(ids(2, length), use_cache=True).past_key_values
    parts = [part.kv for part in attention.parts(model).values()]
    positions = parts[0].rotary.size * length * 4
    formula = sum(part.nbytes_of(2, length) for part in parts) - positions  # two layers share one table of positions
    assert kv_cache.nbytes(cache) == pytest.approx(formula, rel=0.05)
    floats = 2 * 2 * 2 * length * 32 * 4
    assert kv_cache.nbytes(cache) < 0.3 * floats
    for layer, part in zip(cache.layers, parts, strict=True):
        assert layer.store.nbytes == pytest.approx(part.nbytes_of(2, length), rel=0.05)


@pytest.mark.must_hold("kvquant", 12)
def test_quality_on_a_trained_model(small_lm: Any) -> None:
    """Every scored token sees rounded keys and values; better than a range a token.

    Windows of tokens store more bits (half a bit a number here), and win with them on so small a model: the table of
    the cards compares the two on a real one.
    """
    windows = small_lm.windows(6)
    data = torch.tensor(small_lm.windows(8, part="train", seed=0))
    common = {"calibration_samples": 8, "calibration_seqlen": 128, "progress": False}
    model = small_lm.make()
    base = perplexity(model, windows)
    found = {}
    for bits, name, options in (
        (4, "own", {}), (3, "own", {}), (3, "token", TOKEN), (2, "own", {}),
        (2, "token", TOKEN),
    ):
        hfq.quantize(model, hfq.KVQuantConfig(kv_bits=bits, **common, **options), data)
        found[bits, name] = perplexity(model, windows)
        hfq.dequantize(model)
    assert perplexity(model, windows) == base
    assert found[4, "own"] <= 1.01 * base and found[3, "own"] <= 1.04 * base, (base, found)
    assert base < found[4, "own"] < found[3, "own"] < found[2, "own"], (base, found)
    assert found[3, "own"] < found[3, "token"] and found[2, "own"] < found[2, "token"], found


def test_gradients_weigh_the_codebook() -> None:
    """Frozen weights and packed ones let gradients through to keys and values all the same."""
    model = tiny().double().requires_grad_(False)
    places = kv_install.places(model, lambda: model(ids(1)), pre_rope=True)
    batches = normalise(ids(2), samples=2, seqlen=40, batch_size=2)
    found = keys.collect(model, batches, places, drop=1)
    x = ids(2)[:1].clone()
    # the definition: the loss with one key changed, by finite differences
    name, layer = "model.layers.1.self_attn", 1
    place, step = places[layer], 0.05
    row, column = divmod(int(found[name].key_weight[:39].argmax()), 32)

    def loss(change: float) -> float:
        def observer(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any) -> Any:
            if module is not model.get_submodule(name):
                return None
            angles = place.rotary.angles_of(model.model.rotary_emb(key, torch.arange(40)[None]))
            plain = place.rotary.undo(key, angles)
            plain[0, column // 16, row + 1, column % 16] += change  # the first token was dropped
            return query, place.rotary.turn(plain, angles, 1), value

        with attention.observing(model, observer), torch.no_grad():
            out = model(x, use_cache=False).logits[:, :-1].double().flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(out, x[:, 1:].flatten(), reduction="sum"))

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert found[name].key_weight[row, column] == pytest.approx(slope**2, rel=0.05)


def test_same_seed_same_numbers() -> None:
    one, two = (quantized(kv_bits=3).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sum(name.endswith("key_encode") for name in one) == 2


@pytest.mark.parametrize("carried", [False, True])
def test_stopped_and_resumed_is_uninterrupted(
    carried: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(kv_bits: int = 4, **more: Any) -> Any:
        if not carried:
            return quantized(kv_bits=kv_bits, **more)
        model = tiny()
        hfq.quantize(model, hfq.RTNConfig(bits=8, kv_cache={"kv_bits": kv_bits}, **COMMON, **more), ids())
        return model

    whole = made()
    seen: list[str] = []

    def stop(found: Any, place: Any, *args: Any, fit: Any = method.fit) -> Any:
        if seen == ["model.layers.0.self_attn"]:
            raise KeyboardInterrupt
        seen.append(place.name)
        return fit(found, place, *args)

    with monkeypatch.context() as patch:
        patch.setattr(method, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            made(work_dir=tmp_path)
    seen.clear()
    monkeypatch.setattr(method, "fit", lambda *args, fit=method.fit: seen.append(args[1].name) or fit(*args))
    model = made(work_dir=tmp_path)
    assert seen == ["model.layers.1.self_attn"]
    ours, theirs = model.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows, wanted = model.hfq_report.rows, whole.hfq_report.rows
    assert rows == wanted and torch.equal(logits(model, ids(2)), logits(whole, ids(2)))
    with pytest.raises(CheckpointError, match=r"kv_bits was 4, is 2.*delete the folder"):
        made(work_dir=tmp_path, kv_bits=2)


def test_padding_and_first_tokens_are_left_out() -> None:
    model, x = tiny(), ids(2, 16)
    mask = torch.ones_like(x)
    mask[0, :6] = 0
    places = kv_install.places(model, lambda: model(x), pre_rope=True)
    data = normalise([{"input_ids": x, "attention_mask": mask}], samples=None, seqlen=None, batch_size=2)
    found = keys.collect(model, data, places, drop=2)
    assert all(f.key.shape == (8 + 14, 32) and f.seen == 32 for f in found.values())
    few = keys.collect(model, data, places, most=8)
    assert all(f.key.shape == (8, 32) for f in few.values())


WRONG = [
    ({"bits": 4}, "bits=4"), ({"kv_bits": 9}, "kv_bits=9"), ({"outliers": 0.3}, "outliers"),
    ({"datatype": "fp"}, "datatype"), ({"key_axis": "token", "pre_rope": True}, "pre_rope"),
    ({"key_axis": "window"}, "window"), ({**GROUPED, "residual": 40}, "residual"), ({"value_group": 32}, "value_group"),
    ({"activation_bits": 8}, "activation_bits"), ({"kv_cache": {"kv_bits": 4}}, "kv_cache"),
]  # fmt: skip


@pytest.mark.parametrize("options,word", WRONG, ids=lambda value: str(value)[:24])
def test_wrong_options_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        hfq.KVQuantConfig(**options)


def test_saved_baselines_can_be_read_again() -> None:
    for options in ({"datatype": "int", "key_axis": "token", "outliers": 0.0}, GROUPED, {}):
        config = hfq.KVQuantConfig(**options)
        again = hfq.HfqConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict() and again.form() == config.form()


def test_the_model_is_hashed_only_for_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    digest = progress.state_digest
    monkeypatch.setattr(progress, "state_digest", lambda model: seen.append("model") or digest(model))
    quantized(fit_tokens=64)
    assert not seen
    quantized(fit_tokens=64, work_dir=tmp_path)
    assert seen == ["model"]


def test_the_report_counts_bits_and_errors() -> None:
    model = tiny()
    report = hfq.quantize(model, hfq.KVQuantConfig(**COMMON, kv_bits=3), ids())
    rows = [row for row in report if row.kind == "cache"]
    assert [row.module for row in rows] == [f"{name}.hfq_attention" for name in attention.parts(model)]
    for row in rows:
        # 3 bits, two outliers of 32 bits a token and side, and of values a scale and an offset
        assert row.bits == pytest.approx(3 + 2 * 32 / 32 + 32 / 32 / 2) and 0 < row.error < 0.3
        assert row.tokens == ids().numel() and {"key_error", "value_error", "key_outliers"} <= set(row.extra)
    assert report.rows["model.layers.0.mlp.up_proj"].status == "float"
