"""Weights to codes: solvers that take a matrix and what is known about its inputs, and return its codes."""
