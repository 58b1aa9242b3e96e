"""The loop and the student: gradients, recomputation, parts of a mini-batch, padding, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from hfq import graph
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, affine
from hfq.layers.fake import fake_inputs
from hfq.training import learn, loop
from hfq.training.distill import Distillation
from hfq.training.losses import top_divergence
from hfq.training.progress import Saved
from hfq.training.student import Student
from hfq.training.weights import FakeWeights
from hfq.transforms.learned import Sites
from hfq.transforms.manifold import ManifoldAdam, parameter_groups

IDS = torch.randint(0, 96, (6, 10), generator=torch.Generator().manual_seed(0))


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, bos_token_id=1, eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def with_outliers(model: Any, by: float = 10) -> Any:
    """The same function, with two channels behind each norm ``by`` times as large."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in ((layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                              (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
            norm.weight[:2] *= by
            for reader in readers:
                reader.weight[:, :2] /= by
    return model


class Setting:
    """A model with transforms and 4-bit inputs."""

    def __init__(self, *, recompute: bool = True, shape: Any = None, bits: int = 4, start: str = "womi",
                 outliers: bool = False) -> None:
        self.model = with_outliers(tiny()) if outliers else tiny()
        self.plan = graph.read(self.model)
        made = learn.prepare(self.model, self.plan, lambda: self.model(IDS[:1]), Sites(start=start))
        self.transforms = made.transforms
        specs = {site.module: ActivationSpec(bits) for site in self.plan.sites}
        blocks = [(block.name, block.module) for block in self.plan.blocks]
        shape = shape(self.plan) if shape else None
        self.student = Student(self.model, blocks, self.transforms, inputs=lambda: fake_inputs(specs), shape=shape,
                               recompute=recompute)
        self.objective = Distillation(self.student, lambda s, t: top_divergence(s, t, 20))

    def optimizer(self, lr: float = 0.02) -> ManifoldAdam:
        return ManifoldAdam(parameter_groups(self.transforms, rotation_lr=lr, lr=lr / 10))

    def gradients(self, *batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.objective.start()
        for batch in batches:
            self.objective.add(batch)
        self.objective.finish()
        found = {name: p.grad.clone() for name, p in self.transforms.named_parameters()}
        self.transforms.zero_grad()
        return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-4) -> bool:
    scale = max(float(t.norm()) for t in a.values())
    return a.keys() == b.keys() and all(float((a[k] - b[k]).norm()) <= tolerance * scale for k in a)


def test_gradients_are_those_of_the_merged_model_in_one_graph() -> None:
    one = Setting()
    found = one.gradients({"input_ids": IDS})
    assert all(float(g.norm()) > 0 for g in found.values())
    wanted = one.student.teacher({"input_ids": IDS})
    merged = one.transforms()
    (stream,) = one.transforms.streams
    q = one.transforms.rotation(stream)
    blocks = one.model.model.layers
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, k: ((a[0] @ q, *a[1:]), k), with_kwargs=True),
        blocks[1].register_forward_hook(lambda m, a, o: o @ q.t()),
    ]
    handles += [one.model.get_submodule(name).register_forward_pre_hook(lambda m, a, part=part: (part(a[0]),))
                for name, part in one.transforms.online.items()]  # fmt: skip
    with one.student.inputs():
        logits = functional_call(one.model, merged, (IDS,)).logits
    for handle in handles:
        handle.remove()
    top_divergence(logits, wanted, 20).sum().backward()
    assert same(found, {name: p.grad for name, p in one.transforms.named_parameters()})


def test_recomputation_changes_nothing() -> None:
    first, second = (Setting(recompute=flag).gradients({"input_ids": IDS}) for flag in (True, False))
    assert same(first, second, 1e-6)


def test_parts_of_a_mini_batch_add_up() -> None:
    one = Setting()
    whole = one.gradients({"input_ids": IDS})
    assert same(whole, one.gradients({"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}))
    assert not same(whole, one.gradients({"input_ids": IDS[:2]}))


def test_the_model_is_as_before_outside_of_running() -> None:
    one = Setting()
    with torch.no_grad():
        before = one.model(IDS).logits
        one.student.start()
        with one.student.running():
            assert not torch.equal(one.model(IDS).logits, before)
        assert torch.equal(one.model(IDS).logits, before)
    for block in one.model.model.layers:
        assert "forward" not in vars(block) and not block._forward_pre_hooks and not block._forward_hooks
    assert torch.equal(one.student.teacher({"input_ids": IDS}), before)


def test_padded_positions_do_not_count() -> None:
    one = Setting()
    mask = torch.ones_like(IDS)
    mask[1:, 6:] = 0
    one.objective.start()
    loss, count = one.objective.add({"input_ids": IDS, "attention_mask": mask})
    other = IDS.clone()
    other[mask == 0] = 5
    again, _ = one.objective.add({"input_ids": other, "attention_mask": mask})
    assert count == 10 + 5 * 6 and again == pytest.approx(loss, rel=1e-5)


def test_training_lowers_the_loss_and_repeats() -> None:
    curves, losses = [], []
    for _ in range(2):
        one = Setting(bits=3, start="identity", outliers=True)  # else there is little to learn
        batches = [{"input_ids": IDS}]
        before = one.objective.mean(batches)
        curves.append(loop.fit(one.objective, one.optimizer(), batches, steps=12, batch_size=6, micro_batch=3))
        losses.append((before, one.objective.mean(batches)))
    assert curves[0] == curves[1] and len(curves[0]) == 12
    assert losses[0][1] < 0.9 * losses[0][0]


def test_every_row_is_used_before_one_is_used_again() -> None:
    rows = loop._Rows([{"input_ids": IDS[:4]}, {"input_ids": IDS[4:]}], 3, seed=0)
    firsts = [[int(part["input_ids"][0, 0]) for part in rows.parts(step, 1)] for step in range(4)]
    assert all(sorted(firsts[i] + firsts[i + 1]) == sorted(IDS[:, 0].tolist()) for i in (0, 2))
    assert [[len(part["input_ids"]) for part in rows.parts(0, 4)]] != [[1, 1, 1]]
    again = loop._Rows([{"input_ids": IDS[:4]}, {"input_ids": IDS[4:]}], 3, seed=0)
    assert [int(part["input_ids"][0, 0]) for part in again.parts(3, 1)] == firsts[3]


@pytest.mark.parametrize("schedule", loop.SCHEDULES)
def test_schedules(schedule: str) -> None:
    factors = [loop._factor(schedule, step, 10) for step in range(10)]
    assert factors[0] == 1 and all(a >= b for a, b in zip(factors, factors[1:], strict=False))
    assert (factors[-1] < 0.2) == (schedule != "constant")


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def trained(steps: int, path: Path | None, stop: int | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        one = Setting()
        seen: list[int] = []

        def after() -> None:
            seen.append(1)
            if len(seen) == stop:
                raise KeyboardInterrupt

        saved = None if path is None else Saved(path, {"config": 1}, every=2)
        curve = loop.fit(one.objective, one.optimizer(), [{"input_ids": IDS}], steps=steps, batch_size=4, saved=saved,
                         after=after)
        return curve, one.transforms.state_dict()

    whole, wanted = trained(7, None)
    path = tmp_path / "deep" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(7, path, stop=5)
    curve, found = trained(7, path)
    assert curve == whole and all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Finished: nothing is trained again.
    assert trained(7, path, stop=1)[0] == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    one = Setting()
    loop.fit(one.objective, one.optimizer(), [{"input_ids": IDS}], steps=1, saved=Saved(path, {"seed": 0}))
    with pytest.raises(CheckpointError, match="another run: seed was 0, is 1"):
        Saved(path, {"seed": 1}).load(one.optimizer())
    with pytest.raises(CheckpointError, match="shapes"):
        Saved(path, {"seed": 0}).load(torch.optim.Adam([nn.Parameter(torch.ones(2))]))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        Saved(path, {"seed": 0}).load(one.optimizer())


def test_weights_are_rounded_with_a_straight_through_gradient() -> None:
    spec = QuantSpec(3, symmetric=True)
    one = Setting(shape=lambda plan: FakeWeights({site: spec for site in plan.sites}))
    with torch.no_grad():
        one.student.start()
    weight = one.student._weights["model.layers.0"]["model.layers.0.mlp.up_proj.weight"]
    assert all(len(torch.unique(row)) <= 8 for row in weight)
    one.student.drop()
    found = one.gradients({"input_ids": IDS})
    assert all(float(g.norm()) > 0 for g in found.values())
    # Searched ranges are no worse than the extremes.
    merged = one.transforms()["model.layers.0.mlp.up_proj.weight"].detach()
    nearest = affine.dequantize(affine.quantize(merged, spec))
    assert (weight - merged).norm() <= (nearest - merged).norm()


def test_ranges_of_weights_can_be_kept_for_some_steps() -> None:
    one = Setting()
    fake = FakeWeights({one.plan.sites[0]: QuantSpec(4, symmetric=True)}, every=2)
    name = f"{one.plan.sites[0].name}.weight"
    weight = torch.randn(4, 32)
    first = fake(name, weight, True)
    assert torch.equal(fake(name, weight, False), first)
    assert not torch.equal(fake(name, 9 * weight, True), 9 * first)
    torch.testing.assert_close(fake(name, 9 * weight, True), 9 * first, rtol=1e-2, atol=1e-3)
    assert fake("model.norm.weight", weight, True) is weight


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"micro_batch": 0}, {"schedule": "step"}, {"batch_size": 0}])
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    one = Setting()
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        loop.fit(one.objective, one.optimizer(), [{"input_ids": IDS}], **{"steps": 1, **wrong})


def test_impossible_training() -> None:
    one = Setting()
    with pytest.raises(DataError, match="needs data"):
        loop.fit(one.objective, one.optimizer(), [], steps=1)
    one.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(QuantizationError, match="step 0"):
        loop.fit(one.objective, one.optimizer(), [{"input_ids": IDS}], steps=1)
    one.model.lm_head.to("meta")
    with pytest.raises(QuantizationError, match="offloaded"):
        Student(one.model, [], one.transforms)
