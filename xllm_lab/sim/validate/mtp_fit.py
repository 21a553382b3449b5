"""The constants of `mtp_server.Server`, fitted to three rows of the table and to nothing else.

    python -m xllm_lab.sim.validate.mtp_fit

First those of the server without drafts, then what drafts add. mtp.toml holds what this finds, and a test holds it to
that. Takes five minutes.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from xllm_lab.sim.validate.mtp_server import Server, fitted_server, serve, table

BASE = ("prefill_us", "prompt_token_us", "decode_us", "sequence_us", "length_shape")
DRAFTS = ("draft_us", "draft_row_us")
# Of a logarithm: steps come and go one by one, so that derivatives need room.
_STEP = 0.005
_MOST_TRIALS = {BASE: 12, DRAFTS: 4}


def fit() -> Server:
    """The least squared logarithms of simulated over published figures, all columns of the fitted rows alike."""
    return _fitted(_fitted(fitted_server(), BASE), DRAFTS)


def errors(server: Server, *, drafts: bool) -> npt.NDArray[np.float64]:
    """Logarithms of simulated over published figures of the fitted rows, with drafts or without."""
    logs = []
    for row in table()["rows"]:
        if row.get("is_fitted"):
            ours = serve(server, row["clients"], drafts=drafts)
            logs += [np.log(getattr(ours, name) / us) for name, us in row["mtp" if drafts else "base"].items()]
    return np.asarray(logs)


def _fitted(server: Server, names: tuple[str, ...]) -> Server:
    from scipy.optimize import least_squares

    def at(logs: npt.NDArray[np.float64]) -> Server:
        return replace(server, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    start = np.log([getattr(server, name) for name in names])
    found = least_squares(
        lambda logs: errors(at(logs), drafts=names is DRAFTS), start, diff_step=_STEP, max_nfev=_MOST_TRIALS[names]
    )
    return at(found.x)


if __name__ == "__main__":
    for name, value in asdict(fit()).items():
        print(f"{name} = {value:.4g}")  # noqa: T201
