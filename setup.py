"""The optional compiled build: with XLLM_LAB_COMPILE=1 what a simulated step runs becomes C extensions, by mypyc.

Everything else about the package is in pyproject.toml. Without the variable this file adds nothing, the wheel is pure
Python and needs no compiler. `make compiled` builds and installs it away from the checkout; see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import setup

# What runs once per step, or more often. Policies stay Python: mypyc compiles no frozen dataclass with slots and class
# variables, and a policy is what people edit. `policies/ordered.py` does, as no native class may inherit from a list.
COMPILED = (
    "dispatch",
    "ledger",
    "live_view",
    "lockstep",
    "policies/api",
    "policies/batch/admission",
    "policies/checks",
    "records",
    "request_state",
    "router",
    "scheduler",
    "serving",
    "sim/cost/__init__",
    "sim/fleet",
    "sim/instance",
    "sim/links",
    "step",
    "step_time",
    "transfers",
)


def extensions() -> list[Any]:
    """The compiled modules, if they are asked for."""
    if os.environ.get("XLLM_LAB_COMPILE") != "1":
        return []
    from mypyc.build import mypycify

    options = ("--config-file", "mypyc.ini")  # without it, mypy takes minutes
    return mypycify([*options, *(f"xllm_lab/{name}.py" for name in COMPILED)], opt_level="2", debug_level="0")


setup(ext_modules=extensions())
