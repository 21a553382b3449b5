"""Two ranks that share experts on fake NPUs, through the real ProcessGroupHCCL: one rank's tokens, calls counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.fake_cann.ranks import free_port
from tests.npu.engines import NUM_LAYERS, WHERE, Talk, engine, folder, install_operators, let_float32_through, served
from tests.npu.serve_experts import CASES
from tests.npu.test_npu_experts import QWEN
from tests.npu.test_npu_serving import crowd

L = NUM_LAYERS
# Of a decoding step. Embedding and head take one each, each layer two all-reduces; experts as said in the tests.
# The fused operators' references meet twice going there, and three times coming back.
FUSED = {"inside_operator": 5 * L}
DIVIDED = {"all_reduce": 1 + 2 * L, "all_gather": 1}


@pytest.fixture(scope="module", autouse=True)
def _operators() -> None:
    install_operators()
    let_float32_through()


def told_by_ranks(layout: str, dispatch: str) -> list[dict[str, Any]]:
    """What each of two ranks printed; a rank that follows prints nothing."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-m", "tests.npu.serve_experts", str(folder(**QWEN)), layout, dispatch]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    last = [(out.splitlines() or [""])[-1] for out, _ in outputs]
    return [json.loads(line) if line.startswith("{") else {} for line in last]


@pytest.mark.parametrize("dispatch", ["all-gather", "all-to-all", "fused"])
def test_divided_ranks_draw_the_tokens_of_one(dispatch: str) -> None:
    """All-gathered, experts cost no collective beside the layer's all-reduce, and graphs capture everything; by
    all-to-all they cost three a layer: counts, rows, and rows back. No graph can hold those.
    """
    told = told_by_ranks("tensor", dispatch)[0]
    alone, _ = served(engine("cpu", model=folder(**QWEN)), crowd())
    for (shapes, mode), (tokens, graphs) in zip(CASES, told["found"], strict=False):
        assert {int(i): t for i, t in tokens.items()} == alone, (shapes, mode)
        assert (graphs is not None and graphs["replays"] > 0) == (shapes != "eager")
    assert len(told["found"]) == (1 if dispatch == "all-to-all" else 2)
    exchanges = {"all-gather": {}, "all-to-all": {"all_to_all": 3 * L}, "fused": FUSED}[dispatch]
    assert told["collectives"] == DIVIDED | exchanges
    assert ("whose counts npu cannot capture" in told["refused"]) == (dispatch == "all-to-all")


@pytest.mark.parametrize("dispatch", ["all-gather", "all-to-all", "fused"])
def test_ranks_with_their_own_tokens_draw_those_of_one(dispatch: str) -> None:
    """Of the whole model but for its experts: one collective before the step; two a layer, or three."""
    alone, talk = engine("cpu", model=folder(**QWEN))._runner(WHERE), Talk(5, 150, 127)
    expected = [alone.run(step).argmax(-1).tolist() for step in (talk.prefill(), talk.decode())]
    exchanges = {"all-to-all": {"all_to_all": 3 * L}, "all-gather": {"reduce_scatter": L}, "fused": FUSED}[dispatch]
    gathers = 1 + (L if dispatch == "all-gather" else 0)
    for told in told_by_ranks("data", dispatch):
        assert told["found"] == expected
        assert told["collectives"] == {"all_gather": gathers} | exchanges
