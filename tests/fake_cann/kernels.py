"""Kernels of the fake device: every `aten` operator that torch_npu has a kernel for runs torch's CPU kernel instead.

Device memory is host memory, so a CPU tensor can lie over the bytes of an NPU tensor. A kernel is split as on a device:
on the host, shapes come from the operator's meta kernel and results from torch_npu's own caching allocator; the
arithmetic is a task of the current stream, which holds addresses only. So work is late when the fake is told to be
late, and reads what is in memory when it runs, also if the tensor was freed by then.

torch_npu keeps what is its own: allocation, views, storage, streams, and copies to and from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_npu
from torch.utils import _pytree as pytree

from . import control

# Allocation, storage and host traffic: the wheel's own code, on the fake runtime.
KEPT = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::record_stream", "aten::is_pinned",
    "aten::pin_memory", "aten::_pin_memory", "aten::_local_scalar_dense", "aten::_copy_from",
    "aten::_copy_from_and_resize", "aten::_has_compatible_shallow_copy_type", "aten::copy_", "aten::new_empty_strided",
    "aten::empty_like", "aten::_resize_output_", "aten::_lazy_clone",
}  # fmt: skip
KEPT_NAMES = ("aten::set_", "aten::is_set_to", "aten::storage", "aten::_foreach_copy_", "aten::equal")

_library = {name: torch.library.Library(name, "IMPL") for name in ("aten", "npu", "atb")}
_registered: set[str] = set()
_wheel: dict[str, Any] = {}  # kernels of torch_npu that ours call
_shapes: dict[Any, Any] = {}


def is_npu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same bytes. It keeps nothing alive."""
    storage = tensor.untyped_storage()
    flat = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    view = torch.empty(0, dtype=tensor.dtype)
    view.set_(flat, tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        view = torch._conj(view)
    return view


def stream_of(device: torch.device | None = None) -> int:
    index = torch.npu.current_device() if device is None or device.index is None else device.index
    return int(torch_npu._C._npu_getCurrentRawStream(index))


def _generator(npu: torch.Generator | None) -> torch.Generator:
    """A CPU generator that starts where the device's stands, and moves that on."""
    torch.npu.init()
    source = npu if npu is not None else torch.npu.default_generators[torch.npu.current_device()]
    state = source.get_state()
    seed, offset = (int(one) for one in state[-16:].view(torch.int64))
    following = state.clone()
    following[-16:].view(torch.int64)[1] = offset + 4
    source.set_state(following)
    return torch.Generator().manual_seed((seed * 1_000_003 + offset) % 2**63)


def on_cpu(value: Any) -> Any:
    """What the task computes with: addresses of device tensors, copies of host tensors, CPU for NPU."""
    if isinstance(value, torch.Tensor):
        return alias(value) if is_npu(value) else value.detach().clone()
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.Generator):
        return _generator(value)
    return value


def on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    return None if isinstance(value, torch.Generator) else value


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.size(), value.stride(), value.dtype)
    return (type(value), value)


class DataDependentError(Exception):
    """The shape of the result is only known when the kernel has run."""


def infer(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The results' shapes as meta tensors, from `call` on meta tensors; remembered by the arguments' shapes."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    try:
        key: Any = (call, spec, tuple(map(_key, leaves)))
        if key in _shapes:
            return _shapes[key]
    except TypeError:
        key = None
    meta_args, meta_kwargs = pytree.tree_unflatten([on_meta(leaf) for leaf in leaves], spec)
    try:
        found = call(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError) as failure:
        data = isinstance(failure, NotImplementedError) or "ata-dependent" in str(failure) or "meta" in str(failure)
        if not data:
            raise
        raise DataDependentError(str(failure)) from failure
    if key is not None:
        _shapes[key] = found
    return found


def allocate(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=device)


def _store(results: Any, into: list[torch.Tensor | None], name: str) -> None:
    found = list(results) if isinstance(results, (tuple, list)) else [results]
    assert len(found) == len(into), f"{name} returned {len(found)} results for {len(into)}"
    for result, target in zip(found, into, strict=True):
        if target is None or not isinstance(result, torch.Tensor):
            continue
        if result.shape != target.shape or result.dtype != target.dtype:
            due = f"{tuple(target.shape)} {target.dtype}"
            raise AssertionError(f"{name} computed {tuple(result.shape)} {result.dtype} where {due} is due")
        if result.data_ptr() != target.data_ptr() or result.numel() == 0:
            target.copy_(result)


def device_of(leaves: list[Any]) -> torch.device:
    for leaf in leaves:
        if is_npu(leaf):
            return leaf.device  # type: ignore[no-any-return]
        if isinstance(leaf, torch.device) and leaf.type == "npu" and leaf.index is not None:
            return leaf
    return torch.device("npu", torch.npu.current_device())


class Kernel:
    """One operator on the fake device.

    Args:
        op: the operator, whose schema says which arguments are written and which results are new.
        compute: what the task calls, on CPU tensors; torch's CPU kernel by default.
        shapes: what gives the results' shapes, on meta tensors; torch's meta kernel by default.
    """

    def __init__(
        self, op: Any, compute: Callable[..., Any] | None = None, shapes: Callable[..., Any] | None = None
    ) -> None:
        self.op = op
        self.name = op._schema.name if op._overloadname == "default" else f"{op._schema.name}.{op._overloadname}"
        self.compute = compute or op
        self.shapes = shapes or op
        schema = op._schema
        written = [one.alias_info is not None and one.alias_info.is_write for one in schema.arguments]
        self.written = [one.name for one, is_written in zip(schema.arguments, written, strict=True) if is_written]
        self.is_out = any(one.is_out for one in schema.arguments)
        self.names = [one.name for one in schema.arguments]
        # `npu::x.out(..., Tensor[] out)` returns what it is given without saying so in its schema.
        self.returns_out = self.names[-1:] == ["out"] and not self.is_out
        self.new = [one.alias_info is None and not self.returns_out for one in schema.returns]
        self.random = "generator" in self.names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        elsewhere = named.get("device")
        if elsewhere is not None and elsewhere.type != "npu":  # zeros_like(x, device="cpu"): only the shape is x's
            args, kwargs = pytree.tree_map(lambda one: on_meta(one) if is_npu(one) else one, (args, kwargs))
            return self.op(*args, **kwargs)
        leaves, _ = pytree.tree_flatten((args, kwargs))
        device = device_of(leaves)
        stream = stream_of(device)
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not is_npu(leaf) and leaf.dim() > 0 and leaf.numel() > 0:
                self._check_host_tensor(leaf, named)
        if not any(self.new):
            if self.is_out:
                self._resize_outputs(args, kwargs, named)
            cpu_args, cpu_kwargs = pytree.tree_map(on_cpu, (args, kwargs))
            self._add_generator(cpu_kwargs, named)
            control.launch(stream, self.name, lambda: self._run(cpu_args, cpu_kwargs, None))
            return self._written_results(named)
        try:
            meta = infer(self.shapes, args, kwargs)
        except DataDependentError:
            return self._run_now(device, stream, args, kwargs)
        as_list = list(meta) if isinstance(meta, (tuple, list)) else [meta]
        results = [allocate(one, device) if isinstance(one, torch.Tensor) else one for one in as_list]
        into = [alias(one) if isinstance(one, torch.Tensor) else None for one in results]
        cpu_args, cpu_kwargs = pytree.tree_map(on_cpu, (args, kwargs))
        self._add_generator(cpu_kwargs, named)
        control.launch(stream, self.name, lambda: self._run(cpu_args, cpu_kwargs, into))
        if not isinstance(meta, (tuple, list)):
            return results[0]
        return results if isinstance(meta, list) else tuple(results)

    def _check_host_tensor(self, leaf: torch.Tensor, named: dict[str, Any]) -> None:
        index_ok = "indices" in named or self.name.startswith(("npu::", "atb::"))
        if not index_ok:
            raise RuntimeError(
                f"{self.name}: expected all tensors on the NPU, got a {tuple(leaf.shape)} tensor on {leaf.device}"
            )

    def _run(self, args: Any, kwargs: Any, into: list[torch.Tensor | None] | None) -> None:
        with torch.inference_mode(), torch._C._AutoDispatchBelowAutograd():
            results = self.compute(*args, **kwargs)
            if into is not None:
                _store(results, into, self.name)

    def _run_now(self, device: torch.device, stream: int, args: Any, kwargs: Any) -> Any:
        """For results whose shape is data: waits for the stream, computes, and copies to memory of the device."""
        if control.capturing(stream):
            raise RuntimeError(f"{self.name} in a graph capture: the shape of its result depends on data (107030)")
        control.library().fake_count(b"wait_for_shape", 0)
        error = control.library().aclrtSynchronizeStream(stream)
        control.raise_device_failure()
        if error:
            raise RuntimeError(f"{self.name}: synchronisation failed with ACL error {error}")
        cpu_args, cpu_kwargs = pytree.tree_map(on_cpu, (args, kwargs))
        with torch._C._AutoDispatchBelowAutograd():
            found = self.compute(*cpu_args, **cpu_kwargs)
        control.library().fake_count(f"launch:{self.name}".encode(), 0)

        def to_device(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            result = allocate(value, device)
            into = alias(result)
            control.launch(stream, "store", lambda: _store(value, [into], self.name))
            return result

        return pytree.tree_map(to_device, found)

    def _add_generator(self, kwargs: dict[str, Any], named: dict[str, Any]) -> None:
        if self.random and named.get("generator") is None:
            kwargs["generator"] = _generator(None)

    def _written_results(self, named: dict[str, Any]) -> Any:
        found = list(named["out"]) if self.returns_out else [named[name] for name in self.written]
        if not self.new:
            return None
        return found[0] if len(self.new) == 1 else tuple(found)

    def _resize_outputs(self, args: Any, kwargs: Any, named: dict[str, Any]) -> None:
        """Out arguments of the wrong shape are resized, as torch does; the wheel's resize_ allocates."""
        outs = [named[name] for name in self.written if isinstance(named[name], torch.Tensor)]
        if all(out.numel() for out in outs):
            return
        meta = infer(self.shapes, args, kwargs)
        for out, shape in zip(outs, meta if isinstance(meta, (tuple, list)) else [meta], strict=False):
            if out.shape != shape.shape:
                out.resize_(shape.shape)


def find_op(name: str) -> Any:
    """The operator of a dispatcher name such as `aten::add.Tensor`."""
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, space), base), overload or "default")


def is_ours(name: str) -> bool:
    return name in _registered


def register(name: str, kernel: Callable[..., Any]) -> None:
    _registered.add(name)
    space, _, rest = name.partition("::")
    _library[space].impl(rest, kernel, "PrivateUse1", allow_override=True)


def is_view(op: Any) -> bool:
    aliased = [one.alias_info for one in op._schema.returns]
    return any(one is not None and not one.is_write for one in aliased)


# Copies ---------------------------------------------------------------------------------------------------------------
def _same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    plain = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
    return plain and one.is_contiguous()


def _host_copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    _wheel["copy_"].call_boxed(keys, to, source, non_blocking)


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Between host and device: the wheel's own copy when both sides are the same dense bytes; otherwise through a
    staged tensor, whose cast and strides are a kernel where they are the device's. Within the device: a kernel."""
    if to.numel() == 0:
        return to
    if is_npu(to) and is_npu(source):
        into, values = alias(to), alias(source)
        control.launch(stream_of(to.device), "aten::copy_", lambda: _copy_task(into, values))
    elif is_npu(to):
        plain = source.to(to.dtype).expand(to.shape).contiguous()
        if plain.data_ptr() != source.data_ptr():
            non_blocking = False  # a temporary of ours may not be freed before the copy has run
        if _same_layout(to, plain):
            _host_copy(to, plain, non_blocking)
        else:
            staged = torch.empty(to.shape, dtype=to.dtype, device=to.device)
            _host_copy(staged, plain, non_blocking)
            _copy(to, staged)
    else:
        dense = source if source.is_contiguous() and not source.is_conj() else source.contiguous()
        if _same_layout(to, dense):
            _host_copy(to, dense, non_blocking)
        else:
            staged = torch.empty(dense.shape, dtype=dense.dtype)
            _host_copy(staged, dense, False)
            to.copy_(staged)
    return to


def _to_copy(
    source: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    where = device or source.device
    pin = bool(pin_memory) or (non_blocking and where.type == "cpu")  # torch pins what a late copy will write
    result = torch.empty_like(
        source,
        dtype=dtype or source.dtype,
        layout=layout or source.layout,
        device=where,
        pin_memory=pin and where.type == "cpu",
        memory_format=memory_format or torch.preserve_format,
    )
    return result.copy_(source, non_blocking)


def _copy_task(into: torch.Tensor, values: torch.Tensor) -> None:
    with torch.inference_mode(), torch._C._AutoDispatchBelowAutograd():
        into.copy_(values)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one == other).all().item())


def wheel_kernels() -> Iterator[tuple[str, Any]]:
    """The `aten` operators torch_npu has a kernel for (it names some that have no schema: nobody can call those)."""
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        if not name.startswith("aten::"):
            continue
        try:
            yield name, find_op(name)
        except AttributeError:
            continue


def install() -> None:
    """Puts the kernels in place. Once, after torch_npu is imported."""
    _wheel["copy_"] = torch.library.get_kernel("aten::copy_", "PrivateUse1")
    for name, op in wheel_kernels():
        if name not in KEPT and not name.startswith(KEPT_NAMES) and not is_view(op):
            register(name, Kernel(op))
    register("aten::copy_", _copy)
    register("aten::_to_copy", _to_copy)
    register("aten::equal", _equal)
