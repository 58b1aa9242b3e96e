"""Sites that a method leaves alone for reasons of its own."""

from __future__ import annotations

from collections.abc import Callable

from hfq.graph.read import Plan, Site

__all__ = ["leave"]


def leave(plan: Plan, reason_for: Callable[[Site], str | None]) -> None:
    """Move every site that ``reason_for`` gives a reason for to those that stay float, in place.

    Args:
        plan: not traced yet.
    """
    places = [(plan.outside, plan.kept_outside), *((block.sites, block.kept) for block in plan.blocks)]
    for sites, kept in places:
        for site in list(sites):
            reason = reason_for(site)
            if reason:
                plan.skipped[site.name] = reason
                sites.remove(site)
                kept.append(site)
    for block in plan.blocks:
        block.groups = [[site] for site in block.sites]
