"""Experts that change places while steps run, on one rank: a second buffer, filled beside steps, swapped between two.

    prepare      on a thread of its own: the weights of slots that change, layer by layer, from the checkpoint
    activate     between two steps: they are put into their slots, and the slots are told; the old ones go
    drop         the buffer goes, and whatever is still being read

Only slots of this rank that change are read and kept: so much memory more, for as long as a change is under way.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xllm_lab.engine.device import Device
from xllm_lab.engine.layer_config import expert_names
from xllm_lab.engine.mixture import MixtureLayer
from xllm_lab.engine.model import DecoderModel
from xllm_lab.engine.models import LoadedModel
from xllm_lab.engine.weights import safetensors_files
from xllm_lab.errors import ConfigError, ModelError
from xllm_lab.rebalancing import Move


class Checkpoint:
    """Where single experts of a model are read.

    Raises:
        ConfigError: the model is no folder of safetensors.
    """

    def __init__(self, model: LoadedModel) -> None:
        folder = Path(model.name).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"model {model.name}: experts are moved from safetensors; accepted: a folder of them, or experts "
                "policy static"
            )
        self._names, self._dtype = expert_names(model.config.architecture), model.model.dtype
        self._folder = folder
        self._file_of: dict[str, Path] | None = None

    def gate_up(self, layer: int, expert: int) -> Tensor:
        """Gate and up of an expert, one below the other, as a layer takes them."""
        return torch.cat([self._read(layer, expert, self._names.gate), self._read(layer, expert, self._names.up)])

    def down(self, layer: int, expert: int) -> Tensor:
        return self._read(layer, expert, self._names.down)

    def _read(self, layer: int, expert: int, part: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        name = f"model.layers.{layer}.{self._names.block}.experts.{expert}.{part}.weight"
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: {name}: {' '.join(str(error).split())}") from error
        return tensor.to(self._dtype)

    def _path(self, name: str) -> Path:
        """Looked up when first asked: who is to prepare a change and finds no file is not ready, no more."""
        files = safetensors_files(self._folder)
        if len(files) == 1:
            return files[0]
        if self._file_of is None:
            index = json.loads((self._folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
            self._file_of = {held: self._folder / file for held, file in index["weight_map"].items()}
        return self._file_of[name]


class _Prepared(NamedTuple):
    """The weights that a slot of this rank is to have; `layer` is a row of the layers with experts."""

    layer: int
    slot: int
    gate_up: Any
    down: Any


class _Buffer:
    """What is prepared of a change; `is_wanted` until somebody drops it."""

    def __init__(self, serial: int) -> None:
        self.serial, self.is_wanted, self.is_ready = serial, True, False
        self.held: list[_Prepared] = []
        self.failed: Exception | None = None


class LiveExperts:
    """The experts of this rank's slots, and a second buffer for those that are to come.

    Attributes:
        layers: numbers of the layers with experts, in order.
    """

    def __init__(self, model: LoadedModel, device: Device) -> None:
        self._checkpoint, self._device = Checkpoint(model), device
        self._layers = mixture_layers(model.model)
        self.layers = tuple(self._layers)
        self._rows = tuple(self._layers.values())
        self._buffer: _Buffer | None = None

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Of each layer, the expert in each slot of all ranks, in steps from now on."""
        return tuple(_slots(layer).slots for layer in self._rows)

    def prepare(self, serial: int, moves: Iterable[Move], done: Callable[[int], None]) -> None:
        """Begin to fill the buffer; `done` is called from another thread, with the change's serial number."""
        assert self._buffer is None, "two changes at a time"
        self._buffer = buffer = _Buffer(serial)
        own = [move for move in moves if self._own_slot(move) is not None]
        begin = self._device.like_this_thread()

        def fill() -> None:
            begin()
            try:
                self._fill(buffer, own)
            except Exception as error:  # whoever waits for this rank gives the change up, and serving goes on
                buffer.failed = error
                return
            if buffer.is_wanted:
                done(serial)

        threading.Thread(target=fill, name="experts", daemon=True).start()

    def is_ready(self, serial: int) -> bool:
        """Whether this rank has its weights of that change."""
        return self._buffer is not None and self._buffer.serial == serial and self._buffer.is_ready

    @property
    def failed(self) -> Exception | None:
        """Why this rank will never be ready, where that is known."""
        return None if self._buffer is None else self._buffer.failed

    def activate(self, serial: int, slots: Sequence[Sequence[int]]) -> None:
        """The next step, and those behind it, compute with the prepared weights."""
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, f"change {serial} begins, and nothing is prepared"
        assert (buffer.serial, buffer.is_ready) == (serial, True), f"change {serial} begins and is not ready"
        self._put(buffer.held, slots)

    def drop(self) -> None:
        """Nobody wants what is prepared."""
        if self._buffer is not None:
            self._buffer.is_wanted = False
        self._buffer = None

    def restore(self, slots: Sequence[Sequence[int]]) -> None:
        """A run begins: experts are where they are to be at first, whatever the run before did with them."""
        self.drop()
        moves = [
            Move(row, slot, new)
            for row, (olds, news) in enumerate(zip(self.slots, slots, strict=True))
            for slot, (old, new) in enumerate(zip(olds, news, strict=True))
            if old != new
        ]
        if moves:
            buffer = _Buffer(-1)
            self._fill(buffer, [move for move in moves if self._own_slot(move) is not None])
            self._put(buffer.held, slots)

    def _own_slot(self, move: Move) -> int | None:
        slots = _slots(self._rows[move.layer])
        own = move.slot - slots.first
        return own if 0 <= own < slots.num_own else None

    def _fill(self, buffer: _Buffer, own: Sequence[Move]) -> None:
        launch = self._device.side("experts")
        for move in own:
            if not buffer.is_wanted:
                return
            number, layer, slot = self.layers[move.layer], self._rows[move.layer], self._own_slot(move)
            assert slot is not None, "a slot of another rank"
            gate_up, down = self._checkpoint.gate_up(number, move.expert), self._checkpoint.down(number, move.expert)

            def copy(layer: MixtureLayer = layer, slot: int = slot, move: Move = move) -> None:
                where = self._device.torch_device
                parts = layer.gate_up.prepared(gate_up.to(where)), layer.down.prepared(down.to(where))  # noqa: B023
                buffer.held.append(_Prepared(move.layer, slot, *parts))

            launch(copy)
        buffer.is_ready = True

    def _put(self, held: Sequence[_Prepared], slots: Sequence[Sequence[int]]) -> None:
        for prepared in held:
            layer = self._rows[prepared.layer]
            layer.gate_up.put(prepared.slot, prepared.gate_up)
            layer.down.put(prepared.slot, prepared.down)
        for layer, own in zip(self._rows, slots, strict=True):
            if _slots(layer).slots != tuple(own):
                _slots(layer).put(own)


def mixture_layers(model: DecoderModel) -> dict[int, MixtureLayer]:
    """Layers with experts by their numbers, in order."""
    return {number: layer.mlp for number, layer in enumerate(model.layers) if isinstance(layer.mlp, MixtureLayer)}


def _slots(layer: MixtureLayer) -> Any:
    assert layer.slots is not None, "experts that do not lie on ranks"
    return layer.slots
