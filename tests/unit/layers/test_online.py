from __future__ import annotations

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.kernels import hadamard
from hfq.layers import Hadamard, StreamRotation, install_rotation, swap
from hfq.layers.online import rotations

D = 24
Pair = namedtuple("Pair", "hidden cache")


class Output(dict):
    """Like a ModelOutput: a dictionary that is read by position too."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


FORMS = {
    "tensor": lambda h: h, "tuple": lambda h: (h, "cache"), "list": lambda h: [h, "cache"],
    "named": lambda h: Pair(h, "cache"), "output": lambda h: Output(hidden=h, cache="cache"),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, form="tensor"):
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.form = form

    def forward(self, hidden_states, scale=1.0):
        return FORMS[self.form](hidden_states + scale * self.lin(hidden_states))


class Model(nn.Module):
    def __init__(self, forms=("tensor", "tensor"), by_name=False):
        super().__init__()
        self.embed = nn.Linear(5, D)
        self.blocks = nn.ModuleList(Block(form) for form in forms)
        self.head = nn.Linear(D, 3)
        self.by_name = by_name

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            out = block(hidden_states=h, scale=0.5) if self.by_name else block(h, 0.5)
            h = out if isinstance(out, torch.Tensor) else out[0]
        return self.head(h)


def rotate(model, kind="hadamard", block=None):
    """Rotate the stream and fold the rotation into what lies between, so that the function stays."""
    generator = torch.Generator().manual_seed(5)
    if kind == "hadamard":
        tensors = {"signs": hadamard.random_signs(D, generator)}
    else:
        tensors = {"matrix": torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]}
    last = f"blocks.{len(model.blocks) - 1}"
    first, _ = install_rotation(model, "blocks.0", last, kind, tensors, block=block)
    q = first.matrix_of()
    with torch.no_grad():
        for b in model.blocks:
            b.lin.weight.copy_(q.t() @ b.lin.weight.double() @ q)
            b.lin.bias.copy_(b.lin.bias.double() @ q)
    return q


class TestHadamard:
    @pytest.mark.parametrize("block", [None, 12, 2])
    @pytest.mark.parametrize("signs", [False, True])
    def test_inverse_and_fold(self, block, signs):
        part = Hadamard(D, block, signs=hadamard.random_signs(D) if signs else None)
        x, w = torch.randn(7, D), torch.randn(5, D)
        assert torch.allclose(part.inverse(part(x)), x, atol=1e-5)
        assert torch.allclose(part(x) @ part.fold(w).t(), x @ w.t(), atol=1e-5)
        assert part.fold(w.bfloat16()).dtype == torch.bfloat16
        assert (part(x) - x).norm() > 0.1

    def test_refusals(self):
        with pytest.raises(QuantizationError, match="block of 5"):
            Hadamard(D, 5)
        with pytest.raises(QuantizationError, match="nearest"):
            Hadamard(30)
        with pytest.raises(QuantizationError, match=r"\+1 or -1"):
            Hadamard(D, signs=torch.zeros(D, dtype=torch.int8))
        with pytest.raises(QuantizationError, match="24 elements"):
            Hadamard(D, signs=torch.ones(D - 1, dtype=torch.int8))

    def test_signs_are_a_parameter_that_casts_leave_alone(self):
        part = Hadamard(D, signs=hadamard.random_signs(D)).to(torch.bfloat16)
        assert part.signs.dtype == torch.int8 and not part.signs.requires_grad and not list(part.buffers())
        assert not list(Hadamard(D).parameters())


class TestStreamRotation:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize(("kind", "block"), [("hadamard", None), ("hadamard", 12), ("dense", None)])
    def test_keeps_the_function(self, form, by_name, kind, block):
        model, x = Model(("tensor", form), by_name), torch.randn(4, 6, 5)
        y = model(x)
        q = rotate(model, kind, block)
        assert torch.allclose(q @ q.t(), torch.eye(D, dtype=q.dtype), atol=1e-6)
        assert torch.allclose(model(x), y, atol=1e-4)
        seen = []
        model.blocks[1].lin.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        h, lin = model.embed(x) @ q.float(), model.blocks[0].lin
        model(x)
        wanted = h + 0.5 * lin(h)
        assert torch.allclose(seen[0], wanted, atol=1e-4), "the stream in between is not rotated"

    def test_other_outputs_stay(self):
        model = Model(("named",))
        rotate(model)
        out = model.blocks[0](torch.randn(2, D))
        assert isinstance(out, Pair) and out.cache == "cache"

    def test_one_block_has_both(self):
        model, x = Model(("tuple",)), torch.randn(3, 5)
        y = model(x)
        rotate(model)
        assert torch.allclose(model(x), y, atol=1e-5)
        assert [entry["side"] for entry in rotations(model)] == ["in", "out"]

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_rotate_by_their_own_tensors(self, duplicate):
        model, x = Model(), torch.randn(3, 5)
        rotate(model)
        y = model(x)
        other = duplicate(model)
        assert torch.allclose(other(x), y)
        with torch.no_grad():
            model.blocks[0].hfq_rotation_in.signs.neg_()
        assert torch.allclose(other(x), y) and not torch.allclose(model(x), y)

    @pytest.mark.parametrize("kind", ["hadamard", "dense"])
    def test_rebuilt_from_the_manifest_and_a_state_dict(self, kind):
        model, x = Model(), torch.randn(3, 5)
        rotate(model, kind)
        y, state, manifest = model(x), model.state_dict(), swap.describe(model)
        assert "blocks.0.hfq_rotation_in.signs" in state or kind == "dense"
        assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state), "tensors are shared"
        with torch.device("meta"):
            other = Model()
        swap.build_empty(other, manifest)
        assert {p.device.type for p in other.parameters()} == {"meta"}
        other.load_state_dict(state, assign=True)
        assert torch.equal(other(x), y)
        swap.build_empty(other, manifest)  # what is there stays
        assert torch.equal(other(x), y)
        assert swap.describe(other) == manifest

    def test_gradients_flow_to_the_input_and_not_to_the_rotation(self):
        for kind in ("hadamard", "dense"):
            model, x = Model(), torch.randn(3, 5)
            reference = copy.deepcopy(model)
            rotate(model, kind)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            model(a).square().sum().backward()
            reference(b).square().sum().backward()
            assert torch.allclose(a.grad, b.grad, atol=1e-4)
            assert all(p.grad is None for n, p in model.named_parameters() if "rotation" in n)
            assert all(p.grad is not None for n, p in model.named_parameters() if "rotation" not in n)

    @pytest.mark.parametrize("kind", ["hadamard", "dense"])
    def test_casts_keep_it_orthogonal(self, kind):
        model = Model()
        rotate(model, kind)
        before = {n: p.clone() for n, p in model.named_parameters() if "rotation" in n}
        model.to(torch.bfloat16)
        for name, tensor in before.items():
            assert torch.equal(model.get_parameter(name), tensor) and model.get_parameter(name).dtype == tensor.dtype
        assert model(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("kind", ["hadamard", "dense"])
    def test_under_offloading_hooks(self, kind):
        accelerate = pytest.importorskip("accelerate")
        model, x = Model(("tuple", "tuple")), torch.randn(3, 5)
        rotate(model, kind)
        y = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.blocks[0].hfq_rotation_in._parameters["signs" if kind == "hadamard" else "matrix"].is_meta
        assert torch.equal(model(x), y)

    def test_hooks_that_record_a_call_see_the_caller_s_stream(self):
        model, x = Model(), torch.randn(3, 5)
        inputs, outputs = [], []
        # Hooks from before and from after; a recorder of inputs that comes after puts itself in front.
        model.blocks[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        model.blocks[1].register_forward_hook(lambda m, args, out: outputs.append(out))
        rotate(model)
        model.blocks[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]), prepend=True)
        model.blocks[1].register_forward_hook(lambda m, args, out: outputs.append(out))
        y = model(x)
        assert len(inputs) == len(outputs) == 2
        assert all(torch.equal(h, model.embed(x)) for h in inputs)
        assert all(torch.allclose(model.head(h), y) for h in outputs)

    def test_refusals(self):
        model, signs = Model(), hadamard.random_signs(D)
        with pytest.raises(QuantizationError, match="no block 'blocks.7'"):
            install_rotation(model, "blocks.0", "blocks.7", "hadamard", {"signs": signs})
        with pytest.raises(QuantizationError, match="takes 'signs'"):
            install_rotation(model, "blocks.0", "blocks.1", "hadamard", {"matrix": torch.eye(D)})
        with pytest.raises(QuantizationError, match="not orthogonal"):
            install_rotation(model, "blocks.0", "blocks.1", "dense", {"matrix": torch.randn(D, D)})
        with pytest.raises(QuantizationError, match="kind 'givens'"):
            StreamRotation(D, "givens", "in")
        assert not rotations(model), "a refusal left half a rotation behind"
        install_rotation(model, "blocks.0", "blocks.1", "hadamard", {"signs": signs})
        with pytest.raises(QuantizationError, match="already rotates"):
            install_rotation(model, "blocks.0", "blocks.1", "hadamard", {"signs": signs})
        with pytest.raises(QuantizationError, match="without a hidden state"):
            model.blocks[0](scale=1.0)
