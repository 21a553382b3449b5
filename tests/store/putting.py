"""A process that puts and gets chains of blocks, until it is killed or has done its rounds.

    python -m tests.store.putting SPEC SEED FIRST_CHAIN [ROUNDS]

It says "ready" when one chain is there, and ends with status 3 if it ever gets wrong bytes.
"""

from __future__ import annotations

import random
import sys
from functools import cache
from itertools import count

from tests.store.places import content, key_of, room, store_at, told

BLOCK_BYTES, NUM_CHAINS, LENGTH = 20_000, 12, 5
TIMEOUT_US = 500_000


def chain(number: int) -> list[bytes]:
    """Keys of one prompt."""
    return [key_of(number, position) for position in range(LENGTH)]


@cache
def right(key: bytes) -> bytes:
    """Its only right bytes."""
    return content(key, BLOCK_BYTES)


def main(spec: str, seed: str, first: str, rounds: str = "") -> int:
    """See above."""
    dice = random.Random(int(seed))
    with store_at(spec, BLOCK_BYTES) as store:
        for done in range(int(rounds)) if rounds else count():
            keys = chain(int(first) + dice.randrange(NUM_CHAINS))
            store.put(keys, [[right(key)] for key in keys], TIMEOUT_US)
            found = room(LENGTH, BLOCK_BYTES)
            num_hits = store.get_into(keys, found, TIMEOUT_US)
            if any(told(found[k]) != right(keys[k]) for k in range(num_hits)):
                return 3
            if done == 0:
                print("ready", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
