from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import ActivationSpec, activation

SPECS = [
    ActivationSpec(bits, symmetric, granularity, group)
    for bits in (2, 4, 8) for symmetric in (False, True)
    for granularity, group in (("token", -1), ("token", 5), ("token", 16), ("tensor", -1))
]  # fmt: skip


def _x(seed=0, shape=(3, 4, 17)):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    x[..., 2] *= 30
    return x


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_definition_element_by_element(spec):
    x = _x()
    codes = activation.quantize(x, spec)
    assert codes.codes.shape == x.shape and codes.codes.dtype == (torch.int8 if spec.symmetric else torch.uint8)
    top = 2 ** (spec.bits - 1) - 1 if spec.symmetric else 2**spec.bits - 1
    flat, got = x.reshape(-1, 17), codes.codes.reshape(-1, 17)
    scale = codes.scale.expand(3, 4, -1).reshape(12, -1)
    for row in range(12):
        for j in range(17):
            group = slice(0, 17) if spec.group_size == -1 else slice(j // spec.group_size * spec.group_size,
                                                                    (j // spec.group_size + 1) * spec.group_size)
            part = flat if spec.granularity == "tensor" else flat[row, group]
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            step = max(high, -low) / top if spec.symmetric else (high - low) / top
            zero = 0 if spec.symmetric else round(-low / step)
            g = 0 if spec.group_size == -1 else j // spec.group_size
            assert float(scale[row, g]) == pytest.approx(step, rel=1e-5)
            want = float(flat[row, j]) / step + zero
            assert abs(float(got[row, j]) - min(max(want, -top if spec.symmetric else 0), top)) <= 0.501


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_error_is_at_most_half_a_step_and_fake_is_the_same(spec):
    x = _x(1)
    codes = activation.quantize(x, spec)
    back = activation.dequantize(codes)
    step = codes.scale.amax() if spec.granularity == "tensor" else None
    bound = step if step is not None else (
        codes.scale if spec.group_size == -1 else codes.scale.repeat_interleave(spec.group_size, -1)[..., :17]
    )
    assert ((back - x).abs() <= bound * (0.5001 if spec.symmetric else 1.0001)).all()
    assert torch.equal(activation.fake(x, spec), back)
    assert torch.equal(activation.fake(x.requires_grad_(), spec), back)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_one_sided_tokens(symmetric):
    spec = ActivationSpec(4, symmetric)
    x = torch.stack([torch.zeros(8), torch.linspace(1, 2, 8), torch.linspace(-2, -1, 8), torch.full((8,), 1e-30)])
    back = activation.fake(x, spec)
    assert torch.isfinite(back).all() and (back[0] == 0).all() and (back[3] == 0).all()
    assert torch.allclose(back[1:3], x[1:3], atol=0.15)
    sparse = torch.tensor([[0.0, 5.0, 3.0, 0.0]])
    assert (activation.fake(sparse, spec)[sparse == 0] == 0).all()


def test_symmetric_codes_never_reach_the_odd_end():
    codes = activation.quantize(torch.tensor([[-1.0, 1.0]]), ActivationSpec(8, True))
    assert codes.codes.tolist() == [[-127, 127]]


def test_tokens_do_not_depend_on_their_batch():
    x = _x(2)
    for spec in (ActivationSpec(8), ActivationSpec(4, True, group_size=5)):
        assert torch.equal(activation.fake(x, spec)[1:2, 2:3], activation.fake(x[1:2, 2:3], spec))


@pytest.mark.parametrize("symmetric", [False, True])
def test_static(symmetric):
    spec = ActivationSpec(8, symmetric, "tensor", dynamic=False)
    x = _x(3)
    params = activation.range_parameters(x.amin().reshape(1), x.amax().reshape(1), spec)
    activation.check_parameters(params, spec)
    assert torch.equal(activation.fake(x, spec, params), activation.fake(x, ActivationSpec(8, symmetric, "tensor")))
    far = activation.quantize(x * 100, spec, params)  # outside: clamped
    assert int(far.codes.max()) == spec.max_code
    with pytest.raises(QuantizationError, match="stored parameters"):
        activation.fake(x, spec)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(QuantizationError, match="above zero"):
            activation.check_parameters((torch.tensor([bad]), params[1]), spec)
    if not symmetric:
        for bad in (-1.0, 256.0, 0.5, float("nan")):
            with pytest.raises(QuantizationError, match="zero point"):
                activation.check_parameters((params[0], torch.tensor([bad])), spec)


def test_factor_narrows_the_range_and_gets_a_gradient():
    spec = ActivationSpec(4, factor=True)
    x = _x(4)
    one, half = torch.ones(1), torch.full((1,), 0.5, requires_grad=True)
    assert torch.equal(activation.fake(x, spec, factor=one), activation.fake(x, ActivationSpec(4)))
    y = activation.fake(x, spec, factor=half)
    assert float(y.detach().amax()) < 0.6 * float(x.amax())
    y.square().sum().backward()
    assert torch.isfinite(half.grad).all() and half.grad.abs() > 0
    with pytest.raises(QuantizationError, match="factor"):
        activation.fake(x, spec)


def test_gradients_pass_rounding_and_stop_at_the_clamp():
    spec = ActivationSpec(4, False, "tensor", dynamic=False)
    scale = torch.tensor([0.1], requires_grad=True)
    x = torch.tensor([[0.03, 0.52, 9.0, -9.0]], requires_grad=True)
    activation.fake(x, spec, (scale, torch.tensor([5.0]))).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    # learned-step rule: (round(v) - v) inside, the clamped code outside
    assert float(scale.grad) == pytest.approx((0 - 0.3) + (5 - 5.2) + 10 - 5, abs=1e-4)


def test_numbers_that_are_not_finite_stay_so():
    x = torch.ones(3, 8)
    x[0, 1], x[1, 1] = float("nan"), float("inf")
    for symmetric in (False, True):
        back = activation.fake(x, ActivationSpec(8, symmetric))
        assert not torch.isfinite(back[0]).any() and not torch.isfinite(back[1]).all()
        assert torch.isfinite(back[2]).all()


def test_empty():
    for spec in SPECS:
        assert activation.fake(torch.empty(0, 17), spec).shape == (0, 17)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x = _x(5).to(dtype)
    y = activation.fake(x, ActivationSpec(8))
    assert y.dtype == dtype
    assert torch.equal(y, activation.fake(x.double(), ActivationSpec(8)).to(dtype)) or dtype != torch.float64


def test_dict_round_trip_and_refusals():
    for spec in SPECS:
        assert ActivationSpec.from_dict(spec.to_dict()) == spec
    for bad in (
        {"bits": 1}, {"bits": 9}, {"bits": True}, {"granularity": "row"}, {"group_size": 0}, {"dynamic": False},
        {"granularity": "tensor", "group_size": 4}, {"granularity": "tensor", "dynamic": False, "factor": True},
        {"symmetric": 1}, {"width": 8},
    ):
        with pytest.raises(ConfigError):
            ActivationSpec.from_dict(bad)
