"""Published points of mixtures of experts on Ascend NPUs, beside what the roofline and `cost.overlap` say of them."""

from __future__ import annotations

from collections.abc import Iterator

from xllm_lab.hardware import hardware
from xllm_lab.known_models import known_model
from xllm_lab.model_spec import PRECISIONS
from xllm_lab.sim.cost import Batch, batch_of
from xllm_lab.sim.cost.collectives import collectives
from xllm_lab.sim.cost.overlap import LayerTime, overlapped
from xllm_lab.sim.cost.roofline import RooflineCost
from xllm_lab.sim.cost.sharding import Sharding
from xllm_lab.sim.npu_fit import FITTED_DEVICE, decoding
from xllm_lab.sim.npu_points import Points, Row, point
from xllm_lab.sim.validate.published import Point
from xllm_lab.step_time import Chunk


def dispatch(row: Row, table: Points) -> Iterator[Point]:
    """Tokens to their experts' devices, and what these give back."""
    predicted = None
    if "not_modelled" not in row:
        predicted = collectives(hardware(FITTED_DEVICE), row["devices"]).all_to_all_us(row["num_bytes"])
    yield point(
        row,
        table,
        name="all-to-all of experts' dispatch and combine, us",
        what=f"{row['op']}, EP{row['devices']}, {row.get('tokens', 128)} tokens a die",
        published=row["us"],
        predicted=predicted,
    )


def dual_stream(row: Row, table: Points) -> Iterator[Point]:
    """What the published times of one stream become on two, if neither slows the other down."""
    half = LayerTime(row["compute_ms"] / 2, row["communication_ms"] / 2)
    layers = row["layers"]
    ours = overlapped([half, half], layers)
    alone_ms = layers * (row["compute_ms"] + row["communication_ms"])
    pairs = {
        "computing, ms a layer": (row["two_compute_ms"], row["compute_ms"]),
        "exchanging, ms a layer": (row["two_communication_ms"], row["communication_ms"]),
        "exchanging exposed, ms a layer": (row["exposed_ms"], ours.us / layers - row["compute_ms"]),
        "exchanging beside computing, %": (100 * row["overlap_frac"], 100 * ours.overlap_frac),
        f"saved by {layers} layers, ms": (row["saved_ms"], alone_ms - ours.us),
    }
    for what, (published, predicted) in pairs.items():
        yield point(
            row, table, name="two micro-batches on two streams", what=what, published=published, predicted=predicted
        )


def _decode_ep(row: Row) -> RooflineCost:
    """DeepSeek-R1 with attention on each die and experts on all."""
    sharding = Sharding(data=row["data"], expert=row["data"])
    return RooflineCost(
        hardware(FITTED_DEVICE), known_model("deepseek-r1"), sharding=sharding, precision=PRECISIONS["w8a8"]
    )


def layer(row: Row, table: Points) -> Iterator[Point]:
    """A step without its host and head, by layers."""
    rows, cost = row["rows_per_seq"], _decode_ep(row)
    chunks = [Chunk(rows, row["context"])] * row["seqs"]
    parts = cost.parts(batch_of(chunks, 0))
    yield point(
        row,
        table,
        name="layers of DeepSeek-R1, us",
        what=row["what"],
        published=row["us"],
        predicted=(parts.compute_us + parts.communication_us) / known_model("deepseek-r1").num_layers,
    )


def micro_batches(row: Row, table: Points) -> Iterator[Point]:
    """Weights are read by each micro-batch, and kernels and rounds of collectives are twice as many."""
    cost, layers = _decode_ep(row), known_model("deepseek-r1").num_layers
    whole, half = (cost.parts(_batch(row, num_micro)) for num_micro in (1, 2))
    time = LayerTime(half.compute_us / layers, half.communication_us / layers)
    gain = (whole.compute_us + whole.communication_us) / overlapped([time, time], layers).us
    yield point(
        row,
        table,
        name="two micro-batches, times as fast as one",
        what=row["what"],
        published=row["gain"],
        predicted=gain,
    )


def _batch(row: Row, num_micro: int) -> Batch:
    """One of so many micro-batches."""
    if "prompts" in row:
        num = row["prompts"] // num_micro
        return Batch((Chunk(row["prompt_tokens"], 0),) * num, 0, 0, 0, num)
    return decoding(row["seqs"] // num_micro, row["context"])
