"""Operators of our own that are plain Python functions in a graph; ``REGISTRY`` finds them by name.

The operators in torch's registry (``autopar::attention``, ``autopar::straight_through``) are registered by this import.
"""

from __future__ import annotations

from autopar.operators.attention import ATTENTION
from autopar.operators.attention_tile import MERGE, TILE, TILE_BACKWARD
from autopar.operators.convolution import padded_convolution
from autopar.operators.embedding import embedding_rows
from autopar.operators.losses import cross_entropy_from_parts, cross_entropy_sums, vocabulary_maximum, vocabulary_sums
from autopar.operators.masked_attention import ATTENTIONS, masked_attention
from autopar.operators.random import random_keep, random_uniform
from autopar.operators.registry import REGISTRY, operator
from autopar.operators.routing import PERMUTE_ROWS
from autopar.operators.sequence import hybrid_attention, ring_attention, rows_attention
from autopar.operators.straight_through import STRAIGHT_THROUGH

__all__ = [
    "ATTENTION",
    "ATTENTIONS",
    "MERGE",
    "PERMUTE_ROWS",
    "REGISTRY",
    "STRAIGHT_THROUGH",
    "TILE",
    "TILE_BACKWARD",
    "cross_entropy_from_parts",
    "cross_entropy_sums",
    "embedding_rows",
    "hybrid_attention",
    "masked_attention",
    "operator",
    "padded_convolution",
    "random_keep",
    "random_uniform",
    "ring_attention",
    "rows_attention",
    "vocabulary_maximum",
    "vocabulary_sums",
]
