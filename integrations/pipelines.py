"""Components of a diffusers pipeline quantized in place, calibrated on what the pipeline calls them with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hfq import api
from hfq.config import HfqConfig
from hfq.errors import ConfigError, DataError
from hfq.integrations.calls import RecordedCalls
from hfq.integrations.drawing import Surroundings
from hfq.integrations.recording import check_precision, component_of, guidance_scale, record_calls
from hfq.integrations.registration import install_environment

__all__ = ["quantize_pipeline", "record_calls"]


def quantize_pipeline(
    pipe: Any, configs: Mapping[str, Any], calibration: Any = None, **options: Any
) -> Any:
    """Quantize components of a pipeline in place, one after the other, each in the pipeline as it then is.

    Args:
        pipe: a pipeline of diffusers in memory; ``enable_model_cpu_offload`` and ``enable_sequential_cpu_offload`` may
            be on, and are on afterwards.
        configs: component name to Config (or to a dict with ``method`` and its fields).
        calibration: prompts, ``RecordedCalls`` of the component, or a dict of them (or of any calibration data) by
            component. Without it an unconditional pipeline is recorded as it is.
        options: of :func:`record_calls`.

    Returns:
        ``pipe``; ``pipe.save_pretrained`` writes the packed components.

    Raises:
        ConfigError, DataError: as :func:`record_calls` and :func:`hfq.quantize`; and recorded calls of another
            component, of timesteps that the scheduler does not have, or without the half of guidance that the
            pipeline uses.
    """
    install_environment()
    if not isinstance(configs, Mapping) or not configs:
        raise ConfigError("quantize_pipeline needs {component: Config}, at least one")
    todo = {name: (component_of(pipe, name), _config(name, config)) for name, config in configs.items()}
    for name, (module, _) in todo.items():
        check_precision(pipe, name, module)
    if isinstance(calibration, Mapping) and (unknown := sorted(set(calibration) - set(configs))):
        raise ConfigError(f"calibration of {unknown}, which have no config; configs are for {sorted(configs)}")
    for name, (_, config) in todo.items():
        data = _data(pipe, name, config, calibration, options)
        # What is drawn first must come from a pipeline that is whole; only then is the module looked up and changed.
        with _resident(pipe, name) as module:
            config._surroundings = Surroundings(pipe, name, data)
            try:
                api.quantize(module, config, data)
            finally:
                config._surroundings = None
    return pipe


def _config(name: str, config: Any) -> HfqConfig:
    if isinstance(config, HfqConfig):
        return config
    if isinstance(config, Mapping) and config.get("method"):
        return HfqConfig(**config)
    raise ConfigError(f"{name}: {config!r} is no Config of a method, nor a dict with 'method' and its fields")


def _data(pipe: Any, name: str, config: HfqConfig, calibration: Any, options: Mapping[str, Any]) -> Any:
    """Calibration data of one component: as given, or recorded now; ``None`` for a method that needs none."""
    given = calibration.get(name) if isinstance(calibration, Mapping) else calibration
    if given is None and config.data is not None:
        given = config.data
    if not isinstance(given, RecordedCalls):
        if not config.wants_data:
            return None
        prompts = given if given is None or _are_prompts(given) else False
        if prompts is False:
            return given
        seeded = {"seed": config.seed, **options}
        return record_calls(pipe, name, prompts, **seeded)
    _check_recorded(pipe, name, given, options)
    return given


def _are_prompts(given: Any) -> bool:
    return isinstance(given, Sequence) and bool(len(given)) and isinstance(given[0], (str, int))


def _check_recorded(pipe: Any, name: str, calls: RecordedCalls, options: Mapping[str, Any]) -> None:
    if calls.component != name:
        raise ConfigError(f"calls of {calls.component!r} were given for {name!r}: record_calls(pipe, {name!r}, ...)")
    last = getattr(getattr(pipe, "scheduler", None), "config", {}).get("num_train_timesteps")
    times = calls.timesteps[~calls.timesteps.isnan()]
    # Flow matching starts at the last timestep itself, others one before.
    if last is not None and len(times) and float(times.max()) > last:
        raise DataError(f"the calls were recorded at timesteps up to {float(times.max()):g}, and the scheduler of this "
                        f"pipeline ({type(pipe.scheduler).__name__}) has none above {last}: record them with it")
    usual, scale = guidance_scale(pipe, options)
    if options.get("guidance") is False or not len(times):
        return
    if scale > 1 and not calls.guidance and calls.record.meant is not False:
        raise DataError(f"the calls lack the unconditional half of guidance, which this pipeline uses (guidance_scale="
                        f"{scale:g}): record them with it, or say guidance=False")
    if usual > 1 >= scale and calls.guidance:
        raise DataError(f"guidance_scale={scale:g} removes the unconditional half of guidance, which the calls were "
                        "recorded with: record them without it, or leave guidance_scale above 1")


@contextlib.contextmanager
def _resident(pipe: Any, name: str) -> Iterator[nn.Module]:
    """The component on the device it computes on; a pipeline that moves whole models in and out does so again after."""
    moved = bool(getattr(pipe, "_all_hooks", None))
    if not moved:
        yield pipe.components[name]
        return
    device = pipe._offload_device
    pipe.remove_all_hooks()
    try:
        yield pipe.components[name].to(device)
    finally:
        pipe.enable_model_cpu_offload(device=device)
