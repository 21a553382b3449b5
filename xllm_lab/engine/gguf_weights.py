"""Config, weights and tokenizer out of one GGUF file."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from xllm_lab.engine.gguf_file import GgufFile
from xllm_lab.engine.model_config import ModelConfig, from_gguf
from xllm_lab.engine.weights import checked
from xllm_lab.errors import ModelError

_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_config(file: GgufFile) -> ModelConfig:
    """The model of a file, with Llama 3's rope factors if it has them.

    Raises:
        ModelError: see `model_config.from_gguf`.
    """
    config = from_gguf(file.metadata, frozenset(file.tensors), source=str(file.path))
    if _ROPE_FACTORS in file.tensors:
        divisors = tuple(float(v) for v in file.dequantised(_ROPE_FACTORS))
        return dataclasses.replace(config, rope_divisors=divisors)
    return config


def gguf_weights(file: GgufFile, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight under its transformers name, dequantised and cast to `dtype`.

    Raises:
        ModelError: a tensor is unreadable, missing, unexpected or of the wrong shape.
    """
    weights: dict[str, Tensor] = {}
    for gguf_name in file.tensors:
        if gguf_name == _ROPE_FACTORS:
            continue
        name = transformers_name(gguf_name)
        tensor = torch.from_numpy(file.dequantised(gguf_name))
        if config.architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
            tensor = half_split_rows(tensor, heads)
        weights[name] = tensor.to(dtype)
    return checked(weights, config, source=str(file.path))


def transformers_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name comes back as it is."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, kind = gguf_name.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else gguf_name


def half_split_rows(rows: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of q and k, whose rotary pairs are neighbours: rows (2i, 2i + 1) of a head.

    Ours (and transformers') are (i, i + H/2). Works on weights [heads * H, I] and biases [heads * H].
    """
    if rows.shape[0] % (2 * heads):
        return rows  # of the wrong shape, which `checked` reports by name
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    """Tokens that end a text or a turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(int(file.metadata[key]) for key in keys if key in file.metadata))


# How a text is cut before merging, by `tokenizer.ggml.pre`: llama.cpp's regular expressions (src/llama-vocab.cpp).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace("{1,3}", ""),
    "smollm": None,
    "gpt-2": None,
    "default": None,
}
_CONTROL = 3  # GGUF specification, `tokenizer.ggml.token_type`
_USER_DEFINED = 4


def gguf_tokenizer(file: GgufFile) -> Any:
    """A `transformers` fast tokenizer of the file's vocabulary, with its chat template.

    Raises:
        ModelError: a vocabulary other than byte-level BPE, or a pre-tokenizer we do not know.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    if facts.get("model") != "gpt2":
        raise ModelError(f"{file.path}: tokenizer model {facts.get('model')!r} is not supported; accepted is 'gpt2'")
    if facts.get("pre", "default") not in _SPLITS:
        raise ModelError(f"{file.path}: pre-tokenizer {facts['pre']!r} is unknown; accepted are {', '.join(_SPLITS)}")
    tokens = facts["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer(facts.get("pre", "default"))
    backend.decoder = decoders.ByteLevel()
    kinds = facts.get("token_type", ())
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=False) if k == _CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=False) if k == _USER_DEFINED]
    )
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    special = {f"{name}_token": tokens[facts[key]] for name, key in names.items() if key in facts}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = file.metadata.get("tokenizer.chat_template")
    return tokenizer


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = _SPLITS[name]
    if split is not None:
        parts = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        return pre_tokenizers.Sequence(parts)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":  # every digit stands alone
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level
