"""Pairs of small blocks in which one thing is unusual."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.graph import read
from hfq.graph.links import apply_scale
from hfq.graph.pairs import discover
from hfq.graph.trace import order_groups, record

WIDTH, INNER = 12, 16


class Rms(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH) * 0.3 + 1 - offset)
        self.offset = offset

    def forward(self, x):
        normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normal * (self.offset + self.weight)).type_as(x)


class Block(nn.Module):
    """x + down(up(norm(x)) * gate(norm(x)).sigmoid()), with hooks for what is unusual."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or Rms()
        self.up, self.gate = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def normed(self, x):
        return self.norm(x)

    def inner(self, h):
        return self.up(h) * self.gate(h).sigmoid()

    def forward(self, x):
        return x + self.down(self.inner(self.normed(x)))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def examine(*blocks, **kwargs):
    torch.manual_seed(0)
    model = Net(*blocks).eval()
    plan = read(model)
    x = torch.randn(3, 7, WIDTH)
    return plan, discover(plan, lambda: model(x), **kwargs)


def kinds(report):
    return {(pair.kind, pair.proven) for pair in report}


def test_plain_block():
    plan, report = examine(Block(), Block())
    assert kinds(report) == {("norm", True), ("updown", True), ("rotation", True)}
    assert [[s.name for s in g] for g in plan.blocks[0].groups] == [["blocks.0.up", "blocks.0.gate"], ["blocks.0.down"]]
    rotation = report.proven("rotation")[0]
    assert rotation.blocks == ["blocks.0", "blocks.1"] and not rotation.fix_ones and rotation.width == WIDTH


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gain_conventions(offset):
    _, report = examine(Block(Rms(offset)))
    norm = report.proven("norm")[0].sources[0].part
    assert norm.offset == offset and norm.gain == "weight" and not norm.centred and norm.bias is None


def test_layer_norm_keeps_ones_and_moves_its_bias():
    block = Block(nn.LayerNorm(WIDTH))
    nn.init.normal_(block.norm.bias)
    _, report = examine(block)
    assert report.proven("rotation")[0].fix_ones and report.proven("norm")[0].bias_moves


def test_bias_stays_where_a_mask_or_padding_lies_between():
    class Masked(Block):
        def normed(self, x):
            return self.norm(x) * torch.ones(7, 1)

    block = Masked(nn.LayerNorm(WIDTH))
    nn.init.normal_(block.norm.bias)
    pair = examine(block)[1].proven("norm")[0]
    assert not pair.bias_moves

    class Padded(Block):
        def normed(self, x):
            return F.pad(self.norm(x), (0, 0, 0, 0))

    block = Padded(nn.LayerNorm(WIDTH))
    nn.init.normal_(block.norm.bias)
    assert not examine(block)[1].proven("norm")[0].bias_moves


def test_bias_stays_where_a_reader_has_none():
    block = Block(nn.LayerNorm(WIDTH))
    nn.init.normal_(block.norm.bias)
    block.up.bias = None
    assert not examine(block)[1].proven("norm")[0].bias_moves


def test_norm_that_is_also_added():
    class PostNorm(Block):
        def forward(self, x):
            h = self.norm(x)
            return h + self.down(self.inner(h))

    _, report = examine(PostNorm(), PostNorm())
    assert "added" in report.refused("norm")[0].reason
    assert "cannot be folded" in report.refused("rotation")[0].reason


def test_layer_scale_stops_the_rotation():
    class Scaled(Block):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)

        def forward(self, x):
            return x + self.gamma * self.down(self.inner(self.norm(x)))

    _, report = examine(Scaled())
    assert report.proven("norm") and "channel by channel" in report.refused("rotation")[0].reason


def test_added_constant_stops_the_rotation():
    class Positions(Block):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(7, WIDTH))

        def forward(self, x):
            return super().forward(x + self.position)

    assert "position" in examine(Positions())[1].refused("rotation")[0].reason


def test_nonlinearities():
    class Relu(Block):
        def inner(self, h):
            return F.relu(self.up(h) + 0 * self.gate(h))

    class Gelu(Block):
        def inner(self, h):
            return F.gelu(self.up(h))

    class Only(Block):
        def inner(self, h):
            return F.relu(self.up(h))

    block = Only()
    block.gate = nn.Identity()
    pair = examine(block)[1].proven("updown")[0]
    assert pair.positive and pair.through == "relu"
    block = Gelu()
    block.gate = nn.Identity()
    assert "gelu" in examine(block)[1].refused("updown")[0].reason
    assert not examine(Relu())[1].proven("updown")


def test_fused_up_and_gate_in_any_order():
    class Fused(Block):
        def __init__(self, swap):
            super().__init__()
            self.swap, self.up, self.gate = swap, nn.Linear(WIDTH, 2 * INNER), nn.Identity()

        def inner(self, h):
            a, b = self.up(h).chunk(2, dim=-1)
            return a * b.tanh() if self.swap else a.tanh() * b

    assert examine(Fused(True))[1].proven("updown")[0].sources[0].rows == (0, INNER)
    assert examine(Fused(False))[1].proven("updown")[0].sources[0].rows == (INNER, 2 * INNER)


def test_interleaved_rows():
    class Interleaved(Block):
        def __init__(self):
            super().__init__()
            self.up, self.gate = nn.Linear(WIDTH, 2 * INNER), nn.Identity()

        def inner(self, h):
            pairs = self.up(h).unflatten(-1, (INNER, 2))
            return pairs[..., 0] * pairs[..., 1].tanh()

    link = examine(Interleaved())[1].proven("updown")[0].sources[0]
    assert link.rows is None and torch.nonzero(link.index >= 0).flatten().tolist() == list(range(0, 2 * INNER, 2))


def test_a_site_called_twice_is_refused():
    class Twice(Block):
        def inner(self, h):
            return self.up(h) * self.gate(h).sigmoid() + self.up(torch.ones_like(h)) * 0

    report = examine(Twice())[1]
    assert "called 2 times" in report.refused("norm")[0].reason and not report.proven("norm")
    assert report.proven("updown")  # both results of `up` arrive at `down`


def test_weights_that_belong_to_two_modules():
    first, second = Block(), Block()
    second.up.weight = first.up.weight
    report = examine(first, second)[1]
    reasons = {pair.reason for pair in report.refused("updown")}
    assert reasons == {f"the weight of blocks.{i}.up belongs to another module too" for i in (0, 1)}
    assert report.refused("rotation") and report.refused("norm")


def test_parametrized_weight():
    block = Block()
    block.up = nn.utils.parametrizations.weight_norm(block.up)
    report = examine(block)[1]
    assert not report.proven("norm") and "parametriz" in report.refused("norm")[0].reason


def test_expert_that_the_pass_does_not_reach():
    class Routed(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(WIDTH, INNER)

        def inner(self, h):
            return self.up(h) * self.gate(h).sigmoid() if h.shape[0] < 100 else self.other(h)

    report = examine(Routed())[1]
    assert not report.proven() and "blocks.0.other" in report.refused("norm")[0].reason


def test_write_through_a_view_is_seen():
    class Writes(Block):
        def inner(self, h):
            up = self.up(h)
            up[..., :4].mul_(2).add_(1)
            return up * self.gate(h).sigmoid()

    pairs = [p for p in examine(Writes())[1].proven("updown") if p.sources[0].name.endswith("up")]
    assert not pairs


def test_a_branch_on_values_is_caught_by_the_proof():
    class Sneaky(Block):
        def inner(self, h):
            up = self.up(h)
            with torch.no_grad():
                factor = float(up.abs().max())  # leaves the traced world
            return up * self.gate(h).sigmoid() * factor

    report = examine(Sneaky())[1]
    assert not report.proven("updown")


def test_hidden_state_that_is_tapped():
    class Tapped(Net):
        def forward(self, x):
            first = self.blocks[0](x)
            return self.out(self.blocks[1](first) + first)

    torch.manual_seed(0)
    model = Tapped(Block(), Block()).eval()
    x = torch.randn(3, 7, WIDTH)
    report = discover(read(model), lambda: model(x))
    assert "also read by add" in report.refused("rotation")[0].reason
    assert len(report.proven("norm")) == 2


def test_shared_block():
    torch.manual_seed(0)
    block = Block()
    model = Net(block).eval()
    model.forward = lambda x: model.out(block(block(x)))
    x = torch.randn(3, 7, WIDTH)
    report = discover(read(model), lambda: model(x))
    assert not report.proven() and "2 times" in report.refused("block")[0].reason


def test_discovery_changes_nothing_and_restores_training_mode():
    torch.manual_seed(0)
    model = Net(Block(), Block()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(3, 7, WIDTH)
    discover(read(model), lambda: model(x))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.get_default_dtype() == torch.float32


def test_apply_scale_keeps_the_function():
    torch.manual_seed(0)
    model = Net(Block(nn.LayerNorm(WIDTH)), Block(Rms(1.0))).eval()
    x = torch.randn(3, 7, WIDTH)
    report = discover(read(model), lambda: model(x))
    before = model(x)
    for pair in report.proven():
        if pair.kind != "rotation":
            apply_scale(pair, torch.rand(pair.classes) + 0.5)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_explicit_pairs():
    wanted = {"kind": "updown", "source": "blocks.0.up", "readers": ["blocks.0.down"]}
    report = examine(Block(), explicit=[wanted])[1]
    assert len([p for p in report if p.kind == "updown"]) == 1 and report.proven("updown")
    wrong = {"kind": "updown", "source": "blocks.0.gate", "readers": ["blocks.0.down"]}
    report = examine(Block(), explicit=[wrong])[1]
    assert "changes the block's output" in report.find("updown", "blocks.0.gate").reason
    norm = {"kind": "norm", "source": "blocks.0.norm", "readers": ["blocks.0.up"]}  # one reader forgotten
    assert examine(Block(), explicit=[norm])[1].refused("norm")
    for bad in ({"kind": "updown"}, {**wanted, "kind": "magic"}, {**wanted, "source": "blocks.0.nothing"},
                {**wanted, "source": "elsewhere"}, {**wanted, "rows": [0, 4]}, {**wanted, "colour": 1}):
        with pytest.raises(ConfigError, match="explicit pair"):
            examine(Block(), explicit=[bad])


def test_call_that_does_not_run_the_model():
    plan = read(Net(Block()))
    with pytest.raises(QuantizationError, match="did not run the model"):
        discover(plan, lambda: None)
    assert not any(module._forward_hooks for module in plan.model.modules())


def test_order_and_groups_of_execution():
    class Late(Block):
        def __init__(self):
            nn.Module.__init__(self)
            self.down = nn.Linear(INNER, WIDTH)
            self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
            self.norm = Rms()

        def inner(self, h):
            return self.up(h) * self.gate(h.reshape(-1, WIDTH)).sigmoid().view(3, 7, INNER)

    torch.manual_seed(0)
    model = Net(Late(), Late())
    model.forward = lambda x: model.out(model.blocks[0](model.blocks[1](x)))
    plan = read(model)
    trace = record(plan, lambda: model(torch.randn(3, 7, WIDTH)))
    order_groups(plan, trace)
    assert [b.name for b in plan.blocks] == ["blocks.1", "blocks.0"]
    assert [s.name for s in plan.blocks[0].sites] == ["blocks.1.up", "blocks.1.gate", "blocks.1.down"]
    assert [len(g) for g in plan.blocks[0].groups] == [2, 1]
    assert all(site.executed for site in plan.sites)
