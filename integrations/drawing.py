"""Pictures of a pipeline, also while one of its models is being quantized, and what conditions that model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import DataError
from hfq.integrations.calls import RecordedCalls
from hfq.integrations.conditioning import digest

__all__ = ["Surroundings", "draw"]

_ENCODERS = "text_encoder"  # and those with a number behind


@torch.no_grad()
def draw(pipe: Any, asked: Sequence[Any], *, seed: int = 0, batch_size: int = 50, **options: Any) -> Tensor:
    """Pictures float32 ``[N, C, H, W]`` in [0, 1], one for each of ``asked``.

    Every picture has a random generator of its own, so that it does not depend on the batch it is drawn in.

    Args:
        asked: prompts, class labels, or ``None`` for each picture of an unconditional pipeline.
        options: passed to the pipeline, such as ``num_inference_steps`` and ``guidance_scale``.
    """
    found = []
    for start in range(0, len(asked), batch_size):
        part = list(asked[start : start + batch_size])
        random = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        if part[0] is None:
            given: dict[str, Any] = {"batch_size": len(part)}
        else:
            given = {"prompt" if isinstance(part[0], str) else "class_labels": part}
        images = pipe(**given, **{"generator": random, "output_type": "pt", **options}).images
        found.append(torch.as_tensor(images).float().cpu())
    pictures = torch.cat(found)
    # Some pipelines give arrays with the channels last whatever is asked.
    return pictures.permute(0, 3, 1, 2) if pictures.shape[-1] in (1, 3) else pictures


class Surroundings:
    """The pipeline around a model that is being quantized on calls that were recorded from it.

    Args:
        pipe: the pipeline, with the model in it.
        name: of the model.
        data: the calls.
    """

    def __init__(self, pipe: Any, name: str, data: Any) -> None:
        self.pipe, self.name, self.data = pipe, name, data

    def draw(self, count: int, batch_size: int = 8) -> Tensor:
        """What the pipeline as it is now draws for the prompts of the calls, as it was run when they were recorded.

        Raises:
            DataError: the data does not say how.
        """
        if not isinstance(self.data, RecordedCalls) or self.data.record.sampling is None:
            raise DataError("pictures are drawn as the calls were recorded, and this data does not say how: record it "
                            "with hfq.record_calls of this version")
        record = self.data.record
        asked = [None] * count if record.prompts is None else [
            record.prompts[i % len(record.prompts)] for i in range(count)]
        device = next((p.device for p in self.pipe.components[self.name].parameters() if not p.is_meta), None)
        for module in self.pipe.components.values():  # of an offloaded pipeline whose hooks are off for now
            if isinstance(module, nn.Module) and device is not None and not hasattr(module, "_hf_hook"):
                module.to(device)
        with _silent(self.pipe):
            return draw(self.pipe, asked, seed=record.seed, batch_size=batch_size, **record.sampling)

    def conditioning(self) -> dict[str, str]:
        """Digest of each text encoder of the pipeline."""
        return {name: digest(module.state_dict().values()) for name, module in sorted(self.pipe.components.items())
                if name.startswith(_ENCODERS) and isinstance(module, nn.Module)}  # fmt: skip


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    models = [module for module in pipe.components.values() if isinstance(module, nn.Module) and module.training]
    try:
        pipe.set_progress_bar_config(**{**before, "disable": True})
        for module in models:
            module.eval()
        yield
    finally:
        pipe.set_progress_bar_config(**before)
        for module in models:
            module.train()
