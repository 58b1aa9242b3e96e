"""Hadamard matrices of every order that can be constructed, and the fast transform on the last axis.

An order ``n`` is decomposed as ``m * 2**k`` with a constructed core of order ``m``, and ``H_n`` is
``Sylvester(2**k) (x) H_m``. Cores come from Paley's two constructions over any finite field, from Goethals and Seidel's
array for the orders that Paley misses, and from products of two cores. No matrix is stored; the transform multiplies by
two small factors whose Kronecker product is ``H_n``.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch

from hfq.errors import QuantizationError

__all__ = ["best_block", "decompose", "hadamard", "is_order", "random_signs", "transform"]

# Cores are dense: above this order a core would cost more than the layer that it prepares.
LARGEST_CORE = 2048

# First rows of the four circulants of Goethals-Seidel arrays of order 4n: {n: (subgroup of units, four bit masks)}.
# Bit i of a mask set: the i-th orbit of the subgroup on 1..n-1, in order of its smallest element, has sign -1.
_CIRCULANTS: dict[int, tuple[tuple[int, ...], tuple[int, int, int, int]]] = {
    23: ((1, 22), (0x34A, 0x573, 0x5C1, 0x407)),
    29: ((1, 28), (0x24B5, 0x2C3D, 0x1730, 0x2047)),
    39: ((1, 16, 22), (0x367, 0x172E, 0x13FA, 0x85E)),
    43: ((1, 4, 11, 16, 21, 35, 41), (0x19, 0x15, 0x34, 0x1E)),
    65: ((1, 9, 14, 16, 29, 61), (0x171A, 0x1B94, 0xDCE, 0x37B4)),
    73: ((1, 2, 4, 8, 16, 32, 37, 55, 64), (0x2B, 0x3C, 0xA7, 0xF)),
    93: ((1, 2, 4, 8, 16, 32, 35, 47, 64, 70), (0xE76, 0xB3A, 0x1427, 0xDDC)),
}


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, e)`` with ``p**e == q`` and ``p`` prime, or ``None``."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    exponent, rest = 0, q
    while rest % p == 0:
        rest, exponent = rest // p, exponent + 1
    return (p, exponent) if rest == 1 else None


def _field_powers(p: int, e: int) -> list[tuple[int, ...]]:
    """The powers ``x**0, x**1, ...`` of a generator of the multiplicative group of GF(p**e), as coefficient tuples."""
    q = p**e
    one = (1,) + (0,) * (e - 1)
    for index in range(1, q):
        # x**e = tail(x); the polynomial is primitive exactly if the powers of x run through all q - 1 elements.
        tail = tuple(index // p**i % p for i in range(e))
        powers, element = [one], one
        while True:
            top = element[-1]
            element = tuple((low + top * t) % p for low, t in zip((0, *element[:-1]), tail, strict=True))
            if element == one or not any(element) or len(powers) == q - 1:
                break
            powers.append(element)
        if element == one and len(powers) == q - 1:
            return powers
    raise AssertionError(f"GF({q}) has no generator")  # impossible: every finite field has one


def _jacobsthal(p: int, e: int) -> torch.Tensor:
    """``Q[a, b] = chi(a - b)`` over GF(p**e), int8 ``[q, q]``: 1 for squares, -1 for non-squares, 0 on the diagonal."""
    q = p**e
    chi = torch.zeros(q, dtype=torch.int8)
    for power, element in enumerate(_field_powers(p, e)):
        chi[sum(c * p**i for i, c in enumerate(element))] = 1 if power % 2 == 0 else -1
    elements = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.long)
    for i in range(e):
        digit = elements // p**i % p
        difference += (digit[:, None] - digit[None, :]) % p * p**i
    return chi[difference]


def _paley(n: int) -> torch.Tensor | None:
    """Paley's matrix of order ``q + 1`` (q = 3 mod 4) or ``2 (q + 1)`` (q = 1 mod 4); ``None`` if neither is ``n``."""
    if n % 4:
        return None
    field = _prime_power(n - 1)
    if field:
        s = torch.ones(n, n, dtype=torch.int8)
        s[1:, 0] = -1
        s[1:, 1:] = _jacobsthal(*field)
        s[0, 0] = 0
        return s + torch.eye(n, dtype=torch.int8)
    half = n // 2
    field = _prime_power(half - 1)
    if not field or half % 4 != 2:
        return None
    s = torch.ones(half, half, dtype=torch.int8)
    s[1:, 1:] = _jacobsthal(*field)
    s[0, 0] = 0
    eye = torch.eye(half, dtype=torch.int8)
    plus, minus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(s, plus) + torch.kron(eye, minus)


def _goethals_seidel(n: int) -> torch.Tensor | None:
    """The array of order ``n`` from four circulants of order ``n / 4``, if their first rows are known."""
    entry = _CIRCULANTS.get(n // 4) if n % 4 == 0 else None
    if entry is None:
        return None
    order, (units, masks) = n // 4, entry
    orbits: list[list[int]] = []
    for element in range(1, order):
        if not any(element in orbit for orbit in orbits):
            orbits.append(sorted({element * u % order for u in units}))
    shift = (torch.arange(order)[None, :] - torch.arange(order)[:, None]) % order
    circulants = []
    for mask in masks:
        row = torch.ones(order, dtype=torch.int8)
        for i, orbit in enumerate(orbits):
            if mask >> i & 1:
                row[orbit] = -1
        circulants.append(row[shift])
    a, b, c, d = circulants
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)
    btr, ctr, dtr = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    return torch.cat([
        torch.cat([a, br, cr, dr], 1), torch.cat([-br, a, dtr, -ctr], 1),
        torch.cat([-cr, -dtr, a, btr], 1), torch.cat([-dr, ctr, -btr, a], 1),
    ])  # fmt: skip


@cache
def _core_kind(m: int) -> str | None:
    """How a core of order ``m`` is built ("" for the trivial one), without building it."""
    if m == 1:
        return ""
    if m % 4 or m > LARGEST_CORE:
        return None
    if m // 4 in _CIRCULANTS:
        return "goethals-seidel"
    if _prime_power(m - 1) or (m // 2 % 4 == 2 and _prime_power(m // 2 - 1)):
        return "paley"
    return "product" if _product(m) else None


def _product(m: int) -> tuple[int, int] | None:
    return next(((a, m // a) for a in range(4, math.isqrt(m) + 1, 4)
                 if m % a == 0 and _core_kind(a) and _core_kind(m // a)), None)


@lru_cache(maxsize=32)
def _core(m: int) -> torch.Tensor:
    kind = _core_kind(m)
    if kind == "":
        return torch.ones(1, 1, dtype=torch.int8)
    found = {"paley": _paley, "goethals-seidel": _goethals_seidel}.get(kind or "", lambda _: None)(m)
    if found is None:
        a, b = _product(m) or (1, m)
        found = torch.kron(_core(a), _core(b))
    return found


def _sylvester(order: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.int8)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@cache
def _split(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    power = n & -n
    m = n // power
    while power >= 1:  # the smallest core first
        if _core_kind(m) is not None:
            return m, power
        m, power = 2 * m, power // 2
    return None


def is_order(n: int) -> bool:
    """Whether :func:`hadamard` can construct order ``n``."""
    return _split(n) is not None


def decompose(n: int) -> tuple[int, int]:
    """``(m, 2**k)`` with ``m * 2**k == n`` and the smallest core ``m`` that can be constructed.

    Raises:
        QuantizationError: no construction is known; the message lists the nearest orders and the largest block.
    """
    found = _split(n)
    if found is None:
        near = [o for o in range(max(n - 64, 1), n + 65) if is_order(o)]
        near = sorted(sorted(near, key=lambda o: abs(o - n))[:4])
        block = best_block(n) if n >= 1 else None
        hint = f"; block={block} divides {n} and works" if block else ""
        raise QuantizationError(f"no Hadamard matrix of order {n} can be constructed (nearest: {near}){hint}")
    return found


def best_block(n: int, largest: int | None = None) -> int | None:
    """The largest order above 1 that divides ``n`` (and is at most ``largest``), or ``None``."""
    limit = n if largest is None else min(n, largest)
    return next((b for b in range(limit, 1, -1) if n % b == 0 and is_order(b)), None)


def hadamard(n: int) -> torch.Tensor:
    """A Hadamard matrix ``[n, n]``, int8 of +1 and -1, with ``H @ H.T == n * I``; rows act from the left (``x @ H``).

    Raises:
        QuantizationError: see :func:`decompose`.
    """
    m, power = decompose(n)
    return torch.kron(_sylvester(power), _core(m))


def random_signs(n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """``n`` independent signs, int8 of +1 and -1, drawn on the generator's device (CPU by default)."""
    device = generator.device if generator is not None else None
    return (torch.randint(0, 2, (n,), generator=generator, device=device) * 2 - 1).to(torch.int8)


# (order, dtype, device, inverse) -> the two factors of the normalised matrix, left one [a, a] and right one [b, b].
_FACTORS: dict[tuple[int, torch.dtype, torch.device, bool], tuple[torch.Tensor, torch.Tensor]] = {}


def _factors(n: int, dtype: torch.dtype, device: torch.device, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    key = (n, dtype, device, inverse)
    found = _FACTORS.get(key)
    if found is None:
        m, power = decompose(n)
        # One element costs left + right products: the powers of two go where their sum is smallest.
        right = min((2**i for i in range(power.bit_length())), key=lambda r: power // r + m * r)
        power //= right
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a later backward pass
            core = torch.kron(_sylvester(right), _core(m)).to(torch.float64)
            b = (core.T if inverse else core) / math.sqrt(n)
            found = _sylvester(power).to(device, dtype), b.to(device, dtype).contiguous()
        _FACTORS[key] = found
    return found


def _apply(x: torch.Tensor, n: int, inverse: bool) -> torch.Tensor:
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    left, right = _factors(n, dtype, x.device, inverse)
    a, b = left.shape[0], right.shape[0]
    y = x.to(dtype).reshape(-1, b) @ right
    if a > 1:
        y = y.view(a, b) if y.shape[0] == a else y.view(-1, a, b)
        y = left @ y  # Sylvester matrices are symmetric
    return y.reshape(x.shape).to(x.dtype)


_LIBRARY = torch.library.Library("hfq", "FRAGMENT")
_LIBRARY.define("hadamard(Tensor x, int n, bool inverse) -> Tensor")
_LIBRARY.impl("hadamard", _apply, "CompositeExplicitAutograd")
torch.library.register_fake("hfq::hadamard", lambda x, n, inverse: torch.empty_like(x).contiguous(), lib=_LIBRARY)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    ctx.order, ctx.inverse = inputs[1], inputs[2]  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    # The matrix is orthogonal: its transpose is its inverse.
    return torch.ops.hfq.hadamard(gradient, ctx.order, not ctx.inverse), None, None  # type: ignore[attr-defined]


torch.library.register_autograd("hfq::hadamard", _backward, setup_context=_setup, lib=_LIBRARY)


def transform(x: torch.Tensor, n: int, inverse: bool = False) -> torch.Tensor:
    """``x @ H_n / sqrt(n)`` (or its inverse) on the last axis, which may hold several blocks of ``n``.

    Args:
        x: ``[..., c * n]``, floating; 16-bit inputs are computed in float32 and rounded once at the end.
        n: order; each run of ``n`` elements is transformed by itself.
        inverse: multiply by the transpose.

    Returns:
        Shape and dtype of ``x``. Differentiable.

    Raises:
        QuantizationError: ``n`` does not divide the last axis, or is not a constructible order.
    """
    if x.shape[-1] != n:
        if x.shape[-1] % n:
            raise QuantizationError(f"the last axis has {x.shape[-1]} elements, not a multiple of the block {n}")
        return transform(x.reshape(*x.shape[:-1], -1, n), n, inverse).reshape(x.shape)
    if torch.compiler.is_compiling():
        return torch.ops.hfq.hadamard(x, n, inverse)
    return _apply(x, n, inverse)
