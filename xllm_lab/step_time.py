"""How long a step takes, as a sum of terms with a physical meaning; fitted with non-negative weights.

    step_us = eager_us, or replay_us                         launching and bookkeeping: kernel by kernel, or in a graph
            + small_batch_m_us * min(tokens, m)              reading weights: a small batch costs more per token
            + token_us     * tokens                          matrix multiplications
            + sequence_us  * sequences                       one attention call per sequence
            + logits_us    * rows                            the head and the sampler
            + attention_us * sum(new * (computed + new / 2)) scores and weighted values
            + kv_read_us   * sum(computed + new)             gathering K and V

A step in a captured graph computes what pads it, too: a graph of decodes is a batch of as many sequences, any other one
has more tokens.

xLLM fits prefill and decode apart, on [1, L-P, (L-P)^2, (L-P)*P] and [1, B, B*L] (time_predictor.cpp at 87e8d6e), and
adds requests up. Here a mixed batch is one batch, so the saving of sharing a matrix multiplication is in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xllm_lab.errors import ConfigError

SMALL_BATCHES = (4, 16, 64)
TERMS = (
    "eager_us",
    "replay_us",
    *(f"small_batch_{m}_us" for m in SMALL_BATCHES),
    "token_us",
    "sequence_us",
    "logits_us",
    "attention_us",
    "kv_read_us",
)
_MOST_ROUNDS = 20


class Chunk(NamedTuple):
    """One request's part of a step: tokens computed now, tokens in KV before."""

    num_tokens: int
    num_computed_tokens: int


def features(chunks: Iterable[Chunk], num_logits: int, graph_tokens: int | None = None) -> list[float]:
    """The terms' factors, in the order of `TERMS`.

    Args:
        graph_tokens: size of the captured graph that runs the step; None: it runs eagerly.
    """
    tokens = sequences = kv_read = 0
    attention = 0.0
    for new, computed in chunks:
        tokens += new
        sequences += 1
        kv_read += computed + new
        attention += new * (computed + 0.5 * new)
    constants = (1.0, 0.0)
    if graph_tokens is not None:
        constants = (0.0, 1.0)
        if tokens == sequences:  # what pads are sequences of one token
            padding = graph_tokens - sequences
            sequences = num_logits = graph_tokens
            kv_read += padding
            attention += 0.5 * padding
        tokens = graph_tokens
    small = (float(min(tokens, m)) for m in SMALL_BATCHES)
    return [*constants, *small, tokens, sequences, num_logits, attention, kv_read]


def feature_rows(
    num_chunks: npt.NDArray[np.int64],
    num_tokens: npt.NDArray[np.int64],
    num_computed_tokens: npt.NDArray[np.int64],
    num_logits: npt.NDArray[np.int64],
    graph_tokens: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """The factors of many steps at once, shape [steps, terms]; what `features` says of each.

    Args:
        num_chunks, num_logits: shape [steps].
        graph_tokens: of steps in captured graphs; 0 of those that ran eagerly. Shape [steps].
        num_tokens, num_computed_tokens: of all the steps' chunks in one line, shape [chunks].
    """
    step = np.repeat(np.arange(len(num_chunks)), num_chunks)
    new, kv = num_tokens.astype(np.float64), (num_computed_tokens + num_tokens).astype(np.float64)
    tokens, kv_read, attention = (
        np.bincount(step, of_chunk, len(num_chunks)) for of_chunk in (new, kv, new * (kv - 0.5 * new))
    )
    is_replayed = graph_tokens > 0
    is_decode = is_replayed & (tokens == num_chunks)
    padding = np.where(is_decode, graph_tokens - num_chunks, 0)
    sequences, logits = num_chunks + padding, np.where(is_decode, graph_tokens, num_logits)
    tokens = np.where(is_replayed, graph_tokens, tokens)
    small = (np.minimum(tokens, m) for m in SMALL_BATCHES)
    columns = (
        ~is_replayed,
        is_replayed,
        *small,
        tokens,
        sequences,
        logits,
        attention + 0.5 * padding,
        kv_read + padding,
    )
    return np.column_stack(columns).astype(np.float64)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Fitted weights. Satisfies `policies.api.StepTimeView`.

    Attributes:
        weights: microseconds per unit of each of `TERMS`.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(TERMS) or any(w < 0 or not np.isfinite(w) for w in self.weights):
            raise ConfigError(f"step-time weights are {self.weights}, accepted: {len(TERMS)} numbers of at least 0")

    @property
    def constant_us(self) -> float:
        """Of a step that runs eagerly."""
        return self.weights[0]

    def request_us(self, num_tokens: int, num_computed_tokens: int) -> float:
        """What one request adds to a batch that is large already."""
        alone = features((Chunk(num_tokens, num_computed_tokens),), 1)
        skip = TERMS.index("token_us")
        return sum(w * f for w, f in zip(self.weights[skip:], alone[skip:], strict=True))

    def load_us(self, num_tokens: int, num_seqs: int, num_logits: int, attention: float, kv_read: int) -> float:
        """Of an eager step with these sums.

        Args:
            attention, kv_read: the factors of `attention_us` and `kv_read_us`.
        """
        small = (min(num_tokens, m) for m in SMALL_BATCHES)
        factors = (1.0, 0.0, *small, num_tokens, num_seqs, num_logits, attention, kv_read)
        return sum(w * f for w, f in zip(self.weights, factors, strict=True))

    def row_us(self, num_tokens: int, num_computed_tokens: int) -> float:
        """What one more row, with its logits, adds to a request with so many tokens in KV in a step of `num_tokens`."""
        # Asked for every draft that a policy weighs: no loop over all terms.
        *_, us, _, logits_us, attention_us, kv_read_us = self.weights
        if num_tokens < SMALL_BATCHES[-1]:
            us += sum([w for w, m in zip(self.weights[2:], SMALL_BATCHES, strict=False) if num_tokens < m])
        return us + logits_us + attention_us * (num_computed_tokens + 0.5) + kv_read_us

    def step_us(self, chunks: Iterable[Chunk], num_logits: int, graph_tokens: int | None = None) -> float:
        """Predicted time of one step; arguments as of `features`."""
        return sum(w * f for w, f in zip(self.weights, features(chunks, num_logits, graph_tokens), strict=True))


def fit(rows: Sequence[Sequence[float]], step_us: Sequence[float]) -> StepTime:
    """Non-negative least squares, each step weighted by 1 / its predicted time.

    Unweighted, the longest steps alone would decide; weighted by 1 / time^2, the sum over all steps drifts, and with it
    every queue. With predicted times in the weights the fitted sum is the measured one; with measured times, steps that
    were short by chance would count for more, and the sum fall short by the square of the scatter. Weights and times
    are found in turn. Raises ConfigError for too few steps.
    """
    if len(rows) < 2 * len(TERMS):
        raise ConfigError(f"{len(rows)} steps to fit step times to, at least {2 * len(TERMS)} are accepted")
    times = np.maximum(np.asarray(step_us, dtype=np.float64), 1.0)
    matrix = np.asarray(rows, dtype=np.float64)
    weights = _weighted_fit(matrix, times, times)
    for _ in range(_MOST_ROUNDS):
        predicted = np.maximum(matrix @ weights, 1.0)
        weights = _weighted_fit(matrix, times, predicted)
        if np.abs(matrix @ weights - predicted).max() <= 1e-6 * predicted.max():
            break
    return StepTime(tuple(float(w) for w in weights))


def _weighted_fit(
    matrix: npt.NDArray[np.float64], times: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    from scipy.optimize import nnls

    root = np.sqrt(variance)
    scaled = matrix / root[:, None]
    scale = np.maximum(scaled.max(axis=0), 1e-300)
    weights, _ = nnls(scaled / scale, times / root)
    return np.asarray(weights / scale, dtype=np.float64)
