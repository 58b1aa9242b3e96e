"""Tiny untrained pipelines of diffusers: unconditional, text to image with guidance, class-conditional, and video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, UMT5Config, UMT5EncoderModel

PROMPTS = ["a seven", "a bold three", "a thin nine", "a five"]


def unet(**more: Any) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
             "block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8}  # fmt: skip
    return diffusers.UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{**sizes, **more},
    ).eval()


def text_unet(**more: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
             "block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 8,
             "cross_attention_dim": 16, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**sizes, **more}).eval()


def transformer(**more: Any) -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
             "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 8}  # fmt: skip
    return diffusers.DiTTransformer2DModel(**{**sizes, **more}).eval()


def vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), sample_size=8,
    ).eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A real tokenizer of CLIP whose vocabulary is the letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def unconditional(steps: int = 50) -> diffusers.DDIMPipeline:
    return _quiet(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(num_train_timesteps=steps)))


def text_to_image(folder: Path) -> diffusers.StableDiffusionPipeline:
    words = tokenizer(folder / "words")
    torch.manual_seed(2)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )).eval()  # fmt: skip
    return _quiet(diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=encoder, tokenizer=words, unet=text_unet(), scheduler=diffusers.PNDMScheduler(
            num_train_timesteps=100, skip_prk_steps=True, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ))  # fmt: skip


def class_conditional() -> diffusers.DiTPipeline:
    return _quiet(diffusers.DiTPipeline(transformer(), vae(), diffusers.DDIMScheduler(num_train_timesteps=50)))


VIDEO = {"height": 16, "width": 16, "num_frames": 3, "max_sequence_length": 8, "guidance_scale": 3.0}


def video_transformer(**more: Any) -> diffusers.WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
             "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 16}
    return diffusers.WanTransformer3DModel(**{**sizes, **more}).eval()


def text_to_video(folder: Path) -> diffusers.WanPipeline:
    """Guidance in two calls a step; latents ``[N, 4, 2, 4, 4]``."""
    words = tokenizer(folder / "words")
    torch.manual_seed(2)
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id, decoder_start_token_id=words.pad_token_id)).eval()
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], patch_size=2,
        in_channels=12, out_channels=12, scale_factor_temporal=2, scale_factor_spatial=4, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4).eval()
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(diffusers.WanPipeline(words, encoder, autoencoder, schedule, video_transformer()))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **more: Any) -> Any:
    """One picture, always of the same noise."""
    options = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 3, "output_type": "np"}
    given = {"prompt": "a two"} if isinstance(pipe, diffusers.StableDiffusionPipeline) else {}
    given = {"class_labels": [1]} if isinstance(pipe, diffusers.DiTPipeline) else given
    return torch.as_tensor(pipe(**{**options, **given, **more}).images)
