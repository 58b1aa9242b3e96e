"""Hooks that parts hang on modules, taken off again."""

from __future__ import annotations

import torch
from torch import nn

from hfq.layers.hooks import unhook


def before(module, args, kwargs):
    return (args[0] + 1,), kwargs


def behind(module, args, kwargs, output):
    return output * 2


def other(module, args):
    return (args[0] * 3,)


def test_only_the_named_functions_go():
    module, x = nn.Identity(), torch.ones(2)
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_pre_hook(other)
    module.register_forward_hook(behind, with_kwargs=True, always_call=True)
    assert module(x).tolist() == [12.0, 12.0]
    unhook(module, before)
    assert module(x).tolist() == [6.0, 6.0]
    unhook(module, behind, before)
    assert module(x).tolist() == [3.0, 3.0]
    flags = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs,
             module._forward_hooks_always_called)  # fmt: skip
    assert not any(flags) and len(module._forward_pre_hooks) == 1
