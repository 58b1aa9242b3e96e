import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import read
from hfq.graph.pairs import discover
from hfq.graph.proof import relative_error
from hfq.graph.read import site_of
from hfq.transforms import fold, rotate

WIDTH = 24


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 36), nn.Linear(36, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (m(h).unflatten(-1, (3, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, norm=nn.RMSNorm, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([Block(norm) for _ in range(depth)])
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.arange(20).view(2, 10)


def prepared(norm=nn.RMSNorm, **kwargs):
    model = Net(norm, **kwargs).eval()
    plan = read(model)
    return model, plan, discover(plan, lambda: model(IDS))


def outliers(model):
    """Largest over typical size of the residual stream's channels after the first block."""
    stream = []
    handle = model.blocks[0].register_forward_hook(lambda m, a, out: stream.append(out))
    model(IDS)
    handle.remove()
    sizes = stream[0].detach().abs().amax((0, 1))
    return float(sizes.max() / sizes.median())


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_function_and_embeddings_stay(norm, kind):
    model, plan, pairs = prepared(norm)
    before, embedding, final = model(IDS), model.embed.weight.clone(), model.norm.weight.clone()
    weights = {site.name: site.weight.clone() for site in plan.blocks[0].sites}
    done = rotate.rotate_stream(model, plan, pairs, kind=kind, call=lambda: model(IDS))
    assert [pair.place for pair in done] == ["blocks"]
    assert relative_error(model(IDS), before) < 1e-5
    assert torch.equal(model.embed.weight, embedding) and model.head.weight is model.embed.weight
    assert torch.equal(model.norm.weight, final)
    assert all(not torch.allclose(site.weight, weights[site.name], atol=1e-2) for site in plan.blocks[0].sites)


def test_outliers_are_spread():
    model, _, _ = prepared()
    with torch.no_grad():  # one channel of the stream much larger than the others
        model.blocks[0].down.weight[3] *= 50
        model.blocks[0].o.weight[3] *= 50
    plan = read(model)
    pairs = discover(plan, lambda: model(IDS))
    before, function = outliers(model), model(IDS)
    rotate.rotate_stream(model, plan, pairs, generator=torch.Generator().manual_seed(1))
    assert before > 9 and outliers(model) < before / 3
    assert relative_error(model(IDS), function) < 1e-5


def test_rotation_of_one_block_and_of_a_copy():
    model, plan, pairs = prepared(depth=1)
    before = model(IDS)
    assert rotate.rotate_stream(model, plan, pairs, call=lambda: model(IDS))
    assert relative_error(copy.deepcopy(model)(IDS), before) < 1e-5


def test_given_matrix():
    model, plan, pairs = prepared()
    before = model(IDS)
    _, tensors, _ = rotate.make_rotation(WIDTH, "random")
    rotate.rotate_stream(model, plan, pairs, matrix=tensors["matrix"])
    assert relative_error(model(IDS), before) < 1e-5
    model, plan, pairs = prepared(nn.LayerNorm)
    with pytest.raises(QuantizationError, match="ones"):
        rotate.rotate_stream(model, plan, pairs, matrix=tensors["matrix"])
    with pytest.raises(QuantizationError, match="24 channels"):
        rotate.rotate_stream(model, plan, pairs, matrix=torch.eye(8))


def test_roll_back_restores_every_bit():
    model, plan, pairs = prepared()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model(IDS)
    pair = pairs.proven("rotation")[0]
    pair.readers.pop()  # a pair that claims less than it should, as if the proof had been wrong
    assert rotate.rotate_stream(model, plan, pairs, call=lambda: model(IDS)) == []
    assert "changes the model's output" in pair.reason and not pair.proven
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("width", [24, 36, 30, 64, 7, 1])
@pytest.mark.parametrize("fix_ones", [True, False])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotations_are_orthogonal(width, fix_ones, kind):
    from hfq.layers.online import StreamRotation

    generator = torch.Generator().manual_seed(0)
    name, tensors, block = rotate.make_rotation(width, kind, fix_ones=fix_ones, generator=generator)
    q = StreamRotation(width, name, "in", tensors, block=block).matrix_of()
    assert torch.allclose(q @ q.t(), torch.eye(width, dtype=q.dtype), atol=1e-6)
    if fix_ones:
        assert torch.allclose(q.sum(0), torch.ones(width, dtype=q.dtype), atol=1e-5)
    if width >= 24 and block is None:
        assert float(q.abs().max()) < 0.85  # every channel is spread over many


def test_unknown_kind_and_foreign_plan():
    model, plan, pairs = prepared()
    with pytest.raises(QuantizationError, match="kind"):
        rotate.rotate_stream(model, plan, pairs, kind="magic")
    with pytest.raises(QuantizationError, match="another model"):
        rotate.rotate_stream(Net(), plan, pairs)
    with pytest.raises(QuantizationError, match="another model"):
        fold.fold_norms(Net(), plan, pairs)


def test_heads():
    model, plan, pairs = prepared()
    before, value = model(IDS), model.blocks[0].v.weight.clone()
    assert len(rotate.rotate_heads(model, plan, pairs)) == 2
    assert relative_error(model(IDS), before) < 1e-5 and not torch.allclose(model.blocks[0].v.weight, value, atol=1e-2)


@pytest.mark.parametrize("size", [36, 24, 64])
@pytest.mark.parametrize("signs", [True, False])
def test_online_input(size, signs):
    torch.manual_seed(0)
    layer = nn.Linear(size, 5)
    site = site_of("layer", layer)
    x = torch.randn(3, size)
    y, weight = layer(x), layer.weight.clone()
    transform = rotate.online_input(site, signs=signs)
    assert torch.allclose(layer(x), y, atol=1e-5) and not torch.allclose(layer.weight, weight, atol=1e-2)
    # What a packed layer will compute: the transformed input times the changed weight.
    assert torch.allclose(F.linear(transform(x), layer.weight, layer.bias), y, atol=1e-5)
    assert rotate.online_of(layer) is transform and list(layer.state_dict()) == ["weight", "bias"]
    seen = []
    layer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    layer(x)
    assert torch.allclose(seen[0], transform(x))  # statistics see what the packed layer's weight will meet
    assert torch.allclose(copy.deepcopy(layer)(x), y, atol=1e-5)
    with pytest.raises(QuantizationError, match="already"):
        rotate.online_input(site)


def test_online_input_needs_a_linear():
    with pytest.raises(QuantizationError, match="embedding"):
        rotate.online_input(site_of("e", nn.Embedding(4, 8)))
    with pytest.raises(QuantizationError, match="order"):
        rotate.online_input(site_of("l", nn.Linear(7, 3)))


def test_fold_twice_and_some_blocks():
    model, plan, pairs = prepared(nn.LayerNorm)
    before = model(IDS)
    assert fold.fold_norms(model, plan, pairs, blocks=["blocks.1"]) == ["blocks.1.norm", "blocks.1.norm2"]
    assert relative_error(model(IDS), before) < 1e-5
    assert not model.blocks[0].norm.weight.eq(1).all() and model.blocks[1].norm.weight.eq(1).all()
    assert model.blocks[1].norm.bias.eq(0).all()
    folded = {key: value.clone() for key, value in model.state_dict().items()}
    fold.fold_norms(model, plan, pairs, blocks=["blocks.1"])
    assert all(torch.equal(value, folded[key]) for key, value in model.state_dict().items())


def test_placement_is_entered_for_every_block():
    from contextlib import contextmanager

    model, plan, pairs = prepared()
    entered = []

    @contextmanager
    def placement(module):
        entered.append(module)
        yield

    fold.fold_norms(model, plan, pairs, placement=placement)
    rotate.rotate_stream(model, plan, pairs, placement=placement)
    rotate.rotate_heads(model, plan, pairs, placement=placement)
    assert entered == [*model.blocks] * 3
    entered.clear()
    discover(plan, lambda: model(IDS), placement=placement)
    assert entered == [*model.blocks]
