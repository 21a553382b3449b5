"""An Argo Rollouts AnalysisTemplate whose conditions are the predicted intervals: the canary is judged by the promise.

Fields are those of argoproj.io/v1alpha1 at argo-rollouts 9f8d111 (manifests/crds/analysis-template-crd.yaml). A latency
above its interval fails; one below it, or no number at all, is inconclusive, which pauses the rollout: such traffic is
not what was predicted. Throughput is no condition: a canary has a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from xllm_lab.errors import ConfigError
from xllm_lab.tuning.intervals import Interval

# A canary begins with a cold prefix cache.
_WARM_UP = "10m"
_INTERVAL = "1m"
_COUNT = 10
_FAILURE_LIMIT = 2
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def analysis_template(intervals: Mapping[str, Interval], to: str, *, name: str) -> dict[str, Any]:
    """As plain data; `yaml_of` writes it.

    Args:
        intervals: by metric, microseconds; those that the target exposes become conditions.
        to: the target of the export: its engine's metrics are asked for.
        name: of the template, as Kubernetes accepts names.

    Raises:
        ConfigError: no predicted metric is exposed by the target.
    """
    query = _vllm_query if to == "vllm" else _xllm_query
    metrics = [
        _metric(metric, interval, *asked)
        for metric, interval in intervals.items()
        if (asked := query(metric)) is not None
    ]
    if not metrics:
        raise ConfigError(f"{to} exposes none of {', '.join(intervals) or 'no metrics'}; accepted: predicted latencies")
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "AnalysisTemplate",
        "metadata": {"name": name},
        "spec": {
            "args": [
                {"name": "prometheus"},
                # What tells the canary's series from the others', as `pod=~"llm-canary-.*"`.
                {"name": "selector"},
                {"name": "window", "value": "5m"},
            ],
            "metrics": metrics,
        },
    }


def yaml_of(template: Mapping[str, Any]) -> str:
    """As `kubectl apply -f` takes it."""
    return str(yaml.safe_dump(dict(template), sort_keys=False, width=120))


def _metric(metric: str, interval: Interval, query: str, unit_us: float) -> dict[str, Any]:
    low, high = interval.low / unit_us, interval.high / unit_us
    told = "len(result) > 0 && "
    return {
        "name": metric.replace("_us.", "-"),
        "initialDelay": _WARM_UP,
        "interval": _INTERVAL,
        "count": _COUNT,
        "failureLimit": _FAILURE_LIMIT,
        "inconclusiveLimit": _FAILURE_LIMIT,
        "successCondition": f"{told}result[0] >= {low:.6g} && result[0] <= {high:.6g}",
        "failureCondition": f"{told}result[0] > {high:.6g}",
        "provider": {"prometheus": {"address": "{{args.prometheus}}", "query": query}},
    }


def _vllm_query(metric: str) -> tuple[str, float] | None:
    """Histograms in seconds, one observation a request (vLLM 0.27.1, docs/design/metrics.md)."""
    latency, _, level = metric.partition(".")
    names = {"ttft_us": "vllm:time_to_first_token_seconds", "tpot_us": "vllm:request_time_per_output_token_seconds"}
    if latency not in names:
        return None
    rate = f"rate({names[latency]}_bucket{{{{{{args.selector}}}}}}[{{{{args.window}}}}])"
    return f"histogram_quantile({_QUANTILES[level]}, sum by (le) ({rate}))", 1e6


def _xllm_query(metric: str) -> tuple[str, float] | None:
    """Gauges in milliseconds: brpc's recorders expose their P80, P90 and P99 as NAME_latency_90 and so on.

    xLLM 3906f5a, xllm/core/common/metrics.cpp; brpc 078051f, src/brpc/builtin/prometheus_metrics_service.cpp. Of tokens
    it counts each gap, not a request's mean, so nothing there is a TPOT.
    """
    latency, _, level = metric.partition(".")
    if latency != "ttft_us" or level not in ("p90", "p99"):
        return None
    return f"max(time_to_first_token_latency_milliseconds_latency_{level[1:]}{{{{{{args.selector}}}}}})", 1e3
