"""A tiny mixture whose router follows topics: tokens of a topic go to the same few neighbouring experts.

A text stays with its topic, so a change of topics among requests is a drift of loads.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.tiny_models import EOS_TOKEN_IDS, VOCAB_SIZE, write_tiny_model
from xllm_lab.workload import Prompt, Request, RequestId, Workload

NUM_EXPERTS, PER_TOKEN, LAYERS = 16, 2, (0, 1)
# The experts of each topic; on four ranks, and on two, they are neighbours on one.
HOT = ((0, 1, 2, 3), (8, 9, 10, 11))
_SHAPE = {
    "model_type": "qwen3_moe",
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": PER_TOKEN,
    "moe_intermediate_size": 24,
}


def words(topic: int) -> list[int]:
    """Tokens of a topic, none of which ends a text."""
    return [t for t in range(topic * 100 + 1, topic * 100 + 100) if t not in EOS_TOKEN_IDS]


def write_topical_model(folder: Path) -> Path:
    """A checkpoint; coordinate `topic` of the residual stream says what a token is about. Returns `folder`."""
    write_tiny_model(folder, **_SHAPE)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, tensor in weights.items():
        if name.endswith("norm.weight") and len(tensor) > len(HOT):
            tensor[: len(HOT)] = 1.0
        if name.endswith("mlp.gate.weight"):
            tensor[:, : len(HOT)] = 0.0
            for topic, experts in enumerate(HOT):
                tensor[list(experts), topic] = 1.5
    for name, strength in (("model.embed_tokens.weight", 12.0), ("lm_head.weight", 2.0)):
        weights[name][:, : len(HOT)] = -strength if name == "lm_head.weight" else 0.0
        for topic in range(len(HOT)):
            weights[name][words(topic), topic] = strength
    save_file(weights, path)
    return folder


def on_topics(topics: list[int], *, gap_us: int, output_tokens: int) -> Workload:
    """A request for each, one after another."""
    requests = []
    for number, topic in enumerate(topics):
        known = words(topic)
        tokens = tuple(known[(7 * number + 5 * k) % len(known)] for k in range(10 + number % 4))
        prompt = Prompt(num_tokens=len(tokens), token_ids=tokens)
        made = Request(id=RequestId(number), arrival_us=number * gap_us, prompt=prompt, output_tokens=output_tokens)
        requests.append(made)
    assert max(max(r.prompt.token_ids or ()) for r in requests) < VOCAB_SIZE
    return Workload(requests=tuple(requests))
