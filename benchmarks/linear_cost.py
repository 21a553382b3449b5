"""Step times as one line of arithmetic, so that a benchmark times the simulator and not its cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xllm_lab.sim.cost import Batch, Price, Prices


@dataclass(frozen=True, slots=True)
class LinearCost:
    """us = step + prefill_token * prefill tokens + decode * decodes + kv_token * tokens in KV that the decodes read."""

    step_us: float
    prefill_token_us: float
    decode_us: float
    kv_token_us: float

    def step(self, batch: Batch) -> Price:
        return Price(self._us(batch, batch.decode_kv_tokens))

    def decode_steps(self, batch: Batch, num_steps: int) -> Prices:
        kv_tokens = batch.decode_kv_tokens + batch.num_decodes * np.arange(num_steps)
        return Prices(self._us(batch, kv_tokens), np.zeros(num_steps, dtype=np.bool_))

    def _us(self, batch: Batch, kv_tokens: Any) -> Any:
        prefill_tokens = batch.num_tokens - batch.num_decodes
        without_kv = self.step_us + self.prefill_token_us * prefill_tokens + self.decode_us * batch.num_decodes
        return without_kv + self.kv_token_us * kv_tokens


# Llama-2-7B on an A100 as Vidur simulates it on one replica: `vidur_step_times.py`, 1.4 % off on a mean step.
LIKE_VIDUR = LinearCost(step_us=9527.0, prefill_token_us=55.6, decode_us=51.1, kv_token_us=0.446)
# Dynamo's default, perf_model.rs in ai-dynamo/dynamo: decodes take 5.74 ms and up to 54.01 ms more as 2**20 tokens of
# KV fill up, its square term left out; a prefill of 512 tokens takes 16.5 + 512 * 0.01518 + 0.1 ms more.
LIKE_DYNAMO = LinearCost(step_us=5740.0, prefill_token_us=47.6, decode_us=0.0, kv_token_us=54_010 / 2**20)
