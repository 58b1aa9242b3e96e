"""Teach a 4-bit language model another language with LoRA, and measure what it costs and what it brings.

    python examples/adapters/language.py                                    # SmolLM2-135M, French Wikipedia
    python examples/adapters/language.py --data es --steps 200
    python examples/adapters/language.py --model <Hub id> --data <Hub id or file> --output out/mine

In order: the float model is packed; a LoRA adapter is trained on it by transformers' ``Trainer``, and an adapter in
groups (QA-LoRA); a few steps run on the packed and on the float model for comparison of memory; the adapter file is
loaded on both; the adapter in groups is merged, and the logits are compared with those before. Every training runs in a
process of its own, so that its memory is its own. The figures land in ``<output>/results.json``; what it holds of the
same settings is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hfq
from hfq import kernels
from hfq.errors import HfqError
from hfq.evaluation.memory import disk_bytes
from hfq.evaluation.perplexity import logits_of, perplexity
from hfq.integrations import inputs, measure
from hfq.integrations.cli import screen
from hfq.integrations.results import machine

# Steps over which memory is compared.
MEMORY_STEPS = 6
TRAINING = "training.safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=measure.DEMO, help="Hub id or folder")
    parser.add_argument("--data", default="fr", help="fr, es, a Hub id, or a file with text")
    parser.add_argument("--output", type=Path, default=Path("out/adapters"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of one window each")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=24, help="test windows of 512 tokens")
    parser.add_argument("--train", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.train:
            train(options, options.train)
        else:
            run(options)
    except HfqError as error:
        screen.error(str(error))
        return 1
    return 0


# What is trained: on the packed model or not, in groups or not, all steps or those that memory needs.
KINDS = {"packed": (True, False, True), "grouped": (True, True, True), "short": (True, False, False),
         "float": (False, False, False)}  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Pack, train in processes of their own, measure; what ``results.json`` holds of the same settings stays."""
    options.output.mkdir(parents=True, exist_ok=True)
    source, file = measure.resolve(options.model), options.output / "results.json"
    tokenizer, text = measure.load_tokenizer(source), open_text(options.data)
    windows = text.windows(tokenizer, options.windows, 512)
    # Here, not where the memory of a training is measured: the tokens of a whole text take more than the adapter.
    tokens = tokenizer(text.train, add_special_tokens=False, verbose=False)["input_ids"]
    drawn = inputs.windows(tokens, options.length, options.steps, seed=0)
    save_file({"input_ids": torch.tensor(drawn)}, options.output / TRAINING)
    settings: dict[str, Any] = {"model": options.model, "data": text.title, "windows": len(windows)}
    settings |= {name: getattr(options, name) for name in ("bits", "group_size", "rank", "steps", "length", "lr")}
    known = json.loads(file.read_text()) if file.exists() else {}
    found = known if known.items() >= settings.items() else settings
    found["machine"] = machine()

    def once(name: str, work: Callable[[], Any]) -> None:
        if name not in found:
            screen.say(name)
            found[name] = work()
            file.write_text(json.dumps(found, indent=1) + "\n")

    config = hfq.RTNConfig(bits=options.bits, group_size=options.group_size, symmetric=False)
    if not (options.output / "base").exists():
        load(source, quantization_config=config).save_pretrained(options.output / "base")
    once("float", lambda: perplexity(load(source), windows))
    once("packed", lambda: perplexity(load(options.output / "base"), windows))
    for kind in KINDS:
        once(f"training {kind}", lambda kind=kind: in_its_own_process(kind))
    packed, base = options.output / "packed", options.output / "base"
    once("packed with the adapter", lambda: perplexity(load(base, packed), windows))
    once("float with the adapter", lambda: perplexity(load(source, packed), windows))
    once("packed with groups", lambda: perplexity(load(base, options.output / "grouped"), windows))
    once("merged difference", lambda: merged_difference(options, torch.tensor(windows[:1])))
    found["memory ratio"] = found["training short"]["peak_bytes"] / found["training float"]["peak_bytes"]
    file.write_text(json.dumps(found, indent=1) + "\n")
    screen.say(summary(found))
    return found


def load(source: Any, adapter: Path | None = None, **options: Any) -> Any:
    """A model in float32, with an adapter if one is named."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def merged_difference(options: argparse.Namespace, ids: torch.Tensor) -> float:
    """Largest change of a logit when the adapter in groups is merged, of the largest logit.

    Fast products on a CPU may round to 16 bits, each time otherwise: what merging changes shows in float32 ones.
    """
    model = load(options.output / "base", options.output / "grouped")
    with kernels.use(wna16="reference"):
        before = logits_of(model, ids)
        difference = (logits_of(model.merge_and_unload(), ids) - before).abs().max()
    return float(difference / before.abs().max())


def summary(found: dict[str, Any]) -> str:
    lines = [f"{name:26} {found[name]:8.2f}" for name in
             ("float", "packed", "packed with the adapter", "float with the adapter", "packed with groups")]
    change = 1 - found["packed with the adapter"] / found["packed"]
    return "\n".join([
        f"Perplexity, {found['data']}:", *lines, f"perplexity lower by {100 * change:.1f} %",
        f"memory of the training: {found['memory ratio']:.2f} of that on the float model",
        f"largest difference of logits after the exact merge, of the largest logit: {found['merged difference']:.1e}",
    ])


def in_its_own_process(kind: str) -> dict[str, Any]:
    """This script again, with the same options; what it measured is the last line it writes."""
    command = [sys.executable, __file__, *sys.argv[1:], "--train", kind]
    environment = dict(os.environ)
    if not KINDS[kind][2]:
        # Where memory is compared, what is freed goes back at once: else glibc keeps more or less of it, by chance.
        environment |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def train(options: argparse.Namespace, kind: str) -> None:
    """Train one adapter into ``<output>/<kind>`` and print time, memory and losses as one line of JSON."""
    from peft import LoraConfig, get_peft_model

    on_packed, in_groups, whole = KINDS[kind]
    start = resident()
    torch.manual_seed(0)
    if on_packed:
        model = hfq.prepare_for_training(load(options.output / "base"))
    else:
        model = load(measure.resolve(options.model))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = {"use_qalora": True, "qalora_group_size": options.group_size} if in_groups else {}
    model = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear",
                                             task_type="CAUSAL_LM", **groups))
    steps = options.steps if whole else min(MEMORY_STEPS, options.steps)
    rows = [{"input_ids": ids, "labels": ids} for ids in load_file(options.output / TRAINING)["input_ids"]]
    trainer = Trainer(model=model, train_dataset=rows, args=TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=steps, per_device_train_batch_size=1,
        learning_rate=options.lr, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), seed=0, disable_tqdm=None,
    ))
    started, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    model.save_pretrained(options.output / kind)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({
        "steps": steps, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "peak_bytes": resident("VmHWM") - start, "adapter_bytes": disk_bytes(options.output / kind), "losses": losses,
    }))


def open_text(data: str) -> measure.Text:
    if data in inputs.TEXT_FILES and not Path(data).exists():
        return measure.Text(*inputs.demo_text(data), f"Wikipedia introductions ({data}), every tenth by title")
    return measure.open_text(data)


def resident(kind: str = "VmRSS") -> int:
    """Memory of this process, pages of mapped files included: a float model that is read from a file needs them too.

    Args:
        kind: "VmRSS" for now, "VmHWM" for the most so far. (``getrusage`` counts the parent's as well.)
    """
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))


if __name__ == "__main__":
    raise SystemExit(main())
