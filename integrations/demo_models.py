"""Small real models that a script of ``examples/`` trains on first use: the cache, the call of the script, the loop."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfq.errors import DataError, HfqError
from hfq.integrations.inputs import cache_folder, locked

__all__ = [
    "RECORD", "arguments", "digest", "file_name", "fit", "folder_of", "made_once", "optimizers", "script", "train",
    "trained_by",
]  # fmt: skip

RECORD = "training.json"  # written last: a folder that has it is complete
# Matrices that are looked up, added, or give the output: orthogonal steps do not fit them.
_NOT_ORTHOGONAL = ("classifier", "embed", "position", "proj_out", "conv_out")


def digest(*parts: Any) -> str:
    """Eight hexadecimal digits that change with any of the JSON values ``parts``."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()[:8]


def file_name(title: str) -> str:
    """``title`` in small letters and digits, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def folder_of(kind: str, name: str, recipes: Mapping[str, Any]) -> Path:
    """Where the trained model of a recipe lies in the cache, or would lie.

    Raises:
        DataError: there is no recipe of that name.
    """
    if name not in recipes:
        raise DataError(f"no demo model {name!r}: {', '.join(recipes)} are the names")
    return cache_folder() / "models" / f"{kind}-{name}-{recipes[name].digest()}"


def made_once(target: Path, lock: str, make: Callable[[Path], None]) -> Path:
    """``target``, which ``make(folder)`` fills on the first call; it appears only when it is complete.

    Args:
        target: a folder; complete when it holds :data:`RECORD`.
        lock: one process at a time makes what is called so.
        make: writes the model and :data:`RECORD` into a folder that does not exist yet.
    """
    with locked(lock):
        if not (target / RECORD).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".train-") as scratch:
                folder = Path(scratch) / "model"
                make(folder)
                os.replace(folder, target)
    return target


def trained_by(script: Path, name: str, folder: Path) -> Path:
    """``folder`` with the demo model ``name``, trained on the first call (some minutes) by ``script``.

    Raises:
        DataError: the model is not trained yet and the script is not here, or it failed.
    """
    if (folder / RECORD).is_file():
        return folder
    where = "/".join(script.parts[-3:])
    if not script.is_file():
        raise DataError(f"the demo model {name!r} is not trained yet: run {where} --models {name} of the source tree "
                        "(minutes on two cores)")
    done = subprocess.run([sys.executable, str(script), "--models", name], stdout=subprocess.DEVNULL, check=False)
    if done.returncode or not folder.is_dir():
        raise DataError(f"training the demo model {name!r} failed: run {where} --models {name} to see why")
    return folder


def train(
    name: str, folder: Path, make: Callable[[int], tuple[Any, float]], quality: Callable[[Any], dict[str, Any]],
    aims: Mapping[str, float], *, steps: int, trial: int | None = None, rejected: Path, beside: Sequence[Any] = (),
) -> None:
    """Train, measure and save a demo model, with :data:`RECORD` beside it.

    Args:
        make: steps to a trained model and the mean loss of its last steps.
        quality: what is measured of the model.
        aims: the least shares of what ``quality`` measures by that name.
        steps: of the recipe.
        trial: another number of steps, after which nothing is asked of the quality.
        rejected: where a model lands that misses an aim: it took minutes, and somebody will want to look at it.
        beside: what is saved with the model.

    Raises:
        DataError: an aim was missed.
    """
    count = steps if trial is None else trial
    torch.manual_seed(0)
    started, processor_time = time.perf_counter(), time.process_time()
    made, loss = make(count)
    seconds, used = time.perf_counter() - started, time.process_time() - processor_time
    record = {"steps": count, "train_loss": round(loss, 4), "seconds": round(seconds), "cpu_seconds": round(used),
              **quality(made)}  # fmt: skip
    for key, aim in aims.items():
        if trial is None and record.get(key, 1.0) < aim:
            made.save_pretrained(rejected)
            raise DataError(f"{name}: {key} {100 * record[key]:.1f} %, {100 * aim:.0f} % are the aim: this machine "
                            f"trained another model than the recipe means; it is in {rejected}")
    for part in (made, *beside):
        part.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    sys.stderr.write(f"{name}: {json.dumps(record)}\n")


def arguments(description: str, recipes: Iterable[str]) -> argparse.ArgumentParser:
    """What a script that trains demo models can be asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(recipes), help="names, separated by commas")
    parser.add_argument("--output", type=Path, help="where to write the model (default: the cache); one model only")
    parser.add_argument("--steps", type=int, help="a trial with another number of steps; needs --output")
    return parser


def script(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, list[str]], None]) -> int:
    """The main function of such a script: ``run(options, names)``; its exit status."""
    options = parser.parse_args()
    names = [name.strip() for name in options.models.split(",")]
    if options.steps and not options.output:
        parser.error("--steps needs --output")
    if options.output and len(names) > 1:
        parser.error("--output takes one model: name it with --models")
    try:
        run(options, names)
    except HfqError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def optimizers(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, muon_lr: float, betas: tuple[float, float] = (0.9, 0.999),
) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside the model, AdamW for convolutions (decayed), embeddings, outputs and vectors."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and not any(word in name for word in _NOT_ORTHOGONAL)]
    decayed = [p for _, p in trained if p.ndim == 4]
    chosen = {id(p) for p in (*matrices, *decayed)}
    others = [p for _, p in trained if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=betas)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01))
    return found


def fit(
    modules: Sequence[nn.Module], steppers: Sequence[torch.optim.Optimizer], loss: Callable[[int], Tensor], steps: int,
    *, warmup: int = 30, decay: float = 0.7, floor: float = 0.0,
) -> float:
    """Minimise ``loss(step)`` over the parameters of ``modules``, which are left in evaluation mode.

    Args:
        steppers: optimizers that hold the parameters; their rates rise over ``warmup`` steps and fall in a line to
            ``floor`` over the last ``decay`` of all steps.

    Returns:
        The loss, averaged over the last twenty steps or so.
    """
    def factor(step: int) -> float:
        return min((step + 1) / warmup, 1.0, max(floor, (steps - step) / (decay * steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(stepper, factor) for stepper in steppers]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for module in modules:
        module.train()
    average, bar = 0.0, tqdm(range(steps), desc="training", disable=not sys.stderr.isatty())
    for step in bar:
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepper, schedule in zip(steppers, schedules, strict=True):
            stepper.step()
            schedule.step()
            stepper.zero_grad(set_to_none=True)
        average = value.item() if not step else 0.95 * average + 0.05 * value.item()
        bar.set_postfix(loss=f"{average:.3f}")
    for module in modules:
        module.eval()
    return average
