"""The verbs of the command as plain functions, for notebooks: names and paths in, values out.

Everything heavy is imported where it is used, so that simulating needs no torch and replaying no SimPy.
"""

from __future__ import annotations

from xllm_lab.verbs.given import configure
from xllm_lab.verbs.handing_over import drift, export, lint, lint_rules, promote
from xllm_lab.verbs.looking import catalogue, compare, parity, report, timeline
from xllm_lab.verbs.machines import (
    calibrate,
    import_profile,
    profile_engine,
    validate_measured,
    validate_mtp,
    validate_npu,
)
from xllm_lab.verbs.running import follow, replay, simulate
from xllm_lab.verbs.tuning import recommend, tune, verify

__all__ = [
    "calibrate",
    "catalogue",
    "compare",
    "configure",
    "drift",
    "export",
    "follow",
    "import_profile",
    "lint",
    "lint_rules",
    "parity",
    "profile_engine",
    "promote",
    "recommend",
    "replay",
    "report",
    "simulate",
    "timeline",
    "tune",
    "validate_measured",
    "validate_mtp",
    "validate_npu",
    "verify",
]
