"""One file per paper, and the table of methods.

``METHODS`` names every method of the project. A method is available as soon as its file ``hfq/methods/<slug>.py``
exists; the file holds the Config class and the recipe ``quantize(model, data, config, report)``, and is imported only
when the method is used.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfq.errors import ConfigError

__all__ = ["METHODS", "Method", "config_class", "config_names", "find", "recipe"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        slug: name in ``HfqConfig(method=...)``, in saved checkpoints and of the file.
        config: name of the Config class, importable from ``hfq``.
        title: the paper, short.
        arxiv: identifier of the paper, empty for the round-to-nearest baseline.
        domain: what kind of model it was made for ("any", "language", "vision", "diffusion", ...).
    """

    slug: str
    config: str
    title: str
    arxiv: str
    domain: str

    @property
    def available(self) -> bool:
        """Whether this version of hfq can run the method."""
        return (_FOLDER / f"{self.slug}.py").is_file()

    @property
    def status(self) -> str:
        return "available" if self.available else "planned"

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


METHODS: dict[str, Method] = {
    row[0]: Method(*row)
    for row in (
        ("rtn", "RTNConfig", "Round to nearest (baseline)", "", "any"),
        ("gptq", "GPTQConfig", "GPTQ (baseline)", "2210.17323", "any"),
        ("affinequant", "AffineQuantConfig", "AffineQuant", "2403.12544", "language"),
        ("ostquant", "OSTQuantConfig", "OSTQuant", "2501.13987", "language"),
        ("rsq", "RSQConfig", "RSQ: learning from important tokens", "2503.01820", "language"),
        ("crossquant", "CrossQuantConfig", "CrossQuant", "2410.07505", "language"),
        ("i_llm", "ILLMConfig", "I-LLM: integer-only inference", "2405.17849", "language"),
        ("kvquant", "KVQuantConfig", "KVQuant", "2401.18079", "language"),
        ("flexround", "FlexRoundConfig", "FlexRound", "2306.00317", "any"),
        ("cbq", "CBQConfig", "CBQ: cross-block quantization", "2312.07950", "language"),
        ("ptq1_61", "PTQ161Config", "PTQ1.61", "2502.13179", "language"),
        ("layerwise_quant", "LayerwiseQuantConfig", "Layer-wise quantization", "2406.17415", "language"),
        (
            "saliency_partial_retraining", "SaliencyPartialRetrainingConfig",
            "Saliency-aware partial retraining", "2504.13932", "language",
        ),
        ("ifairy", "FairyConfig", "iFairy: complex-valued 2-bit weights", "2508.05571", "language"),
        ("edgeqat", "EdgeQATConfig", "EdgeQAT", "2402.10787", "language"),
        ("aphq_vit", "APHQViTConfig", "APHQ-ViT", "2504.02508", "vision"),
        ("lrp_qvit", "LRPQViTConfig", "LRP-QViT", "2401.11243", "vision"),
        ("noisyquant", "NoisyQuantConfig", "NoisyQuant", "2211.16056", "vision"),
        ("mptq_vit", "MPTQViTConfig", "MPTQ-ViT", "2401.14895", "vision"),
        ("repquant", "RepQuantConfig", "RepQuant", "2402.05628", "vision"),
        ("adaquant", "AdaQuantConfig", "AdaQuant", "2006.10518", "vision"),
        ("ohq", "OHQConfig", "OHQ: on-chip hardware-aware quantization", "2309.01945", "vision"),
        ("asq", "ASQConfig", "ASQ and POST", "2504.17263", "vision"),
        ("cfws", "CFWSConfig", "CFWS: coarse and fine weight splitting", "2312.10588", "vision"),
        ("quantnas", "QuantNASConfig", "QuantNAS for super resolution", "2208.14839", "vision"),
        ("q_diffusion", "QDiffusionConfig", "Q-Diffusion", "2302.04304", "diffusion"),
        ("efficientdm", "EfficientDMConfig", "EfficientDM", "2310.03270", "diffusion"),
        ("quest", "QuESTConfig", "QuEST", "2402.03666", "diffusion"),
        ("qvgen", "QVGenConfig", "QVGen", "2505.11497", "diffusion"),
        ("mixdq", "MixDQConfig", "MixDQ", "2405.17873", "diffusion"),
        ("vidit_q", "ViDiTQConfig", "ViDiT-Q", "2406.02540", "diffusion"),
        ("dgq", "DGQConfig", "DGQ", "2501.04304", "diffusion"),
        ("lrq_dit", "LRQDiTConfig", "LRQ-DiT", "2508.03485", "diffusion"),
        ("mambaquant", "MambaQuantConfig", "MambaQuant", "2501.13484", "state space"),
        ("q_vlm", "QVLMConfig", "Q-VLM", "2410.08119", "vision-language"),
        ("lidar_ptq", "LiDARPTQConfig", "LiDAR-PTQ", "2401.15865", "detection"),
        ("q_petr", "QPETRConfig", "Q-PETR", "2502.15488", "detection"),
    )
}


def config_names() -> dict[str, str]:
    """Config class name to slug, for every method of the table."""
    return {method.config: slug for slug, method in METHODS.items()}


def find(slug: str) -> Method:
    """The row of an available method.

    Raises:
        ConfigError: the slug is unknown, or the method is planned and this version of hfq does not have it.
    """
    method = METHODS.get(slug)
    if method is None:
        near = difflib.get_close_matches(str(slug), METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; hfq.methods() lists what there is"
        raise ConfigError(f"method {slug!r} is not known to hfq {_version()}: a newer version of hfq may have it{hint}")
    if not method.available:
        raise ConfigError(
            f"method {slug!r} ({method.title}) is planned and not part of hfq {_version()}: a newer version is needed"
        )
    return method


def config_class(slug: str) -> type[Any]:
    """The Config class of an available method (imports its file)."""
    method = find(slug)
    return getattr(importlib.import_module(f"hfq.methods.{slug}"), method.config)


def recipe(slug: str) -> Callable[..., None]:
    """``quantize(model, data, config, report)`` of an available method (imports its file)."""
    return importlib.import_module(f"hfq.methods.{find(slug).slug}").quantize


def _version() -> str:
    from hfq import __version__

    return __version__


class _Table(types.ModuleType):
    """``hfq.methods`` is this folder and, called, the table: ``hfq.methods()``."""

    def __call__(self) -> dict[str, Method]:
        return dict(METHODS)


sys.modules[__name__].__class__ = _Table
