"""Tables of vision models: method x {W8A8, W6A6, W4A4, W3A3, mixed} x {ViT, Swin}, and of CNNs.

    hfq bench methods vit --table widths --output examples/vit/methods.json
    hfq bench methods swin --table widths --output examples/vit/methods.json
    hfq bench methods repvgg --table merged --output examples/vit/methods.json

Rows are quantized from the exactly rescaled demo model (the same function with the channel ranges of large models)
unless their table says otherwise, calibrated on training images and measured on all held-out ones. Any image classifier
of the Hub, or in a folder, takes the place of a demo model; it is not rescaled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfq.integrations import bench_rows, measure_vision
from hfq.integrations.bench_tables import Case
from hfq.integrations.inputs_vision import RECIPES, open_images
from hfq.integrations.results import machine

__all__ = [
    "CARDS", "MIXED", "MODELS", "PROTOCOL", "TABLES", "TITLES", "cases", "measure", "pivot", "rescale_model", "run",
]  # fmt: skip

PROTOCOL = (
    "Top-1 of held-out images and share of them that get the float model's class, float32; calibration: 128 training "
    "images (seed 0); classifier and patch embedding as each method leaves them; the float model exactly rescaled by "
    "powers of two (RepVGG: a twin channel) unless a row says plain"
)
WIDTHS = (8, 6, 4, 3)
CALIBRATION = {"calibration_samples": 128, "calibration_batch_size": 16}
# Searches of the published length would take hours on this many layers; the second pass refines around the best.
SEARCH = {"clip_search_steps": 200, "noise_steps": 200, "mean_steps": 50, "coarse": 20, "search_rows": 1024}
# The published 20,000 steps a unit would take days: a hundredth of them, at ten times the rates.
LEARNED = {"calibration_samples": 256, "steps": 200, "mlp_steps": 300, "lr": 1e-2, "lr_activation": 4e-4,
           "mlp_lr": 4e-4}  # fmt: skip
LOWERED = {"candidates": 40, "rounds": 2}
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "round to nearest, min-max": ("rtn", {"observer": "minmax", "group_size": -1}),
    "round to nearest, percentile": ("rtn", {"observer": "percentile", "clip": "mse", "group_size": -1}),
}
# Label to method and options; rows of methods that this version of hfq does not have are left out.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "RepQuant": ("repquant", {}),
    "NoisyQuant": ("noisyquant", SEARCH),
    "NoisyQuant, two regions": ("noisyquant", {**SEARCH, "base": "twin"}),
    "APHQ-ViT": ("aphq_vit", LEARNED),
}


def _lowered(bits: int) -> dict[str, Any]:
    """Widths lowered from two bits above their mean; a quarter of the images judges each of the hundreds of moves."""
    return {**LOWERED, "target_bits": bits, "max_bits": bits + 2, "greedy_images": 32}


# Methods that choose widths, and the same without: label to method and options of a mean width.
MIXED: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "LRP-QViT, one width": ("lrp_qvit", lambda bits: {"mixed": False}),
    "LRP-QViT": ("lrp_qvit", lambda bits: {}),
    "LRP-QViT, bits as objective": ("lrp_qvit", lambda bits: {"objective": "bits"}),
    "MPTQ-ViT, one width": ("mptq_vit", lambda bits: LOWERED),
    "MPTQ-ViT": ("mptq_vit", lambda bits: {**_lowered(bits), "min_bits": bits - 1}),
    "MPTQ-ViT, fully quantized": ("mptq_vit", lambda bits: {**_lowered(bits), "min_bits": min(4, bits - 1),
                                                            "fully_quantized": True}),
}


def _case(model: str, label: str, width: str, method: str, options: Mapping[str, Any], rescaled: bool = True) -> Case:
    rescaled = rescaled and model in RECIPES
    name = f"{model}: {label}{'' if rescaled or model not in RECIPES else ', plain'}, {width}"
    return Case(name, method, {**CALIBRATION, **options}, rescaled, model)


def _widths(model: str, chosen: Mapping[str, tuple[str, dict[str, Any]]], widths: Iterable[int],
            rescaled: bool = True) -> list[Case]:
    from hfq.methods import METHODS as known

    return [
        _case(model, label, f"W{bits}A{bits}", method, {"bits": bits, "activation_bits": bits, **options}, rescaled)
        for bits in widths for label, (method, options) in chosen.items() if known[method].available
    ]  # fmt: skip


def _float(model: str) -> Case:
    return Case(f"{model}: float, {bench_rows.FLOAT}", model=model, rescaled=model in RECIPES)


def widths(model: str) -> list[Case]:
    """Every method at every width against round to nearest with two observers."""
    return [_float(model), *_widths(model, {**BASELINES, **METHODS}, WIDTHS)]


def plain(model: str) -> list[Case]:
    """8 and 4 bits on the model as it was trained, without the rescaling."""
    return _widths(model, {**BASELINES, **METHODS}, (8, 4), rescaled=False)


def mixed(model: str) -> list[Case]:
    """Widths chosen by layer at a mean of 6, 4 and 3 bits, against one width for all."""
    from hfq.methods import METHODS as known

    return [
        _case(model, label, f"mean {bits}", method, {"bits": bits, "activation_bits": bits, **options(bits)})
        for bits in (6, 4, 3) for label, (method, options) in MIXED.items() if known[method].available
    ]  # fmt: skip


def reparameterized(model: str) -> list[Case]:
    """What each step of RepQuant does at 6, 4 and 3 bits."""
    steps: dict[str, tuple[str, dict[str, Any]]] = {
        "layer-wise ranges": ("repquant", {"reparameterize": False, "clip": False, "reconstruction": "nearest"}),
        "+ scale reparameterization": ("repquant", {"clip": False, "reconstruction": "nearest"}),
        "+ learned clipping": ("repquant", {"reconstruction": "nearest"}),
        "+ weight reconstruction (RepQuant)": ("repquant", {}),
        "RepQuant, powers of 2 for the softmax": ("repquant", {"softmax": "log2"}),
        "RepQuant, uniform softmax": ("repquant", {"softmax": "uniform"}),
    }
    return _widths(model, steps, (6, 4, 3))


def noisy(model: str) -> list[Case]:
    """The same quantizer without and with the noisy bias."""
    steps: dict[str, tuple[str, dict[str, Any]]] = {
        f"{label} quantizer{suffix}": ("noisyquant", {**SEARCH, "base": base, "noise": noise})
        for label, base in (("linear", "linear"), ("two-region", "twin"))
        for suffix, noise in (("", False), (" with noisy bias", True))
    }
    return _widths(model, steps, (6, 4))


def learned(model: str) -> list[Case]:
    """What each step of APHQ-ViT does at 3 bits."""
    steps: dict[str, tuple[str, dict[str, Any]]] = {
        label: ("aphq_vit", {**LEARNED, **options}) for label, options in (
            ("errors count alike", {"hessian": "none", "mlp": False}),
            ("errors count as squared gradients", {"hessian": "squared", "mlp": False}),
            ("perturbation of each image", {"hessian": "sample", "mlp": False}),
            ("average perturbation", {"mlp": False}),
            ("average perturbation, random signs", {"mlp": False, "perturbation_signs": True}),
            ("+ perceptrons with ReLUs (APHQ-ViT)", {}),
            ("errors count alike, perceptrons with ReLUs", {"hessian": "none"}),
        )
    }  # fmt: skip
    return _widths(model, steps, (3,))


def merged(model: str) -> list[Case]:
    """A RepVGG with merged branches at 8 bits: ranges of channels, of the tensor, and split kernels."""
    steps: dict[str, tuple[str, dict[str, Any]]] = {
        "merged, round to nearest, a range a channel": ("rtn", {"group_size": -1, "observer": "percentile"}),
        "merged, round to nearest, one range": ("rtn", {"group_size": 0, "observer": "percentile"}),
        "merged, GPTQ": ("gptq", {"group_size": -1, "observer": "percentile", "clip": "mse"}),
        "CFWS": ("cfws", {}),
        "CFWS, ordinary KL": ("cfws", {"act_metric": "kl"}),
    }
    return [_float(model), *_widths(model, steps, (8,)), *_widths(model, steps, (8,), rescaled=False)]


def cnn(model: str) -> list[Case]:
    """CNNs at 8, 4 and 3 bits: one width for all layers, and chosen by an integer program of the same size."""
    from hfq.methods import METHODS as known

    tuned = {"steps": 200, "calibration_samples": 256, "lr_weight": 3e-3, "lr_input": 3e-3}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        **BASELINES,
        "AdaQuant, layers in parallel": ("adaquant", tuned),
        "AdaQuant, layers in sequence": ("adaquant", {**tuned, "mode": "sequential"}),
    }
    mixed = [
        _case(model, "AdaQuant, widths by the integer program", f"W{bits}A{bits}", "adaquant",
              {"bits": bits, "activation_bits": bits, **tuned, "widths": [8, 6, 4, 3, 2], "target_size": bits / 32})
        for bits in (4, 3) if known["adaquant"].available
    ]  # fmt: skip
    return [_float(model), *_widths(model, methods, (8, 4, 3)), *mixed]


TABLES: dict[str, Callable[[str], list[Case]]] = {
    "widths": widths, "plain": plain, "mixed": mixed, "repquant": reparameterized, "noisyquant": noisy,
    "aphq": learned, "merged": merged, "cnn": cnn,
}  # fmt: skip


# The demo models that a table is meant for; any other model may be asked too.
MODELS: dict[str, tuple[str, ...]] = {
    "widths": ("vit", "swin"), "plain": ("vit", "swin"), "mixed": ("vit", "swin"), "repquant": ("vit", "swin"),
    "noisyquant": ("vit", "swin"), "aphq": ("vit", "swin"), "merged": ("repvgg",), "cnn": ("resnet",),
}  # fmt: skip
TITLES = {
    "widths": "One width for weights and activations",
    "plain": "The same models as they were trained, without the rescaling",
    "mixed": "Widths chosen by layer against one width of the same size",
    "repquant": "What each step of RepQuant does",
    "noisyquant": "The same quantizer without and with a noisy bias",
    "aphq": "What each step of APHQ-ViT does, 3 bits",
    "merged": "A RepVGG with merged branches",
    "cnn": "A ResNet: one width for all layers, and chosen by layer",
}
# Model card to its tables.
CARDS = {
    "repquant": ("widths", "repquant"), "noisyquant": ("widths", "noisyquant"), "aphq_vit": ("widths", "aphq"),
    "lrp_qvit": ("mixed",), "mptq_vit": ("mixed",), "adaquant": ("cnn",), "cfws": ("merged",),
}  # fmt: skip


def cases(model: str, names: Sequence[str]) -> list[Case]:
    """The rows of tables for ``model``; see :func:`hfq.integrations.bench_rows.chosen`."""
    return bench_rows.chosen(TABLES, model, names)


def measure(case: Case, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Load the float model, quantize it as ``case`` says, and measure; in this process.

    Args:
        shared: "data" (demo, folder or Hub id) and "count" of test images (``None`` for all).
    """
    import hfq
    from hfq.evaluation.classification import image_logits

    model, processor = measure_vision.load(case.model), measure_vision.load_processor(case.model)
    if case.rescaled:
        rescale_model(model)
    images = open_images(shared["data"], "test", shared["count"])
    pixels, labels = measure_vision.prepared(images, model, processor)
    row: dict[str, Any] = {"name": case.name, "model": case.model}
    reference = None
    if case.method:
        reference = image_logits(model, pixels)
        if case.method != "cfws" and hasattr(model, "reparameterize"):
            model.reparameterize()
        config = hfq.HfqConfig(method=case.method, **case.options)
        data = None
        if config.wants_data:
            data = measure_vision.calibration(shared["data"], processor, config.calibration_samples)
        cpu = time.process_time()
        report = hfq.quantize(model, config, data)
        row |= bench_rows.quantized_row(report, config, time.process_time() - cpu)
    started = time.perf_counter()
    found = measure_vision.row(case.name, model, pixels, labels, reference=reference)
    row |= {key: found[key] for key in ("accuracy", "agreement", "kl") if key in found}
    return row | {"evaluation_seconds": round(time.perf_counter() - started, 1), "machine": machine()}


def rescale_model(model: Any) -> None:
    """Give a demo model the channel ranges of large models, exactly, as its kind allows."""
    from hfq.evaluation import rescale
    from hfq.integrations.models import repvgg

    if isinstance(model, repvgg.RepVGGForImageClassification):
        repvgg.unbalance(model)
    elif any(hasattr(module, "layernorm_before") for module in model.modules()):
        rescale.spread_norms(model)
    else:
        rescale.spread_convolutions(model)


def run(rows: Iterable[Case], data: str, count: int | None, output: Path, *,
        progress: Callable[[int, str], Any] | None = None) -> list[dict[str, Any]]:
    """Measure every row that ``output`` does not hold yet; see :func:`hfq.integrations.bench_rows.run`."""
    inputs = {"data": data, "count": count}
    return bench_rows.run(rows, inputs, output, module=__name__, protocol=PROTOCOL, progress=progress)


def pivot(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a method, one column a model and width: ``top-1 / same class as the float model``, in percent."""

    def cell(row: Mapping[str, Any]) -> str:
        same = f" / {100 * row['agreement']:.2f}" if row.get("agreement") is not None else ""
        return f"{100 * row['accuracy']:.2f}{same}"

    return bench_rows.pivot(rows, cell)


if __name__ == "__main__":
    raise SystemExit(bench_rows.child(measure))
