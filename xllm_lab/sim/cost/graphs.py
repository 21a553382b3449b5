"""Captured graphs: a step is padded to the next captured size and replayed, or runs eagerly."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from xllm_lab.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GraphBuckets:
    """Numbers of tokens for which a graph was captured, ascending; none at all means that every step runs eagerly."""

    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.sizes):
            raise ConfigError(f"graph sizes contain {min(self.sizes)}, at least 1 token is accepted")
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ConfigError(f"graph sizes are {self.sizes}, sizes that rise from each to the next are accepted")

    def is_replayed(self, num_tokens: int) -> bool:
        """Whether a graph holds so many tokens; more than the largest run eagerly."""
        return bool(self.sizes) and num_tokens <= self.sizes[-1]

    def padded(self, num_tokens: int) -> int:
        """Tokens the device computes: the smallest captured size that holds them, or, run eagerly, just them."""
        return self.sizes[bisect_left(self.sizes, num_tokens)] if self.is_replayed(num_tokens) else num_tokens


def vllm_graph_buckets(max_num_seqs: int) -> GraphBuckets:
    """vLLM's sizes for `--max-num-seqs`: 1, 2, 4, every 8th below 256, every 16th up to min(2 * max_num_seqs, 512).

    Source: `VllmConfig._set_cudagraph_sizes` of vLLM 0.11 and later.
    """
    largest = min(2 * max_num_seqs, 512)
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16))
    return GraphBuckets(tuple(size for size in sizes if size <= largest))


def xllm_graph_buckets(max_num_tokens: int = 16) -> GraphBuckets:
    """xLLM's sizes: 1, 2, 4, 8, then multiples of 16 up to the one that holds `max_num_tokens`.

    The default is that of `acl_graph_decode_batch_size_limit`: larger decode batches run eagerly on an NPU.
    Source: xLLM at 3906f5a, `acl_graph_executor_impl.cpp`.
    """
    rounded = -(-max_num_tokens // 16) * 16
    small = tuple(size for size in (1, 2, 4, 8) if max_num_tokens > size // 2)
    return GraphBuckets((*small, *range(16, rounded + 1, 16)) if max_num_tokens > 8 else small)
