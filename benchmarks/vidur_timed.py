"""Run Vidur once and time its event loop. For Vidur's own Python, from Vidur's root; `vidur_peer.py` starts it.

    python vidur_timed.py RESULT.json STEPS.npy|- VIDUR_FLAGS...

`Simulator.run` is what is timed: no imports, no prediction tables, no reading of the trace, no output. With a file for
the steps, each step's batch and predicted time are kept as well; that slows the loop, so such a run gives no time.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import sys
import time
from array import array

sys.path.insert(0, os.getcwd())  # Vidur is run from its checkout: its profiles are found by relative paths

import numpy as np
from vidur.config import SimulationConfig
from vidur.entities import Batch
from vidur.events import BaseEvent
from vidur.execution_time_predictor import BaseExecutionTimePredictor
from vidur.simulator import Simulator
from vidur.utils.random import set_seeds


def main() -> None:
    result_path, steps_path = sys.argv[1:3]
    del sys.argv[1:3]
    config = SimulationConfig.create_from_cli_args()
    set_seeds(config.seed)
    simulator = Simulator(config)
    atexit.unregister(simulator._write_output)
    num_requests = len(simulator._event_queue)
    steps = None if steps_path == "-" else record_steps()
    start = time.process_time()
    simulator.run()
    loop_cpu_s = time.process_time() - start
    num_batches = Batch._id + 1
    result = {
        "num_requests": num_requests,
        "num_batches": num_batches,
        "heap_events_per_batch": BaseEvent._id / num_batches,
        "num_kv_blocks": int(config.cluster_config.replica_scheduler_config.num_blocks),
        "simulated_s": float(simulator._time),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if steps is None:
        result["loop_cpu_s"] = loop_cpu_s
    else:
        np.save(steps_path, np.array(steps).reshape(-1, 5))
    with open(result_path, "w") as file:
        json.dump(result, file)


def record_steps() -> array:
    """Let the predictor write down what it says: five numbers a step, see `vidur_step_times.py`."""
    steps = array("d")
    predict = BaseExecutionTimePredictor.get_execution_time

    def recording(self, batch, stage):
        predicted = predict(self, batch, stage)
        prefill_tokens = num_decodes = kv_tokens = 0
        for request, num_tokens in zip(batch.requests, batch.num_tokens, strict=True):
            if request._is_prefill_complete:
                num_decodes += 1
                kv_tokens += request.num_processed_tokens
            else:
                prefill_tokens += num_tokens
        steps.extend((batch.size, prefill_tokens, num_decodes, kv_tokens, predicted.total_time * 1e6))
        return predicted

    BaseExecutionTimePredictor.get_execution_time = recording
    return steps


if __name__ == "__main__":
    main()
