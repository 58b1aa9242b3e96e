"""Reconstruction of a block: that it learns, what it leaves alone, and how samples are drawn from calls."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.reconstruction import block as reconstruct
from hfq.reconstruction import layer
from hfq.reconstruction.samples import Samples
from hfq.rounding import gptq, nearest
from hfq.rounding.flexround import DivisorRounding

WIDTH, LENGTH = 24, 7


class Mixer(nn.Module):
    """A residual block: positions mix through a mask-aware mean, a broadcast position table enters as a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(
        self, x: torch.Tensor, *, table: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, str]:
        weight = torch.ones(x.shape[:2]) if mask is None else mask.float()
        mean = (x * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
        return x + self.down(nn.functional.gelu(self.up(x + mean + table))), "extra"


def step_of(sizes: tuple[int, ...] = (4, 4, 3, 1), *, padded: bool = False, noise: float = 0.02) -> SimpleNamespace:
    """What reconstruction uses of a step; the quantized stream is the float stream with noise."""
    torch.manual_seed(0)
    module = Mixer()
    table = torch.randn(1, LENGTH, WIDTH)
    mixing = torch.randn(WIDTH, WIDTH) * torch.arange(1, WIDTH + 1) ** -0.5
    inputs, float_inputs, outputs, masks = [], [], [], []
    for size in sizes:
        x = torch.randn(size, LENGTH, WIDTH) @ mixing
        mask = torch.arange(LENGTH)[None] < torch.randint(3, LENGTH + 1, (size, 1)) if padded else None
        kwargs = {"table": table, "mask": mask}
        float_inputs.append(((x,), kwargs))
        inputs.append(((x + noise * torch.randn_like(x),), kwargs))
        masks.append(mask)
        with torch.no_grad():
            outputs.append(module(x, **kwargs)[0])
    sites = [SimpleNamespace(name=f"h.0.{n}", kind="linear", module=getattr(module, n)) for n in ("up", "down")]
    block = SimpleNamespace(name="h.0", module=module, sites=sites)
    return SimpleNamespace(
        block=block, inputs=inputs, float_inputs=float_inputs, outputs=outputs, mask=lambda i: masks[i]
    )


def quantizers(step: SimpleNamespace, spec: QuantSpec, **options: Any) -> dict[str, DivisorRounding]:
    return {site.name: DivisorRounding(site.module.weight, spec, **options) for site in step.block.sites}


def weights_of(made: dict[str, DivisorRounding]) -> dict[str, torch.Tensor]:
    return {name: affine.dequantize(q.codes()) for name, q in made.items()}


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, 16), QuantSpec(3, 0)], ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_lower_error_than_nearest(spec: QuantSpec, rank: int | None) -> None:
    step = step_of()
    before = copy.deepcopy(step.block.module.state_dict())
    made = quantizers(step, spec, rank=rank)
    start = reconstruct.output_error(step, weights_of(made))
    curve = reconstruct.fit(step, made, steps=150, lr=5e-3, batch_size=4, generator=torch.Generator().manual_seed(0))
    assert len(curve) == 150
    assert reconstruct.output_error(step, weights_of(made)) < 0.85 * start
    assert all(torch.equal(value, before[key]) for key, value in step.block.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in step.block.module.parameters())


def test_same_seed_same_result_and_other_seed_another() -> None:
    results = []
    for seed in (0, 0, 1):
        step = step_of()
        made = quantizers(step, QuantSpec(3))
        curve = reconstruct.fit(
            step, made, steps=20, lr=5e-3, batch_size=4, generator=torch.Generator().manual_seed(seed)
        )
        results.append((curve, made["h.0.up"].codes().codes))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


def test_micro_batches_and_single_calls_give_the_same_gradients() -> None:
    curves = []
    for sizes, limit in (((4, 4, 3, 1), None), ((4, 4, 3, 1), 1), ((12,), None), ((12,), 5)):
        step = step_of()
        whole = {i: [torch.cat([c[0][0] for c in getattr(step, i)])] for i in ("inputs", "float_inputs")}
        if sizes == (12,):
            kwargs = step.inputs[0][1]
            step.inputs = [((whole["inputs"][0],), kwargs)]
            step.float_inputs = [((whole["float_inputs"][0],), kwargs)]
            step.outputs = [torch.cat(step.outputs)]
        made = quantizers(step, QuantSpec(3))
        curves.append(
            reconstruct.fit(
                step, made, steps=8, lr=5e-3, batch_size=6, micro_batch=limit, mix=0.5,
                generator=torch.Generator().manual_seed(0),
            )
        )  # fmt: skip
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-4)


def test_calls_of_one_shape_run_together() -> None:
    step = step_of((4, 4, 3, 1))
    samples = Samples(step.inputs, step.outputs)
    parts = samples.parts([0, 1, 4, 8, 11], 0)
    # The call of one sample has a table that counts as one row each: it cannot tell a batch of one from broadcasting.
    assert sorted(part.rows for part in parts) == [1, 4]
    joined = next(part for part in parts if part.rows == 4)
    assert torch.equal(
        joined.call[0][0], torch.cat([step.inputs[0][0][0][:2], step.inputs[1][0][0][:1], step.inputs[2][0][0][:1]])
    )
    assert joined.call[1]["table"].shape[0] == 1
    assert [part.rows for part in samples.parts([0, 1, 4], 0, limit=2)] == [2, 1]


def test_padded_positions_have_no_influence() -> None:
    errors = []
    for value in (0.0, 50.0):
        step = step_of(padded=True)
        for i, (args, _) in enumerate(step.inputs):
            args[0][~step.mask(i)] = value
            step.outputs[i][~step.mask(i)] = -value
        made = quantizers(step, QuantSpec(3))
        curve = reconstruct.fit(step, made, steps=10, lr=5e-3, batch_size=4, generator=torch.Generator().manual_seed(0))
        errors.append((curve, reconstruct.output_error(step, weights_of(made))))
    assert errors[0][0] == pytest.approx(errors[1][0], rel=1e-4)
    assert errors[0][1] == pytest.approx(errors[1][1], rel=1e-3)


def test_mixed_inputs_come_from_both_streams() -> None:
    step = step_of(noise=1.0)
    samples = Samples(step.inputs, step.outputs, float_inputs=step.float_inputs, mix=0.5)
    part = samples.parts([5], seed=3)[0]
    x, quantized, exact = part.call[0][0][0], step.inputs[1][0][0][1], step.float_inputs[1][0][0][1]
    from_float, from_quantized = x == exact, x == quantized
    assert (from_float | from_quantized).all()
    assert 0.3 < float(from_float.float().mean()) < 0.7
    assert torch.equal(samples.parts([5], seed=3)[0].call[0][0], part.call[0][0])
    assert not torch.equal(samples.parts([5], seed=4)[0].call[0][0], part.call[0][0])
    step.float_inputs = None
    with pytest.raises(QuantizationError, match="float stream"):
        reconstruct.fit(step, quantizers(step, QuantSpec(3)), steps=1, lr=1e-3, mix=0.5)


def test_best_parameters_are_kept_when_training_diverges() -> None:
    step = step_of()
    made = quantizers(step, QuantSpec(4))
    start = reconstruct.output_error(step, weights_of(made))
    reconstruct.fit(step, made, steps=60, lr=0.3, batch_size=4, holdout=0.5, generator=torch.Generator().manual_seed(0))
    assert reconstruct.output_error(step, weights_of(made)) < 1.5 * start


def test_patience_ends_early() -> None:
    step = step_of()
    made = quantizers(step, QuantSpec(4))
    curve = reconstruct.fit(step, made, steps=200, lr=0.3, batch_size=4, holdout=0.5, checks=20, patience=2)
    assert len(curve) < 100


def test_mixed_precision_is_close() -> None:
    curves = []
    for autocast in (None, torch.bfloat16):
        step = step_of()
        made = quantizers(step, QuantSpec(3))
        curves.append(reconstruct.fit(step, made, steps=10, lr=5e-3, batch_size=4, autocast=autocast))
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=0.1)


def test_a_block_that_mixes_samples_keeps_its_calls_whole() -> None:
    step = step_of((4, 4))

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.up(x - x.mean(0, keepdim=True))

    assert reconstruct.separable(step, torch.device("cpu"))
    step.block.module = Across()
    step.block.sites = [SimpleNamespace(name="h.0.up", kind="linear", module=step.block.module.up)]
    with torch.no_grad():
        step.outputs = [step.block.module(args[0]) for args, _ in step.inputs]
    assert not reconstruct.separable(step, torch.device("cpu"))
    made = quantizers(step, QuantSpec(3))
    start = reconstruct.output_error(step, weights_of(made))
    reconstruct.fit(step, made, steps=60, lr=5e-3, batch_size=1)
    assert reconstruct.output_error(step, weights_of(made)) < 0.9 * start


def test_transposed_sites_and_other_parameters() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH))
            self.gain = nn.Parameter(torch.ones(2 * WIDTH))

        def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return (x @ self.weight) * self.gain

    step = step_of()
    module = nn.ModuleDict({"c": Transposed()})
    module.forward = lambda x, **_: module["c"](x)  # type: ignore[method-assign]
    step.block = SimpleNamespace(
        name="h.0", module=module, sites=[SimpleNamespace(name="h.0.c", kind="transposed", module=module["c"])]
    )

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.full((2 * WIDTH,), 0.5))

        def forward(self) -> torch.Tensor:
            return self.value

    step.outputs = [step.block.module(args[0]).detach() for args, _ in step.float_inputs]
    gain = Gain()
    made = {"h.0.c": DivisorRounding(module["c"].weight.t(), QuantSpec(8)), "h.0.c.gain": gain}
    reconstruct.fit(step, made, steps=150, lr=lambda name, _: 0.02 if "gain" in name else 0.0, batch_size=6)
    assert float((gain.value.detach() - 1).abs().max()) < 0.1
    with pytest.raises(QuantizationError, match="no parameter 'missing'"):
        reconstruct.fit(step, {"h.0.missing": gain}, steps=1, lr=1e-3)


def test_errors() -> None:
    step = step_of()
    made = quantizers(step, QuantSpec(4))
    with pytest.raises(ConfigError, match="float16"):
        reconstruct.fit(step, made, steps=1, lr=1e-3, autocast=torch.float16)
    with pytest.raises(ConfigError, match="holdout"):
        reconstruct.fit(step, made, steps=1, lr=1e-3, holdout=1.0)
    step.outputs[0][:] = torch.nan
    with pytest.raises(QuantizationError, match="h.0: the loss is nan in step"):
        reconstruct.fit(step, made, steps=20, lr=1e-3)
    assert reconstruct.fit(step, made, steps=0, lr=1e-3) == []


def _train(rank: int, world: int, results: Any, port: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    step = step_of((4, 4, 3, 1))
    own = slice(None) if world == 1 else slice(0, 2) if rank == 0 else slice(2, 4)
    step.inputs, step.float_inputs, step.outputs = step.inputs[own], step.float_inputs[own], step.outputs[own]
    made = quantizers(step, QuantSpec(3))
    curve = reconstruct.fit(
        step, made, steps=12, lr=5e-3, batch_size=6, mix=0.5, holdout=0.25, generator=torch.Generator().manual_seed(0)
    )
    results[(world, rank)] = (curve, {name: q.codes().codes.tolist() for name, q in made.items()})
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    # The children import this module by its name, which plain `pytest` leaves off the path.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        _train(0, 1, results, port)
        mp.spawn(_train_entry, args=(2, results, port), nprocs=2)
        one, first, second = results[(1, 0)], results[(2, 0)], results[(2, 1)]
    assert first[0] == pytest.approx(one[0], rel=1e-4)
    assert first == second
    for name, codes in one[1].items():
        same = (torch.tensor(codes) == torch.tensor(first[1][name])).float().mean()
        assert same > 0.999


def _train_entry(rank: int, world: int, results: Any, port: int) -> None:
    _train(rank, world, results, port)


def test_layer_fit_beats_nearest_in_the_second_moment() -> None:
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, 32)
    mixing = torch.randn(WIDTH, WIDTH) * torch.arange(1, WIDTH + 1) ** -1.0
    inputs = [torch.randn(4, LENGTH, WIDTH) @ mixing.T for _ in range(3)]
    rows = torch.cat([x.flatten(0, 1) for x in inputs])
    h = 2 / len(rows) * rows.T @ rows
    w = module.weight.detach()

    def relative(codes: Any) -> float:
        d = w - affine.dequantize(codes)
        return float(((d @ h) * d).sum() / ((w @ h) * w).sum())

    start = relative(nearest.solve(w, QuantSpec(3)))
    site = SimpleNamespace(name="h.0.up", kind="linear", module=module)
    by_inputs = DivisorRounding(w, QuantSpec(3))
    layer.fit(site, by_inputs, inputs, steps=150, lr=5e-3, batch_size=4)
    assert relative(by_inputs.codes()) < 0.8 * start
    assert relative(gptq.solve(w, h, QuantSpec(3), clip="mse", refine=2)[0]) < start


def test_a_relative_loss_starts_at_its_number_and_rates_may_stay() -> None:
    module, inputs = nn.Linear(WIDTH, WIDTH), [torch.randn(8, WIDTH)]
    site = SimpleNamespace(name="here", kind="linear", module=module)
    curves = []
    for scale in (1.0, 1000.0):
        quantizer = DivisorRounding(module.weight, QuantSpec(3))
        curves.append(layer.fit(site, quantizer, inputs, [module(x).detach() * scale for x in inputs], steps=4, lr=1e-3,
                                batch_size=8, relative=2.0, constant=lambda name: True))
    assert [curve[0] for curve in curves] == [2.0, 2.0] and min(curves[0]) < 2
