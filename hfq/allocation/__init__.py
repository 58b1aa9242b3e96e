"""Which bits where: scores and costs of every choice, and programs that choose under a budget.

One interface: ``scores {name: {bits: loss}}`` (lower is better), ``costs {name: {bits: cost}}`` and a budget give
``{name: bits}``.
"""
