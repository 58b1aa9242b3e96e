"""The calls of a pipeline's component, recorded over the denoising loop."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import Store, leaves, rebuild
from hfq.errors import ConfigError, DataError
from hfq.fields import did_you_mean
from hfq.integrations.calls import Call, Record, RecordedCalls, check_tree

__all__ = ["check_precision", "component_of", "guidance_scale", "record_calls"]

# What pipelines call the thing that a picture shows.
_CONDITIONS = ("prompt", "class_labels")
# Bytes of recorded tensors kept in memory without a folder; more go into a temporary one.
MEMORY = 256 << 20


def record_calls(
    pipe: Any,
    component: str = "unet",
    prompts: Sequence[Any] | None = None,
    *,
    steps: int | None = None,
    every: int = 1,
    samples: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    guidance: bool | None = None,
    **options: Any,
) -> RecordedCalls:
    """Run a pipeline and keep what it calls one of its components with.

    Every image starts from a generator of its own (``seed`` plus its number): what is recorded does not depend on
    ``batch_size``, and is the same in every run.

    Args:
        pipe: a pipeline of diffusers, offloaded or not.
        component: its name in ``pipe.components``.
        prompts: texts, or class labels, for pipelines that take them.
        steps: how many timesteps to keep: every ``len(timesteps) // steps``-th one from the first on.
        every: the same, said as the distance of kept timesteps.
        samples: images at each kept timestep; default one a prompt. Prompts are picked evenly, or used again.
        batch_size: images that are drawn at once.
        seed: of the noise.
        folder: where tensors are written while the pipeline runs; default memory, and what is over 256 MiB into a
            temporary folder. Read later with ``RecordedCalls.load(folder)``.
        guidance: ``False`` says that the missing half of classifier-free guidance is meant (distilled models run
            without it); ``True`` insists on both halves.
        options: of the pipeline's call (``num_inference_steps``, ``guidance_scale``, ``height``, ...).

    Raises:
        ConfigError: there is no such component, an option that the pipeline does not take, or half precision on a CPU.
        DataError: prompts are missing, the scheduler has too few timesteps, options remove the unconditional half of
            guidance, the component is never called, or its inputs are not finite.
    """
    module = component_of(pipe, component)
    check_precision(pipe, component, module)
    _check_counts(steps=steps, every=every, samples=samples, batch_size=batch_size)
    if steps is not None and every != 1:
        raise ConfigError(f"steps={steps} and every={every}: both choose the timesteps, give one")
    condition = _check_options(pipe, prompts, options, guidance)
    images = _images(prompts, samples, batch_size)
    store = Store(MEMORY) if folder is None else Store(0, _fresh(folder), keep=True)
    recorder = _Recorder(pipe, module, store, steps, every)
    with recorder:
        for start in range(0, len(images), batch_size):
            chosen = images[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))]
            recorder.run(_arguments(pipe, condition, chosen, options) | {"generator": generators}, len(chosen))
    if not recorder.calls:
        raise DataError(f"{type(pipe).__name__} never called {component!r}: nothing was recorded")
    if guidance and not recorder.doubled:
        raise DataError(f"guidance=True, and {component!r} was called with one row an image: the unconditional half of "
                        "guidance is missing")
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    record = Record(component, recorder.doubled, recorder.length, config.get("num_train_timesteps"), seed,
                    type(pipe).__name__, type(getattr(pipe, "scheduler", None)).__name__, guidance,
                    None if images[0] is None else images, _plain_options(options))  # fmt: skip
    calls = RecordedCalls(recorder.calls, record, store)
    if folder is not None:
        calls.save(folder)
    return calls


def _plain_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of a call as they can be written down; ``None`` if one cannot."""
    plain = all(isinstance(value, (str, int, float, bool, type(None))) for value in options.values())
    return {name: value for name, value in options.items() if name != "output_type"} if plain else None


class _Recorder:
    """Keeps calls of one module while it is entered; :meth:`run` runs the pipeline once."""

    def __init__(self, pipe: Any, module: nn.Module, store: Store, steps: int | None, every: int) -> None:
        self.pipe, self.module, self.store, self.steps, self.every = pipe, module, store, steps, every
        self.signature = inspect.signature(module.forward)
        self.calls: list[Call] = []
        self.doubled = False
        self.length: int | None = None
        self._seen: dict[float, int] = {}
        self._images = 0
        self._handle: Any = None
        self._last: tuple[dict[str, Any], int, float] | None = None  # a call whose other half may follow

    def __enter__(self) -> _Recorder:
        self._handle = self.module.register_forward_pre_hook(self._keep, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def run(self, arguments: Mapping[str, Any], images: int) -> None:
        self._seen, self._images = {}, images
        training = [module for module in self.pipe.components.values() if isinstance(module, nn.Module)
                    and module.training]  # fmt: skip
        try:
            for module in training:
                module.eval()
            with torch.no_grad():
                self.pipe(**arguments)
        finally:
            for module in training:
                module.train()
        self._write()

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self.signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        defaults = {name: p.default for name, p in self.signature.parameters.items()}
        given = {name: value for name, value in given.items()
                 if name != "return_dict" and (isinstance(value, torch.Tensor) or value is not defaults.get(name))}
        timestep = _timestep(given)
        if self._last is not None and timestep == self._last[2] and (both := _joined(given, self._last[0])) is not None:
            self._last, self.doubled = (both, 2 * self._last[1], timestep), True
            return
        if not self._wanted(timestep):
            return
        check_tree(given, f"{type(module).__name__} at timestep {timestep:g}")
        rows = next((t.shape[0] for _, t in leaves(given) if t.ndim), 1)
        self.doubled |= rows > self._images and not math.isnan(timestep)
        self._write()
        self._last = rebuild(given, lambda _, t: t.detach().cpu().clone()), rows, timestep

    def _write(self) -> None:
        if self._last is not None:
            given, rows, timestep = self._last
            self.calls.append(Call(rebuild(given, lambda _, t: self.store.put(t, shared=True)), rows, timestep))
            self._last = None

    def _wanted(self, timestep: float) -> bool:
        """Whether this is the first call at a timestep that is to be kept; outside the loop every call is."""
        if math.isnan(timestep):
            return True
        if timestep in self._seen:  # multistep schedulers call twice at some timesteps
            return False
        place = self._seen[timestep] = len(self._seen)
        timesteps = dict.fromkeys(float(t) for t in self.pipe.scheduler.timesteps)
        self.length = len(self.pipe.scheduler.timesteps)
        if self.steps is None:
            return place % self.every == 0
        if self.steps > len(timesteps):
            raise DataError(f"steps={self.steps}: the loop has {len(timesteps)} timesteps; raise num_inference_steps")
        distance = len(timesteps) // self.steps
        return place % distance == 0 and place // distance < self.steps


def _joined(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any] | None:
    """One call for both halves of guidance that a pipeline makes in two, first with the condition and then without;
    the half without comes first, as in pipelines that make one call. ``None`` unless that is what these are.

    The halves have one noisy sample, and other conditions of the same shape.
    """
    one, other = (dict(leaves(dict(tree))) for tree in (before, now))
    if list(one) != list(other) or any(a.shape != b.shape for a, b in zip(one.values(), other.values(), strict=True)):
        return None
    same = [torch.equal(a, b.detach().cpu()) for a, b in zip(one.values(), other.values(), strict=True)]
    first = next((i for i, t in enumerate(one.values()) if t.ndim), None)
    if first is None or not same[first] or all(same):
        return None
    rows = list(one.values())[first].shape[0]

    def join(path: Any, t: torch.Tensor) -> torch.Tensor:
        batched = t.ndim > 0 and t.shape[0] == rows
        return torch.cat([other[path].detach().cpu(), t]) if batched else t

    return rebuild(dict(before), join)


def _timestep(given: Mapping[str, Any]) -> float:
    value = given.get("timestep", given.get("t"))
    if isinstance(value, torch.Tensor) and value.numel():
        return float(value.reshape(-1)[0])
    return float(value) if isinstance(value, (int, float)) else math.nan


def _images(prompts: Sequence[Any] | None, samples: int | None, batch_size: int) -> list[Any]:
    """What each image shows; ``None`` where nothing is asked for."""
    if prompts is None:
        return [None] * (samples or batch_size)
    if samples is None or samples == len(prompts):
        return list(prompts)
    if samples < len(prompts):
        return [prompts[i * len(prompts) // samples] for i in range(samples)]
    return [prompts[i % len(prompts)] for i in range(samples)]


def _arguments(pipe: Any, condition: str | None, chosen: list[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(pipe.__call__).parameters
    given = dict(options)
    if condition is not None and chosen[0] is not None:
        given[condition] = chosen
    elif "batch_size" in taken:
        given["batch_size"] = len(chosen)
    if "output_type" in taken:
        given.setdefault("output_type", "latent" if hasattr(pipe, "vae") and _knows_latent(pipe) else "np")
    return given


def _knows_latent(pipe: Any) -> bool:
    """Whether the pipeline can stop before it decodes pictures that nobody looks at."""
    return '"latent"' in inspect.getsource(type(pipe).__call__)


# -- checks


def component_of(pipe: Any, name: str) -> nn.Module:
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ConfigError(f"{type(pipe).__name__} is no pipeline of diffusers: it has no components")
    modules = {key: item for key, item in components.items() if isinstance(item, nn.Module)}
    if name in modules:
        return modules[name]
    if "." in name and name.partition(".")[0] in modules:
        head, _, rest = name.partition(".")
        raise ConfigError(f"{name!r} is inside a component: name {head!r}, and leave out the rest of it with "
                          f"modules_to_not_convert, or say in overrides what holds for {rest!r}")
    if name in components:
        what = "is not loaded" if components[name] is None else f"is a {type(components[name]).__name__}, not a model"
        raise ConfigError(f"the component {name!r} of {type(pipe).__name__} {what}")
    raise ConfigError(f"{type(pipe).__name__} has no component {name!r}{did_you_mean(name, modules)}: "
                      f"its models are {sorted(modules)}")


def check_precision(pipe: Any, name: str, module: nn.Module) -> None:
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    # Of a packed model the parameters say little: scales have a dtype of their own.
    if getattr(module, "dtype", None) == torch.float16 and device.type == "cpu":
        raise ConfigError(f"{name} is in float16 and runs on a CPU, which computes in float32 or bfloat16: load the "
                          "pipeline with torch_dtype=torch.float32")


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: a number of at least 1 is needed")


def _check_options(
    pipe: Any, prompts: Sequence[Any] | None, options: Mapping[str, Any], guidance: bool | None
) -> str | None:
    """The keyword that prompts are given by, ``None`` for an unconditional pipeline."""
    taken = inspect.signature(pipe.__call__).parameters
    for name in options:
        if name not in taken:
            raise ConfigError(f"{type(pipe).__name__} takes no option {name!r}{did_you_mean(name, taken)}")
    if "generator" in options:
        raise ConfigError("generator: recordings are seeded by seed=..., one generator an image")
    condition = next((name for name in _CONDITIONS if name in taken), None)
    if isinstance(prompts, str) or (prompts is not None and not len(prompts)):
        raise DataError(f"prompts={prompts!r}: a list of at least one is needed")
    if condition is None and prompts is not None:
        raise ConfigError(f"{type(pipe).__name__} draws without prompts: leave prompts out, and say samples=...")
    if condition is not None and prompts is None:
        raise DataError(f"{type(pipe).__name__} draws what its {condition} says: calibration needs prompts=[...] like "
                        "those it will be used with")
    usual, scale = guidance_scale(pipe, options)
    if guidance is None and usual > 1 >= scale:
        raise DataError(f"guidance_scale={scale:g} removes the unconditional half of guidance, which the pipeline "
                        f"uses by default (guidance_scale={usual:g}): calls without it do not stand for those with it. "
                        "Leave it above 1, or say guidance=False if the pipeline will never use guidance")
    return condition


def guidance_scale(pipe: Any, options: Mapping[str, Any]) -> tuple[float, float]:
    """The pipeline's own guidance scale and the one asked for; 0 where there is none."""
    parameter = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    usual = parameter.default if parameter is not None and isinstance(parameter.default, (int, float)) else 0.0
    return float(usual), float(options.get("guidance_scale", usual) or 0.0)


def _fresh(folder: str | os.PathLike[str]) -> str | os.PathLike[str]:
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder):
        raise DataError(f"{folder} is not empty: recorded calls go into a new folder")
    return folder
