"""Quantize a model that is in memory, say what runs, and give the float model back.

This layer knows nothing of the Hugging Face libraries. What it needs from them (where a block is kept, how a tokenizer
is found, how a model is marked as quantized) is an :class:`Environment`, which ``hfq.integrations`` installs.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hfq import methods as methods_table
from hfq.calibration.data import normalise
from hfq.calibration.images import check
from hfq.config import HfqConfig
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.graph import select
from hfq.memory import PeakMemory
from hfq.report import Report

__all__ = ["Environment", "dequantize", "environment", "explain", "install", "methods", "prepare", "quantize"]


@dataclass
class Environment:
    """What the layers below need from the libraries above; every entry is optional.

    Attributes:
        placement: ``placement(model)`` gives ``place``, or ``None`` if nothing is offloaded; ``with place(module)`` the
            module's tensors are in memory on their device.
        load_processor: ``load_processor(model, config, data)`` gives a tokenizer or processor.
        load_hub: ``load_hub(name)`` gives the rows of a data set that is named by a string.
        progress: ``progress(total, description)`` makes a progress bar with ``update()`` and ``close()``.
        attach: ``attach(model, config)`` marks a live model as quantized, so that its library can save it.
        detach: ``detach(model)`` undoes ``attach``.
        is_packed: ``is_packed(model, config)`` says who quantized the model before; ``None`` if nobody did.
        untie: ``untie(model, name)`` gives a module whose weight is tied to another one a weight of its own.
        example: ``example(model)`` gives the arguments of one forward pass.
        can_cache: ``can_cache(model)`` raises if the model has no key-value cache.
        check_cache: ``check_cache(model)`` raises if the model does not decode with the cache of its attention parts as
            it does with its own.
    """

    placement: Callable[[nn.Module], Callable[[nn.Module], AbstractContextManager[Any]] | None] | None = None
    load_processor: Callable[[nn.Module, HfqConfig, Any], Any] | None = None
    load_hub: Callable[..., Iterable[Any]] | None = None
    progress: Callable[[int, str], Any] | None = None
    attach: Callable[[nn.Module, HfqConfig], None] | None = None
    detach: Callable[[nn.Module], None] | None = None
    is_packed: Callable[[nn.Module, HfqConfig], str | None] | None = None
    untie: Callable[[nn.Module, str], None] | None = None
    example: Callable[[nn.Module], Mapping[str, Any]] | None = None
    can_cache: Callable[[nn.Module], None] | None = None
    check_cache: Callable[[nn.Module], None] | None = None


_ENVIRONMENT = Environment()


def install(new: Environment) -> None:
    """Make ``new`` the environment of every later call."""
    global _ENVIRONMENT
    _ENVIRONMENT = new


def environment() -> Environment:
    """The environment in use."""
    return _ENVIRONMENT


def quantize(model: nn.Module, config: HfqConfig, data: Any = None) -> Report:
    """Quantize ``model`` in place, and mark it so that ``save_pretrained`` writes the packed checkpoint.

    Args:
        model: a float model; its blocks may be offloaded by accelerate.
        config: the method's config; its ``manifest`` and ``summary`` are filled in.
        data: calibration data; ``None`` takes ``config.calibration``.

    Returns:
        The report, also kept as ``model.hfq_report``.

    Raises:
        ConfigError: the config does not fit the model, or the model is quantized already.
        DataError: the method needs data and it is missing, too short, or of the wrong form.
        QuantizationError: a module could not be done and ``allow_partial`` is off. The model is then partly
            quantized: load it again before another try.
    """
    from hfq.layers import swap

    config.validate()
    _check_model(model, config)
    started, memory = time.perf_counter(), PeakMemory()
    place = None if _ENVIRONMENT.placement is None else _ENVIRONMENT.placement(model)
    config._environment = replace(_ENVIRONMENT, placement=place)
    try:
        with memory, torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            asked = _asked_sites(model, config)
            batches = _batches(model, config, config.data if data is None else data)
            report = Report(method=config.method)
            for name, reason in asked.skipped.items():
                report.leave(name, reason)
            methods_table.recipe(config.method)(model, batches, config, report)
            _store_cache(model, batches, config, report)
    finally:
        config._environment = None
    _check_report(report, asked.names, config)
    _tell_products(model, config, report)
    swap.keep_dtype(model)
    prepare(model, config)
    report.totals |= {
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": memory.peak,
        "bits_per_weight": report.bits_per_weight(),
        "packed_bytes": round(report.stored_bits() / 8),
        "seed": config.seed,
        "data": getattr(batches, "descriptor", None),
        "versions": _versions(),
    }
    _record(model, config, report)
    return report


def explain(model: nn.Module) -> dict[str, Any]:
    """Which kernel serves each packed layer and each side of a quantized cache, and why others were passed over."""
    from hfq.layers import kv_install, swap

    caches = kv_install.explain(model)
    names = list(swap.packed_modules(model)) if caches else _packed_names(model, "explain")
    return {name: model.get_submodule(name).explain() for name in names} | caches


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every packed layer by its float module, in place, and unmark the model."""
    from hfq.layers import attention, swap

    if not attention.parts(model):
        _packed_names(model, "dequantize")
    swap.dequantize_modules(model, dtype)
    attention.uninstall(model)
    if _ENVIRONMENT.detach is not None:
        _ENVIRONMENT.detach(model)
    return model


def methods() -> dict[str, methods_table.Method]:
    """The table of methods: slug to row (config class, paper, domain, status)."""
    return dict(methods_table.METHODS)


def _packed_names(model: nn.Module, verb: str) -> list[str]:
    from hfq.layers import swap

    names = list(swap.packed_modules(model))
    if not names:
        raise ConfigError(f"{type(model).__name__} has no packed layers: there is nothing to {verb}")
    return names


@dataclass
class _Asked:
    names: list[str]
    skipped: dict[str, str]


def _check_model(model: nn.Module, config: HfqConfig) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is {type(model).__name__}, a torch.nn.Module is needed")
    packed = _ENVIRONMENT.is_packed(model, config) if _ENVIRONMENT.is_packed is not None else None
    if packed:
        raise ConfigError(f"{type(model).__name__} is already quantized ({packed}): load the float model first")
    if _ENVIRONMENT.can_cache is not None and (config.kv_bits != 16 or config._cache is not None):
        _ENVIRONMENT.can_cache(model)
    if config.dequantize:
        raise ConfigError("dequantize=True gives a packed checkpoint back as floats: it cannot be used to quantize")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parent = model.get_submodule(name.rpartition(".")[0])
        if tensor.is_meta and not hasattr(parent, "_hf_hook"):
            raise ConfigError(f"{name} is on the meta device and has no data: load the weights first")


def _asked_sites(model: nn.Module, config: HfqConfig) -> _Asked:
    plan = config.plan(model)
    sites = plan.sites
    names = [name for name, _ in model.named_modules()]
    for pattern in select.unused(config.overrides, names):
        raise ConfigError(f"overrides[{pattern!r}] matches no module of {type(model).__name__}")
    for site in sites:
        if _ENVIRONMENT.untie is not None:
            _ENVIRONMENT.untie(model, site.name)
    if not sites and config.bits != 16:
        raise ConfigError(f"{type(model).__name__} has no layer that {config.method} could quantize")
    usual = type(config).__dataclass_fields__["activation_bits"].default
    if not sites and config.activation_bits not in (16, usual):
        raise ConfigError(f"activation_bits={config.activation_bits} and bits=16: only packed layers quantize their "
                          "inputs: bits=8 leaves the weights nearly as they are")
    if sites and config.group_size > max(site.in_features for site in sites):
        widest = max(site.in_features for site in sites)
        raise ConfigError(f"group_size={config.group_size} fits no layer: the widest has {widest} inputs")
    return _Asked([site.name for site in sites], dict(plan.skipped))


def _batches(model: nn.Module, config: HfqConfig, data: Any) -> Any:
    if data is None:
        if config.wants_data:
            raise DataError(f"{config.method} needs calibration data: pass data=..., or calibration=... to the config")
        return None
    load = _ENVIRONMENT.load_processor
    processor = config._processor if load is None else load(model, config, data)
    batches = normalise(
        data, processor=processor, samples=config.calibration_samples, seqlen=config.calibration_seqlen,
        batch_size=config.calibration_batch_size, seed=config.seed, text_column=config.text_column,
        load_hub=_ENVIRONMENT.load_hub, accepted=_accepted(model),
    )
    check(batches, model)
    return batches


def _accepted(model: nn.Module) -> list[str] | None:
    """Argument names of the model's forward; ``None`` if it takes any, or names its input in its own way."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return names if {"input_ids", "pixel_values"} & set(names) else None


def _store_cache(model: nn.Module, batches: Any, config: HfqConfig, report: Report) -> None:
    """Quantize the key-value cache as the config asks, if the method has not done so."""
    from hfq.layers import attention, kv_install

    def caches() -> bool:
        return any(part.cache is not None for part in attention.parts(model).values())

    if config._cache is not None:
        config._cache._environment = config._environment
        methods_table.recipe(config._cache.method)(model, batches, config._cache, report)
    elif config.kv_bits != 16 and not caches():
        if batches is None and _ENVIRONMENT.example is None:
            raise DataError("the attention of this model is found by running it: pass data")
        rows = [_ENVIRONMENT.example(model)] if batches is None else batches  # type: ignore[misc]
        kv_install.uniform(model, config.one_call(model, rows), config.kv_bits, report)
    if caches() and _ENVIRONMENT.check_cache is not None:
        _ENVIRONMENT.check_cache(model)


def _check_report(report: Report, asked: list[str], config: HfqConfig) -> None:
    for name in asked:
        if name not in report.rows:
            report.refuse(name, f"the method {config.method} left it out without a reason")
    if report.refused and not config.allow_partial:
        lines = "; ".join(f"{row.module}: {row.reason}" for row in report.refused[:5])
        more = f" (and {len(report.refused) - 5} more)" if len(report.refused) > 5 else ""
        raise QuantizationError(
            f"{config.method} could not do {len(report.refused)} of {len(asked)} modules: {lines}{more}. "
            "Skip them with modules_to_not_convert, or accept it with allow_partial=True"
        )


def _tell_products(model: nn.Module, config: HfqConfig, report: Report) -> None:
    """Say so if products of attentions were asked for and none could be found."""
    from hfq.layers import attention, products

    asked = getattr(config, "attention", False) and config.activation_bits != 16 and report.packed
    if asked and not attention.parts(model) and not any(map(products.causal, model.modules())):
        report.note("no attention whose linears are packed goes through the attention interface: products of "
                    "attentions stay floats")


def prepare(model: nn.Module, config: HfqConfig) -> None:
    """Give every packed layer the compute dtype that was asked for, and the form that its kernel computes from."""
    from hfq.layers import swap

    swap.freeze(model)
    if config.torch_compute_dtype is not None:
        for module in swap.packed_modules(model).values():
            module.compute_dtype = config.torch_compute_dtype
    swap.prepare(model, config.cpu_memory)  # type: ignore[arg-type]


def _record(model: nn.Module, config: HfqConfig, report: Report) -> None:
    """Put the outcome where saving finds it."""
    from hfq.layers import swap

    # What serves a layer is known only now: while it was calibrated, its products were the reference's.
    for name, module in swap.packed_modules(model).items():
        if name in report.rows and module.device.type != "meta":
            report.rows[name].kernel = swap.kernel_of(module)

    config.manifest = swap.describe(model)
    totals = report.totals
    counts = {status: sum(row.status == status for row in report) for status in ("packed", "float", "refused")}
    config.summary = {
        **counts, "bits_per_weight": totals["bits_per_weight"], "seconds": totals["seconds"],
        "peak_memory_bytes": totals["peak_memory_bytes"], "packed_bytes": totals["packed_bytes"],
        "data": totals["data"], "versions": totals["versions"],
    }
    model.hfq_report = report  # type: ignore[assignment]
    if _ENVIRONMENT.attach is not None:
        _ENVIRONMENT.attach(model, config)


def _versions() -> dict[str, str]:
    from hfq import __version__

    found = {"hfq": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "diffusers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
