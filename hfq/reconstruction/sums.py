"""The stream between layers on stored grids: what norms read, and the sums that enter blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from hfq.calibration import ranges, static
from hfq.graph.read import is_norm
from hfq.layers import rounded
from hfq.layers.rounded import RoundedInput
from hfq.reconstruction.static import input_grid
from hfq.report import Report, Row

__all__ = ["places", "round_stream"]

# Elements that a range is found on: there are several streams a block.
_LIMIT = 1 << 20


def places(plan: Any) -> list[str]:
    """Blocks with sites, and norms in them or outside all blocks: to be asked for while the model is float."""
    blocks = {block.name: bool(block.sites) for block in plan.blocks}
    return [name for name, module in plan.model.named_modules()
            if blocks.get(name) or (is_norm(module) and blocks.get(_around(name, blocks), True))]  # fmt: skip


def _around(name: str, blocks: Iterable[str]) -> str:
    return next((block for block in blocks if name.startswith(f"{block}.")), "")


@torch.no_grad()
def round_stream(
    plan: Any, names: Sequence[str], batches: Sequence[Mapping[str, Any]], bits: int, report: Report, *,
    observer: str = "mse", seed: int = 0,
) -> None:
    """Give every module of ``names`` (of :func:`places`) a stored symmetric range of its first input.

    A block's input is the sum of the residual stream: it goes on rounded to the norm that reads it and to the next sum.
    A norm inside a block rounds what it reads itself; the sum there goes on as it is, as an accumulator does.
    """
    model, grid = plan.model, input_grid(bits, symmetric=True)
    sites = [SimpleNamespace(name=name, module=model.get_submodule(name), kind="") for name in names]
    rows = static.observe_outside(model, batches, sites, limit=_LIMIT, seed=seed)
    for site in sites:
        if site.name not in rows:
            report.note(f"{site.name}: the data does not reach it: its input stays float")
            continue
        whole = rows.get(_around(site.name, [block.name for block in plan.blocks]))
        if whole is not None and torch.equal(whole, rows[site.name]):
            continue  # the block has rounded it
        device = next((p.device for p in site.module.parameters() if not p.is_meta), None)
        part = RoundedInput(grid, ranges.fit(rows[site.name], grid, observer)).to(device)
        rounded.attach_rounding(site.module, part)
        report.add(Row(f"{site.name}.{rounded.CHILD}", kind="part", status="attached", bits=8.0 * part.nbytes, numel=1,
                       reason="the input of a block or of a norm on a stored grid", extra=grid.to_dict()))
