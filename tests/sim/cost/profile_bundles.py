"""Small operator profiles, written as a profiler writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

LAYERS_US = {
    "embedding": 3.0,
    "layernorm": 2.0,
    "qkv_proj": 40.0,
    "rotary_emb": 2.5,
    "o_proj": 30.0,
    "gate_up_proj": 170.0,
    "act_fn": 3.0,
    "down_proj": 90.0,
    "final_layernorm": 2.6,
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SEQUENCES = (1, 2, 4, 8, 16, 32)
CHUNKS = (16, 64, 256, 512)
LENGTHS = (16, 64, 256, 1024)
DECODES = (1, 2, 4, 8, 16, 32)
META = """\
model: meta-llama/Llama-3.1-8B
hardware: test-device
tp_degrees: [1]
skew_fit:
  enabled: {skew}
"""


def attention_us(chunk: int, before: int, decodes: int, kv: int) -> float:
    """Not linear in anything, so that between the points there is something to get wrong."""
    return float(8.0 + 0.002 * (chunk * (before + chunk / 2)) ** 0.9 + 0.004 * (decodes * kv) ** 0.95)


def write_bundle(
    folder: Path,
    *,
    model: str = "meta-llama/Llama-3.1-8B",
    tensor_parallel: int = 1,
    skew: bool = False,
    without: tuple[str, ...] = (),
    more: dict[str, float] | None = None,
    attention: Callable[[int, int, int, int], float] = attention_us,
) -> Path:
    """A bundle of few points; `without` leaves operators out, `more` adds some."""
    tables = folder / f"tp{tensor_parallel}"
    tables.mkdir(parents=True)
    (folder / "meta.yaml").write_text(META.format(skew=str(skew).lower()).replace("meta-llama/Llama-3.1-8B", model))
    layers = {name: us for name, us in {**LAYERS_US, **(more or {})}.items() if name not in without}
    rows = [f"{name},{n},{us * (1 + (n / 256) ** 1.1):.6f}" for name, us in layers.items() for n in TOKENS]
    _write(tables / "dense.csv", "layer,tokens,time_us", rows)
    heads = {name: us for name, us in {"lm_head": 700.0, "sampler": 25.0}.items() if name not in without}
    rows = [f"{name},{n},{us + n:.6f}" for name, us in heads.items() for n in SEQUENCES]
    _write(tables / "per_sequence.csv", "layer,sequences,time_us", rows)
    _write(tables / "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", _attention_rows(attention))
    if skew:
        _write(
            tables / "skew.csv", "regime,n,nb,skew,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us", _skew_rows()
        )
    return folder


def write_experts(path: Path) -> Path:
    """A table of 128 experts, of which a token has 8."""
    rows = [f"{n},{e},{e * 6.0 + n * 0.5}" for n in TOKENS for e in (8, 32, 128) if e <= 8 * n]
    _write(path, "tokens,activated_experts,time_us", rows)
    return path


def _attention_rows(attention: Callable[[int, int, int, int], float]) -> list[str]:
    points = [(0, 0, n, kv) for n in DECODES for kv in LENGTHS if n * kv <= 16 * 1024]
    for chunk in CHUNKS:
        for before in (0, *LENGTHS):
            points += [(chunk, before, 0, 0), *((chunk, before, n, kv) for n in DECODES[:-1] for kv in LENGTHS)]
    points.append((512, 500, 0, 0))  # a length that was measured for the chunk alone
    return [f"{','.join(map(str, p))},{attention(*p):.6f}" for p in points]


def _skew_rows() -> list[str]:
    rows = []
    for chunk in (0, *CHUNKS):
        for n in (2, 8, 32):
            for short in (16, 64, 256):
                for long in sorted({1, n // 2, n - 1}):
                    mean = (long * 4 * short + (n - long) * short) / n
                    t_mean = 3 * attention_us(chunk, 0, n, round(mean))
                    rows.append(
                        f"{'mixed' if chunk else 'pure'},{n},{long},4.0,{chunk},0,{short},{4 * short},{mean},"
                        f"{t_mean},{2 * t_mean},{t_mean * (1 + 0.2 * (1 - long / n))}"
                    )
    return rows


def _write(path: Path, head: str, rows: list[str]) -> None:
    path.write_text("\n".join([head, *rows]) + "\n")
