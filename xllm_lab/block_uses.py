"""How often, and when last, requests had the blocks of an instance's tiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm_lab.ledger import BlockKey
from xllm_lab.policies.cache import CachedBlock


class _Use:
    """Of a key: how often requests had its block, when one began to last, and how many blocks are before it."""

    __slots__ = ("depth", "last_used_us", "num_uses")

    def __init__(self, depth: int) -> None:
        self.depth, self.last_used_us, self.num_uses = depth, 0, 0


class BlockUses:
    """Of all keys that are somewhere, and of some that were."""

    def __init__(self) -> None:
        self._uses: dict[BlockKey, _Use] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def add(self, keys: Sequence[BlockKey], first_block: int, began_us: int) -> None:
        """A request that began to run then has blocks from `first_block` of its own on.

        It does not matter when it computed them, or steps could not be skipped.
        """
        for depth, key in enumerate(keys, first_block):
            use = self._uses.get(key)
            if use is None:
                use = self._uses[key] = _Use(depth)
            use.num_uses += 1
            use.last_used_us = max(use.last_used_us, began_us)

    def of(self, block: int, key: BlockKey) -> CachedBlock:
        use = self._uses[key]
        return CachedBlock(block, use.num_uses, use.last_used_us, use.depth)

    def keep(self, is_anywhere: Callable[[BlockKey], bool]) -> None:
        """And forget the others."""
        self._uses = {key: use for key, use in self._uses.items() if is_anywhere(key)}
