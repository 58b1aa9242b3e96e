"""Packed checkpoints on disk: names that stop a transformers without hfq, and checks before a byte is loaded.

A transformers that does not know ``"hfq"`` ignores the quantization config, builds the float model, and would fill it
with random numbers. So the codes of a layer are saved under the name of its float weight (``<module>.weight``, or the
expert tensor's own name) with one more axis: such a loader finds the name, meets another shape, and stops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hfq.errors import CheckpointError
from hfq.layers.attached import AttachedPart
from hfq.layers.integer import IntegerModule
from hfq.layers.kv_cache import CacheQuant
from hfq.layers.online import OnlinePart, StreamRotation
from hfq.layers.packed import PackedModule
from hfq.layers.products import AttentionProducts

__all__ = [
    "PackedRename", "add_rename", "check_files", "disk_leaf", "drop_rename", "header", "packed_tensors",
    "renew", "with_rename",
]


def disk_leaf(leaf: str) -> str | None:
    """Name on disk of a packed layer's main tensor; ``None`` for tensors that keep their name."""
    if leaf == "qweight":
        return "weight"
    return leaf.removesuffix("_qweight") if leaf.endswith("_qweight") else None


class PackedRename(WeightRenaming):
    """Renames the main tensors of packed layers: by exact names, where a pattern would hit every norm's weight too.

    ``load`` maps ``<module>.<disk name>`` to ``qweight``; the reverse, made for saving, needs the modules only.
    A checkpoint of a model with a head and one of its bare backbone differ by ``prefix``, which is tolerated.
    """

    __slots__ = ("load", "modules", "prefix", "saving")

    def __init__(
        self, names: Iterable[str], prefix: str = "", modules: Iterable[str] = (), saving: bool = False
    ) -> None:
        super().__init__(source_patterns="hfq-packed-tensor", target_patterns="hfq-packed-tensor")
        self.load: dict[str, str] = {}
        for name in names:
            base, _, leaf = name.rpartition(".")
            disk = disk_leaf(leaf)
            if disk is not None:
                self.load[f"{base}.{disk}" if base else disk] = leaf
        self.modules = frozenset(modules)
        self.prefix, self.saving = prefix, saving
        # Always reversed on save, also when nothing was loaded through it (a model quantized in memory).
        self._was_used = True

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        base, _, leaf = source_key.rpartition(".")
        if self.saving:
            new = disk_leaf(leaf) if base in self.modules else None
        else:
            new = next((self.load[key] for key in _candidates(source_key, self.prefix) if key in self.load), None)
        if new is None:
            return source_key, None
        return (f"{base}.{new}" if base else new), self.source_patterns[0]

    def reverse_transform(self) -> PackedRename:
        reverse = PackedRename((), self.prefix, self.modules, not self.saving)
        reverse.load = self.load
        return reverse


def _candidates(key: str, prefix: str) -> Iterator[str]:
    """The key in a model with, and without, ``prefix``."""
    yield key
    if prefix:
        yield key.removeprefix(f"{prefix}.") if key.startswith(f"{prefix}.") else f"{prefix}.{key}"


def packed_tensors(model: Any) -> dict[str, Any]:
    """Every tensor of every packed layer, rotation, attached part and online transform, by its name in memory."""
    parts = (PackedModule, StreamRotation, OnlinePart, AttachedPart, CacheQuant, IntegerModule, AttentionProducts)
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules() if isinstance(module, parts)
        for leaf, parameter in module.named_parameters(recurse=False)
    }


def renew(config: Any, model: Any) -> None:
    """Bring manifest and report up to date: merging an adapter may have changed the grid of a layer."""
    layers = (config.manifest or {}).get("layers", {})
    report = getattr(model, "hfq_report", None)
    changed = 0
    for name, module in model.named_modules():
        if name not in layers or not isinstance(module, PackedModule) or layers[name] == module.describe():
            continue
        layers[name] = module.describe()
        row = None if report is None else report.rows.get(name)
        if row is not None and row.numel:
            shapes = [shape for slot in module.slots.values() for shape in slot.shapes.values()]
            row.bits = sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in shapes) / row.numel
            changed += 1
    if changed:
        report.note(f"the grids of {changed} layers are no longer those of the method: adapters were merged into them")
        if config.summary is not None:
            config.summary["bits_per_weight"] = report.bits_per_weight()


def with_rename(model: Any, conversions: Iterable[Any]) -> list[Any]:
    """``conversions`` of ``model`` and, at the end, the renaming of its packed layers' main tensors."""
    names = list(packed_tensors(model))
    modules = {name.rpartition(".")[0] for name in names}
    kept = [conversion for conversion in conversions if not isinstance(conversion, PackedRename)]
    for conversion in kept:
        if isinstance(conversion, WeightConverter) and any(_touches(conversion, name) for name in names):
            _spare(conversion, frozenset(names), model.base_model_prefix)
    return [*kept, PackedRename(names, model.base_model_prefix, modules)]


def _touches(conversion: Any, name: str) -> bool:
    both = (conversion, conversion.reverse_transform())
    return any(one.compiled_sources.search(name) is not None for one in both)


def _spare(conversion: Any, names: frozenset[str], prefix: str) -> None:
    """Keep a converter away from packed tensors.

    In older transformers (5.17) the pattern of ``experts.gate_up_proj`` also matches ``experts.gate_up_proj_qweight``:
    the converter would split the codes into one tensor an expert. The class is changed and not the instance, because
    the reverse converter is made from the class.
    """
    base = type(conversion)

    def rename_source_key(self: Any, source_key: str) -> tuple[str, str | None]:
        if names.intersection(_candidates(source_key, prefix)):
            return source_key, None
        return base.rename_source_key(self, source_key)

    conversion.__class__ = type(base.__name__, (base,), {"__slots__": (), "rename_source_key": rename_source_key})


def add_rename(model: Any) -> None:
    """Make a live model save the main tensors of its packed layers under their names on disk."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # What saving would fall back to for a model that was not loaded from a checkpoint.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    model._weight_conversions = with_rename(model, conversions)


def drop_rename(model: Any) -> None:
    """Undo :func:`add_rename`, for a model whose layers are float again."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [c for c in conversions if not isinstance(c, PackedRename)]


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}): copy or download it again") from None
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete, copy or download it again") from None


def header(files: Iterable[str] | None) -> dict[str, str]:
    """Metadata of the first safetensors file, after opening every one.

    Raises:
        CheckpointError: a file is missing, truncated, or not safetensors.
    """
    metadata: dict[str, str] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with _opened(file) as handle:
                metadata = metadata or dict(handle.metadata() or {})
    return metadata


def check_files(
    files: Iterable[str], expected: Mapping[str, Any], conversions: list[Any], model: Any
) -> None:
    """Compare the tensors of packed layers on disk with what the manifest says, before any is read.

    transformers only warns when a tensor is missing, and fills it with random numbers.

    Args:
        files: the safetensors files of the checkpoint.
        expected: name in memory → meta tensor, for every tensor of every packed layer.
        conversions: the renamings and converters that loading will use.
        model: the model on meta.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", None)
    found: set[str] = set()
    for file in files:
        with _opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                name, _ = rename_source_key(key, renamings, converters, prefix, state)
                if name not in expected and key in expected:
                    name = key
                if name not in expected:
                    continue
                found.add(name)
                stored, tensor = handle.get_slice(key), expected[name]
                if list(stored.get_shape()) != list(tensor.shape):
                    raise CheckpointError(
                        f"{key} in {file} has shape {list(stored.get_shape())}, the quantization config says "
                        f"{list(tensor.shape)}: config.json and the weights do not belong together"
                    )
                if tensor.is_floating_point() == (stored.get_dtype() in ("U8", "I8", "I16", "I32", "I64", "BOOL")):
                    raise CheckpointError(f"{key} in {file} is {stored.get_dtype()}, {tensor.dtype} is needed")
    missing = sorted(set(expected) - found)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing[:3])}{more}: it is incomplete")
