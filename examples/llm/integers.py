"""Integer products, a quantized cache, and a model that knows no float: quantize, save, reload, measure.

    python examples/llm/integers.py
    python examples/llm/integers.py --model <Hub id or folder> --data <Hub id or file> --output out/integers

Three models in 8 bits from the same float one: weights and inputs (CrossQuant), the same with keys and values of 4 bits
(a KVQuant cache that the config carries and that `generate` then uses by itself), and integers alone from token ids to
logits (I-LLM). Each is loaded again in a new process and has to give the same bits. With the demo's model and text it
takes about half an hour on two cores, most of it calibration.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo import check_output, check_reload, say
from transformers import AutoModelForCausalLM

import hfq
from hfq.errors import HfqError
from hfq.integrations import card, measure, saving
from hfq.integrations.cli import screen
from hfq.integrations.results import machine


def configs(samples: int, length: int, **common: Any) -> dict[str, tuple[str, hfq.HfqConfig]]:
    """Name of a row to the name of its folder and its config."""
    data = {"calibration_samples": samples, "calibration_seqlen": length, **common}
    wide, cache = {"bits": 8, "activation_bits": 8, "group_size": -1}, hfq.KVQuantConfig(kv_bits=4)
    return {
        "8-bit weights and inputs": ("w8a8", hfq.CrossQuantConfig(**wide, **data)),
        "the same, 4-bit cache": ("w8a8-kv4", hfq.CrossQuantConfig(**wide, **data, kv_cache=cache)),
        "integers only": ("integers", hfq.ILLMConfig(**wide, **data, epochs=0)),
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything in order; returns the rows of the table."""
    started = time.perf_counter()
    torch.set_num_threads(os.cpu_count() or 1)
    source, text = measure.resolve(options.model), measure.open_text(options.data)
    tokenizer = measure.load_tokenizer(source)
    windows = text.windows(tokenizer, options.windows, options.length)
    wanted = configs(options.samples, options.length, calibration=[text.train], processor=tokenizer)
    folders = {name: options.output / leaf for name, (leaf, _) in wanted.items()}
    for folder in folders.values():
        check_output(folder)
    say("float model")
    models = {"float": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()}
    rows = [measure.row("float", models["float"], windows, folder=source)]
    for name, (_, config) in wanted.items():
        say(name)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config).eval()
        saving.save(model, folders[name], overwrite=True, processor=tokenizer)
        models[name] = model
        rows.append(measure.row(name, model, windows, folder=folders[name]))
        check_reload(model, folders[name], windows[0][:64])
    say("speed, in turns, and a sentence of each")
    measure.timed_rows(rows, models, windows, new_tokens=options.new_tokens)
    samples = {name: measure.sample(model, tokenizer) for name, model in models.items()}
    screen.results_table(rows, title=f"{options.model}; {text.title}")
    for name, sample in samples.items():
        say(f"{name}: {' '.join(sample.split())}")
    for name, folder in folders.items():
        found = measure.origin(options.model)
        found.rows = [{**row, **({"this": True} if row["name"] == name else {})} for row in rows]
        found.samples, found.dataset, found.machine = samples, text.title, machine()
        found.protocol = measure.PROTOCOL.format(count=len(windows), length=options.length)
        card.write_card(folder, results=found)
    say(f"done in {time.perf_counter() - started:.0f} s; models and cards in {options.output}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=measure.DEMO, help="Hub id or folder")
    parser.add_argument("--data", default=measure.DEMO, help="Hub id or file with text")
    parser.add_argument("--output", type=Path, default=Path("out/integers"))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--windows", type=int, default=24, help="windows to evaluate on")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded tokens of the speed measurement")
    try:
        run(parser.parse_args())
    except HfqError as error:
        screen.error(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
