"""What the user asks for: one Config class a method, all of them :class:`HfqConfig`.

The class serves transformers and diffusers alike. Its fields are what is saved in ``config.json``; data, processors
and run options are attributes that are neither saved nor copied.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfq.errors import CheckpointError, ConfigError
from hfq.fields import QuantMethodName, accepts, allowed, did_you_mean, in_range, option, plain, type_hints
from hfq.formats.spec import QuantSpec
from hfq.graph import select

__all__ = ["FORMAT_VERSION", "QUANT_METHOD", "HfqConfig", "QuantMethodName", "option"]

FORMAT_VERSION = 1

_DTYPES = ("float32", "float16", "bfloat16")
# What a checkpoint records besides the fields of its Config class.
_RECORDS = ("format_version", "hfq_version", "manifest", "summary")
# Keys that the loading libraries, or the Hub's tools, add to a saved quantization config.
_LOADER_KEYS = frozenset({"_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit", "run_compressed"})
_SPEC_FIELDS = ("bits", "group_size", "symmetric", "zero_point", "scale_dtype")

QUANT_METHOD = QuantMethodName("hfq")


@dataclass(kw_only=True, eq=False, repr=False)
class HfqConfig(QuantizationConfigMixin):
    """Base of every method's Config; ``HfqConfig(method="rtn", ...)`` gives an instance of that method's class.

    A method's class sets ``method = "<slug>"`` (no annotation) and the flags, and adds fields made with :func:`option`.

    Args:
        bits: width of a weight code, 1 to 8; 16 leaves weights as they are.
        group_size: weights along the input axis that share a scale; -1 per output channel, 0 per tensor.
        symmetric: no stored zero point.
        activation_bits, kv_bits: width of activations and of the key-value cache; 16 is off.
        kv_cache: how a language model stores keys and values: a ``KVQuantConfig``, or a dict of its fields.
        modules_to_not_convert: names or patterns of modules to leave alone, besides hfq's own rule (output heads,
            tied embeddings).
        overrides: ``{pattern: {field: value}}`` by module name; later patterns win. ``{"bits": 16}`` leaves a module
            alone; naming an output head with other bits quantizes it.
        compute_dtype: dtype of the products; ``None`` follows the input.
        calibration: texts, tensors, dicts, a dataset, a loader, a callable, a file or a Hub id; the fields
            ``calibration_...`` and ``text_column`` say how it is read.
        processor: tokenizer or processor, or the id of one; ``None`` takes the model's.
        seed: of everything random.
        allow_partial: modules that could not be done are reported instead of raised.
        cpu_memory: "compact" keeps only codes in memory on CPU, "cached" keeps an expanded copy for speed.
        dequantize: when loading a packed checkpoint, give back a float model.
        work_dir: folder of the progress files; a run that finds some continues.
        progress: show progress bars.
    """

    supports_activation_bits: ClassVar[bool] = False
    supports_kv_bits: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = True
    is_cache: ClassVar[bool] = False  # quantizes nothing but the key-value cache: others carry it in `kv_cache`
    _given = frozenset[str]()  # fields that were passed in

    quant_method: str = field(default=QUANT_METHOD, repr=False)
    method: str = ""
    bits: int = option(4, range=(1, 8), also=(16,), per_module=True)
    group_size: int = option(-1, range=(-1, 1 << 20), per_module=True)
    symmetric: bool = option(False, per_module=True)
    activation_bits: int = option(16, range=(2, 8), also=(16,), per_module=True)
    kv_bits: int = option(16, range=(1, 8), also=(16,))
    kv_cache: Any = None
    modules_to_not_convert: Sequence[str] | None = None
    overrides: Mapping[str, Any] = option({})
    compute_dtype: Any = None
    calibration: Any = None
    calibration_samples: int = option(64, range=(1, 1 << 20))
    calibration_seqlen: int = option(512, range=(1, 1 << 20))
    calibration_batch_size: int = option(8, range=(1, 1 << 16))
    text_column: str | None = None
    processor: Any = None
    seed: int = option(0, range=(0, 2**63 - 1))
    allow_partial: bool = False
    cpu_memory: str = option("compact", choices=("compact", "cached"))
    dequantize: bool = option(False, saved=False)
    work_dir: str | os.PathLike[str] | None = option(None, saved=False)
    progress: bool = option(True, saved=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> HfqConfig:
        if args:
            raise ConfigError(f"{cls.__name__} takes keyword arguments only")
        target = cls
        if not cls.method and kwargs.get("method"):
            target = _config_class(kwargs["method"])
        known = [f.name for f in fields(target) if f.init]
        for name in (name for name in kwargs if name not in known):
            raise ConfigError(f"unknown field {name!r} of {target.__name__}{did_you_mean(name, known)}")
        (made := object.__new__(target))._given = frozenset(kwargs)
        return made

    def __post_init__(self) -> None:
        slug = type(self).method
        if not slug:
            raise ConfigError("HfqConfig needs method=... (hfq.methods() lists them); or use a method's own class")
        if self.method not in ("", slug):
            raise ConfigError(f"{type(self).__name__} is the config of {slug!r}, not of method={self.method!r}")
        self.method = slug
        if str(self.quant_method) != QUANT_METHOD:
            raise ConfigError(f"quant_method={self.quant_method!r}: a config of hfq has 'hfq'")
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.hfq_version: str | None = None
        self.manifest: dict[str, Any] | None = None
        self.summary: dict[str, Any] | None = None
        # Data and processors are objects: kept out of to_dict, shared by copies.
        self._data, self._processor = self.calibration, self.processor
        self.calibration = self.calibration if isinstance(self.calibration, (str, os.PathLike)) else None
        self.processor = self.processor if isinstance(self.processor, str) else None
        self._environment = self._surroundings = None  # of the run: what the libraries above give
        self._cache = importlib.import_module("hfq.compose").carried(self)
        self.validate()

    def validate(self) -> None:
        """Check every field, then the combinations; :class:`ConfigError` names the field and what is allowed."""
        if self.compute_dtype is not None:
            name = str(self.compute_dtype).removeprefix("torch.")
            if name not in _DTYPES:
                raise ConfigError(f"compute_dtype={self.compute_dtype!r}: None or one of {_DTYPES} is allowed")
            self.compute_dtype = name
        hints = type_hints(type(self))
        for f in fields(self):
            self._check_value(f, getattr(self, f.name), hints[f.name], f.name)
        for name, what in (("activation_bits", "activations"), ("kv_bits", "the key-value cache")):
            if getattr(self, name) != 16 and not getattr(self, f"supports_{name}"):
                raise ConfigError(f"{name}={getattr(self, name)}: {self.method} does not quantize {what} (16 is off)")
        self._check_overrides(hints)
        self.spec_for("")
        self.check()

    def check(self) -> None:
        """Combinations that a method forbids: raise :class:`ConfigError`. Methods override this one."""

    def _check_value(self, f: Field[Any], value: Any, hint: Any, label: str) -> None:
        if not accepts(value, hint) or not in_range(value, f.metadata):
            raise ConfigError(f"{label}={value!r} of {type(self).__name__}: {allowed(hint, f.metadata)}")

    def _check_overrides(self, hints: dict[str, Any]) -> None:
        known = {f.name: f for f in fields(self) if f.metadata.get("per_module")}
        for pattern, values in self.overrides.items():
            where = f"overrides[{pattern!r}]"
            if not isinstance(pattern, str) or not isinstance(values, Mapping):
                raise ConfigError(f"{where}={values!r}: a module pattern and a dict of fields are needed")
            for name, value in values.items():
                if name in known:
                    self._check_value(known[name], value, hints[name], f"{where}[{name!r}]")
                elif name not in _SPEC_FIELDS:
                    raise ConfigError(f"{where}: unknown field {name!r}{did_you_mean(name, [*known, *_SPEC_FIELDS])}")
            if values.get("activation_bits", 16) != 16 and not self.supports_activation_bits:
                raise ConfigError(f"{where}: {self.method} does not quantize activations (16 is off)")
            try:
                self._spec(dict(values))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None

    def override_for(self, name: str) -> dict[str, Any]:
        """Merged ``overrides`` of the module ``name``: patterns of ``hfq.graph.select``, later ones win."""
        return {key: value for pattern, values in self.overrides.items() if select.matches(name, pattern)
                for key, value in values.items()}

    def value_for(self, name: str, option_name: str) -> Any:
        """Value of a field for the module ``name``, after overrides."""
        return self.override_for(name).get(option_name, getattr(self, option_name))

    def spec_for(self, name: str) -> QuantSpec | None:
        """Weight format of the module ``name`` after overrides; ``None`` if it stays float (16 bits)."""
        return self._spec(self.override_for(name))

    def _spec(self, override: dict[str, Any]) -> QuantSpec | None:
        values = {key: getattr(self, key) for key in _SPEC_FIELDS if hasattr(self, key)}
        values.update({key: value for key, value in override.items() if key in _SPEC_FIELDS})
        if values["bits"] == 16:
            return None
        if values["symmetric"] and "zero_point" not in override:
            values["zero_point"] = "int"
        return QuantSpec(**values)

    def plan(self, model: Any, ask: Sequence[str] = ()) -> Any:
        """``graph.read`` of ``model``: its sites are those that this config asks for, in the order it finds them.

        An override that ends a site's name (``lm_head``) lifts hfq's own rule for it, as any pattern in ``ask`` does.
        """
        from hfq import graph

        skip = list(self.modules_to_not_convert or ())
        sites = [site.name for site in graph.read(model).every_site]
        named = [name for name in sites if any(f".{name}".endswith(f".{pattern}") for pattern in self.overrides)]
        floats = [name for name in sites if self.spec_for(name) is None]
        plan = graph.read(model, skip=skip + select.exactly(floats), ask=[*select.exactly(named), *ask])
        plain_floats = (name for name in floats if select.first_match(name, skip) is None)
        plan.skipped.update(dict.fromkeys(plain_floats, "16 bits: left as it is"))
        return plan

    def one_call(self, model: Any, batches: Sequence[Mapping[str, Any]]) -> Callable[[], Any]:
        """A function that runs one forward pass of the whole model, on the first row of the data."""
        from hfq.calibration import capture

        def call() -> None:
            with capture.quiet(model):
                capture.forward(model, capture.row_of(batches[0]))

        return call

    def traced_plan(self, model: Any, batches: Sequence[Mapping[str, Any]], *, units: bool = False) -> Any:
        """The plan with sites in execution order, grouped by the tensor they read (one forward pass).

        With ``units``, layers outside the blocks of a convolutional network are blocks of their own.
        """
        from hfq.graph import trace

        plan = self.plan(model)
        if units:
            importlib.import_module("hfq.graph.units").promote(plan)
        trace.order_groups(plan, self.one_call(model, batches))
        return plan

    def placement(self, module: Any) -> AbstractContextManager[Any]:
        """Context in which ``module`` is materialised on its device, wherever it is kept (used by recipes)."""
        place = getattr(self._environment, "placement", None)
        return nullcontext(module) if place is None else place(module)

    def walk_options(self, part: str = "") -> dict[str, Any]:
        """Arguments of ``calibration.walk`` that come from above: placement, bar, progress folder (of a part)."""
        environment, saved = self._environment, self.to_dict()
        return {
            "fingerprint": {k: v for k, v in saved.items() if k not in ("manifest", "summary", "allow_partial")},
            "placement": getattr(environment, "placement", None),
            "progress": getattr(environment, "progress", None) if self.progress else None,
            "progress_dir": os.path.join(self.work_dir, part) if part and self.work_dir is not None else self.work_dir,
        }

    data = property(lambda self: self._data, doc="The calibration data as given (object, path or Hub id), or ``None``.")
    wants_data = property(lambda self: self.needs_calibration or (self._cache is not None and self._cache.wants_data))

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """``compute_dtype`` as a torch dtype."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options that a user may set anew when loading a packed checkpoint (only those that are not default)."""
        defaults = (("compute_dtype", None), ("cpu_memory", "compact"), ("dequantize", False))
        return {key: getattr(self, key) for key, default in defaults if getattr(self, key) != default}

    def check_manifest(self) -> None:
        """Raise :class:`CheckpointError` unless this config was read from a packed checkpoint."""
        if not isinstance(self.manifest, Mapping) or not isinstance(self.manifest.get("layers"), Mapping):
            raise CheckpointError("config.json has an hfq config without 'manifest' and its 'layers': it is damaged")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary of the saved fields and, once quantized, of the record of the packed layers."""
        from hfq import __version__

        result = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.metadata.get("saved", True)}
        if isinstance(self.calibration, (str, os.PathLike)) and os.path.exists(self.calibration):
            result["calibration"] = None  # a path of this machine means nothing elsewhere: the summary has a descriptor
        version = self.hfq_version or __version__
        result |= {"quant_method": str(QUANT_METHOD), "format_version": self.format_version, "hfq_version": version}
        return result | {name: plain(getattr(self, name)) for name in ("manifest", "summary")
                         if getattr(self, name) is not None}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)
                 if f.repr and f.name != "method" and getattr(self, f.name) not in (f.default, {})}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The Config that a dictionary describes, as an instance of its method's class.

        Raises:
            ConfigError: the dictionary is not a valid configuration.
            CheckpointError: it is the record of a packed model, and damaged or of a newer version.
        """
        try:
            config = cls._read(dict(config_dict))
        except ConfigError as error:
            if "manifest" in config_dict or "format_version" in config_dict:
                raise CheckpointError(f"the saved quantization config cannot be used: {error}") from None
            raise
        unused = config.update(**{k: v for k, v in kwargs.items() if not k.startswith("_")})
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def _read(cls, saved: dict[str, Any]) -> HfqConfig:
        from hfq import __version__

        writer = saved.get("hfq_version")
        newer = f"written by a newer hfq ({writer or 'not recorded'}), this is {__version__}: pip install -U hfq"
        if str(saved.get("quant_method", QUANT_METHOD)) != QUANT_METHOD:
            raise ConfigError(f"quant_method={saved['quant_method']!r}: this is not an hfq model")
        version = saved.get("format_version", FORMAT_VERSION)
        if not accepts(version, int) or version < 1:
            raise ConfigError(f"format_version={version!r}: an integer from 1 to {FORMAT_VERSION} is allowed")
        if version > FORMAT_VERSION:
            raise ConfigError(f"format_version={version}: {newer}")
        slug = saved.get("method") or cls.method
        if not slug or not isinstance(slug, str):
            raise ConfigError("the dictionary has no 'method'")
        target = _config_class(slug, f"; {newer}" if writer and writer != __version__ else "")
        if not issubclass(target, cls):
            raise ConfigError(f"{cls.__name__} cannot read a config of method {slug!r}")
        known = [f.name for f in fields(target) if f.init]
        values = {key: value for key, value in saved.items() if key not in _RECORDS and key not in _LOADER_KEYS}
        unknown = sorted(set(values) - set(known))
        if unknown and "hfq_version" in saved:
            raise ConfigError(f"fields {unknown} are unknown to {target.__name__}: {newer}")
        config = target(**values)  # an unknown field that a person wrote raises here, with a suggestion
        config.hfq_version = writer
        for name in ("manifest", "summary"):
            if (value := saved.get(name)) is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{name} is {type(value).__name__}, a dict is needed")
            setattr(config, name, value)
        return config

    def __deepcopy__(self, memo: dict[int, Any]) -> HfqConfig:
        """Copies the fields; data, processors and run options are shared (a generator cannot be copied)."""
        shared = {f.name for f in fields(self) if not f.metadata.get("saved", True)}
        clone = object.__new__(type(self))
        for key, value in vars(self).items():
            vars(clone)[key] = value if key.startswith("_") or key in shared else copy.deepcopy(value, memo)
        return clone


def _config_class(slug: str, suffix: str = "") -> type[HfqConfig]:
    # By name, as a plugin is found: configs do not depend on the methods above them.
    try:
        return importlib.import_module("hfq.methods").config_class(slug)
    except ConfigError as error:
        raise ConfigError(f"{error}{suffix}") from None
