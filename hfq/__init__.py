"""hfq: published quantization methods for Hugging Face models.

Importing it is cheap: everything below is loaded on first use, and the Hugging Face libraries learn of hfq when they
are imported themselves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfq import _autoload

__version__ = "0.1.0"

# Name to module. Names of the first group work on models and need the libraries' glue around them.
_GLUED = {"dequantize": "hfq.api", "explain": "hfq.api", "quantize": "hfq.api"}
_PLAIN = {
    "CheckpointError": "hfq.errors",
    "ConfigError": "hfq.errors",
    "DataError": "hfq.errors",
    "HfqConfig": "hfq.config",
    "HfqError": "hfq.errors",
    "KernelError": "hfq.errors",
    "QALoraConfig": "hfq.integrations.peft",
    "QuantizationError": "hfq.errors",
    "RankDecayConfig": "hfq.integrations.peft",
    "RecordedCalls": "hfq.integrations.calls",
    "Report": "hfq.report",
    "prepare_for_training": "hfq.integrations.peft",
    "push_to_hub": "hfq.integrations.hub",
    "quantize_pipeline": "hfq.integrations.pipelines",
    "record_calls": "hfq.integrations.pipelines",
    "save": "hfq.integrations.saving",
}

if TYPE_CHECKING:
    from hfq.api import dequantize, explain, quantize
    from hfq.config import HfqConfig
    from hfq.errors import CheckpointError, ConfigError, DataError, HfqError, KernelError, QuantizationError
    from hfq.report import Report

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "HfqConfig", "HfqError", "KernelError", "QuantizationError",
    "Report", "dequantize", "explain", "quantize",
]


def __getattr__(name: str) -> Any:
    if name == "methods":  # the folder; calling it gives the table
        return importlib.import_module("hfq.methods")
    if name in _GLUED:
        importlib.import_module("hfq.integrations.registration").install_environment()
        return getattr(importlib.import_module(_GLUED[name]), name)
    if name in _PLAIN:
        found = getattr(importlib.import_module(_PLAIN[name]), name, None)
        if found is None:
            raise AttributeError(f"hfq {__version__} has no {name!r} yet")
        return found
    if name.endswith("Config"):
        table = importlib.import_module("hfq.methods")
        slug = table.config_names().get(name)
        if slug is not None:
            return table.config_class(slug)
    raise AttributeError(f"module 'hfq' has no attribute {name!r}")


def __dir__() -> list[str]:
    table = importlib.import_module("hfq.methods")
    configs = [method.config for method in table.METHODS.values() if method.available]
    return sorted({*globals(), *_GLUED, *_PLAIN, "methods", *configs})


_autoload.install()
