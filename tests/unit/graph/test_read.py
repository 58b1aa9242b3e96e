import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import read


class Mlp(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 16)
        self.down = nn.Linear(16, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks: nn.Module, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.project = nn.Linear(width, width)
        self.trunk = blocks
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, ids):
        x = self.project(self.embed(ids))
        for block in self.trunk:
            x = block(x)
        return self.head(x)


class Experts(nn.Module):
    def __init__(self, transposed: bool = False, inner: int = 6):
        super().__init__()
        shapes = ((4, 2 * inner, 8), (4, 8, inner))
        self.a = nn.Parameter(torch.randn(*(s[::1] if not transposed else (s[0], s[2], s[1]) for s in shapes[:1])))
        self.b = nn.Parameter(torch.randn(shapes[1] if not transposed else (4, inner, 8)))


def test_blocks_sites_and_default_skips():
    plan = read(Net(nn.ModuleList([Mlp(), Mlp(), Mlp()])))
    assert [b.name for b in plan.blocks] == ["trunk.0", "trunk.1", "trunk.2"]
    assert [s.name for s in plan.blocks[1].sites] == ["trunk.1.up", "trunk.1.down"]
    assert plan.blocks[1].groups == [[s] for s in plan.blocks[1].sites]
    assert [s.name for s in plan.outside] == ["project"]
    assert "last block" in plan.skipped["head"] and plan.skipped["embed"].startswith("embedding")
    assert len(plan.stacks) == 1 and [b.index for b in plan.blocks] == [0, 1, 2]
    assert plan.block("trunk.2.up").name == "trunk.2" and plan.site("head").out_features == 11
    with pytest.raises(QuantizationError, match="no block"):
        plan.block("nothing")
    with pytest.raises(QuantizationError, match="no site"):
        plan.site("nothing")


def test_sequential_stack_and_no_stack():
    assert len(read(Net(nn.Sequential(Mlp(), Mlp()))).blocks) == 2
    plan = read(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert plan.blocks == [] and len(plan.outside) == 2


def test_stages_hold_the_blocks():
    class Stage(nn.Module):
        def __init__(self, depth: int):
            super().__init__()
            self.inner = nn.ModuleList([Mlp() for _ in range(depth)])
            self.down = nn.Linear(8, 8)

    plan = read(nn.ModuleDict({"stages": nn.ModuleList([Stage(2), Stage(1)])}))
    assert [b.name for b in plan.blocks] == ["stages.0.inner.0", "stages.0.inner.1", "stages.1.inner.0"]
    assert [len(stack) for stack in plan.stacks] == [2, 1]
    assert [s.name for s in plan.outside] == ["stages.0.down"]
    assert "stages.1.down" in plan.skipped


def test_a_list_of_experts_is_no_stack():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.gate = nn.Linear(8, 4)
            self.experts = nn.ModuleList([Expert() for _ in range(4)])

    plan = read(nn.ModuleList([Block(), Block()]))
    assert [b.name for b in plan.blocks] == ["0", "1"]
    assert len(plan.blocks[0].sites) == 8
    assert plan.skipped["0.gate"].startswith("router")


def test_expert_tensors():
    for transposed in (False, True):
        site = read(nn.ModuleDict({"experts": Experts(transposed)})).outside[0]
        assert (site.kind, site.in_features, site.out_features) == ("experts", 8, 8)
        assert site.tensors == ("a", "b") and site.numel == 4 * 8 * 18
    with pytest.raises(QuantizationError, match="several weights"):
        _ = site.weight


def test_skip_only_ask():
    model = Net(nn.ModuleList([Mlp(), Mlp()]))
    plan = read(model, skip=["trunk.1"])
    assert [s.name for s in plan.sites] == ["trunk.0.up", "trunk.0.down", "project"]
    assert "pattern 'trunk.1'" in plan.skipped["trunk.1.up"] and len(plan.blocks[1].kept) == 2
    plan = read(model, only=["*.up"])
    assert [s.name for s in plan.sites] == ["trunk.0.up", "trunk.1.up"]
    plan = read(model, ask=["head", "embed"])
    assert "head" not in plan.skipped and "embed" not in plan.skipped
    assert {s.name for s in plan.outside} == {"head", "embed", "project"}


def test_tied_parametrized_and_bypassed_weights():
    model = Net(nn.ModuleList([Mlp(), Mlp()]))
    model.head.weight = model.embed.weight
    model.trunk[0].up = nn.utils.parametrizations.weight_norm(model.trunk[0].up)
    model.trunk[1].attention = nn.MultiheadAttention(8, 2)
    plan = read(model)
    assert plan.skipped["head"] == "weight tied to embed" and plan.skipped["embed"] == "weight tied to head"
    assert "parametrized" in plan.skipped["trunk.0.up"]
    assert "without calling" in plan.skipped["trunk.1.attention.out_proj"]


def test_output_embeddings_are_a_head_wherever_they_are_defined():
    model = Net(nn.ModuleList([Mlp(), Mlp()]))
    model.get_output_embeddings = lambda: model.project
    assert read(model).skipped["project"] == "output head"


def test_meta_device_and_packed_layers():
    with torch.device("meta"):
        model = Net(nn.ModuleList([Mlp(), Mlp()]))
    model.trunk[0].up.qweight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    plan = read(model)
    assert [s.name for s in plan.blocks[0].sites] == ["trunk.0.down"]


@pytest.mark.parametrize(
    ("shapes", "turned"),
    [
        ({"gate_up": (4, 24, 8), "down": (4, 8, 12)}, False),
        ({"gate_up": (4, 8, 24), "down": (4, 12, 8)}, True),
        ({"gate": (4, 12, 8), "up": (4, 12, 8), "down": (4, 8, 12)}, False),
        ({"up": (4, 12, 8), "down": (4, 8, 12)}, False),
        ({"gate_up": (4, 8, 8), "down": (4, 8, 4)}, False),  # twice the inner size equals the width
        ({"gate_up": (4, 8, 8), "down": (4, 4, 8)}, True),
    ],
)
def test_the_orientation_of_experts_is_read_from_their_shapes(shapes, turned):
    bank = nn.Module()
    for name, shape in shapes.items():
        setattr(bank, name, nn.Parameter(torch.zeros(shape)))
    assert read(nn.ModuleDict({"bank": bank})).outside[0].in_by_out is turned
    bank.is_transposed = not turned
    assert read(nn.ModuleDict({"bank": bank})).outside[0].in_by_out is not turned
