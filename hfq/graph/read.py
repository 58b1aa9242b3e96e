"""Where things are in a model: repeated blocks and the sites in them, found by structure alone.

No architecture is known by name. A *site* is a module whose weight multiplies activations; a *block* is a repeated
child of a container (``nn.ModuleList``, ``nn.Sequential``); a *stack* is the blocks of one container.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import heads
from hfq.graph.select import first_match

__all__ = ["DEFAULT_KINDS", "Block", "Plan", "Site", "is_norm", "read", "site_of"]

Kind = Literal["linear", "transposed", "embedding", "experts", "conv"]
DEFAULT_KINDS: tuple[str, ...] = ("linear", "transposed", "experts")

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class Site:
    """A module whose weight can hold codes.

    Attributes:
        name: qualified name in the model.
        module: the module itself.
        kind: "linear" (weight ``[out, in]``), "transposed" (``[in, out]``, transformers' Conv1D), "embedding",
            "experts" (several ``[E, ..., ...]`` parameters in one module) or "conv".
        in_features, out_features: of the activations that enter and leave; for experts those of the module.
        numel: weights, biases not counted.
        tensors: names of the weight parameters ("weight"; for experts the 3-D parameters).
        in_by_out: the matrices of a bank of experts are ``[E, in, out]``.
        executed: ``False`` when a traced forward pass did not reach it, ``None`` before tracing.
        bypassed: the traced pass read the weight without calling the module, so hooks on it see nothing.
    """

    name: str
    module: nn.Module
    kind: Kind
    in_features: int
    out_features: int
    numel: int
    tensors: tuple[str, ...] = ("weight",)
    in_by_out: bool = False
    executed: bool | None = None
    bypassed: bool = False

    @property
    def weight(self) -> torch.Tensor:
        """The weight of a site with one weight tensor, in the layout of its module."""
        if len(self.tensors) != 1:
            raise QuantizationError(f"{self.name} holds several weights {list(self.tensors)}: name one")
        return getattr(self.module, self.tensors[0])

    def __repr__(self) -> str:
        return f"Site({self.name}, {self.kind}, {self.in_features} -> {self.out_features})"


@dataclass(eq=False)
class Block:
    """One repeated child of a stack.

    Attributes:
        name, module: qualified name and module.
        index: position in its stack, from 0.
        stack: position of its stack in ``Plan.stacks``.
        sites: what a method quantizes, in execution order once traced, else in definition order.
        kept: sites of the block that stay float (their reasons are in ``Plan.skipped``).
        groups: sites that read the same input tensor, in execution order; one site a group before tracing.
    """

    name: str
    module: nn.Module
    index: int
    stack: int
    sites: list[Site] = field(default_factory=list)
    kept: list[Site] = field(default_factory=list)
    groups: list[list[Site]] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        """Whether the block is a single layer."""
        return any(site.name == self.name for site in (*self.sites, *self.kept))

    def __repr__(self) -> str:
        return f"Block({self.name}, {len(self.sites)} sites)"


@dataclass(eq=False)
class Plan:
    """Blocks and sites of a model.

    Attributes:
        model: the model that was read.
        blocks: all blocks of all stacks, in execution order once traced, else in definition order.
        outside: sites outside the blocks that a method quantizes.
        skipped: name → reason, for every site that stays float.
    """

    model: nn.Module
    blocks: list[Block]
    outside: list[Site]
    skipped: dict[str, str]
    kept_outside: list[Site] = field(default_factory=list)

    @property
    def stacks(self) -> list[list[Block]]:
        """The blocks by stack."""
        found: dict[int, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.stack, []).append(block)
        return list(found.values())

    @property
    def sites(self) -> list[Site]:
        """Every site that a method quantizes: those of the blocks, then those outside."""
        return [site for block in self.blocks for site in block.sites] + self.outside

    @property
    def every_site(self) -> list[Site]:
        """Every site, also those that stay float."""
        inside = [site for block in self.blocks for site in (*block.sites, *block.kept)]
        return [*inside, *self.outside, *self.kept_outside]

    def block(self, name: str) -> Block:
        """The block called ``name``, or the block that holds the module ``name``."""
        for block in self.blocks:
            if name == block.name or name.startswith(block.name + "."):
                return block
        raise QuantizationError(f"no block {name!r} in this model; blocks: {[block.name for block in self.blocks]}")

    def part_of(self, site: Site) -> str:
        """Name of the child of a block that holds ``site`` (an attention, a perceptron); outside the blocks its own."""
        around = next((f"{b.name}." for b in self.blocks if site.name.startswith(f"{b.name}.")), "")
        return around + site.name[len(around) :].partition(".")[0] if around else site.name

    def site(self, name: str) -> Site:
        """The site called ``name``, also if it stays float."""
        for site in self.every_site:
            if site.name == name:
                return site
        raise QuantizationError(f"no site {name!r} in this model: see Plan.every_site for the names")


def read(
    model: nn.Module,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    *,
    ask: Sequence[str] = (),
    kinds: Sequence[str] = DEFAULT_KINDS,
) -> Plan:
    """Find the blocks and sites of ``model``.

    Args:
        model: any torch model, on any device (``meta`` included); nothing is changed and nothing is run.
        skip: patterns (see ``hfq.graph.select``) of modules that stay float.
        only: when given, every site that no pattern names stays float.
        ask: patterns of modules that are quantized although the default rule would leave them float
            (an output head, an embedding). ``only`` asks as well.
        kinds: kinds of site that are quantized unless asked by name. Of a convolutional network two-dimensional
            convolutions are besides.
    """
    sites = {name: site for name, module in model.named_modules() if (site := site_of(name, module)) is not None}
    containers = list(_stacks("", model, sites))
    blocks = [Block(name, module, index, number)
              for number, stack in enumerate(containers) for index, (name, module) in enumerate(stack)]
    owner = {site: block for block in blocks for site in sites if site.startswith(block.name + ".")}
    reasons = heads.default_reasons(model, sites, owner)
    plan = Plan(model, blocks, [], {})
    convolutions = _convolutions(sites, blocks)
    for name, site in sites.items():
        reason = _reason(site, reasons.get(name), skip, only, ask, (*kinds, "conv") if name in convolutions else kinds)
        if reason:
            plan.skipped[name] = reason
        block = owner.get(name)
        if block is None:
            (plan.kept_outside if reason else plan.outside).append(site)
        else:
            (block.kept if reason else block.sites).append(site)
    for block in blocks:
        block.groups = [[site] for site in block.sites]
    return plan


def _convolutions(sites: dict[str, Site], blocks: list[Block]) -> set[str]:
    """Names of the two-dimensional convolutions of a convolutional network; a patch embedding makes none.

    It has more of them than linears, as a whole or in one of its blocks (beside the transformers of a UNet).
    """
    found = {name for name, site in sites.items() if isinstance(site.module, nn.Conv2d)}
    linears = {name for name, site in sites.items() if site.kind in ("linear", "transposed")}
    places = ["", *(f"{block.name}." for block in blocks)]
    most = any(sum(name.startswith(place) for name in found) > sum(name.startswith(place) for name in linears)
               for place in places)
    return found if most else set()


def _reason(
    site: Site, default: str | None, skip: Sequence[str], only: Sequence[str], ask: Sequence[str], kinds: Sequence[str]
) -> str | None:
    """Why ``site`` stays float; ``None`` when it is quantized."""
    pattern = first_match(site.name, skip)
    if pattern is not None:
        return f"skipped by pattern {pattern!r}"
    if only and first_match(site.name, only) is None:
        return f"not named by {list(only)}"
    if first_match(site.name, (*only, *ask)) is not None:
        return None
    if default is not None:
        return default
    return None if site.kind in kinds else f"{site.kind}: float unless asked by name"


def site_of(name: str, module: nn.Module) -> Site | None:
    """The site that ``module`` is, or ``None``. Layers that already hold codes are none."""
    if hasattr(module, "qweight"):
        return None
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and len(shape) == 2:
        return Site(name, module, "transposed", shape[0], shape[1], weight.numel())
    if isinstance(module, nn.Embedding):
        return Site(name, module, "embedding", module.num_embeddings, module.embedding_dim, weight.numel())
    if isinstance(module, _CONVS):
        return Site(name, module, "conv", module.in_channels, module.out_channels, weight.numel())
    if isinstance(module, nn.Linear) or (_is_linear_shaped(module) and len(shape) == 2):
        return Site(name, module, "linear", shape[1], shape[0], weight.numel())
    return _experts(name, module)


def _is_linear_shaped(module: nn.Module) -> bool:
    """A class of its own that still is ``y = x W^T + b``: it names its sizes as nn.Linear does and has no children."""
    weight = module._parameters.get("weight")
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return weight is not None and tuple(weight.shape) == sizes and not module._modules


def _experts(name: str, module: nn.Module) -> Site | None:
    """Two or more floating 3-D parameters of one module that agree on their first size: a bank of expert matrices."""
    own = {key: p for key, p in module._parameters.items() if p is not None}
    stacked = {key: p for key, p in own.items() if p.dim() == 3 and p.is_floating_point()}
    counts = {p.shape[0] for p in stacked.values()}
    if len(stacked) < 2 or len(counts) != 1 or counts == {1}:
        return None
    shapes = [set(p.shape[1:]) for p in stacked.values()]
    hidden = set.intersection(*shapes)
    width = _experts_width(list(stacked.values()), hidden)
    numel, turned = sum(p.numel() for p in stacked.values()), _in_by_out(module, list(stacked.values()), width)
    return Site(name, module, "experts", width, width, numel, tuple(stacked), turned)


def _in_by_out(module: nn.Module, parameters: Sequence[Any], width: int) -> bool:
    """Whether a bank of experts holds ``[E, in, out]``: it says so, or its shapes do.

    More is read from the stream than written to it (gate and up, fused or not): the axis of the stream is the last
    one of the larger part where matrices are ``[out, in]``, and the first one of it where they are not.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    last = sum(p.shape[1] for p in parameters if p.shape[2] == width != p.shape[1])
    first = sum(p.shape[2] for p in parameters if p.shape[1] == width != p.shape[2])
    if any(p.shape[1] == p.shape[2] for p in parameters):  # gate and up are square: what else there is writes
        return last > first
    return first > last


def _experts_width(parameters: Sequence[Any], shared: set[int]) -> int:
    """Size of the activations of a bank of experts: the size that the first and the last matrix share."""
    if len(shared) == 1:
        return next(iter(shared))
    last = parameters[-1].shape[1:]
    if len(shared) == 2 and len(parameters) > 2:  # gate and up apart: the shapes tell nothing, most are [E, out, in]
        return last[0]
    # Both sizes are shared (square, or twice the inner size equals the width): the last matrix writes the width, and
    # its smaller side is the inner size whenever gate and up are fused.
    return max(last) if shared else last[-1]


def is_norm(module: nn.Module) -> bool:
    """Structure of a normalisation: parameters of its own, all of them vectors, and none in its children."""
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and all(p.dim() == 1 for p in own) and all(not list(c.parameters()) for c in module.children())


def _stacks(name: str, module: nn.Module, sites: dict[str, Site]) -> Iterator[list[tuple[str, nn.Module]]]:
    """The stacks below ``module``, outermost first; stages that hold stacks of their own are looked into."""
    if name in sites:
        return
    children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    if _is_stack(module, children, sites):
        own: list[tuple[str, nn.Module]] = []
        for child_name, child in children:
            if not _is_composite(child_name, child, sites):
                continue
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or _is_stage(child_name, child, sites):
                yield from _stacks(child_name, child, sites)
            else:
                own.append((child_name, child))
        if own:
            yield own
        return
    for child_name, child in children:
        yield from _stacks(child_name, child, sites)


def _is_composite(name: str, module: nn.Module, sites: dict[str, Site]) -> bool:
    """A candidate for a block: two sites, or one site and a norm, below a module that is no site itself."""
    if name in sites:
        return False
    count = sum(1 for site in sites if site.startswith(name + "."))
    return count >= 2 or (count == 1 and any(is_norm(m) for m in module.modules()))


def _is_stack(module: nn.Module, children: list[tuple[str, nn.Module]], sites: dict[str, Site]) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    composite = [child for name, child in children if _is_composite(name, child, sites)]
    if isinstance(module, nn.ModuleList):
        return bool(composite)
    normed = all(any(is_norm(m) for m in child.modules()) for child in composite)
    return bool(composite) and len({type(child) for child in composite}) == 1 and (normed or len(composite) >= 2)


def _is_stage(name: str, module: nn.Module, sites: dict[str, Site]) -> bool:
    """Whether a child of a stack is itself made of blocks (a stage of Swin or of a UNet), not a block with experts.

    The inner repetition must be of one class, and each of its members complete: two sites and a norm.
    """
    for path, container in module.named_modules(prefix=name):
        if path == name or not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        inner = [(f"{path}.{key}", child) for key, child in container.named_children()]
        inner = [(key, child) for key, child in inner if _is_composite(key, child, sites)]
        if inner and len({type(child) for _, child in inner}) == 1 and all(
            sum(1 for site in sites if site.startswith(key + ".")) >= 2 and any(is_norm(m) for m in child.modules())
            for key, child in inner
        ):
            return True
    return False
