"""Two ranks on two fake NPUs, joined by the real ProcessGroupHCCL, draw the tokens of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.fake_cann.ranks import free_port
from tests.npu.engines import engine, folder, served
from tests.npu.serve_rank import CASES
from tests.npu.test_npu_serving import crowd


def test_two_ranks_draw_the_tokens_of_one() -> None:
    """In turns and planned ahead, eagerly and in graphs, with their collectives captured; as one rank on a CPU."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.npu.serve_rank", str(folder())],
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
    told = json.loads(outputs[0][0].splitlines()[-1])
    assert told["model"]["tensor_parallel"] == 2
    assert told["model"]["ops"]["all_reduce"]["by"] == "hccl"
    alone, _ = served(engine("cpu"), crowd())
    for (shapes, mode), (tokens, graphs) in zip(CASES, told["found"], strict=True):
        assert {int(i): t for i, t in tokens.items()} == alone, (shapes, mode)
        assert (graphs is not None and graphs["replays"] > 0) == (shapes != "eager")
