"""The diffusers quantizer: packs a float model after loading it, rebuilds the packed layers of a saved one.

A diffusers quantizer sees one model, never the pipeline around it; methods that need a pipeline's calls get them as
recorded calibration data.
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer

from hfq.config import HfqConfig
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError

__all__ = ["HfqDiffusersQuantizer", "attach"]


class HfqDiffusersQuantizer(DiffusersQuantizer):
    """See the module's first lines; the members are those that diffusers calls."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    quantization_config: HfqConfig

    def __init__(self, quantization_config: HfqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert: list[str] = []
        self._files: list[str] = []
        self._packed: dict[str, torch.dtype] = {}
        self._header: dict[str, str] = {}
        self._report: Any = None
        self._model: Any = lambda: None

    # -- loading ------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            config.check_manifest()
        elif config.dequantize:
            raise ConfigError("dequantize=True gives a packed checkpoint back as floats: this checkpoint is not packed")
        elif config.wants_data and config.data is None:
            raise DataError(
                f"{config.method} needs calibration data: pass {type(config).__name__}(calibration=[recorded calls]), "
                "or quantize the live pipeline with hfq.quantize_pipeline"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [str(file) for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        from hfq.integrations import guard
        from hfq.integrations.conditioning import check_conditioning
        from hfq.layers import swap

        check_conditioning(self._files, getattr(self.quantization_config, "conditioning", None))
        self._header = guard.header(self._files)
        swap.build_empty(model, self.quantization_config.manifest or {})
        expected = guard.packed_tensors(model)
        self._packed = {name: tensor.dtype for name, tensor in expected.items()}
        if self._files:
            guard.check_files(self._files, expected, [], model)

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        # Floating tensors of packed layers only: diffusers casts them to the requested dtype, and scales must not be.
        return self._packed.get(param_name, torch.uint8).is_floating_point

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> None:
        found, needed = list(loaded_param.shape), list(current_param.shape)
        raise CheckpointError(f"{param_name} has shape {found}, the quantization config says {needed}")

    def create_quantized_param(
        self, model: Any, param_value: Any, param_name: str, target_device: Any, state_dict: dict[str, Any],
        unexpected_keys: Any = None, **kwargs: Any,
    ) -> None:
        path, _, leaf = param_name.rpartition(".")
        value = state_dict[param_name].to(device=target_device, dtype=self._packed[param_name])
        model.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._model = weakref.ref(model)
        if not self.pre_quantized:
            from hfq import api
            from hfq.integrations.registration import install_environment

            install_environment()
            model.eval()
            model.hf_quantizer = self
            api.quantize(model, self.quantization_config)
            self.pre_quantized = True
            return
        from hfq import api
        from hfq.layers import swap
        from hfq.report import Report

        swap.check(model)
        api.prepare(model, self.quantization_config)
        if "hfq_report" in self._header:
            model.hfq_report = self._report = Report.from_dict(json.loads(self._header["hfq_report"]))

    # -- saving -------------------------------------------------------------------------------------------------

    @property
    def is_serializable(self) -> bool:
        """Asked before the config is written: the one moment to bring it up to date."""
        from hfq.integrations import guard

        if (model := self._model()) is not None:
            guard.renew(self.quantization_config, model)
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        metadata = {"hfq_format_version": str(self.quantization_config.format_version)}
        if self._report is not None:
            metadata["hfq_report"] = json.dumps(self._report.to_dict(), separators=(",", ":"), allow_nan=False)
        model = self._model()
        if model is not None and any(tensor.is_meta for tensor in state_dict.values()):
            # Weights that are on their device only while their layer runs: diffusers would try to save the empty ones.
            state_dict = get_state_dict_offloaded_model(model)
        return state_dict, metadata

    # -- the rest of the contract -------------------------------------------------------------------------------

    def _dequantize(self, model: Any) -> Any:
        from hfq.layers import swap

        swap.dequantize_modules(model)
        _drop_config(model)
        return model

    def forget(self, model: Any) -> None:
        """Leave no trace of the packed layers on a model that is float again."""
        _drop_config(model)
        for name in ("hf_quantizer", "quantization_method"):
            if name in vars(model):
                delattr(model, name)
        model.is_quantized = False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, config: HfqConfig) -> None:
    """Mark a live ``ModelMixin`` as quantized with ``config``, so that it saves as a packed checkpoint."""
    _check_dtype(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, HfqDiffusersQuantizer):
        quantizer = HfqDiffusersQuantizer(config, pre_quantized=True)
    quantizer._report = getattr(model, "hfq_report", None)
    quantizer._model = weakref.ref(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)


def _check_dtype(model: Any) -> None:
    """A model computes in the dtype of its first floating parameter: that must be no scale of a packed layer."""
    first = next(((name, p) for name, p in model.named_parameters() if p.is_floating_point()), None)
    if first is None or not first[0].endswith("scale"):
        return
    layer = model.get_submodule(first[0].rpartition(".")[0])
    if getattr(layer, "compute_dtype", first[1].dtype) != first[1].dtype:
        raise QuantizationError(f"{first[0]} would be the first floating tensor of {type(model).__name__}, whose dtype "
                                "diffusers takes for that of the model: leave this layer out with "
                                "modules_to_not_convert, or give it scale_dtype in overrides")


def _drop_config(model: Any) -> None:
    # A frozen dict: entries can be set through register_to_config, and not removed.
    kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = FrozenDict(kept)
