"""Kernels for NVIDIA GPUs, written in Triton.

Host sides: ``wna16`` (weight-only products), ``integer`` (integer products), ``producers`` (quantized activations),
``cache`` (attention over packed keys and values). The kernels are in the modules whose names end in ``jit``, the forms
in which they read weights in ``layout`` and ``integer_layout``, the choice of tiles in ``config``; ``tune`` and the
``benchmark`` modules measure. All have run in Triton's interpreter and are compiled for sm_80 and sm_90 by the tests;
they have not run on a GPU yet (``BENCHMARKS.md``).
"""
