"""An attention profile that Vidur can read: Llama-2-7B on one A100, from a roofline.

Copies of Vidur often lack the measured `attention.csv`, its largest files. What the profile says decides how many steps
Vidur simulates and how large their batches are, not what simulating a batch costs: that is a look-up. So these step
times are plausible rather than measured, and the same in every checkout.
"""

from __future__ import annotations

import csv
from pathlib import Path

# Llama-2-7B, float16: config.json of https://huggingface.co/meta-llama/Llama-2-7b-hf.
HIDDEN = 4096
NUM_HEADS = 32
MAX_TOKENS = 4096
KV_BYTES_PER_TOKEN = 2 * 2 * HIDDEN  # keys and values of one layer
# A100 40 GB: 312 TFLOP/s in float16 without sparsity, 1,555 GB/s (NVIDIA A100 datasheet), times what a good attention
# kernel gets out of them. The launch time is of the order that CUDA launches have. Nothing is fitted.
FLOP_PER_MS = 312e9 * 0.55
BYTES_PER_MS = 1555e6 * 0.75
LAUNCH_MS = 0.01
# Vidur's own grids have this distance up to 1,024 tokens.
GRID_TOKENS = 32


def write_attention_profile(path: Path, max_seqs: int = 128) -> None:
    """The CSV that Vidur trains its attention predictors on: milliseconds a layer."""
    grid = range(GRID_TOKENS, MAX_TOKENS + 1, GRID_TOKENS)
    prefills = [_row(chunk, kv, 1) for chunk in grid for kv in range(0, MAX_TOKENS - chunk + 1, chunk)]
    decodes = [_row(0, kv, seqs) for kv in grid for seqs in range(1, max_seqs + 1)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(decodes[0]))
        writer.writeheader()
        writer.writerows(prefills + decodes)


def _row(chunk: int, kv: int, seqs: int) -> dict[str, float | str]:
    """One prefill of `chunk` tokens behind `kv` others, or with `chunk` 0, `seqs` decodes behind `kv` each."""
    flop = 4 * chunk * (kv + chunk / 2) * HIDDEN  # scores and weighted values; a causal chunk sees half of itself
    read_ms = seqs * (kv + chunk) * KV_BYTES_PER_TOKEN / BYTES_PER_MS
    attention_ms = LAUNCH_MS + max(flop / FLOP_PER_MS, read_ms)
    return {
        "time_stats.attn_kv_cache_save.median": LAUNCH_MS + max(chunk, seqs) * KV_BYTES_PER_TOKEN / BYTES_PER_MS,
        "time_stats.attn_prefill.median": attention_ms if chunk else 0.0,
        "time_stats.attn_decode.median": 0.0 if chunk else attention_ms,
        "n_embd": HIDDEN,
        "n_q_head": NUM_HEADS,
        "n_kv_head": NUM_HEADS,
        "block_size": 16,
        "num_tensor_parallel_workers": 1,
        "max_model_len": MAX_TOKENS,
        "batch_size": seqs,
        "prefill_chunk_size": chunk,
        "kv_cache_size": kv,
        "is_prefill": str(chunk > 0),
        "attention_backend": "roofline",
    }
