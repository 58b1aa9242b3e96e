"""KVQuant (arXiv 2401.18079): keys per channel before RoPE, values per token, a learned codebook, sparse outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["KVQuantConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class KVQuantConfig(HfqConfig):
    """A quantized key-value cache; weights stay as they are. Other methods carry it as ``kv_cache=KVQuantConfig(...)``.

    Args:
        kv_bits: width of the codes of keys and values.
        datatype: "nuq" a codebook a layer, learned for keys and for values; "nf" the quantiles of a normal
            distribution; "int" a uniform grid.
        outliers: share of the numbers of a token that are kept exactly.
        sink: first tokens of each sequence that are kept exactly.
        qnorm: decode with a codebook that keeps mean and spread; ``None`` does so at 2 bits.
        fisher: weigh the codebook's errors with squared gradients of the loss (and the squared scale).
        key_axis: "channel" calibrated ranges of the channels; "token" and "window" are the baselines of the paper: a
            range a token, or a channel of ``window`` tokens.
        pre_rope: store keys without their rotary embedding (axis "channel" only); ``None`` does so there.
        value_group: channels of a value that share a scale, 0 all heads of the token.
        window, residual: tokens of a window, and newest tokens that are kept exactly (key_axis="window").
        prefill: whether a prompt attends to itself exactly or as stored. Without a cache, as in measurements, all keys
            and values are rounded.
        iterations: most steps of k-means.
        fit_tokens: calibration tokens that ranges and codebooks are fitted to, an even selection.
    """

    method = "kvquant"
    supports_kv_bits = True
    is_cache = True

    bits: int = option(16, choices=(16,), why="kvquant leaves weights as they are; the config of a method that "
                       "quantizes them carries this one in kv_cache")  # fmt: skip
    group_size: int = option(-1, choices=(-1,), why="a cache has no groups of weights, value_group and window say "
                             "which keys and values share a scale")  # fmt: skip
    symmetric: bool = option(False, choices=(False,), why="every scale of a cache has its offset")
    kv_bits: int = option(4, range=(1, 8), also=(16,))
    calibration_samples: int = option(16, range=(1, 1 << 20))
    calibration_seqlen: int = option(2048, range=(2, 1 << 20))
    calibration_batch_size: int = option(1, range=(1, 1 << 16))
    datatype: str = option("nuq", choices=("nuq", "nf", "int"))
    outliers: float = option(0.01, range=(0.0, 0.2))
    sink: int = option(1, range=(0, 1024))
    qnorm: bool | None = None
    fisher: bool = True
    key_axis: str = option("channel", choices=("channel", "token", "window"))
    pre_rope: bool | None = None
    value_group: int = option(0, range=(-1, 1 << 15))
    window: int = option(32, range=(1, 1 << 15))
    residual: int = option(128, range=(1, 1 << 15))
    prefill: str = option("exact", choices=("exact", "quantized"))
    iterations: int = option(50, range=(1, 10_000))
    fit_tokens: int = option(8192, range=(1, 1 << 30))

    def check(self) -> None:
        for name in ("modules_to_not_convert", "overrides"):
            if getattr(self, name):
                raise ConfigError(f"{name}: all attention modules of a model store keys and values in one format")
        windows = self.key_axis == "window"
        for name, used in (("window", windows), ("residual", windows), ("iterations", self.datatype == "nuq")):
            if not used and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={getattr(self, name)}: key_axis={self.key_axis!r} and datatype="
                                  f"{self.datatype!r} do not use it")
        if self.qnorm and self.datatype == "int":
            raise ConfigError("qnorm=True corrects a codebook: datatype='int' has none")
        if self.key_axis != "channel" and self.pre_rope:
            raise ConfigError(f"pre_rope=True: keys with ranges of axis {self.key_axis!r} keep their positions")
        if windows and (self.datatype != "int" or self.outliers):
            raise ConfigError("key_axis='window' is a uniform grid without outliers: datatype='int', outliers=0")
        if self.outliers and self.value_group:
            raise ConfigError("outliers are chosen among all heads of a token: value_group=0, or outliers=0")
        if self.kv_bits != 16:
            self.form()

    @property
    def keeps_moments(self) -> bool:
        return self.kv_bits <= 2 if self.qnorm is None else self.qnorm

    def form(self) -> Any:
        """The format of the cache."""
        from hfq.formats.kv import KVFormat, SideSpec

        table, windows = self.datatype != "int", self.key_axis == "window"
        groups = {"channel": -1, "token": self.value_group, "window": self.window}
        key = SideSpec(self.kv_bits, self.key_axis, groups[self.key_axis], table, outliers=self.outliers)  # type: ignore
        value = SideSpec(self.kv_bits, "token", self.value_group, table, outliers=self.outliers)
        return KVFormat(
            key, value, pre_rope=self.key_axis == "channel" and self.pre_rope is not False, sink=self.sink,
            residual=self.residual if windows else 0, prefill=self.prefill,  # type: ignore[arg-type]
        )


def quantize(model: Any, data: Any, config: KVQuantConfig, report: Report) -> None:
    """Steps 1 to 7 of the specification: statistics on the float model, then ranges and codebooks layer by layer."""
    from hfq.calibration import keys
    from hfq.calibration.fits import Fits
    from hfq.calibration.progress import state_digest
    from hfq.layers import kv_install

    plan = config.plan(model)
    for name, reason in plan.skipped.items():
        report.leave(name, reason)
    if config.kv_bits == 16:
        return
    form, options = config.form(), config.walk_options()
    places = kv_install.places(model, config.one_call(model, data), pre_rope=form.pre_rope)
    folder, run = options["progress_dir"], {}
    if folder is not None:  # (a digest reads the whole model)
        run = {**options["fingerprint"], "data": data.sha256, "model": state_digest(model)}
    fits = Fits(folder, run)
    done = {place.name: found for place in places if (found := fits.read(place.name)) is not None}
    left = [place for place in places if place.name not in done]
    learned = config.datatype == "nuq"
    tokens = {} if not left else keys.collect(
        model, data, left, gradients=learned and config.fisher, most=config.fit_tokens, drop=config.sink,
        progress=options["progress"],
    )
    for place in left:
        found = tokens.pop(place.name)
        tables, values = fit(found, place, form, config)
        done[place.name] = tables, {**values, "tokens": found.seen}
        fits.write(place.name, *done[place.name])
    for place in places:
        tables, values = done[place.name]
        kv_install.add(model, place, form, report, tables=tables, tokens=values.pop("tokens"),
                       error=values.pop("error"), extra=values)


def fit(found: Any, place: Any, form: Any, config: KVQuantConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ranges and codebooks of one attention module, and the relative errors of its keys and values with them."""
    from hfq.formats import kv, kv_fit

    tables: dict[str, Any] = {}
    squares = {"wrong": 0.0, "all": 0.0}
    errors = {}
    for side, spec in (("key", form.key), ("value", form.value)):
        x, weight = getattr(found, side), getattr(found, f"{side}_weight")
        if spec.axis == "channel":
            low, high = kv_fit.ends(x, spec.outliers)
            tables |= {f"{side}_low": low, f"{side}_high": high}
        if spec.table:
            scaled, scale, kept = kv_fit.normalised(x, spec, tables.get(f"{side}_low"), tables.get(f"{side}_high"))
            weights = None if weight is None else (weight * scale.square())[kept]
            table, decode = kv_fit.tables(
                scaled[kept], weights, spec.bits, learned=config.datatype == "nuq", seed=config.seed,
                iterations=config.iterations, keep_moments=config.keeps_moments,
            )
            tables |= {f"{side}_encode": table, f"{side}_decode": decode}
            errors[f"{side}_outliers"] = round(1 - float(kept.float().mean()), 6)
        parts = {leaf: tables.get(f"{side}_{leaf}") for leaf in ("low", "high", "encode", "decode")}
        stacked = x.unflatten(1, (place.heads, -1)).transpose(0, 1)[None]
        wrong = float((kv.fake(stacked, spec, kv.Tables(**parts)) - stacked).double().square().sum())
        total = float(stacked.double().square().sum())
        errors[f"{side}_error"] = (wrong / total) ** 0.5 if total else 0.0
        squares = {"wrong": squares["wrong"] + wrong, "all": squares["all"] + total}
    return tables, {"error": (squares["wrong"] / squares["all"]) ** 0.5 if squares["all"] else 0.0, **errors}
