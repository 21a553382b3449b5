"""What the rows about vLLM-Ascend share: where they rest, whom they are about, and how their examples are written."""

from __future__ import annotations

from typing import Any

from xllm_lab.tuning.lint.configuration import Kind
from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.rules import Rule, conflict

CONFIG = "vllm-ascend@182b75ea vllm_ascend/ascend_config.py"
PLATFORM = "vllm-ascend@182b75ea vllm_ascend/platform.py"
OPTIONS = "additional_config."
SCHEDULER = f"{OPTIONS}scheduler_config."
FINE_TP = f"{OPTIONS}finegrained_tp_config."
ROLE = "kv_transfer_config.kv_role"
BASE = "max_num_seqs: 64\n"


def more(value: Any, least: int) -> bool:
    """Whether it is a number, and more."""
    return isinstance(value, int | float) and value > least


def at_most_one(value: Any) -> bool:
    return not more(value, 1)


def off(name: str) -> dict[str, Any]:
    return {name: False}


def written(*options: str, before: str = "") -> str:
    """An example: options under additional_config, one a line, nested by their indent."""
    return BASE + before + "additional_config:\n" + "\n".join(f"  {option}" for option in options)


def pair(name: str, severity: Severity, names: tuple[str, ...], **row: Any) -> Rule:
    return conflict(name, severity, names, kind=Kind.VLLM, **row)
