"""Too little memory is one line with the numbers, and the next run is as good as the first.

Runs before the other engine tests, as its name sorts: pieces that they leave in torch_npu's allocator are neither free
nor in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_cann import control
from tests.npu.engines import WHERE, engine, folder, install_operators, let_float32_through, served
from tests.npu.test_npu_serving import crowd
from tests.tiny_models import write_tiny_model
from xllm_lab.engine.device.npu_setup import api
from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.errors import ConfigError

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


@contextmanager
def free(num_bytes: int) -> Iterator[None]:
    """A device with that much left beside what is in use."""
    api().synchronize()
    api().empty_cache()
    with control.hbm(api().memory_reserved() + num_bytes):
        yield


def test_blocks_of_another_size_are_refused() -> None:
    where = replace(WHERE, block_size=16)
    with pytest.raises(ConfigError, match="block_size is 16; the attention of npu takes KV blocks of 128 tokens"):
        served(engine("npu"), crowd(), where)


def test_a_pool_that_does_not_fit_is_refused_before_anything_is_taken() -> None:
    """40 blocks of 128 tokens of 512 bytes are 2.5 MiB."""
    host = engine("npu")
    told = r"num_blocks is 40: .* 2621440 bytes of KV, 2097152 are free on npu"
    with free(2 * MIB), control.counting() as counts, pytest.raises(ConfigError, match=told):
        served(host, crowd())
    assert counts["malloc"].calls == 0


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    """12 MiB of embedding and as much of head, on a device with 8 left."""
    large = write_tiny_model(tmp_path, hidden_size=1024, num_attention_heads=8, vocab_size=3072)
    with free(8 * MIB), pytest.raises(ConfigError, match=r"model .* does not fit on npu: \d+ of \d+ bytes are free"):
        Engine(EngineOptions(model=str(large), device="npu", dtype="float32"))


def test_a_step_that_does_not_fit_ends_the_run_and_not_the_process() -> None:
    """The pool leaves too little for the largest step; afterwards a smaller one is served, with the same tokens."""
    host, where = engine("npu"), replace(WHERE, max_tokens_per_batch=3000, num_kv_blocks=40)
    expected, _ = served(engine("cpu"), crowd())
    with free(4 * MIB):
        with pytest.raises(ConfigError, match="a step at the configured limits does not fit on npu"):
            served(host, crowd(), where)
        assert served(host, crowd(), replace(WHERE, num_kv_blocks=8))[0].keys() == expected.keys()
    assert served(host, crowd(), shapes="xllm-buckets")[0] == expected


def test_graphs_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with free(3 * MIB), pytest.raises(ConfigError, match=r"need a pool of \d+ bytes.*accepted: \d+ \(free on npu\)"):
        served(engine("npu"), crowd(), replace(WHERE, max_tokens_per_batch=3000), shapes="xllm-buckets")


def test_a_run_gives_its_memory_back() -> None:
    """Serving again and again takes no more than serving once: pools, workspaces and graphs go with their run."""
    in_use = []
    for _ in range(3):
        served(engine("npu"), crowd(3), shapes="xllm-buckets")
        api().synchronize()
        api().empty_cache()
        in_use.append(api().memory_reserved())
    assert in_use[2] == in_use[1]


def test_expandable_segments() -> None:
    """The allocator maps pages into reserved addresses instead of asking for blocks; the tokens are the same.

    In a process of its own, because the allocator reads its settings once.
    """
    environment = {**os.environ, "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-m", "tests.npu.serve_once", str(folder())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["calls"].get("malloc", 0) == 0
    assert told["calls"]["map_memory"] > 0
    expected, _ = served(engine("cpu"), crowd())
    assert {int(request): tokens for request, tokens in told["tokens"].items()} == expected
