"""What a code means: grids, encoding, packing. Pure functions on tensors; no modules, no models."""

from hfq.formats import activation, affine, bitpack
from hfq.formats.activation import ActivationCodes, ActivationSpec
from hfq.formats.spec import PER_CHANNEL, PER_TENSOR, Codes, QuantSpec

__all__ = [
    "PER_CHANNEL", "PER_TENSOR", "ActivationCodes", "ActivationSpec", "Codes", "QuantSpec", "activation", "affine",
    "bitpack",
]  # fmt: skip
