"""What planning ahead is worth: measured on the engine, and predicted by the simulator from runs planned in turns.

    python benchmarks/mode_effects.py --layers 4 --hidden 256 --repeats 5

A random Llama small enough for the host to matter. Modes take turns on the engine; the simulator is calibrated on the
runs planned in turns, of another workload. Prints a Markdown table: the end of the run in each mode against planning in
turns, measured (median, range over the repeats) and predicted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from host_gap import CONFIG, workload

from xllm_lab.engine.engine import Engine, EngineOptions
from xllm_lab.instance_config import ASYNC_SCHEDULING
from xllm_lab.policies.batch.decode_first import DecodeFirst
from xllm_lab.records import Records
from xllm_lab.sim.calibrate import calibrate
from xllm_lab.sim.instance import Predicted
from xllm_lab.sim.machine import fitted_machine
from xllm_lab.sim.simulator import run_simulation


def write_model(folder: Path, *, layers: int, hidden: int) -> None:
    """A random Llama with a vocabulary of 1,000."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONFIG.max_model_len,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def end_us(records: Records) -> int:
    return max(r.finish_us or 0 for r in records.requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    policy, held_out, learn = DecodeFirst(), workload(args.requests), workload(args.requests + 7)
    ends: dict[str, list[int]] = {mode: [] for mode in ASYNC_SCHEDULING}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", layers=args.layers, hidden=args.hidden)
        engine = Engine(EngineOptions(model=str(Path(folder) / "model"), device="cpu", timer="cpu"))
        runs = []
        for repeat in range(args.repeats):
            runs.append(engine.replay(learn, CONFIG, policy, out=Path(folder) / f"learn-{repeat}"))
            for mode in ASYNC_SCHEDULING:
                records = Records()
                engine.serve(held_out, replace(CONFIG, async_scheduling=mode), policy, records)
                ends[mode].append(end_us(records))
        machine = fitted_machine(calibrate(runs))
    print(f"Host {machine.host.step_us:.0f} us a step and {machine.host.sequence_us:.1f} us a sequence.\n")
    print("| mode | measured ms | against in turns | predicted ms | against in turns |\n|---|---|---|---|---|")
    predicted: dict[str, int] = {}
    for mode in ASYNC_SCHEDULING:
        config = replace(CONFIG, async_scheduling=mode)
        timing = Predicted(machine.cost_of(config))
        predicted[mode] = end_us(
            run_simulation(held_out, config, policy, timing, vocab_size=machine.model["vocab_size"])
        )
        ratios = [one / other - 1 for one, other in zip(ends[mode], ends["off"], strict=True)]
        print(
            f"| {mode} | {statistics.median(ends[mode]) / 1e3:.1f} | {statistics.median(ratios):+.1%} "
            f"({min(ratios):+.1%} to {max(ratios):+.1%}) | {predicted[mode] / 1e3:.1f} "
            f"| {predicted[mode] / predicted['off'] - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
