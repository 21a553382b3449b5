"""How a model is divided over devices, what each of them holds, and how much KV still fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xllm_lab.errors import ConfigError
from xllm_lab.hardware import Device
from xllm_lab.model_spec import PRECISIONS, GroupedAttention, Matmul, ModelSpec, Precision

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Sizes of the parallel groups.

    Attributes:
        tensor: devices that share every matrix and every batch.
        data: batches that are computed side by side, each by `tensor` devices with weights of their own. They meet in
            the experts only, and are taken to be alike.
        expert: devices over which experts are spread, `tensor * data`; 1 divides each expert over `tensor` instead.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1

    def refuse_if_impossible(self, spec: ModelSpec) -> None:
        """Raise ConfigError if the model cannot be divided so."""
        for name in ("tensor", "data", "expert"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}_parallel is {getattr(self, name)}, at least 1 is accepted")
        heads = spec.attention.num_heads
        if heads % self.tensor:
            raise ConfigError(
                f"tensor_parallel is {self.tensor}; a divisor of the {heads} attention heads of {spec.name} is accepted"
            )
        kv_heads = self._num_kv_heads(spec)
        if kv_heads % self.tensor and self.tensor % kv_heads:
            raise ConfigError(
                f"tensor_parallel is {self.tensor}; a divisor or a multiple of the {kv_heads} key-value heads of "
                f"{spec.name} is accepted"
            )
        if self.expert > 1 and spec.experts is None:
            raise ConfigError(f"expert_parallel is {self.expert}; {spec.name} has no experts, so 1 is accepted")
        if self.expert not in (1, self.tensor * self.data):
            raise ConfigError(
                f"expert_parallel is {self.expert}; accepted are 1, or tensor times data parallel, "
                f"{self.tensor * self.data}"
            )

    @staticmethod
    def _num_kv_heads(spec: ModelSpec) -> int:
        a = spec.attention
        return a.num_kv_heads if isinstance(a, GroupedAttention) else a.num_heads

    def part(self, matmul: Matmul, spec: ModelSpec) -> float:
        """Part of a weight matrix that each device holds."""
        if matmul.shard == "none":
            return 1.0
        if matmul.shard == "kv_heads":
            return 1.0 / min(self.tensor, self._num_kv_heads(spec))
        return 1.0 / self.tensor

    def experts_per_device(self, spec: ModelSpec) -> int:
        """Experts of a layer on each device; where experts do not divide evenly, copies fill up."""
        assert spec.experts is not None
        return -(-spec.experts.num_experts // self.expert)

    def weight_bytes(self, spec: ModelSpec, precision: Precision) -> float:
        """Weights on each device."""
        total = (spec.embedding_params / self.tensor * (not spec.is_tied) + spec.vector_params) * 2.0
        for m in spec.matmuls:
            total += m.num_params * self.part(m, spec) * (precision.weight_bytes if m.is_quantized else 2.0)
        if e := spec.experts:
            held = self.experts_per_device(spec) / (1 if self.expert > 1 else self.tensor)
            total += e.params_per_expert * e.num_layers * held * precision.weight_bytes
        return total

    def kv_bytes_per_token(self, spec: ModelSpec, precision: Precision) -> float:
        """KV of one token on each device: key-value heads are divided while they last, latents not at all."""
        a = spec.attention
        part = 1.0 / min(self.tensor, a.num_kv_heads) if isinstance(a, GroupedAttention) else 1.0
        return spec.kv_bytes_per_token(precision.kv_bytes) * part


def kv_blocks_that_fit(
    device: Device,
    spec: ModelSpec,
    *,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    expert_parallel: int = 1,
    precision: Precision = PRECISIONS["bf16"],
    block_size: int = 128,
    memory_frac: float = 0.9,
) -> int:
    """KV blocks of `block_size` tokens for which `memory_frac` of a device's memory has room beside the weights.

    Raises:
        ConfigError: the model cannot be divided so, or leaves no room for one block; the message says by how much.
    """
    if not 0 < memory_frac <= 1 or block_size < 1:
        raise ConfigError(
            f"memory_frac is {memory_frac} and block_size {block_size}; more than 0 and at most 1, and at least 1, "
            f"are accepted"
        )
    sharding = Sharding(tensor=tensor_parallel, data=data_parallel, expert=expert_parallel)
    sharding.refuse_if_impossible(spec)
    usable, weights = device.hbm_bytes * memory_frac, sharding.weight_bytes(spec, precision)
    block_bytes = sharding.kv_bytes_per_token(spec, precision) * block_size
    if usable - weights < block_bytes:
        raise ConfigError(
            f"{spec.name} needs {weights / GIB:.1f} GiB of weights and {block_bytes / 2**20:.2f} MiB for one KV block "
            f"on each of {tensor_parallel * data_parallel} {device.name}: "
            f"{(weights + block_bytes - usable) / GIB:.1f} GiB more than {memory_frac:.0%} of its memory; more devices "
            f"or fewer bytes a weight are accepted"
        )
    return math.floor((usable - weights) / block_bytes)
