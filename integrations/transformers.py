"""The transformers quantizer: calibrates after the float weights are loaded, rebuilds packed layers before loading.

Life of a float model: nothing before loading; :func:`hfq.api.quantize` in place after it. Life of a packed checkpoint:
the layers of the manifest are built on meta, the loader fills them as ordinary parameters, then they choose kernels.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers.quantizers import HfQuantizer

from hfq.config import HfqConfig
from hfq.errors import ConfigError, DataError

__all__ = ["HfqHfQuantizer", "attach"]


class HfqHfQuantizer(HfQuantizer):
    """See the module's first lines; the members are those that transformers calls."""

    requires_calibration = False
    quantization_config: HfqConfig

    def __init__(self, quantization_config: HfqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._model: Any = None
        self._files: list[str] = []
        self._header: dict[str, str] = {}

    # -- loading ------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            config.check_manifest()
            return
        if config.dequantize:
            raise ConfigError("dequantize=True gives a packed checkpoint back as floats: this checkpoint is not packed")
        if config.wants_data and config.data is None:
            # Said before the weights are loaded: hfq.quantize would say it after.
            raise DataError(f"{config.method} needs calibration data: pass {type(config).__name__}(calibration=...)")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        from hfq.integrations import guard
        from hfq.layers import swap

        self._files = [str(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        self._header = guard.header(self._files)
        swap.build_empty(model, self.quantization_config.manifest or {})
        self._model = model
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        # Not every version passes the model; it is the one of the hook before.
        model = self._model
        if not self.pre_quantized or model is None:
            return weight_conversions
        from hfq.integrations import guard

        conversions = guard.with_rename(model, weight_conversions)
        if self._files:
            guard.check_files(self._files, guard.packed_tensors(model), conversions, model)
            self._files = []
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            self._finish_packed(model)
        else:
            from hfq import api
            from hfq.integrations.registration import install_environment

            install_environment()
            api.quantize(model, self.quantization_config)
            self.pre_quantized = True
        self._model = None
        return model

    def _finish_packed(self, model: Any) -> None:
        from hfq import api
        from hfq.integrations import hub
        from hfq.layers import swap
        from hfq.report import Report

        swap.check(model)
        config = self.quantization_config
        if config.dequantize:
            self._dequantize(model)
            return
        api.prepare(model, config)
        hub.keep_card(model)
        if "hfq_report" in self._header:
            model.hfq_report = Report.from_dict(json.loads(self._header["hfq_report"]))

    # -- saving -------------------------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """The report travels in the header of every weight file; names are changed by the model's conversions."""
        from hfq.integrations import guard

        guard.renew(self.quantization_config, model)  # before the config is written
        metadata = {"hfq_format_version": str(self.quantization_config.format_version)}
        report = getattr(model, "hfq_report", None)
        if report is not None:
            metadata["hfq_report"] = json.dumps(report.to_dict(), separators=(",", ":"), allow_nan=False)
        return None, metadata

    # -- the rest of the contract -------------------------------------------------------------------------------

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from hfq.layers import attention, swap

        # After a save, the model's config holds the name of its dtype.
        dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        swap.dequantize_modules(model, dtype)
        attention.uninstall(model)
        self.forget(model)
        return model

    def forget(self, model: Any) -> None:
        """Leave no trace of the packed layers on a model that is float again."""
        from hfq.integrations import guard

        guard.drop_rename(model)
        self.remove_quantization_config(model)
        for part in model.modules():
            if hasattr(part, "config") and hasattr(part.config, "_is_quantized"):
                part.config._is_quantized = False

    def remove_quantization_config(self, model: Any) -> None:
        # Called twice on some routes; the base class expects the attributes to be there.
        for name in ("hf_quantizer", "quantization_method"):
            if name in vars(model):
                delattr(model, name)
        if "quantization_config" in vars(model.config):
            del model.config.quantization_config
        model.is_quantized = False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model for a static cache: not for a quantized one."""
        manifest = self.quantization_config.manifest or {}
        return not manifest.get("attention")


def attach(model: Any, config: HfqConfig) -> None:
    """Mark a live ``PreTrainedModel`` as quantized with ``config``, so that it saves as a packed checkpoint."""
    from hfq.integrations import guard, hub

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, HfqHfQuantizer):
        quantizer = HfqHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    guard.add_rename(model)
    hub.keep_card(model)

