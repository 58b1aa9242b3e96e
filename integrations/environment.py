"""What ``hfq.api`` needs from the Hugging Face libraries, as plain functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from hfq.api import Environment
from hfq.calibration.data import Batches
from hfq.config import HfqConfig
from hfq.errors import DataError

__all__ = [
    "attach", "can_cache", "check_cache", "detach", "example", "is_packed", "load_hub", "load_processor", "make",
    "progress", "untie",
]  # fmt: skip


def make() -> Environment:
    """The environment of a process with transformers."""
    placement = None
    if importlib.util.find_spec("hfq.integrations.accelerate") is not None:
        placement = getattr(importlib.import_module("hfq.integrations.accelerate"), "placement", None)
    return Environment(
        placement=placement, load_processor=load_processor, load_hub=load_hub, progress=progress,
        attach=attach, detach=detach, is_packed=is_packed, untie=untie, example=example, can_cache=can_cache,
        check_cache=check_cache,
    )


def load_processor(model: Any, config: HfqConfig, data: Any = None) -> Any:
    """Tokenizer or processor for ``data``: the config's, else the model's own; ``None`` if there is none.

    Raises:
        DataError: the config names one that cannot be loaded.
    """
    if config._processor is not None and not isinstance(config._processor, str):
        return config._processor
    name = config.processor or getattr(model, "name_or_path", "")
    if not name or not (config.processor or _may_hold_text(data)):
        return None
    from transformers import AutoProcessor, AutoTokenizer

    problems = []
    for auto in (AutoTokenizer, AutoProcessor):
        try:
            return auto.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            problems.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    if config.processor:
        raise DataError(f"processor={config.processor!r} cannot be loaded: {problems[0]}")
    return None


def _may_hold_text(data: Any) -> bool:
    import torch

    if isinstance(data, (torch.Tensor, Batches)):
        return False
    first = data[0] if isinstance(data, (list, tuple)) and data else data
    if isinstance(first, Mapping):
        return any(isinstance(value, str) for value in first.values())
    return not isinstance(first, torch.Tensor)


def load_hub(name: str) -> Iterable[Any]:
    """Rows of the training split of a data set on the Hub, streamed.

    Raises:
        DataError: ``datasets`` is missing, or the data set cannot be reached.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name!r} is not a file; to load it from the Hub install datasets: pip install 'hfq[eval]'")
    import datasets

    try:
        found = datasets.load_dataset(name, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"{name!r} is neither a file nor a data set that can be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a list of texts, tensors, a Dataset, or the path of a file"
        ) from error
    return found["train"] if "train" in found else next(iter(found.values()))


def progress(total: int, description: str) -> Any:
    """A progress bar on the terminal: ``update()`` after each step, ``close()`` at the end."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, leave=False)


def is_packed(model: Any, config: HfqConfig) -> str | None:
    """Who quantized ``model`` before, or ``None``. The run that ``config`` itself belongs to does not count."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config is not config:
        return f"quantization_config of {quantizer.quantization_config.quant_method}"
    return None


def attach(model: Any, config: HfqConfig) -> None:
    """Mark a live model as quantized, so that its library saves and reloads it."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        from hfq.integrations import transformers as adapter

        adapter.attach(model, config)
        return
    diffusers = sys.modules.get("diffusers")
    if diffusers is not None and isinstance(model, diffusers.ModelMixin):
        from hfq.integrations import diffusers as diffusers_adapter

        diffusers_adapter.attach(model, config)


def detach(model: Any) -> None:
    """Undo :func:`attach`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "forget"):
        quantizer.forget(model)


def untie(model: Any, name: str) -> None:
    """Give the module ``name`` a weight of its own where its model ties it to another one."""
    import torch

    if not hasattr(model, "all_tied_weights_keys"):
        return
    key = f"{name}.weight"
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if key in (target, source)}
    if not tied:
        return
    for target in tied:
        model.all_tied_weights_keys.pop(target)
        module = model.get_submodule(target.rpartition(".")[0])
        if not module.weight.is_meta:
            module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    for part in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        part.tie_word_embeddings = False


def example(model: Any) -> dict[str, Any]:
    """Arguments of one forward pass of a language model: a few tokens.

    Raises:
        DataError: the model takes something else.
    """
    import torch

    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    size = getattr(text, "vocab_size", None)
    if getattr(model, "main_input_name", "") != "input_ids" or not isinstance(size, int):
        raise DataError(f"{type(model).__name__} takes no token ids: pass data, which says how the model is called")
    return {"input_ids": torch.arange(1, 9).remainder(size)[None]}


def can_cache(model: Any) -> None:
    """Raise :class:`hfq.ConfigError` unless ``model`` decodes with a cache that can be quantized."""
    from hfq.integrations import kv_cache

    kv_cache.can_cache(model)


def check_cache(model: Any) -> None:
    """Raise unless ``model`` decodes with the cache of its attention parts as with its own."""
    from hfq.integrations import kv_cache

    kv_cache.check(model, example(model))
