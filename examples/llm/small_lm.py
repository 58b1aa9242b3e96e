"""Train a small language model on real text in minutes, with the outlier channels that large models have.

    python examples/llm/small_lm.py [--output FOLDER] [--steps 300]

Four Llama blocks, 5 million parameters, a byte-level BPE of 4096 tokens, 0.6 million tokens of Wikipedia
introductions. After the training the gain of every norm is multiplied by 30 in a few channels and the weights that
read them are divided by 30: the function is unchanged, and the activations have the outliers that make quantization of
large models hard. The tests use it wherever quality or a backward pass through the whole network is at stake: random
weights have no structure, and rankings on them are noise.

The result is cached (``$HFQ_CACHE`` or ``~/.cache/hfq``); its perplexity is written beside it in ``training.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfq.evaluation.perplexity import perplexity
from hfq.evaluation.rescale import widen_channels
from hfq.integrations import demo_models
from hfq.integrations.inputs import cache_folder, demo_text, windows

VOCABULARY, LENGTH, BATCH, STEPS = 4096, 128, 16, 300
OUTLIERS, GAIN = (17, 101, 102, 230), 30.0
VERSION = 1  # part of the cache name: raise it when the recipe changes


def small_lm(output: Path | None = None, steps: int = STEPS) -> Path:
    """Folder with the trained model and tokenizer; trains on the first call."""
    target = output or cache_folder() / "models" / f"small-lm-v{VERSION}"
    return demo_models.made_once(target, "small-lm", lambda folder: train(folder, steps))


def train(folder: Path, steps: int) -> None:
    """Train, inject the outliers, check that they changed nothing, save."""
    torch.manual_seed(0)
    started = time.perf_counter()
    text, test_text = demo_text()
    tokenizer = make_tokenizer(text)
    tokens = tokenizer(text, verbose=False)["input_ids"]
    test = windows(tokenizer(test_text, verbose=False)["input_ids"], LENGTH, 64)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    ))
    loss = fit(model, windows(tokens, LENGTH), steps)
    before = perplexity(model, test, batch_size=8)
    widen_channels(model, OUTLIERS, GAIN)
    after = perplexity(model, test, batch_size=8)
    if abs(after / before - 1) > 1e-4:
        raise RuntimeError(f"the outlier channels changed the perplexity from {before} to {after}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {"perplexity": after, "train_loss": loss, "steps": steps, "tokens": steps * BATCH * LENGTH,
              "seconds": round(time.perf_counter() - started), "parameters": model.num_parameters()}
    (folder / demo_models.RECORD).write_text(json.dumps(record, indent=1))
    print(json.dumps(record))


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a tenth of the text."""
    bpe = ByteLevelBPETokenizer()
    sample = text.split("\n\n")[::10]
    bpe.train_from_iterator(sample, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>",
                                   model_max_length=1024, clean_up_tokenization_spaces=False)


def fit(model: LlamaForCausalLM, data: list[list[int]], steps: int) -> float:
    """One pass over the windows in random order: Muon for the blocks' matrices, AdamW for the rest."""
    random.Random(0).shuffle(data)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def loss(step: int) -> torch.Tensor:
        ids = torch.tensor([data[(step * BATCH + i) % len(data)] for i in range(BATCH)])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return demo_models.fit([model], optimizers, loss, steps, warmup=20, decay=0.6, floor=0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write the model (default: the cache)")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    print(small_lm(arguments.output, arguments.steps))
