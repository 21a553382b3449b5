"""What does Vidur pay for an Azure trace: CPU seconds of its event loop, beside this machine's `heapq` rate?

    python benchmarks/vidur_peer.py --vidur CHECKOUT --python VENV/bin/python --trace TRACE.csv --work DIR

Vidur (github.com/microsoft/vidur, at 7d47513) runs in its own process and environment; README.md says how to make both.
Llama-2-7B on one A100 a replica, chunked prefill ("sarathi") of 512 tokens, at most 128 sequences a batch, no metrics,
no output. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from calibration import heapq_per_s
from vidur_attention import write_attention_profile
from workloads import MAX_MODEL_LEN, azure_conversation

TIMED = Path(__file__).with_name("vidur_timed.py").resolve()
PREDICTOR = "random_forrest_execution_time_predictor_config"  # as Vidur spells it


@dataclass(frozen=True, slots=True)
class Peer:
    """A Vidur checkout, the Python it runs on, and a folder for what it reads and caches."""

    checkout: Path
    python: Path
    work: Path

    def run(self, num_replicas: int, steps: Path | None = None) -> dict[str, float]:
        """One run over the prepared trace: what `vidur_timed.py` counts and, without `steps`, times."""
        result = self.work / "result.json"
        command = [self.python, TIMED, result, steps or "-", *self._flags(num_replicas)]
        environment = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        # What Vidur logs is of interest only when it fails.
        done = subprocess.run(command, cwd=self.checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"vidur failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return dict(json.loads(result.read_text()))

    def prepare(self, trace: Path) -> None:
        """Write the trace and the attention profile in Vidur's formats. A profile that is there is kept: Vidur's cache
        of predictions does not notice that a profile changed."""
        self.work.mkdir(parents=True, exist_ok=True)
        requests = azure_conversation(trace).requests
        rows = (f"{r.arrival_us / 1e6:.6f},{r.prompt.num_tokens},{r.output_tokens}\n" for r in requests)
        (self.work / "trace.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(rows))
        profile = self.work / "attention.csv"
        if not profile.exists():
            write_attention_profile(profile)

    def _flags(self, num_replicas: int) -> list[str]:
        values = {
            "cluster_config_num_replicas": num_replicas,
            "replica_config_device": "a100",
            "replica_config_model_name": "meta-llama/Llama-2-7b-hf",
            "replica_config_tensor_parallel_size": 1,
            "replica_config_num_pipeline_stages": 1,
            "request_generator_config_type": "trace_replay",
            "trace_request_generator_config_trace_file": self.work / "trace.csv",
            "trace_request_generator_config_max_tokens": MAX_MODEL_LEN,
            "replica_scheduler_config_type": "sarathi",
            "sarathi_scheduler_config_chunk_size": 512,
            "sarathi_scheduler_config_batch_size_cap": 128,
            f"{PREDICTOR}_attention_input_file": self.work / "attention.csv",
            # One small forest in place of a search that takes CPU hours: the loop only looks its predictions up.
            f"{PREDICTOR}_num_estimators": 100,
            f"{PREDICTOR}_max_depth": 16,
            f"{PREDICTOR}_min_samples_split": 2,
            f"{PREDICTOR}_k_fold_cv_splits": 2,
            f"{PREDICTOR}_num_training_job_threads": 1,
            f"{PREDICTOR}_prediction_max_prefill_chunk_size": MAX_MODEL_LEN,
            f"{PREDICTOR}_prediction_max_batch_size": 128,
            f"{PREDICTOR}_prediction_max_tokens_per_request": MAX_MODEL_LEN,
            "metrics_config_cache_dir": self.work / "cache",
            "metrics_config_output_dir": self.work / "out",
        }
        switched_off = ("write_metrics", "enable_chrome_trace", "store_plots")
        flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return flags + [f"--no-metrics_config_{name}" for name in switched_off]


def timed(peer: Peer, num_replicas: int) -> dict[str, float]:
    """A run's counts and CPU seconds, and its cost in operations of the `heapq` loop timed before and after it."""
    before = heapq_per_s()
    result = peer.run(num_replicas)
    rate_per_s = (before + heapq_per_s()) / 2
    per_batch = result["loop_cpu_s"] * rate_per_s / result["num_batches"]
    return result | {"heapq_per_s": round(rate_per_s), "heapq_per_batch": round(per_batch)}


def arguments(description: str) -> tuple[Peer, list[int]]:
    """The peer that the command line names, with its input written, and the numbers of replicas to run."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("vidur", "python", "trace", "work"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4])
    o = parser.parse_args()
    peer = Peer(o.vidur, o.python, o.work)
    peer.prepare(o.trace)
    return peer, o.replicas


def main() -> None:
    peer, replicas = arguments(str(__doc__).splitlines()[0])
    for num_replicas in replicas:
        print(json.dumps({"num_replicas": num_replicas} | timed(peer, num_replicas)), flush=True)


if __name__ == "__main__":
    main()
