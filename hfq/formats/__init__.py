"""What a code means: grids, encoding, packing. Pure functions on tensors; no modules, no models."""

from hfq.formats import affine, bitpack
from hfq.formats.spec import PER_CHANNEL, PER_TENSOR, Codes, QuantSpec

__all__ = ["PER_CHANNEL", "PER_TENSOR", "Codes", "QuantSpec", "affine", "bitpack"]
