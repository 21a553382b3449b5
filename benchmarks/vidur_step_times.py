"""Which linear step times does Vidur's predictor come nearest to, over the steps it runs on a trace?

    python benchmarks/vidur_step_times.py --vidur CHECKOUT --python VENV/bin/python --trace TRACE.csv --work DIR

With these weights our simulator runs about as many steps as Vidur, in batches as large, so that the CPU seconds of the
two can be compared. Prints one JSON object a line; arguments as for `vidur_peer.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from linear_cost import LinearCost
from scipy.optimize import nnls
from vidur_peer import Peer, arguments


def fitted(peer: Peer, num_replicas: int) -> dict[str, float]:
    """The weights, how far they are off, and what a mean step holds."""
    steps = peer.work / f"steps-{num_replicas}.npy"
    counts = peer.run(num_replicas, steps)
    num_seqs, prefill_tokens, num_decodes, kv_tokens, us = np.load(steps).T
    factors = np.stack([np.ones_like(us), prefill_tokens, num_decodes, kv_tokens], axis=1)
    times, predicted_us = nearest(factors, us)
    return {
        **counts,
        **asdict(times),
        "sum_error_frac": float(predicted_us.sum() / us.sum() - 1),
        "mean_step_error_frac": float(np.mean(np.abs(predicted_us / us - 1))),
        "mean_step_us": float(us.mean()),
        "mean_seqs": float(num_seqs.mean()),
        "mean_tokens": float((prefill_tokens + num_decodes).mean()),
    }


def nearest(
    factors: npt.NDArray[np.float64], us: npt.NDArray[np.float64]
) -> tuple[LinearCost, npt.NDArray[np.float64]]:
    """Non-negative weights and the times they give, shape [steps], for `factors` of shape [steps, 4].

    Steps weigh 1/time, which keeps the sum unbiased, and with it the length of every queue.
    """
    weights, _ = nnls(factors / np.sqrt(us)[:, None], np.sqrt(us))
    return LinearCost(*map(float, weights)), factors @ weights


def main() -> None:
    peer, replicas = arguments(str(__doc__).splitlines()[0])
    for num_replicas in replicas:
        print(json.dumps({"num_replicas": num_replicas} | fitted(peer, num_replicas)), flush=True)


if __name__ == "__main__":
    main()
