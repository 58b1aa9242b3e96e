from __future__ import annotations

import copy

import pytest
import torch

from hfq.formats import QuantSpec, affine
from hfq.layers import QEmbedding

SPECS = [QuantSpec(4, 32), QuantSpec(3, symmetric=True), QuantSpec(8, 0), QuantSpec(2, 24)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(spec, dtype):
    codes = affine.quantize(torch.randn(50, 64), spec)
    module = QEmbedding(50, 64, spec, padding_idx=0, compute_dtype=dtype)
    module.set_codes("weight", codes)
    ids = torch.randint(0, 50, (3, 7))
    rows = module(ids)
    assert rows.shape == (3, 7, 64) and rows.dtype == dtype
    assert torch.equal(rows, affine.dequantize(codes, torch.float32)[ids].to(dtype))
    assert torch.equal(module.weight + 0, affine.dequantize(codes, dtype))
    assert module.weight.dtype == dtype and not module.prepare()
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (50, 64, 0)


def test_only_the_rows_asked_for_are_unpacked():
    module = QEmbedding(100_000, 64, QuantSpec(4))
    module.set_codes("weight", affine.quantize(torch.randn(100_000, 64), QuantSpec(4)))
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
                seen.append(out.numel())
            return out

    with Watch():
        module(torch.tensor([[1, 5, 99_999]]))
    assert 3 * 64 in seen and max(seen) <= 3 * 64


def test_casts_and_copies():
    module = QEmbedding(20, 32, QuantSpec(4, 16, scale_dtype="float32"))
    module.set_codes("weight", affine.quantize(torch.randn(20, 32), module.spec))
    other = copy.deepcopy(module).to(torch.bfloat16)
    ids = torch.arange(20)
    assert other(ids).dtype == torch.bfloat16 and other.scale.dtype == torch.float32
    assert torch.equal(other(ids), module(ids).to(torch.bfloat16))
