"""A simulation-backed research and tuning platform for the xLLM inference engine.

Read three files first: `policies/api.py` (what decides), `scheduler.py` (the loop that both hosts drive), and
`serving.py` (how a host talks to it). Then `engine/engine.py` and `sim/instance.py`, the two hosts; `router.py` and
`dispatch.py`, many instances behind a router, which `sim/fleet.py` and `engine/cluster/` drive; `sim/cost/__init__.py`
(what a step costs) and `sim/machine.py` (who can say so); `run_writer.py` and `summary_of_run.py`, for runs larger than
memory; and `tuning/search.py`.

The verbs of the `xllm-lab` command are functions of this package:

    import xllm_lab as lab

    trace = lab.read_trace("traces/chat.jsonl")
    run = lab.replay(trace, out="runs/first")
    fitted = lab.calibrate([run])
    guess = lab.simulate(trace, fitted, out="runs/guess", policy="prefill-first")
    print(lab.summarize_run(guess).ttft_us)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm_lab.formats import read_trace
    from xllm_lab.metrics import summarize
    from xllm_lab.profiles import read_profile
    from xllm_lab.runs import read_run
    from xllm_lab.summary_of_run import summarize_run
    from xllm_lab.verbs import (
        calibrate,
        compare,
        drift,
        export,
        import_profile,
        lint,
        parity,
        promote,
        recommend,
        replay,
        report,
        simulate,
        timeline,
        tune,
        validate_measured,
        validate_npu,
        verify,
    )

# Loaded when asked for: the simulator must not pull in torch, nor the engine SimPy or Optuna.
_HOME = {
    **dict.fromkeys(("calibrate", "compare", "export", "parity", "replay", "report", "simulate", "timeline"), "verbs"),
    **dict.fromkeys(("drift", "lint", "promote", "recommend", "tune", "validate_measured", "validate_npu"), "verbs"),
    "verify": "verbs",
    "import_profile": "verbs",
    "read_profile": "profiles",
    "read_run": "runs",
    "read_trace": "formats",
    "summarize": "metrics",
    "summarize_run": "summary_of_run",
}

__all__ = [
    "calibrate",
    "compare",
    "drift",
    "export",
    "import_profile",
    "lint",
    "parity",
    "promote",
    "read_profile",
    "read_run",
    "read_trace",
    "recommend",
    "replay",
    "report",
    "simulate",
    "summarize",
    "summarize_run",
    "timeline",
    "tune",
    "validate_measured",
    "validate_npu",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"xllm_lab.{_HOME[name]}"), name)
    raise AttributeError(f"module 'xllm_lab' has no attribute {name!r}")
