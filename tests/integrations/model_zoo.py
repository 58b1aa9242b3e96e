"""Tiny models of many architectures with random weights, norms and biases that matter, and one call for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCAB = 99
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}
MAMBA = {
    "vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4,
    "time_step_rank": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}


def _ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _text(**more: Any) -> dict[str, Any]:
    return {"input_ids": _ids(), **more}


def _image() -> dict[str, Any]:
    return {"pixel_values": _noise(2, 3, 16, 16)}


def _build(name: str) -> tuple[nn.Module, dict[str, Any]]:  # noqa: C901 - a table
    import transformers as tf

    cached = {"use_cache": False}
    if name == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**GQA)), _text(**cached)
    if name == "llama-eager":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**GQA, attn_implementation="eager")), _text(**cached)
    if name == "qwen3":
        return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA)), _text(**cached)
    if name == "gemma3":
        config = tf.Gemma3TextConfig(**GQA, query_pre_attn_scalar=8, sliding_window=8)
        return tf.Gemma3ForCausalLM(config), _text(**cached)
    if name == "mistral":
        return tf.MistralForCausalLM(tf.MistralConfig(**GQA, sliding_window=8)), _text(**cached)
    if name == "gpt2":
        config = tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
                               eos_token_id=2)
        return tf.GPT2LMHeadModel(config), _text(**cached)
    if name in ("opt", "opt-postnorm"):
        text = {k: v for k, v in TEXT.items() if k != "intermediate_size"}
        more = {} if name == "opt" else {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
        config = tf.OPTConfig(**text, ffn_dim=48, **{"word_embed_proj_dim": 32, **more})
        return tf.OPTForCausalLM(config), _text(**cached)
    if name == "phi3":
        config = tf.Phi3Config(**{k: v for k, v in GQA.items() if k != "head_dim"})
        return tf.Phi3ForCausalLM(config), _text(**cached)
    if name in ("falcon", "falcon-new"):
        text = {k: v for k, v in TEXT.items() if k not in ("intermediate_size", "max_position_embeddings")}
        more = {"new_decoder_architecture": True, "num_kv_heads": 2} if name == "falcon-new" else {}
        return tf.FalconForCausalLM(tf.FalconConfig(**text, **more)), _text(**cached)
    if name == "mixtral":
        config = tf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2)
        return tf.MixtralForCausalLM(config), _text(**cached)
    if name == "mixtral-eager":
        config = tf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
        return tf.MixtralForCausalLM(config), _text(**cached)
    if name == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)), _text()
    if name in ("t5", "t5-gated"):
        more = {"feed_forward_proj": "gated-gelu"} if name == "t5-gated" else {}
        config = tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
                             eos_token_id=2, decoder_start_token_id=0, **more)
        return tf.T5ForConditionalGeneration(config), _text(decoder_input_ids=_ids(length=7), **cached)
    if name == "whisper":
        config = tf.WhisperConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
        call = {"input_features": _noise(2, 8, 20), "decoder_input_ids": _ids(length=7), **cached}
        return tf.WhisperForConditionalGeneration(config), call
    if name == "vit":
        return tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5)), _image()
    if name == "swin":
        config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
                               window_size=4, num_labels=5)
        return tf.SwinForImageClassification(config), _image()
    if name == "clip":
        config = tf.CLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION), projection_dim=16)
        return tf.CLIPModel(config), _text(**_image())
    if name == "llava":
        config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}),
                                text_config=tf.LlamaConfig(**GQA), image_token_index=98)
        ids = _ids(length=24).clamp_max(97)
        ids[:, 2:18] = 98
        return (tf.LlavaForConditionalGeneration(config),
                {"input_ids": ids, **_image(), **cached})
    if name == "mamba":
        return tf.MambaForCausalLM(tf.MambaConfig(**MAMBA)), _text(**cached)
    raise KeyError(name)


NAMES = ["llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "opt-postnorm", "phi3", "falcon", "falcon-new",
         "mixtral", "bert", "t5", "t5-gated", "whisper", "vit", "swin", "clip", "llava", "mamba"]


def build(name: str) -> tuple[nn.Module, Callable[[], Any]]:
    """A float32 model in eval mode, and a call that runs it once without gradients."""
    torch.manual_seed(0)
    model, inputs = _build(name)
    randomise(model)
    model.eval()

    def call() -> Any:
        with torch.no_grad():
            return model(**inputs)

    return model, call


def randomise(model: nn.Module) -> None:
    """Gains, biases and weights large enough that a transform that forgets one changes the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point():
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1 and key in ("weight", "bias"):
                    parameter.add_(0.3 * noise)
                elif parameter.dim() >= 2 and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
