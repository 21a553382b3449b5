"""A change of experts that some rank never gets ready for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.engine.test_live_experts import BALANCED, options, served, tokens
from tests.engine.topical_model import write_topical_model
from xllm_lab.engine.engine import Engine
from xllm_lab.policies.experts.static import STATIC
from xllm_lab.sim.parity import parity


def test_who_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    """The weights are gone from the disk: changes are rolled back and counted, and serving goes on as before."""
    folder = write_topical_model(tmp_path / "model")
    with Engine(replace(options(folder, 2), prepare_timeout_s=0.05)) as host:
        before = served(host, STATIC, tmp_path / "before")
        (folder / "model.safetensors").rename(folder / "elsewhere")
        run = served(host, BALANCED, tmp_path / "run")
        assert tokens(run) == tokens(before)
        dropped = [d for d in run.decisions if d.dropped_us is not None]
        assert dropped
        assert run.manifest.expert_layout is not None
        assert run.manifest.expert_layout["counts"]["dropped"] == len(dropped)
        assert run.manifest.expert_layout["counts"]["changes"] == 0
        assert {load.placement for load in run.expert_loads} == {0}
        assert parity(run).is_identical
        (folder / "elsewhere").rename(folder / "model.safetensors")
        again = served(host, BALANCED, tmp_path / "again")
        assert tokens(again) == tokens(before)
