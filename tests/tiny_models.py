"""A random Llama small enough to serve in milliseconds a step, saved as a checkpoint folder.

It is written by hand rather than by transformers, whose import alone takes longer than all runs of a test file;
`tests/engine/test_runner.py` shows that such folders are read as transformers reads them.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xllm_lab.engine.model_config import from_transformers
from xllm_lab.engine.weights import expected_shapes

VOCAB_SIZE = 256
MAX_POSITION = 512
# Many, so that a model of random weights does stop now and then.
EOS_TOKEN_IDS = tuple(range(0, VOCAB_SIZE, 16))
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": list(EOS_TOKEN_IDS),
}
# Keys and values, of 2 layers, of 2 heads of 8 numbers of 4 bytes.
KV_BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4


def write_tiny_model(folder: Path, **changes: Any) -> Path:
    """A checkpoint of `SHAPE` with `changes`; the same weights every time. Returns `folder`."""
    raw = {**SHAPE, **changes}
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: torch.randn(shape, generator=generator) * (1.0 if len(shape) == 1 else 0.3)
        for name, shape in expected_shapes(from_transformers(raw, source="the tiny model")).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(weights, folder / "model.safetensors")
    return folder


@functools.cache
def tiny_model() -> Path:
    """The folder of the model that most tests serve, written once a process and gone with it."""
    return write_tiny_model(Path(_FOLDER.name))


_FOLDER = tempfile.TemporaryDirectory(prefix="xllm_lab_tiny_")
