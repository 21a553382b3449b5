"""A store of KV blocks behind the host's memory, shared by processes, of which nothing is believed.

    with open_store("dir:/var/cache/kv?bytes=20GiB", identity, block_bytes) as store:
        store.put(keys, blocks, timeout_us)           how many leading blocks are there now
        store.get_into(keys, blocks, timeout_us)      how many leading blocks are there, and right
        store.num_leading(keys, timeout_us)           how many leading blocks it says it has: a hint

`block_store.py` is the store: what a block is called, the envelope that proves it (`envelope.py`), deadlines
(`lanes.py`) and counts (`counters.py`). A shelf is where envelopes lie: a directory (`directory.py`) or Mooncake
(`mooncake.py`). A shelf may be slow, forget, mix up or lie: a block that is not proven right by then is a miss.
"""

from __future__ import annotations

from xllm_lab.store.block_store import BlockStore
from xllm_lab.store.counters import StoreCounters
from xllm_lab.store.envelope import BlockIdentity
from xllm_lab.store.opening import open_store

__all__ = ["BlockIdentity", "BlockStore", "StoreCounters", "open_store"]
