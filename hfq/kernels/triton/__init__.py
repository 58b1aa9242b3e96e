"""Kernels for NVIDIA GPUs, written in Triton.

``wna16`` is the host side, ``jit`` the kernels, ``layout`` the words they read, ``config`` the choice of tiles;
``tune`` and ``benchmark`` measure. They have run in Triton's interpreter and are compiled for sm_80 and sm_90 by the
tests; they have not run on a GPU yet (``BENCHMARKS.md``).
"""
