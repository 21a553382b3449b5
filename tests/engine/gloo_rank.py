"""Rank 1 of `test_tensor_parallel.py`: computes its part of whatever models it is told of."""

from __future__ import annotations

from tests.engine.test_sharding import logits, runner
from xllm_lab.engine.device import open_device
from xllm_lab.engine.model_config import ModelConfig
from xllm_lab.engine.rank_place import place_in_environment
from xllm_lab.engine.ranks import join


def main() -> None:
    """Until it is told to end."""
    place = place_in_environment()
    assert place is not None
    ranks = join(place, timeout_s=60)
    ranks.connect(open_device("cpu", threads=1).collectives)
    while "config" in (message := ranks.receive()):
        config = ModelConfig(**message["config"])
        logits(runner(config, ranks.group), config.vocab_size)
    ranks.leave()


if __name__ == "__main__":
    main()
