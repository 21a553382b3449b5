"""The JSON that xLLM reads with `--config_json_file`: flag names and values, one flat object.

Names and meanings are those of xLLM at 3906f5a (xllm/core/framework/config/*.cpp). In that version a flag on the
command line wins over the file. `xllm serve --enable-auto-tuning-gflags` writes the same, as `<model_type>.tuned.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from xllm_lab.candidate import Candidate
from xllm_lab.errors import ConfigError
from xllm_lab.policies.api import Flag
from xllm_lab.policies.catalog import flags, policies, policy_name, values_of
from xllm_lab.tuning.lint.finding import Severity
from xllm_lab.tuning.lint.flag_table import LATEST, refuse_unsayable, version_named
from xllm_lab.tuning.lint.linter import lint, repair
from xllm_lab.tuning.lint.reading import parse_configuration
from xllm_lab.tuning.lint.settings import Situation

# Fields that are switches in xLLM, with what is off and what is on there: its overlap is ours that foresees no end.
_SWITCHES = {"async_scheduling": ("off", "on"), "kv_layout": ("paged", "virtual")}
# What drafts need in xLLM besides their flags (scheduler and speculative configuration at 3906f5a).
_DRAFT_MODEL = "the path of MTP's weights, which no run of ours knows"
_XTENSOR_LACKS = {
    "enable_prefix_cache": "xLLM shares no prefixes with enable_xtensor",
    "num_reserved_pages": "xLLM keeps 8 to 32 mapped pages, whatever we do",
}
_NO_MIX = "xLLM computes no prompts beside drafts: num_speculative_tokens turns enable_mix_batch off"

SUFFIX = "json"


class XllmConfig(NamedTuple):
    """See `Export`."""

    config: dict[str, Any]
    left_out: dict[str, Any]

    @property
    def text(self) -> str:
        return json.dumps(self.config, indent=2, sort_keys=True) + "\n"


def export(candidate: Candidate, kv_bytes_per_token: int, version: str | None) -> XllmConfig:
    """Flags for a configuration, in a file.

    Raises:
        ConfigError: as `told_in_flags`, or a version that reads no such file.
    """
    name = version_named(version or LATEST).name
    told = told_in_flags(candidate, kv_bytes_per_token, name)
    found = lint(parse_configuration(told.text, "the export"), Situation(version=name))
    wrong = [one.says for one in found.findings if one.severity is Severity.ERROR]
    if wrong:
        raise ConfigError(f"{wrong[0]}; accepted: a later version, or --to xllm_flagfile")
    return told


def told_in_flags(candidate: Candidate, kv_bytes_per_token: int, version: str) -> XllmConfig:
    """Flags for a configuration.

    Raises:
        ConfigError: xLLM has no scheduler like the batch policy, or this version not a flag, or not the value.
    """
    config: dict[str, Any] = {"max_cache_size": candidate.instance.num_kv_tokens * kv_bytes_per_token}
    left_out: dict[str, Any] = {}
    # The pool's size is in max_cache_size; the context is the model's own.
    told_otherwise = {"num_kv_blocks", "max_model_len"}
    fixed: dict[str, Any] = {}
    parts: list[tuple[str, Any]] = [("", candidate.instance)]
    for decides, policy in candidate.policies:
        always = getattr(policy, "xllm_flags", None)
        if (unsaid := _unsaid(policy)) is not None and decides != "batch":
            left_out[decides] = f"{policy_name(policy)}, {unsaid}"
        elif always is not None:
            fixed.update(always)
            parts.append(("" if decides == "batch" else f"{decides}.", policy))
        elif decides == "batch":
            able = ", ".join(name for name, cls in policies(decides).items() if hasattr(cls, "xllm_flags"))
            raise ConfigError(f"policy {policy_name(policy)} has no equivalent in xLLM; accepted: {able}")
        else:
            left_out[decides] = policy_name(policy)
    for prefix, part in parts:
        named = flags(type(part))
        for field, value in values_of(part).items():
            if field in _SWITCHES:
                config[named[field].name] = value != _SWITCHES[field][0]
                left_out |= {} if value in _SWITCHES[field] else {field: value}
            elif field in named and value is not None:
                config[named[field].name] = _as_told(value, named[field])
            elif value is not None and field not in named and field not in told_otherwise:
                left_out[prefix + field] = value
    config |= fixed
    if config["enable_xtensor"]:
        left_out |= _XTENSOR_LACKS
    refuse_unsayable(config, version)
    return _without_contradictions(XllmConfig(config, left_out | _drafts_need(config)), version)


def _without_contradictions(made: XllmConfig, version: str) -> XllmConfig:
    """What `lint` can repair is what xLLM would do without a word: it is told as it will be, and why."""
    found = lint(parse_configuration(made.text, "the export"), Situation(version=version))
    mended = repair(found)
    why = {one.names[0]: one.says for one in mended.repaired if one.severity is not Severity.NOTE}
    return XllmConfig(json.loads(mended.config.text), why | made.left_out)


def _drafts_need(told: Mapping[str, Any]) -> dict[str, str]:
    """What is not in the flags that switch drafts on."""
    need: dict[str, str] = {}
    if told.get("speculative_algorithm") == "MTP":
        need["draft_model"] = _DRAFT_MODEL
    if told.get("num_speculative_tokens") and told.get("enable_mix_batch"):
        need["enable_mix_batch"] = _NO_MIX
    return need


def _unsaid(policy: Any) -> str | None:
    """What a policy says that xLLM has no word for: without it, its other flags would mean something else."""
    named = flags(type(policy))
    for field, value in values_of(policy).items():
        if field in named and named[field].words and value not in dict(named[field].words):
            return f"{field} {value!r}; xLLM has {', '.join(word for _, word in named[field].words)}"
    return None


def _as_told(value: Any, flag: Flag) -> Any:
    if flag.words:
        return dict(flag.words)[value]
    # A budget of less than one unit is one: with a budget of 0 xLLM schedules nothing at all.
    return value if flag.divide_by == 1 else max(1, value // flag.divide_by)
