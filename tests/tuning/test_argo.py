"""The template is one that Argo Rollouts accepts, asks for what the engine exposes, and judges by the prediction."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.tuning.promotions import CALIBRATED, bursts, one
from xllm_lab.arrivals import rotated
from xllm_lab.errors import ConfigError
from xllm_lab.tuning.argo import analysis_template, yaml_of
from xllm_lab.tuning.intervals import Foresight, Interval, Provenance

# The part of argoproj.io/v1alpha1's schema that we write, at argo-rollouts 9f8d111, with the names that it requires.
PROMETHEUS = {"address": str, "query": str}
METRIC: dict[str, Any] = {
    "name": str,
    "provider": {"prometheus": PROMETHEUS},
    "initialDelay": str,
    "interval": str,
    "count": (int, str),
    "failureLimit": (int, str),
    "inconclusiveLimit": (int, str),
    "successCondition": str,
    "failureCondition": str,
}
SCHEMA: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {"args": [{"name": str, "value": str}], "metrics": [METRIC]},
}
REQUIRED = {"metrics": {"name", "provider"}, "args": {"name"}}
INTERVAL = Interval(expected=2e5, low=1.5e5, high=2.5e5, provenance=Provenance.INTERPOLATED, parts_frac={})
PREDICTED = dict.fromkeys(("goodput_per_s", "ttft_us.p50", "ttft_us.p90", "ttft_us.p99", "tpot_us.p90"), INTERVAL)


def refuse_unknown(value: Any, schema: Any, where: str = "") -> None:
    """As the Kubernetes API server does when told to be strict."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert set(value) <= set(schema), where
        for name, inside in value.items():
            refuse_unknown(inside, schema[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for k, inside in enumerate(value):
            assert set(inside) >= REQUIRED[where.rsplit(".", 1)[1]], where
            refuse_unknown(inside, schema[0], f"{where}[{k}]")
    else:
        assert isinstance(value, schema), where


@pytest.mark.parametrize("to", ["vllm", "xllm", "xllm_flagfile"])
def test_a_template_is_one_that_argo_accepts(to: str) -> None:
    """Known fields of their types, arguments that are declared, durations, names of DNS; as read back from YAML."""
    template = yaml.safe_load(yaml_of(analysis_template(PREDICTED, to, name="predicted")))
    refuse_unknown(template, SCHEMA)
    assert (template["apiVersion"], template["kind"]) == ("argoproj.io/v1alpha1", "AnalysisTemplate")
    metrics = template["spec"]["metrics"]
    declared = {arg["name"] for arg in template["spec"]["args"]}
    used = {name for m in metrics for name in re.findall(r"\{\{args\.([\w-]+)\}\}", str(m["provider"]))}
    assert used <= declared
    assert {"prometheus", "selector"} <= used
    assert len({m["name"] for m in metrics}) == len(metrics)
    for metric in metrics:
        assert re.fullmatch(r"[a-z0-9-]+", metric["name"])
        assert all(re.fullmatch(r"\d+[smh]", metric[name]) for name in ("initialDelay", "interval"))
        query = metric["provider"]["prometheus"]["query"]
        assert query.count("(") == query.count(")")


def holds(condition: str, result: list[float]) -> bool:
    """Argo's expressions are Python's here, but for two words."""
    return bool(eval(condition.replace("&&", "and").replace("||", "or"), {"result": result, "len": len}))


@pytest.mark.parametrize(("to", "unit_us"), [("vllm", 1e6), ("xllm", 1e3)])
def test_the_predicted_interval_decides(to: str, unit_us: float) -> None:
    """Within: success. Above: failure. Below, or nothing at all: neither, which pauses the rollout."""
    for metric in analysis_template(PREDICTED, to, name="predicted")["spec"]["metrics"]:
        for us, verdict in ((2e5, (True, False)), (2.6e5, (False, True)), (1.4e5, (False, False))):
            got = tuple(holds(metric[f"{kind}Condition"], [us / unit_us]) for kind in ("success", "failure"))
            assert got == verdict
        for silent in ([], [float("nan")]):
            assert not any(holds(metric[f"{kind}Condition"], silent) for kind in ("success", "failure"))


def test_each_engine_is_asked_for_what_it_exposes() -> None:
    """vLLM has histograms of requests; xLLM has gauges of its P90 and P99 of TTFT, and nothing of a request's TPOT."""
    vllm = {m["name"]: m for m in analysis_template(PREDICTED, "vllm", name="p")["spec"]["metrics"]}
    assert set(vllm) == {"ttft-p50", "ttft-p90", "ttft-p99", "tpot-p90"}
    assert vllm["tpot-p90"]["provider"]["prometheus"]["query"] == (
        "histogram_quantile(0.9, sum by (le) "
        "(rate(vllm:request_time_per_output_token_seconds_bucket{{{args.selector}}}[{{args.window}}])))"
    )
    xllm = {m["name"]: m for m in analysis_template(PREDICTED, "xllm", name="p")["spec"]["metrics"]}
    assert set(xllm) == {"ttft-p90", "ttft-p99"}
    assert "time_to_first_token_latency_milliseconds_latency_99{" in xllm["ttft-p99"]["provider"]["prometheus"]["query"]


def test_a_real_prediction_becomes_conditions() -> None:
    arrivals = [rotated(bursts(20), seed) for seed in range(2)]
    found = Foresight(CALIBRATED).recommend(one(max_seqs_per_batch=4), one(), arrivals).tuned
    metrics = {m["name"]: m for m in analysis_template(found, "vllm", name="p")["spec"]["metrics"]}
    assert set(metrics) == {f"{latency}-p{level}" for latency in ("ttft", "tpot") for level in (50, 90, 99)}
    assert holds(metrics["ttft-p90"]["successCondition"], [found["ttft_us.p90"].expected / 1e6])


def test_a_target_that_exposes_nothing_predicted_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"xllm exposes none of tpot_us\.p90"):
        analysis_template({"tpot_us.p90": INTERVAL}, "xllm", name="p")
