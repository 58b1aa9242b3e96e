"""Which bits where: scores and costs of every choice, and programs that choose under budgets.

One interface: ``scores {name: {bits: loss}}`` (lower is better), ``costs {name: {bits: cost}}`` and a budget give
``{name: bits}``; for several budgets at once costs and budget are mappings of resources. Where the loss of a choice
depends on the others, ``lowering`` takes a function of the whole allocation in place of the scores.
"""
