from __future__ import annotations

import pytest
import torch

from hfq.errors import QuantizationError
from hfq.kernels import hadamard

# One order a construction: Sylvester, both of Paley over prime and prime-power fields, Goethals-Seidel, product.
GOLDEN = {12: 132, 20: 380, 28: 756, 36: -1332, 92: 301392, 100: -10100, 116: -2121060, 156: 1426620, 172: 18353088}
ORDERS = [1, 2, 4, 64, 12, 20, 28, 36, 40, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 140, 148, 156, 172, 244, 260, 292,
          372, 576, 1536]


@pytest.mark.parametrize("n", ORDERS)
def test_is_a_hadamard_matrix(n):
    h = hadamard.hadamard(n)
    assert h.dtype == torch.int8 and (h.abs() == 1).all()
    assert torch.equal(h.long() @ h.long().t(), n * torch.eye(n, dtype=torch.long))


def test_every_multiple_of_four_up_to_256_but_two():
    assert [n for n in range(4, 257, 4) if not hadamard.is_order(n)] == [188, 236]


@pytest.mark.parametrize(
    ("n", "parts"),
    [(4096, (1, 4096)), (576, (36, 16)), (1536, (12, 128)), (11008, (172, 64)), (14336, (28, 512)), (18944, (148, 128)),
     (8960, (140, 64)), (13824, (108, 128)), (53248, (52, 1024)), (29568, (924, 32))],
)  # fmt: skip
def test_widths_of_real_models(n, parts):
    assert hadamard.decompose(n) == parts


@pytest.mark.parametrize("n", [3, 6, 1076, 4304, 0, -4])
def test_says_what_is_near(n):
    with pytest.raises(QuantizationError, match=f"order {n} can.*nearest") as caught:
        hadamard.decompose(n)
    if n == 4304:
        assert "block=" in str(caught.value)


def test_best_block():
    assert hadamard.best_block(1076) == 4
    assert hadamard.best_block(4304) == 16
    assert hadamard.best_block(96, largest=64) == 48
    assert hadamard.best_block(15) is None


@pytest.mark.parametrize("n", [2, 12, 64, 92, 172, 576, 1536])
def test_transform_is_the_product_and_orthogonal(n):
    x = torch.randn(3, 2, n)
    h = hadamard.hadamard(n).double() / n**0.5
    y = hadamard.transform(x, n)
    assert y.dtype == x.dtype and y.shape == x.shape
    assert ((y - x.double() @ h).norm() / x.norm()) < 1e-6
    assert ((hadamard.transform(y, n, inverse=True) - x).norm() / x.norm()) < 1e-6
    # The matrix is not symmetric: the inverse is another function.
    if n in (12, 172):
        assert ((hadamard.transform(x, n, inverse=True) - y).norm() / x.norm()) > 0.1


def test_orthogonality_of_the_evaluated_matrix():
    q = hadamard.transform(torch.eye(576), 576).double()
    assert (q @ q.t() - torch.eye(576)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_rounded_once(dtype):
    x = torch.randn(4, 576).to(dtype)
    exact = hadamard.transform(x.double(), 576)
    # Against the double result rounded once; float32 sums move a few values over a rounding boundary.
    y = hadamard.transform(x, 576)
    assert y.dtype == dtype and ((y != exact.to(dtype)).float().mean() < 0.01)


def test_blocks_and_strides():
    x = torch.randn(5, 3, 96)
    y = hadamard.transform(x, 12)
    for i in range(8):
        part = slice(12 * i, 12 * i + 12)
        assert torch.allclose(y[..., part], hadamard.transform(x[..., part].contiguous(), 12), atol=1e-6)
    turned = hadamard.transform(x.transpose(0, 1), 96)
    assert torch.allclose(turned, hadamard.transform(x, 96).transpose(0, 1), atol=1e-6)
    assert hadamard.transform(x[:0], 96).shape == (0, 3, 96)
    with pytest.raises(QuantizationError, match="multiple of the block 20"):
        hadamard.transform(x, 20)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(inverse):
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard.transform(x, 12, inverse), x)
    assert torch.autograd.gradcheck(lambda x: torch.ops.hfq.hadamard(x, 24, inverse), x)


def test_tensors_made_in_inference_mode_serve_training():
    hadamard._FACTORS.clear()
    with torch.inference_mode():
        hadamard.transform(torch.randn(2, 20), 20)
    x = torch.randn(2, 20, requires_grad=True)
    hadamard.transform(x, 20).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x, atol=1e-5)


def test_operator_contract_and_full_graph():
    x = torch.randn(3, 5, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.hfq.hadamard.default, (x, 24, False))
    torch.library.opcheck(torch.ops.hfq.hadamard.default, (x.detach().transpose(0, 1), 24, True))
    compiled = torch.compile(lambda x: hadamard.transform(x, 12) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 24, requires_grad=True)
    y = compiled(x)
    assert torch.allclose(y, hadamard.transform(x, 12) * 2)
    y.sum().backward()
    assert torch.allclose(x.grad, hadamard.transform(torch.full_like(x, 2), 12, inverse=True), atol=1e-6)


def test_random_signs():
    signs = hadamard.random_signs(4096, torch.Generator().manual_seed(3))
    assert signs.dtype == torch.int8 and set(signs.tolist()) == {1, -1}
    assert abs(int(signs.sum())) < 400
    assert torch.equal(signs, hadamard.random_signs(4096, torch.Generator().manual_seed(3)))


def test_the_order_of_the_constructed_matrix_is_fixed():
    """Checkpoints depend on it: the same order must give the same matrix in every version."""
    for n, wanted in GOLDEN.items():
        places = torch.arange(n * n).reshape(n, n) % 65521
        assert (places * hadamard.hadamard(n).long()).sum().item() == wanted

