"""How the tests run: no network, one thread a process, and the same Hypothesis examples every time."""

from __future__ import annotations

import os

# Before anything imports torch: its thread pools spin, and read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import HealthCheck, settings

# A verdict must not depend on how busy the machine is, so there are no deadlines.
settings.register_profile(
    "house", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("house"), max_examples=1000)
settings.load_profile(os.environ.get("XLLM_LAB_HYPOTHESIS", "house"))
