"""Computes what torch_npu would send to a device: ATen's operators on the CPU, over the memory of the 'npu' tensors.

``install()`` after ``import torch_npu``. torch_npu's own kernels for PrivateUse1 are replaced, except those that only
make, view or copy memory, which work on the stub of CANN as they are. Its Autograd and Autocast kernels, its schemas,
allocator, streams, generators and process groups stay. ``OPERATORS`` holds CPU implementations of operators in the
namespace npu; any other one raises NotImplementedError.
"""

import ctypes
import inspect
import os

import torch

KEY = "PrivateUse1"
QUEUE = os.environ.get("TASK_QUEUE_ENABLE", "1") != "0"  # torch_npu's own default is 1
# Older releases of torch let nobody replace a kernel that was registered from Python.
OVERRIDE = (
    {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}
)
# Kernels of torch_npu that need no operator: they allocate, describe or copy bytes.
KEPT = {
    "aten::" + name
    for name in """
    as_strided as_strided_ view _reshape_alias set_ set_.source_Storage set_.source_Storage_storage_offset
    set_.source_Tensor is_set_to resize_ resize_as_ empty.memory_format empty_strided empty_like new_empty_strided
    _pin_memory is_pinned record_stream unfold view_as_real view_as_complex get_storage_size get_npu_format
    empty_with_format unsafe_empty_with_format storage_resize_ alias _copy_from_and_resize
    """.split()
}

OPERATORS = {}  # name in the namespace npu -> function over CPU tensors
calls = []  # names of the operators that a device would have run, when ``record`` is True; a view launches nothing
record = False
host_waits = []  # what the host would have waited for: copies to it, values, and blocking copies from pageable memory
_library = []


def cpu_alias(tensor):
    """A CPU tensor over the memory of an 'npu' tensor, after all that its stream's queue still holds."""
    if QUEUE:
        torch.npu.current_stream(tensor.device).synchronize()
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if not size:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = torch.frombuffer((ctypes.c_byte * size).from_address(storage.data_ptr()), dtype=torch.uint8)
    flat = torch.empty(0, dtype=tensor.dtype)
    flat.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    flat = flat.conj() if tensor.is_conj() else flat
    return flat._neg_view() if tensor.is_neg() else flat


class _Call:
    """One operator call: what of its arguments lies where."""

    def __init__(self):
        self.originals = {}  # id of an alias -> (the alias, its 'npu' tensor)
        self.device = None

    def to_cpu(self, value):
        if isinstance(value, torch.Tensor) and value.device.type == "npu":
            alias = cpu_alias(value)
            self.originals[id(alias)] = alias, value
            self.device = value.device
            return alias
        if isinstance(value, torch.device) and value.type == "npu":
            self.device = value
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "npu":
            return cpu_generator(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.to_cpu, value))
        return value

    def to_npu(self, value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.to_npu, value))
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        if id(value) in self.originals:
            return self.originals[id(value)][1]
        for alias, original in self.originals.values():
            if value.numel() and value.untyped_storage().data_ptr() == alias.untyped_storage().data_ptr():
                return original.as_strided(value.shape, value.stride(), value.storage_offset())
        result = torch.empty_strided(
            value.shape,
            value.stride(),
            dtype=value.dtype,
            device=self.device or torch.device("npu", torch.npu.current_device()),
        )
        cpu_alias(result).copy_(value)
        return result

    def written(self):
        """An output argument that the operator resized has got new memory on the CPU: move it."""
        for alias, original in self.originals.values():
            if alias.shape != original.shape:
                original.resize_(alias.shape)
                cpu_alias(original).copy_(alias)


def cpu_generator(generator):
    """A CPU generator that follows from an NPU generator's state, which advances."""
    state = generator.get_state()
    seed, offset = state[-16:].view(torch.int64).tolist()
    state[-8:] = torch.tensor([offset + 4]).view(torch.uint8)
    generator.set_state(state)
    return torch.Generator().manual_seed((seed * 1_000_003 + offset) % (1 << 63))


def _kernel(operator, function):
    random = torch.Tag.nondeterministic_seeded in operator.tags
    has_generator = any(argument.name == "generator" for argument in operator._schema.arguments)

    is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in operator._schema.returns)

    def kernel(*args, **kwargs):
        call = _Call()
        if record and not is_view:
            calls.append(operator._name)
        args, kwargs = call.to_cpu(args), {name: call.to_cpu(value) for name, value in kwargs.items()}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        with torch._C._AutoDispatchBelowAutograd():
            if not random:
                result = function(*args, **kwargs)
            else:
                device = (
                    call.device.index if call.device and call.device.index is not None else torch.npu.current_device()
                )
                own = torch.npu.default_generators[device]
                start = own.get_state()
                generator = cpu_generator(own)
                if has_generator:
                    if kwargs.get("generator") is None:
                        kwargs["generator"] = generator
                    result = function(*args, **kwargs)
                else:
                    before = torch.get_rng_state()
                    torch.set_rng_state(generator.get_state())
                    try:
                        result = function(*args, **kwargs)
                    finally:
                        if torch.equal(torch.get_rng_state(), generator.get_state()):
                            own.set_state(start)  # attention without dropout draws nothing
                        torch.set_rng_state(before)
        call.written()
        return call.to_npu(result)

    return kernel


def _note_upload(source, device, non_blocking):
    if device.type == "npu" and source.device.type == "cpu" and not non_blocking:
        host_waits.append("to the device")


def _copy_(target, source, non_blocking=False):
    if target.device.type == "cpu" and source.device.type == "npu":
        host_waits.append("copy_")
    _note_upload(source, target.device, non_blocking)
    to, what = (cpu_alias(t) if t.device.type == "npu" else t for t in (target, source))
    with torch._C._AutoDispatchBelowAutograd():
        to.copy_(what)
    return target


def _copy_from(source, target, non_blocking=False):
    return _copy_(target, source)


def _to_copy(source, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    call = _Call()
    with torch._C._AutoDispatchBelowAutograd():
        copy = torch.ops.aten._to_copy.default(call.to_cpu(source), dtype=dtype, memory_format=memory_format)
    call.device = source.device if device is None else torch.device(device)
    if call.device.type == "cpu" and source.device.type == "npu":
        host_waits.append("to")
    _note_upload(source, call.device, non_blocking)
    return copy if call.device.type == "cpu" else call.to_npu(copy)


def _item(tensor):
    host_waits.append("item")
    return cpu_alias(tensor).item()


def _matmul_backward(grad, left, right, mask):
    """torch_npu differentiates matmul as one operator."""
    a, b = left[None] if left.dim() == 1 else left, right[:, None] if right.dim() == 1 else right
    grad = grad if left.dim() > 1 else grad.unsqueeze(-1 if right.dim() == 1 else -2)
    grad = grad if right.dim() > 1 or left.dim() == 1 else grad.unsqueeze(-1)
    return (
        (grad @ b.mT).sum_to_size(a.shape).view_as(left) if mask[0] else None,
        (a.mT @ grad).sum_to_size(b.shape).view_as(right) if mask[1] else None,
    )


ATEN = {"aten::matmul_backward": _matmul_backward, "aten::one_": lambda tensor: tensor.fill_(1)}
OPERATORS.update(
    {
        "_npu_dtype_cast": lambda tensor, dtype: tensor.to(dtype, copy=True),
        # Every format is ND here.
        "npu_format_cast": lambda tensor, *format: tensor,
        "npu_format_cast_": lambda tensor, *format: tensor,
        "_npu_dtype_cast_backward": lambda grad, dtype: grad.to(dtype, copy=True),
    }
)


def _refusal(name):
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"npu_on_cpu does not compute {name}")

    return refuse


SPECIAL = {
    "aten::copy_": _copy_,
    "aten::_copy_from": _copy_from,
    "aten::_to_copy": _to_copy,
    "aten::_local_scalar_dense": _item,
}


def _overload(name):
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")


def install_with_attention(tnd_order="documents"):
    """``install``, with the attention operators of tests/helpers/fake_torch_npu under torch_npu's real schemas,
    and what MindSpeed's fusions call.

    Returns:
        The fake's Operators, whose ``calls`` record what was asked for.
    """
    import fused_operators
    from fake_torch_npu import attention

    OPERATORS.update(fused_operators.OPERATORS)
    names = ("npu_fusion_attention", "npu_fusion_attention_grad", "npu_ring_attention_update")
    schemas = {
        name: str(getattr(torch.ops.npu, name).default._schema).split("::")[1]
        for name in names
        if hasattr(torch.ops.npu, name)
    }
    operators = attention.Operators(schemas, tnd_order)
    OPERATORS.update({name: operators.implementation(name) for name in schemas})
    install()
    return operators


def install():
    """Replace torch_npu's kernels; a second call changes nothing."""
    if _library:
        return
    import warnings

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("aten", "npu")}
    _library.extend(libraries.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in torch._C._dispatch_get_all_op_names():
            namespace = name.split("::")[0]
            if (
                namespace not in libraries
                or not has(name, KEY)
                or name in KEPT
                or "::npu_" in name
                and namespace == "aten"
            ):
                continue
            try:
                operator = _overload(name)
            except AttributeError:  # a kernel without a schema: nobody can call it
                continue
            if name in SPECIAL:
                function = SPECIAL[name]
            elif namespace == "npu":
                base = name[len("npu::") :]
                function = _kernel(operator, OPERATORS[base]) if base in OPERATORS else _refusal(name)
            else:
                function = _kernel(operator, ATEN.get(name, operator))
            try:
                libraries[namespace].impl(name, function, KEY, **OVERRIDE)
            except RuntimeError as error:  # torch_npu's own kernel from Python stays where none can be replaced
                if OVERRIDE or "from python" not in str(error):
                    raise


def take_cann_9(torch_npu):
    """NPU_BED_CANN=9: the way of batch_isend_irecv that torch_npu takes with CANN 9 on 910B and 910C; the stub has no
    CANN whose version could be read.

    Returns:
        Whether this release has that way.
    """
    if os.environ.get("NPU_BED_CANN") != "9":
        return False
    messages = torch_npu.distributed.distributed_c10d
    if not hasattr(messages, "_CANN_VERSION"):
        return False
    messages._CANN_VERSION = True
    return True
