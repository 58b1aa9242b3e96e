from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hfq.layers.deferred import Deferred


@pytest.fixture
def made():
    content, calls = torch.arange(12.0).reshape(3, 4), []

    def make():
        calls.append(1)
        return content.clone()

    return content, Deferred(make, (3, 4), torch.float32, torch.device("cpu")), calls


def test_form_costs_nothing(made):
    content, lazy, calls = made
    assert lazy.shape == (3, 4) and lazy.dtype == torch.float32 and lazy.device.type == "cpu" and lazy.numel() == 12
    assert not lazy.requires_grad and isinstance(lazy, torch.Tensor) and "3, 4" in repr(lazy)
    assert not isinstance(lazy, nn.Parameter)
    assert not calls


def test_every_use_sees_the_content(made):
    content, lazy, calls = made
    x = torch.randn(2, 4)
    assert torch.equal(torch.nn.functional.linear(x, lazy), x @ content.t())
    assert torch.equal(lazy + 1, content + 1) and type(lazy + 1) is torch.Tensor
    assert torch.equal(lazy[1], content[1]) and torch.equal(lazy.t(), content.t())
    assert torch.equal(lazy.data, content) and torch.equal(lazy.detach(), content)
    assert torch.equal(torch.cat([lazy, content]), torch.cat([content, content]))
    assert lazy.to(torch.float16).dtype == torch.float16
    assert lazy.numpy().tolist() == lazy.tolist() == content.tolist()
    assert len(calls) >= 8


def test_gradients_pass_through(made):
    content, lazy, _ = made
    x = torch.randn(2, 4, requires_grad=True)
    torch.nn.functional.linear(x, lazy).square().sum().backward()
    y = x.detach().requires_grad_()
    torch.nn.functional.linear(y, content).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_writing_is_refused(made):
    _, lazy, _ = made
    with pytest.raises(RuntimeError, match="cannot be written in place"):
        lazy.copy_(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="cannot be written in place"), torch.no_grad():
        nn.init.normal_(lazy)


def test_copies_are_plain(made):
    content, lazy, _ = made
    for other in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert type(other) is torch.Tensor and torch.equal(other, content)


def test_as_a_parameter(made):
    content, _, _ = made
    lazy = Deferred(lambda: content, (3, 4), torch.float32, torch.device("cpu"), parameter=True)
    assert isinstance(lazy, nn.Parameter)
    module = nn.Module()
    module.register_parameter("w", lazy)
    assert torch.equal(module.state_dict()["w"], content) and type(module.state_dict()["w"]) is torch.Tensor
    for other in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert type(other) is nn.Parameter and torch.equal(other, content)
