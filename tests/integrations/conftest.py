"""Tiny random models on disk, and child processes, for the tests of the libraries' load and save paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import hfq

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, attention_bias=True, **more))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, head_dim=8))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=32))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**TEXT, max_position_embeddings=32))


def vit() -> ViTForImageClassification:
    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))


MAKERS: dict[str, Callable[..., Any]] = {"llama": llama, "mixtral": mixtral, "gpt2": gpt2, "bert": bert, "vit": vit}


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
    return {"input_ids": torch.arange(24).reshape(2, 12) * 7 % 99}


@pytest.fixture(scope="session")
def outputs() -> Callable[[Any], torch.Tensor]:
    """Logits (or the last hidden state) of a model on inputs that are always the same."""

    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs_of(model))[0]

    return run


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``floats("llama")`` is the folder of a saved float model (made once)."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(f"float_{name}")
            MAKERS[name]().eval().save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def packed(floats: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``packed("llama")`` is the folder of the same model in 4 bits, groups of 16 (made once)."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model = type(MAKERS[name]()).from_pretrained(
                floats(name), quantization_config=hfq.RTNConfig(bits=4, group_size=16)
            )
            made[name] = tmp_path_factory.mktemp(f"packed_{name}")
            model.save_pretrained(made[name])
        return made[name]

    return get
