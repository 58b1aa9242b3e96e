"""The JSON record of the packed layers of a model, read with suspicion: a checkpoint may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hfq.errors import CheckpointError, ConfigError
from hfq.formats import QuantSpec

__all__ = ["VERSION", "entries", "fields", "locate", "parts", "present", "size", "spec_of"]

VERSION = 1
# Lists of the manifest besides the rotations; each entry names its module.
_LISTS = {"rotations": "rotation", "attention": "attention", "attached": "attached matrix",
          "folded": "folded norm", "switched": "schedule of widths"}  # fmt: skip

# No tensor dimension of any model is near this; a larger one is damage or malice, and must not reach an allocation.
_LARGEST = 1 << 31


def entries(manifest: Any) -> dict[str, Mapping[str, Any]]:
    """The layers of a manifest; the outer form of all of it is checked.

    Raises:
        CheckpointError: the manifest is no manifest, or of a newer version.
    """
    if not isinstance(manifest, Mapping):
        raise CheckpointError(f"the manifest of packed layers is {type(manifest).__name__}, a dictionary is needed")
    version = manifest.get("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise CheckpointError(f"the manifest has version {version!r}; this hfq reads up to {VERSION}: upgrade hfq")
    unknown = set(manifest) - {"version", "layers", "integer", "noise_levels", *_LISTS}
    if unknown:
        raise CheckpointError(f"the manifest has unknown parts {sorted(unknown)}: it was written by a newer hfq")
    layers = manifest.get("layers", {})
    if not isinstance(layers, Mapping) or any(not isinstance(manifest.get(kind, []), list) for kind in _LISTS):
        raise CheckpointError(f"the manifest needs a dictionary 'layers' and a list {', '.join(map(repr, _LISTS))}")
    for name, entry in layers.items():
        if not isinstance(name, str) or not name or not isinstance(entry, Mapping):
            raise CheckpointError(f"the manifest entry {name!r} is damaged")
    for kind, what in _LISTS.items():
        for entry in manifest.get(kind, []):
            if not isinstance(entry, Mapping) or not isinstance(entry.get("module"), str):
                raise CheckpointError(f"the manifest has a damaged {what}: {entry!r}")
    return dict(layers)


def parts(manifest: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The entries of a list of the manifest, checked by :func:`entries`."""
    return manifest.get(kind, [])


def present(part: Any, entry: Mapping[str, Any], where: str) -> bool:
    """Whether the part that ``entry`` describes is in its place already.

    Args:
        part: what is there; ``None`` for nothing.

    Raises:
        CheckpointError: another part is there.
    """
    if part is None:
        return False
    if {"module": entry["module"], **part.describe()} != dict(entry):
        raise CheckpointError(f"{where} is there already, and otherwise than the manifest says")
    return True


def fields(name: str, entry: Any, known: set[str]) -> None:
    """Raise unless ``entry`` has exactly the known fields: one that is not understood would change the result."""
    if not isinstance(entry, Mapping) or set(entry) != known:
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise CheckpointError(f"{name}: the manifest entry has {found}; {sorted(known)} are needed")


def size(name: str, entry: Mapping[str, Any], field: str, actual: int) -> int:
    """A dimension, which must be the one of the module in the model."""
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
        raise CheckpointError(f"{name}: {field}={value!r} in the manifest is not a size")
    if value != actual:
        raise CheckpointError(f"{name}: {field} is {value} in the manifest and {actual} in the model")
    return value


def spec_of(name: str, entry: Mapping[str, Any]) -> QuantSpec:
    """The grid of an entry."""
    try:
        return QuantSpec.from_dict(dict(entry["spec"]))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{name}: its weight format in the manifest is not valid: {error}") from error


def locate(model: nn.Module, name: str, layers: Mapping[str, Any]) -> str | None:
    """The name under which ``model`` has module ``name`` of the manifest.

    A model without a head can be loaded from the checkpoint of one with a head, and the other way round: then the
    ``base_model_prefix`` is missing or new in every name. ``None``: the module belongs to a head that is not there.

    Raises:
        CheckpointError: the model has no such module.
    """
    if _has(model, name):
        return name
    prefix = getattr(model, "base_model_prefix", "")
    if isinstance(prefix, str) and prefix:
        head, _, rest = name.partition(".")
        if head == prefix and _has(model, rest):
            return rest
        if _has(model, f"{prefix}.{name}"):
            return f"{prefix}.{name}"
        if head != prefix and not _has(model, prefix) and any(other.startswith(f"{prefix}.") for other in layers):
            return None
    raise CheckpointError(f"{name} is packed in the checkpoint; {type(model).__name__} has no such module")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return bool(name)
