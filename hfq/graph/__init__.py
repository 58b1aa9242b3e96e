"""Where things are in a model, and what folds into what."""

from __future__ import annotations

from hfq.graph.read import Block, Plan, Site, read

__all__ = ["Block", "Plan", "Site", "read"]
