"""How the process is switched to Ascend NPUs, and what Megatron needs there beyond torch_npu's ``transfer_to_npu``.

Each row says which torch_npu releases need it; "every release" means all whose sources were read, 2.5 to 2.13. All rows
were seen to fail without the patch on torch_npu 2.13.0 (tests/ascend), except those that say otherwise. A name that a
real MindSpeed has patched already is left to it.
"""

import inspect
import sys
import warnings
from functools import wraps
from importlib import import_module

import torch
from mindspeed_cp.patches.machine import checkout as training_device
from mindspeed_cp.patches.machine import cpu as device
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.training import without_checkout

from mindspeed_cp.kernels.npu_setup import unavailable

CAPABILITY = (8, 0)  # of the NVIDIA GPUs that have what an NPU has: bfloat16


def prepare_npu():
    """Make code that says cuda and nccl run on NPUs and HCCL, through torch_npu's own contrib.transfer_to_npu.

    Call it before Megatron is imported. Needs no apex; Ascend's apex, where installed, is left as it is.

    Raises:
        ValueError: CANN, torch_npu or the device is missing; the message says what to install and source.
    """
    reason = unavailable()
    if reason:
        raise ValueError(f"the NPU cannot be used here: {reason}")
    import_module("torch_npu.contrib.transfer_to_npu")


def npu_patches(when):
    """The table; ``when`` is () -> "" on an NPU that is in use, else why nothing here is needed."""
    return _table(when, (*_torch_rows(), *_core_rows()))


def npu_checkout_patches(when):
    """What a Megatron-LM checkout needs besides; it can be imported once ``training_device.library_patches`` are on."""
    return _table(when, _checkout_rows())


def _table(when, rows):
    return [
        Patch(target, build, f"{releases}: {reason}", _when(when, target, extra), inherited=target in INHERITED)
        for target, build, releases, reason, extra in rows
    ]


INHERITED = ("torch.Tensor.type",)  # torch.Tensor has it from a base class in C++


def _torch_rows():
    yield (
        "torch.compile",
        device._compile,
        "every release",
        "Megatron's fused activations would start inductor, which needs triton-ascend on an NPU",
        None,
    )
    yield (
        "torch.Tensor.type",
        _type,
        "every release",
        "Megatron's gradient clipping and optimizers compare it with torch.cuda.FloatTensor, and it says torch.npu",
        None,
    )
    yield (
        "torch.cuda.default_generators",
        lambda original: _Generators(),
        "2.5 to 2.9 (read)",
        "it stays empty there, and Megatron sets the random state of its entries",
        _generators_follow,
    )
    yield (
        "torch.cuda._lazy_call",
        lambda original: lambda call, **kwargs: _npu()._lazy_call(call),
        "every release",
        "Megatron sets the random state through it, and before the NPU's first use it queues the call for ever",
        None,
    )
    yield (
        "torch.distributed.all_reduce",
        _all_reduce,
        "every release",
        "HCCL has no float64 reductions, and Megatron adds up its start times in float64: reduced in float32",
        None,
    )
    yield (
        "torch.cuda.get_device_capability",
        _capability,
        "every release",
        "it is None, and Megatron reads its first entry",
        None,
    )
    yield (
        "torch.cuda.get_device_properties",
        _properties,
        "every release",
        "its result has no major and minor, which Megatron compares",
        None,
    )
    for name in ("range_push", "range_pop", "mark"):
        yield (
            f"torch.cuda.nvtx.{name}",
            device._always(None),
            "every release",
            "it raises where torch was not built for CUDA",
            None,
        )


def _core_rows():
    yield (
        "megatron.core.fp8_utils.quantize_param_shard",
        device._accept_no_parameters,
        "every release",
        "without Transformer Engine 0.12's distributed optimizer raises even when there is no FP8 parameter to "
        "quantize",
        None,
    )
    yield (
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
        device._norm_with_sequence_parallel,
        "every release",
        "it refuses sequence parallelism, with which torch's norms work once their parameters are marked",
        None,
    )
    yield (
        "megatron.core.utils.local_multi_tensor_l2_norm",
        _l2_norm,
        "every release",
        "a repair of Megatron: without apex its gradient norm asks the device for a number for each parameter, and the "
        "host waits for each; one reduction for each dtype, and none is asked for",
        None,
    )


def _checkout_rows():
    yield (
        "megatron.core.datasets.utils.compile_helpers",
        training_device._compile_if_missing,
        "every release",
        "Megatron's Makefile compiles for the first python3 of the PATH, each time; this compiles once, for the Python "
        "that runs",
        without_checkout,
    )
    yield (
        f"{training_device.FUSED_KERNELS}.load",
        lambda original: lambda args: None,
        "every release",
        "it calls nvcc; Megatron has plain versions of these kernels",
        training_device.without_fused_kernels,
    )


def _when(when, target, extra):
    return lambda: when() or _by_mindspeed(target) or (extra() if extra else "")


def _by_mindspeed(target):
    """Why a name is left alone: what it holds, or the class that holds it, comes from a real MindSpeed."""
    parts = target.split(".")
    owner = None
    for part in parts:
        owner = sys.modules.get(part) if owner is None else getattr(owner, part, None)
        module = getattr(owner, "__globals__", {}).get("__name__") or getattr(owner, "__module__", None) or ""
        if not inspect.ismodule(owner) and str(module).split(".")[0] == "mindspeed":
            return "MindSpeed has patched it"
    return ""


def _npu():
    return import_module("torch_npu").npu


def _type(original):
    @wraps(original)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return original(self).replace("torch.npu.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.npu.")
        return original(self, dtype, *args, **kwargs)

    return type_


class _Generators:
    """torch_npu's default generators of this moment: the tuple there is replaced when the NPU is first used."""

    def _now(self):
        npu = _npu()
        npu._lazy_init()
        return npu.default_generators

    def __getitem__(self, index):
        return self._now()[index]

    def __len__(self):
        return len(self._now())


def _generators_follow():
    """Why the generators are left alone: transfer_to_npu has filled them, or will at the NPU's first use."""
    queued = getattr(_npu(), "_queued_calls", [])
    waiting = any("default_generators" in getattr(call, "__name__", "") for call, *_ in queued)
    return "this release fills them" if waiting or len(torch.cuda.default_generators) else ""


def _all_reduce(original):
    @wraps(original)
    def all_reduce(tensor, *args, **kwargs):
        if tensor.dtype != torch.float64 or tensor.device.type != "npu":
            return original(tensor, *args, **kwargs)
        narrow = tensor.float()
        work = original(narrow, *args, **kwargs)
        if work is not None:
            return _CopyBack(work, narrow, tensor)
        tensor.copy_(narrow)  # in place: the caller reads its own tensor
        return None

    return all_reduce


class _CopyBack:
    """The handle of an asynchronous reduction that is done in another tensor; ``wait`` brings the result back."""

    def __init__(self, work, narrow, tensor):
        self._work, self._pair = work, (tensor, narrow)

    def wait(self, *args, **kwargs):
        result = self._work.wait(*args, **kwargs)
        if self._pair:
            tensor, narrow = self._pair
            tensor.copy_(narrow)
            self._pair = None
        return result

    def __getattr__(self, name):
        return getattr(self._work, name)


def _l2_norm(original):
    @wraps(original)
    def local_multi_tensor_l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args):
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in (tensor for tensors in tensor_lists for tensor in tensors):
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        norms = [torch.stack(torch._foreach_norm(tensors)).float() for tensors in by_dtype.values()]
        return torch.linalg.vector_norm(torch.cat(norms)).reshape(1), None

    return local_multi_tensor_l2_norm


def _capability(original):
    @wraps(original)
    def get_device_capability(device=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for an environment variable with this very answer
            return original(device) or CAPABILITY

    return get_device_capability


class _Properties:
    """The properties of an NPU, with an NVIDIA GPU's version numbers where they have none."""

    def __init__(self, properties):
        self._properties = properties

    major, minor = CAPABILITY

    def __getattr__(self, name):
        return getattr(self._properties, name)

    def __repr__(self):
        return repr(self._properties)


def _properties(original):
    @wraps(original)
    def get_device_properties(device=None):
        return _Properties(original(device))

    return get_device_properties
