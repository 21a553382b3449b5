"""How long do puts, gets and probes of a block store take, and which two constants say so?

    build/cluster/venv/bin/python benchmarks/block_store.py --folder FOLDER [--samples samples.jsonl]

In turns, so that a slow minute hits all alike: a directory; Mooncake, in this process's own memory; Mooncake, in memory
that another process lends, over TCP on the loopback device. A line a store and operation has its latency and rate
(`store/timing.py`) and how far these are from the medians that they are fitted to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from xllm_lab.cluster_services import LOOPBACK, free_ports, start_master
from xllm_lab.provenance import commit, hardware, versions
from xllm_lab.store import BlockIdentity, BlockStore, open_store
from xllm_lab.store.timing import StoreSample, fit_store_times, time_store

# In bfloat16, 16 tokens of SmolLM2-135M are 0.37 MB; 128 of Qwen2.5-7B are 7.3 MB on one device, 1.8 MB on each of 4.
SIZES = (100_000, 400_000, 1_500_000, 6_000_000)
BATCHES = (1, 4, 8)
IDENTITY = BlockIdentity(
    model="benchmark", layout="none", dtype="uint8", block_size=16, num_layers=1, num_kv_heads=1, head_dim=1
)
LEND = """
import sys
from benchmarks.block_store import IDENTITY
from xllm_lab.store import open_store
with open_store(sys.argv[1], IDENTITY, 1) as store:
    print("ready", flush=True)
    sys.stdin.read()
"""


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the directory's files are")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each kind a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", type=Path, help="every call, as JSON lines")
    o = parser.parse_args()
    print(json.dumps({"commit": commit(), "hardware": hardware(), "versions": versions()}))
    measured: dict[str, list[StoreSample]] = {}
    with ExitStack() as running:
        stores = opened(running, o.folder)
        for _ in range(o.turns):
            for name, spec in stores.items():
                measured.setdefault(name, []).extend(
                    time_store(at(spec), sizes=SIZES, batches=BATCHES, repeats=o.repeats)
                )
    for name, samples in measured.items():
        tell(name, samples)
    if o.samples:
        lines = (json.dumps({"store": name, **s._asdict()}) for name, samples in measured.items() for s in samples)
        o.samples.write_text("\n".join(lines) + "\n", encoding="utf-8")


def opened(running: ExitStack, folder: Path) -> dict[str, str]:
    """Each store's spec; Mooncake's master, and a process that lends memory, run until the end."""
    port, metrics_port = free_ports(2)
    # Objects may be evicted a second after they were read, so that there is room for every turn.
    options = ("--default_kv_lease_ttl=1s",)
    running.enter_context(start_master(port=port, metrics_port=metrics_port, options=options))
    lent_port, lent_metrics_port = free_ports(2)
    running.enter_context(start_master(port=lent_port, metrics_port=lent_metrics_port, options=options))
    lender = subprocess.Popen(
        [sys.executable, "-c", LEND, f"mooncake://{LOOPBACK}:{lent_port}?segment_bytes=3GiB"],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    running.callback(lender.wait)
    running.callback(lender.kill)
    assert lender.stdout is not None
    assert lender.stdout.readline() == "ready\n"
    return {
        "directory": f"dir:{folder}?bytes=2GiB",
        "mooncake, own memory": f"mooncake://{LOOPBACK}:{port}?segment_bytes=2GiB",
        "mooncake, another's memory": f"mooncake://{LOOPBACK}:{lent_port}",
    }


def at(spec: str) -> Callable[[int], BlockStore]:
    """Opens it for blocks of a size."""
    return lambda block_bytes: open_store(spec, IDENTITY, block_bytes)


def tell(name: str, samples: list[StoreSample]) -> None:
    """Constants, then medians with their quartiles."""
    for operation, link in fit_store_times(samples).items():
        of_it = [s for s in samples if s.operation == operation]
        cells, errors = [], []
        for key in sorted({(s.num_bytes // s.num_blocks, s.num_blocks) for s in of_it}):
            us = sorted(s.us for s in of_it if (s.num_bytes // s.num_blocks, s.num_blocks) == key)
            cells.append(f"{key[1]}x{key[0] / 1e6:g}MB {median(us):.0f} ({us[len(us) // 4]}-{us[-len(us) // 4]})")
            errors.append(abs(link.us(key[0] * key[1]) / median(us) - 1))
        print(f"{name}, {operation}: {link.latency_us:.0f} us + bytes / {link.bytes_per_s / 1e9:.2f} GB/s;", end=" ")
        print(f"off by {sum(errors) / len(errors):.0%} in the mean, {max(errors):.0%} at most; us: {', '.join(cells)}")


if __name__ == "__main__":
    main()
