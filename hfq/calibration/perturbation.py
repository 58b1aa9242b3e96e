"""How sharply a model's prediction bends when the output of one of its parts moves: second derivatives by finite
differences.

The loss is the divergence of the prediction from the model's own, ``KL(softmax(z0 / T) || softmax(z / T))``. Its
gradient at the part's output vanishes where nothing is moved; with ``+d`` and with ``-d`` added to every element at
once it is ``g+`` and ``g-``, and ``|g+ - g-|`` is ``2 d`` times the magnitude of the sums of the rows of the second
derivative. Only proportions matter: the factor is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.cache import leaves, rebuild
from hfq.calibration.capture import first_tensor, quiet
from hfq.calibration.gradients import logits_of
from hfq.errors import QuantizationError

__all__ = ["Objective", "Probe", "divergence", "exact_products"]

# ``(output [rows, classes], output of the model as it is)`` to the loss, summed over rows.
Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def divergence(temperature: float) -> Objective:
    """Divergence of softened predictions from those of the model as it is."""
    def loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        soft = [(t / temperature).log_softmax(-1) for t in (found, wanted)]
        return nn.functional.kl_div(*soft, reduction="sum", log_target=True)

    return loss


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, products of float32 are not shortened on GPUs: the differences looked for are in the last bits."""
    flags = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    before = [getattr(place, name) for place, name in flags]
    try:
        for place, name in flags:
            setattr(place, name, False)
        yield
    finally:
        for (place, name), value in zip(flags, before, strict=True):
            setattr(place, name, value)


class Probe:
    """Asks a model, which stays as it is, for the sensitivity of its parts.

    Args:
        model: gives logits; float32, because ``delta`` is below the last bit of shorter numbers.
        batches: forward keywords.
        temperature: ``T``.
        objective: another loss than the divergence.
        delta: ``d``; with ``relative``, in units of the root mean square of the part's output.
        signs: move every element by ``+d`` or ``-d`` at random, the same for all samples, instead of all by ``+d``.
        seed: of the signs, and of the classes that form "squared" draws.

    Raises:
        QuantizationError: the model has weights of another dtype, or that are not in memory.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], *, temperature: float = 20.0,
        objective: Objective | None = None, delta: float = 1e-6, relative: bool = False, signs: bool = False,
        seed: int = 0,
    ) -> None:
        for name, p in model.named_parameters():
            if p.is_meta or (p.is_floating_point() and p.dtype not in (torch.float32, torch.float64)):
                where = "on the meta device" if p.is_meta else str(p.dtype)
                raise QuantizationError(f"{name} is {where}: sensitivities need the whole model in memory, in float32")
        self.model, self.batches = model, [batches[i] for i in ranks.share(len(batches))]
        self.objective, self.temperature = objective or divergence(temperature), temperature
        self.delta, self.relative, self.signs, self.seed = delta, relative, signs, seed
        self._wanted: list[torch.Tensor] = []

    def average(self, module: nn.Module) -> torch.Tensor:
        """``|g+ - g-|`` averaged over the samples of all processes: float32 ``[1, ...]`` like the output.

        Samples whose outputs differ in shape cannot be averaged.
        """
        total, count = None, 0
        for one in self._each(module, "sample"):
            part = one.double().sum(0, keepdim=True)
            if total is not None and total.shape != part.shape:
                raise QuantizationError(f"outputs of {tuple(total.shape[1:])} and of {tuple(part.shape[1:])} cannot be "
                                        "averaged: use inputs of one size")
            total, count = part if total is None else total + part, count + one.shape[0]
        gathered = [pair for pair in ranks.gather((None if total is None else total.cpu(), count)) if pair[1]]
        whole = torch.stack([part for part, _ in gathered]).sum(0) / sum(number for _, number in gathered)
        return whole.float()

    def samples(self, module: nn.Module, form: str = "sample") -> list[torch.Tensor]:
        """Sensitivities of every sample, batch by batch, on the CPU, of this process' batches.

        Args:
            form: "sample" is ``|g+ - g-|``; "squared" the squared gradient of the cross entropy with a class drawn from
                the prediction, whose mean is the diagonal of the divergence's second derivative.
        """
        return [one.cpu() for one in self._each(module, form)]

    def _each(self, module: nn.Module, form: str) -> Iterator[torch.Tensor]:
        needs = [p for p in self.model.parameters() if p.requires_grad]
        for p in needs:
            p.requires_grad_(False)
        try:
            with quiet(self.model), exact_products():
                for number in range(len(self.batches)):
                    if form == "squared":
                        yield self._gradient(module, number, 0.0, drawn=True).square()
                    else:
                        ahead, behind = (self._gradient(module, number, side) for side in (1.0, -1.0))
                        yield (ahead - behind).abs()
        finally:
            for p in needs:
                p.requires_grad_(True)

    @torch.enable_grad()  # whatever mode the caller is in
    def _gradient(self, module: nn.Module, number: int, side: float, drawn: bool = False) -> torch.Tensor:
        """Gradient of the summed loss of a batch at the output of ``module``, which is moved by ``side * d``."""
        moved: list[torch.Tensor] = []

        def move(_: nn.Module, args: Any, output: Any) -> Any:
            path = first_tensor(output)
            x = next(t for p, t in leaves(output) if p == path).detach()
            step = self.delta * float(x.double().square().mean().sqrt()) if self.relative else self.delta
            moved.append((x + side * step * self._direction(x)).requires_grad_())
            # A copy: what follows may change it in place.
            return rebuild(output, lambda p, t: moved[-1].clone() if p == path else t)

        wanted = self._output(number)
        handle = module.register_forward_hook(move)
        try:
            logits = logits_of(self.model, self.batches[number])
        finally:
            handle.remove()
        if len(moved) != 1:
            raise QuantizationError(f"{type(module).__name__} runs {len(moved)} times in a pass: its output cannot be "
                                    "moved once")
        wanted = wanted.to(logits.device)
        if drawn:
            random = torch.Generator().manual_seed(self.seed + 7919 * number)
            chances = (wanted / self.temperature).softmax(-1).cpu()
            classes = torch.multinomial(chances, 1, generator=random)[:, 0].to(logits.device)
            loss = nn.functional.cross_entropy(logits / self.temperature, classes, reduction="sum")
        else:
            loss = self.objective(logits, wanted)
        return torch.autograd.grad(loss, moved[0])[0].detach()

    def _direction(self, x: torch.Tensor) -> torch.Tensor | float:
        if not self.signs:
            return 1.0
        random = torch.Generator().manual_seed(self.seed)
        return (2 * torch.randint(2, x.shape[1:], generator=random) - 1).to(x)

    @torch.no_grad()
    def _output(self, number: int) -> torch.Tensor:
        while len(self._wanted) <= number:
            self._wanted.append(logits_of(self.model, self.batches[len(self._wanted)]).cpu())
        return self._wanted[number]
