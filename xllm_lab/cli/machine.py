"""Options that say which machine is simulated, and how many of them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_lab.errors import ConfigError

if TYPE_CHECKING:
    from xllm_lab.fleet_config import FleetConfig
    from xllm_lab.model_spec import ModelSpec
    from xllm_lab.page_time import PageTime
    from xllm_lab.sim.experts.routing import Routing
    from xllm_lab.sim.machine import Deployment, Machine

_DEPLOYMENT = ("tensor_parallel", "data_parallel", "expert_parallel")


def machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine", "measured as a whole, by operators, or not at all; one of the three")
    group.add_argument("--calibration", type=Path, metavar="FILE", help="fitted to its steps by `calibrate`")
    group.add_argument("--profile", type=Path, metavar="DIR", help="a bundle of measured operators")
    group.add_argument("--hardware", metavar="NAME|FILE", help="the roofline of its figures; with --profile, its links")
    group.add_argument("--model-config", metavar="NAME|FILE", help="a well-known model, or a transformers config.json")
    for name in _DEPLOYMENT:
        group.add_argument(f"--{name.replace('_', '-')}", type=int, default=1, metavar="N")
    group.add_argument("--alike", action="store_true", help="simulate one of the data-parallel instances for all")
    skew = "tokens choose experts as 1 / rank^X, dealt in each layer; with expert parallelism; else evenly"
    group.add_argument("--expert-skew", type=float, metavar="X", help=skew)
    group.add_argument("--expert-loads", type=Path, metavar="FILE", help="tokens choose experts as in recorded loads")
    group.add_argument("--precision", default="bf16", help="of weights and KV")
    group.add_argument("--host-us", type=float, default=0.0, metavar="US", help="of the host, per step")
    group.add_argument("--host-us-per-seq", type=float, default=0.0, metavar="US", help="of the host, per sequence")
    frac = "drafts that are kept if all before them were, by position: 0.8,0.6; else as calibrated"
    group.add_argument("--acceptance", metavar="FRAC[,FRAC...]", help=frac)
    us = "mapping a run of pages of virtual KV, each page in it, unmapping a run, each page; else as calibrated"
    group.add_argument("--page-us", metavar="US[,US...]", help=us)
    _tier_options(group)


def tier_options(parser: argparse.ArgumentParser) -> None:
    """Of a machine that is calibrated, and needs no other of `machine_options`."""
    _tier_options(parser.add_argument_group("tiers"))


def _tier_options(group: argparse._ArgumentGroup) -> None:
    rate = "of copies of KV to the host and back, each way; else as calibrated"
    group.add_argument("--host-link", type=float, metavar="BYTES_PER_S", help=rate)
    store = "KV below the host: sim:, and any of ?bytes=SIZE&bytes_per_s=RATE&latency_us=TIME; else as calibrated"
    group.add_argument("--store", metavar="STORE", help=store)
    trace = "loads of experts as they come: RUN or FILE, and any of ?bytes_per_s=RATE&row_us=US&activation_us=US"
    group.add_argument("--expert-trace", metavar="TRACE", help=trace)


def fleet_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fleet")
    group.add_argument("--cluster", type=Path, metavar="FILE", help="a cluster file (TOML), see `xllm_lab.fleet_file`")
    group.add_argument("--instances", type=int, metavar="N", help="N instances, instead of --cluster")
    named = "NAME[:KNOB=VALUE,...]"
    group.add_argument("--route", metavar=named, help="routing policy, instead of the file's; else round-robin")
    group.add_argument("--failover", metavar=named, help="failover policy, instead of the file's; else cancel")
    group.add_argument("--roles", metavar=named, help="roles policy, instead of the file's; else colocated")


def machine(o: argparse.Namespace) -> Machine:
    """The machine that the options describe; ConfigError if they describe none, or two."""
    from xllm_lab.hardware import hardware
    from xllm_lab.sim.calibrate import read_calibration
    from xllm_lab.sim.machine import fitted_machine, model_of, profiled_machine, profiled_model, roofline_machine

    if o.calibration is not None:
        _refuse_beside_calibration(o)
        return fitted_machine(read_calibration(o.calibration))
    device = None if o.hardware is None else hardware(o.hardware)
    model = None if o.model_config is None else model_of(o.model_config)
    if o.profile is not None:
        _refuse_beside_profile(o)
        model = model or profiled_model(o.profile)
        return profiled_machine(o.profile, model, _deployment(o, model), device)
    if device is None:
        raise ConfigError("no machine to simulate; accepted: --calibration FILE, --profile DIR, or --hardware NAME")
    if model is None:
        raise ConfigError("--hardware needs a model; accepted: --model-config with a name or a config.json")
    return roofline_machine(device, model, _deployment(o, model))


def acceptance(o: argparse.Namespace) -> tuple[float, ...] | None:
    """The given acceptance, or None."""
    if o.acceptance is None:
        return None
    try:
        return tuple(map(float, o.acceptance.split(",")))
    except ValueError:
        raise ConfigError(f"--acceptance {o.acceptance!r}; accepted: fractions, as 0.8,0.6") from None


def page_time(o: argparse.Namespace) -> PageTime | None:
    """The given times of mapping, or None."""
    from xllm_lab.page_time import PageTime

    if o.page_us is None:
        return None
    names = PageTime.__slots__
    try:
        return PageTime(**dict(zip(names, map(float, o.page_us.split(",", len(names) - 1)), strict=False)))
    except ValueError as error:
        told = error if isinstance(error, ConfigError) else "no numbers"
        raise ConfigError(f"--page-us {o.page_us!r}: {told}; accepted: up to {len(names)} times, as 20,5") from None


def fleet(o: argparse.Namespace) -> FleetConfig | None:
    """The fleet that the options describe, or None for a single instance."""
    from xllm_lab.fleet_config import FLEET_DECISIONS, FleetConfig
    from xllm_lab.fleet_file import read_fleet

    if o.cluster is not None and o.instances is not None:
        raise ConfigError("give --cluster or --instances, one of them")
    given = {decides: text for decides in FLEET_DECISIONS if (text := getattr(o, decides)) is not None}
    chosen = {decides: _policy(decides, text) for decides, text in given.items()}
    if o.cluster is not None:
        return replace(read_fleet(o.cluster), **chosen)
    if o.instances is not None:
        return replace(FleetConfig(num_instances=o.instances), **chosen)
    if chosen:
        raise ConfigError(f"--{next(iter(chosen))} without a fleet; accepted: with --instances or --cluster")
    return None


def _policy(decides: str, text: str) -> Any:
    """A policy by its name, and its knobs if there are any behind it."""
    from xllm_lab.policies.catalog import make_policy

    name, _, rest = text.partition(":")
    knobs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not all(equals for _, equals, _ in knobs):
        raise ConfigError(f"--{decides} {text!r} is not accepted; accepted: NAME, or NAME:KNOB=VALUE,...")
    return make_policy(decides, name, {knob: value for knob, _, value in knobs})


def _deployment(o: argparse.Namespace, model: ModelSpec) -> Deployment:
    from xllm_lab.sim.cost.host import HostOverhead
    from xllm_lab.sim.machine import Deployment

    return Deployment(
        **{name: getattr(o, name) for name in _DEPLOYMENT},
        precision=o.precision,
        host=HostOverhead(step_us=o.host_us, sequence_us=o.host_us_per_seq),
        is_one_of_alike=o.alike,
        routing=_routing(o, model),
    )


def _routing(o: argparse.Namespace, model: ModelSpec) -> Routing | None:
    """How tokens choose experts; None: evenly."""
    from xllm_lab.sim.experts.loads import load
    from xllm_lab.sim.experts.routing import routing_of

    if o.expert_skew is not None and o.expert_loads is not None:
        raise ConfigError("give --expert-skew or --expert-loads, one of them")
    if o.expert_skew is None and o.expert_loads is None:
        return None
    given = o.expert_skew if o.expert_loads is None else load(o.expert_loads)
    return routing_of(given, model, num_devices=o.expert_parallel)


def _refuse_beside_calibration(o: argparse.Namespace) -> None:
    """Options that a calibration leaves without effect."""
    given = [f"--{name}" for name in ("profile", "hardware") if getattr(o, name) is not None]
    given += ["--model-config"] * (o.model_config is not None)
    given += [f"--{name.replace('_', '-')}" for name in _DEPLOYMENT if getattr(o, name) != 1]
    given += ["--alike"] * o.alike
    given += [f"--{name.replace('_', '-')}" for name in ("expert_skew", "expert_loads") if getattr(o, name) is not None]
    given += ["--precision"] * (o.precision != "bf16")
    given += ["--host-us"] * bool(o.host_us) + ["--host-us-per-seq"] * bool(o.host_us_per_seq)
    if given:
        raise ConfigError(f"{', '.join(given)} beside --calibration, which has it all; accepted: one or the other")


def _refuse_beside_profile(o: argparse.Namespace) -> None:
    """Options that measured operators leave without effect."""
    if o.precision != "bf16":
        raise ConfigError("--precision beside --profile, which was measured as it is; accepted: --hardware")
    if o.hardware is not None and o.tensor_parallel * o.data_parallel == 1:
        raise ConfigError(
            "--hardware beside --profile is for links; accepted: with --tensor-parallel or --data-parallel above 1"
        )
