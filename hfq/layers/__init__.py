"""Modules that run codes, what they are composed of, and how they get into a model."""

from hfq.layers.embedding import QEmbedding
from hfq.layers.experts import QExperts
from hfq.layers.linear import QConv1D, QLinear
from hfq.layers.online import ChannelScale, Hadamard, StreamRotation, install_rotation
from hfq.layers.packed import PackedModule

__all__ = [
    "ChannelScale", "Hadamard", "PackedModule", "QConv1D", "QEmbedding", "QExperts", "QLinear", "StreamRotation",
    "install_rotation",
]  # fmt: skip
