"""Steps as a shapes policy meets them, drawn by number for `contract`: sizes on, below and above edges of graphs."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, eq=False)
class DrawnShapeView:
    """A `ShapeView`, and its number."""

    number: int
    num_tokens: int
    num_seqs: int
    is_decode: bool
    max_context_tokens: int
    max_tokens_per_batch: int
    max_seqs_per_batch: int
    max_model_len: int


def drawn_shape_view(number: int) -> DrawnShapeView:
    """The view of that number, at least 0: always the same one, in new objects."""
    rng = random.Random(f"shape view {number}")
    max_seqs_per_batch = rng.choice((1, 3, 16, 20, 200, rng.randint(1, 600)))
    max_tokens_per_batch = rng.choice((1, 7, 512, 10240, rng.randint(1, 5000)))
    is_decode = rng.random() < 0.5
    most_seqs = min(max_seqs_per_batch, max_tokens_per_batch)
    num_seqs = min(most_seqs, _near_an_edge(rng, most_seqs))
    num_tokens = num_seqs
    if not is_decode:
        # A step of nothing but single tokens decodes, to a device, wherever they come from.
        num_tokens = max(num_seqs, min(max_tokens_per_batch, _near_an_edge(rng, max_tokens_per_batch)))
    longest = num_tokens - num_seqs + 1
    max_model_len = rng.choice((longest, 8192, 10**6))
    return DrawnShapeView(
        number=number,
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        is_decode=num_tokens == num_seqs,
        max_context_tokens=rng.choice((longest, longest + 100, max(longest, max_model_len), max_model_len + 1)),
        max_tokens_per_batch=max_tokens_per_batch,
        max_seqs_per_batch=max_seqs_per_batch,
        max_model_len=max_model_len,
    )


def _near_an_edge(rng: random.Random, most: int) -> int:
    edge = rng.choice((1, 2, 4, 8, 16, 32, 48, 248, 256, 512, 2048, most, rng.randint(1, most)))
    return max(1, edge + rng.choice((-1, 0, 0, 1)))
