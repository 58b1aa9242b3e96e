"""The factorised Hessian that error feedback needs; one serves every linear that reads the same input."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfq.errors import QuantizationError

__all__ = ["Factor", "factorise"]


@dataclass(frozen=True)
class Factor:
    """What the solver needs of a Hessian; one serves every linear that reads the same input.

    Attributes:
        upper: ``[K, K]`` upper triangular ``U`` with ``(H + damp I)^-1 = U^T U``, in the order of ``order``.
        hessian: ``[K, K]`` undamped, symmetrised, in the original order.
        dead: ``[K]`` bool, inputs that are always zero.
        order: ``[K]`` columns by falling diagonal (act-order), or ``None``.
        damp: what was added to the diagonal in the end.
        damping_tries: how many times the damping was added until the factorisation succeeded.
    """

    upper: torch.Tensor
    hessian: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor | None
    damp: float
    damping_tries: int


def factorise(
    hessian: torch.Tensor,
    *,
    percdamp: float = 0.01,
    act_order: bool = False,
    max_tries: int = 49,
    dtype: torch.dtype = torch.float64,
    name: str = "",
) -> Factor:
    """Damp and factorise ``hessian`` ``[K, K]`` (float32 or float64, symmetric, positive semidefinite).

    ``percdamp * mean(diag)`` is added to the diagonal, again and again (at most ``max_tries`` times) until the
    factorisation succeeds.

    Raises:
        QuantizationError: the matrix is not finite, has a negative diagonal, or cannot be factorised; there is no
            fall-back to another rounding.
    """
    where = f" of {name}" if name else ""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise QuantizationError(f"the Hessian{where} has shape {tuple(hessian.shape)}: a square matrix is needed")
    h = hessian.detach().to(dtype)
    if not torch.isfinite(h).all():
        raise QuantizationError(f"the Hessian{where} has NaN or infinite elements: look at the calibration activations")
    h = (h + h.t()) / 2
    diag = h.diagonal()
    if (diag < 0).any():
        raise QuantizationError(f"the Hessian{where} has a negative diagonal element {float(diag.min()):.3g}")
    dead = diag == 0
    kept, h = h, h.clone()
    h.diagonal()[dead] = 1
    damp = percdamp * float(h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        h = h[order][:, order]
    # H + damp I = R R^T with R upper triangular (a Cholesky factor read backwards), so U = R^-1.
    h = h.flip(0, 1)
    tries = 0
    while True:
        tries += 1
        h.diagonal().add_(damp)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            break
        if damp == 0:
            raise QuantizationError(f"the Hessian{where} is singular and percdamp=0: use a positive percdamp")
        if tries == max_tries:
            raise QuantizationError(
                f"the Hessian{where} is not positive definite after adding {percdamp} of its mean diagonal "
                f"{max_tries} times: use more calibration data or a larger percdamp"
            )
    eye = torch.eye(h.shape[0], dtype=dtype, device=h.device)
    upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).contiguous()
    return Factor(upper, kept, dead, order, damp * tries, tries)
