"""All layers of a model, tuned one at a time: on the float model's inputs, or behind those that are finished."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hfq.calibration import gradients, operands, sequence
from hfq.calibration.cache import Store
from hfq.calibration.capture import forward, quiet
from hfq.calibration.progress import Progress, state_digest
from hfq.calibration.reference import copy_of
from hfq.calibration.walk import generator
from hfq.formats import QuantSpec
from hfq.graph import rectified, trace
from hfq.layers import products, routing
from hfq.layers.products import AttentionProducts
from hfq.reconstruction import layerwise
from hfq.reconstruction.direct import unpackable
from hfq.reconstruction.layerwise import Course, Layer
from hfq.reconstruction.static import input_grid
from hfq.report import Report

__all__ = ["Tuner", "learn_products"]

LEAST = 1e-6  # of what a narrower layer costs


class Tuner:
    """Tunes the sites of a plan and packs them.

    Args:
        plan: of the model, all of it floats.
        batches: forward keywords.
        config: gives ``spec_for``, ``inputs_for``, ``one_call``, ``walk_options()`` and ``seed``.
        course: of a layer.
        report: gets the rows; sites that have no packed layer are refused.
        relu: a layer with a ReLU behind it is tuned for what passes that.
        extreme: first ranges of inputs are the extremes of all samples, not the means.

    Attributes:
        sites: those that are tuned, in the order in which they run.
        first: name of the site that runs first of all, that is, reads the model's input; ``None`` if it stays float.
        macs: multiplications of one sample, by site, once it was recorded.

    The results are kept in the progress folder, site by site.
    """

    def __init__(
        self, plan: Any, batches: Sequence[Mapping[str, Any]], config: Any, course: Course, report: Report, *,
        relu: bool = True, extreme: bool = False,
    ) -> None:
        self.plan, self.model, self.batches, self.config = plan, plan.model, batches, config
        self.course, self.report, self.extreme = course, report, extreme
        self.sites = []
        for site in sequence.order(self.model, batches[0], plan.sites):
            why = "experts are not tuned one by one" if site.kind == "experts" else unpackable(site)
            if why or site.kind == "embedding":
                report.refuse(site.name, why or "embeddings have no inputs to tune", kind=site.kind, numel=site.numel)
            else:
                self.sites.append(site)
        recorded = trace.record(plan, config.one_call(self.model, batches))
        self.behind = rectified.before_relu(plan, recorded) if relu else set()
        run = [name for name in recorded.calls if name in {site.name for site in plan.every_site}]
        self.first = run[0] if run and run[0] in {site.name for site in self.sites} else None
        self.macs: dict[str, float] = {}
        self._known: dict[tuple[str, int, int], Layer] = {}
        options = config.walk_options()
        self._folder, self._fingerprint, self._bar = (
            options["progress_dir"], options["fingerprint"], options["progress"])
        self._weights = state_digest(self.model) if self._folder is not None else ""

    def close(self) -> None:
        """Forget what was learned."""
        self._known.clear()

    # -- one layer

    def _fit(self, site: Any, spec: QuantSpec, bits: int, float_model: nn.Module | None = None) -> Layer:
        """Learn a site on what it reads in the model as it is now; its targets are those of the float model."""
        with closing(Store()) as store:
            inputs, targets = sequence.record(self.model, self.batches, site, store, results=float_model is None)
            if float_model is not None:
                other = SimpleNamespace(name=site.name, module=float_model.get_submodule(site.name))
                _, targets = sequence.record(float_model, self.batches, other, store)
            self._count(site, targets)
            return layerwise.fit(
                site, spec, bits, inputs, targets, self.course, relu=site.name in self.behind, extreme=self.extreme,
                generator=generator(self.config.seed, zlib.crc32(site.name.encode())),
            )

    def _count(self, site: Any, targets: Sequence[torch.Tensor]) -> None:
        shape = targets[0].shape if len(targets) else (1,)
        positions = torch.Size(shape[1:]).numel() / site.out_features
        self.macs[site.name] = site.numel * positions

    def _widths(self, name: str) -> tuple[QuantSpec, int]:
        return self.config.spec_for(name), self.config.inputs_for(name)

    @contextmanager
    def _saved(self, names: Sequence[str], what: str) -> Iterator[Callable[[str, Callable[[], Layer], Any], Layer]]:
        """A function ``(name, make, formats)``: what an earlier run left under a name, or else made now and kept."""
        empty = nn.Module()
        folder = None if self._folder is None else f"{self._folder}/{what}"
        kept = None if folder is None else Progress(
            folder, {**self._fingerprint, "weights": self._weights, "macs": True}, list(names))  # fmt: skip
        bar = None if self._bar is None else self._bar(len(names), "tuning layers")

        def get(name: str, make: Callable[[], Layer], formats: Any) -> Layer:
            if kept is not None and kept.has(name):
                state = kept.install(name, empty, None)
                self.macs[name.rpartition("@")[0]] = float(state.pop("macs"))
                layer = Layer.of(state, *formats)
            else:
                layer = make()
                if kept is not None:
                    macs = torch.tensor(self.macs[name.rpartition("@")[0]], dtype=torch.float64)
                    kept.write(name, empty, state_digest(empty), None, {**layer.tensors(), "macs": macs})
            if bar is not None:
                bar.update()
            return layer

        try:
            yield get
        finally:
            if bar is not None:
                bar.close()

    def tune(self, wanted: Sequence[tuple[Any, QuantSpec, int]], what: str) -> list[Layer]:
        """Layers of the float model, each by itself: ``(site, grid of the weight, width of the input)``."""
        names = [f"{site.name}@{spec.bits},{bits}" for site, spec, bits in wanted]
        found = []
        with self._saved(names, what) as get:
            for name, (site, spec, bits) in zip(names, wanted, strict=True):
                key = site.name, spec.bits, bits
                if key not in self._known:
                    grid = None if bits == 16 else input_grid(bits)
                    self._known[key] = get(
                        name, lambda s=site, w=spec, b=bits: self._fit(s, w, b), (spec, grid))
                found.append(self._known[key])
        return found

    # -- all layers

    def parallel(self) -> dict[str, Layer]:
        """Tune every site in the float model at its width, then pack all of them."""
        layers = self.tune([(site, *self._widths(site.name)) for site in self.sites], "parallel")
        for site, layer in zip(self.sites, layers, strict=True):
            self._pack(site, layer)
        return {site.name: layer for site, layer in zip(self.sites, layers, strict=True)}

    def sequential(self) -> dict[str, Layer]:
        """Tune and pack the sites one after the other: inputs come from the quantized model, targets from the float
        one."""
        full, found = copy_of(self.model), {}
        with self._saved([f"{site.name}@" for site in self.sites], "sequential") as get:
            for site in self.sites:
                spec, bits = self._widths(site.name)
                formats = spec, None if bits == 16 else input_grid(bits)
                layer = get(f"{site.name}@", lambda s=site, w=spec, b=bits: self._fit(s, w, b, full), formats)
                self._pack(site, layer)
                found[site.name] = layer
        return found

    def _pack(self, site: Any, layer: Layer) -> None:
        if layer.codes.spec.bits < 3:
            self.report.note(f"{site.name} has {layer.codes.spec.bits} bits: tuned by itself, a layer fits its samples "
                             "and little else below 3")
        layerwise.pack(self.model, site, layer, self.report, {"relu": site.name in self.behind})

    def losses(self, widths: Mapping[str, Sequence[int]], wanted: Any) -> dict[str, dict[int, float]]:
        """What each site costs at each width, all others at their largest: rise of the divergence from ``wanted``.

        The sites are floats again afterwards.
        """
        free = {site.name: site for site in self.sites if site.name in widths}
        asked = [(site, self._widths(site.name)[0].with_bits(b), 16 if self._widths(site.name)[1] == 16 else b)
                 for site in free.values() for b in widths[site.name]]  # fmt: skip
        others = [(site, *self._widths(site.name)) for site in self.sites if site.name not in free]
        layers = dict(zip([(site.name, spec.bits) for site, spec, _ in [*asked, *others]],
                          self.tune([*asked, *others], "widths"), strict=True))
        packed = {}
        for (name, bits), layer in layers.items():
            site = next(one for one in self.sites if one.name == name)
            packed[name, bits] = layerwise.pack(self.model, site, layer)
            self.model.set_submodule(name, site.module)
        top = {name: max(widths[name]) for name in free} | {site.name: spec.bits for site, spec, _ in others}
        try:
            for name, bits in top.items():
                self.model.set_submodule(name, packed[name, bits])
            base = gradients.divergence(self.model, self.batches, wanted)
            found: dict[str, dict[int, float]] = {}
            for name in free:
                found[name] = {top[name]: 0.0}
                for bits in (b for b in widths[name] if b != top[name]):
                    self.model.set_submodule(name, packed[name, bits])
                    rise = gradients.divergence(self.model, self.batches, wanted) - base
                    found[name][bits] = max(rise, LEAST)
                self.model.set_submodule(name, packed[name, top[name]])
        finally:
            for site in self.sites:
                self.model.set_submodule(site.name, site.module)
        return found


def learn_products(
    model: nn.Module, plan: Any, batches: Sequence[Mapping[str, Any]], bits: int, bits_for: Callable[[str], int],
    call: Callable[[], Any], report: Report, *, steps: int, lr: float, relative: bool, seed: int = 0,
    extreme: bool = False,
) -> list[Callable[[], Any]]:
    """Ranges for the products of the attentions some of whose linears have quantized inputs, learned on the model as it
    is now; functions that install them."""
    installs: list[Callable[[], Any]] = []
    inside = [site.name for site in plan.sites if bits_for(site.name) != 16]
    for name in routing.find(model, call) if plan.sites else []:
        if not any(site.startswith(f"{name}.") for site in inside):
            continue
        if products.causal(model.get_submodule(name)):
            report.note(products.NOT_CAUSAL)
            continue

        def run() -> None:
            with quiet(model):
                for batch in batches:
                    forward(model, batch)

        sample = operands.observe(model, name, run, seed=seed)
        found = layerwise.fit_products(sample, bits, steps=steps, lr=lr, relative=relative, extreme=extreme)
        part = AttentionProducts(sample.query.shape[-1], **{side: spec for side, (spec, _) in found.items()})
        part.label = name
        for side, (_, params) in found.items():
            part.set_range(side, params)
        installs.append(lambda n=name, p=part: products.install(model, n, p, report))
    return installs
