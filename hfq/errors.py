"""The exceptions of hfq. Each message says what was wrong, where, and what to do about it."""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "DataError", "HfqError", "KernelError", "QuantizationError"]


class HfqError(Exception):
    """Base class of every error that hfq raises on purpose."""


class ConfigError(HfqError, ValueError):
    """A configuration names an unknown field, an impossible value, or an impossible combination."""


class DataError(HfqError, ValueError):
    """Calibration or evaluation data is empty, too short, of the wrong form, or not finite."""


class CheckpointError(HfqError, ValueError):
    """A saved model cannot be read: missing, truncated, of another shape, or of another version."""


class QuantizationError(HfqError, RuntimeError):
    """A method could not do to a module what the configuration asked for."""


class KernelError(HfqError, RuntimeError):
    """A kernel that was asked for by name cannot run on these operands."""
