"""Switch the process to Ascend NPUs, and patch what Megatron needs there beyond torch_npu's ``transfer_to_npu``.

Each row says which torch_npu releases need it; "every release" means all whose sources were read, 2.5 to 2.13. Without
the patch each case failed on torch_npu 2.13.0 (tests/ascend), unless the row says otherwise. A name that a real
MindSpeed has patched already is left to it.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from mindspeed_cp.kernels.npu_setup import unavailable
from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.machine import checkout, cpu
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.rows import Row, always, patch, replacement, rows_of

CAPABILITY = (8, 0)  # of the first NVIDIA GPUs with bfloat16, which NPUs have too


def prepare_npu() -> None:
    """Make code for cuda and nccl run on NPUs and HCCL, through torch_npu's own contrib.transfer_to_npu.

    Must be called before Megatron is imported. Apex is not needed; Ascend's apex, if installed, is not changed.

    Raises:
        ValueError: CANN, torch_npu or the device is missing; the message says what to install and source.
    """
    reason = unavailable()
    if reason:
        raise ValueError(f"the NPU cannot be used here: {reason}")
    import_module("torch_npu.contrib.transfer_to_npu")


EVERY = "every release"


def npu_patches(when: Callable[[], str]) -> list[Patch]:
    """The table; ``when`` is () -> "" if an NPU is in use, else why nothing here is needed."""
    return _left_to_mindspeed(rows_of(sys.modules[__name__]), when)


def npu_checkout_patches(when: Callable[[], str]) -> list[Patch]:
    """Further patches for a Megatron-LM checkout, which can be imported after the patches of ``libraries``."""
    return _left_to_mindspeed(CHECKOUT, when)


def _left_to_mindspeed(rows: Iterable[Row], when: Callable[[], str]) -> list[Patch]:
    def unneeded(made: Patch) -> Callable[[], str]:
        return lambda: when() or by_mindspeed(made.target) or made.when()

    return [replace(made, when=unneeded(made)) for row in rows for made in row.patches(None)]


def by_mindspeed(target: str) -> str:
    """Why a name is left alone: its value, or the class that has it, comes from a real MindSpeed; else ""."""
    parts = target.split(".")
    owner: Any = None
    for part in parts:
        owner = sys.modules.get(part) if owner is None else getattr(owner, part, None)
        module = getattr(owner, "__globals__", {}).get("__name__") or getattr(owner, "__module__", None) or ""
        if not inspect.ismodule(owner) and str(module).split(".")[0] == "mindspeed":
            return "MindSpeed has patched it"
    return ""


def _npu() -> Any:
    return import_module("torch_npu").npu


# Names of torch that are different or missing on an NPU.

compile_ = replace(
    cpu.compile_,
    reason=f"{EVERY}: Megatron's fused activations would start inductor, which needs triton-ascend on an NPU",
)


@patch(
    "torch.Tensor.type",
    reason=f"{EVERY}: Megatron's gradient clipping and optimizers compare it with torch.cuda.FloatTensor, and it says "
    "torch.npu",
    inherited=True,  # torch.Tensor inherits it from a base class in C++
)
def type_(adaptor: Any, original: Any, self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return original(self).replace("torch.npu.", "torch.cuda.")
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.npu.")
    return original(self, dtype, *args, **kwargs)


class _Generators:
    """torch_npu's current default generators; torch_npu replaces the tuple when the NPU is first used."""

    def _now(self) -> Any:
        npu = _npu()
        npu._lazy_init()
        return npu.default_generators

    def __getitem__(self, index: int) -> Any:
        return self._now()[index]

    def __len__(self) -> int:
        return len(self._now())


def generators_follow() -> str:
    """Why the generators are left alone: transfer_to_npu has filled them, or will at the NPU's first use; else ""."""
    queued = getattr(_npu(), "_queued_calls", [])
    waiting = any("default_generators" in getattr(call, "__name__", "") for call, *_ in queued)
    return "this release fills them" if waiting or len(torch.cuda.default_generators) else ""


default_generators = replacement(
    "torch.cuda.default_generators",
    reason="2.5 to 2.9 (read): it stays empty there, and Megatron sets the random state of its entries",
    when=generators_follow,
)(always(_Generators()))


@patch(
    "torch.cuda._lazy_call",
    reason=f"{EVERY}: Megatron sets the random state through it, and before the NPU's first use it queues the call for "
    "ever",
)
def lazy_call(adaptor: Any, original: Any, call: Callable[[], None], **kwargs: Any) -> None:
    _npu()._lazy_call(call)


@patch(
    "torch.distributed.all_reduce",
    reason=f"{EVERY}: HCCL has no float64 reductions, and Megatron adds up its start times in float64: reduced in "
    "float32",
)
def all_reduce(adaptor: Any, original: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if tensor.dtype != torch.float64 or tensor.device.type != "npu":
        return original(tensor, *args, **kwargs)
    narrow = tensor.float()
    work = original(narrow, *args, **kwargs)
    if work is not None:
        return _CopyBack(work, narrow, tensor)
    tensor.copy_(narrow)  # in place: the caller reads its own tensor
    return None


class _CopyBack:
    """The handle of an asynchronous reduction in another tensor; ``wait`` copies the result back."""

    def __init__(self, work: Any, narrow: torch.Tensor, tensor: torch.Tensor) -> None:
        self._work = work
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = (tensor, narrow)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        result = self._work.wait(*args, **kwargs)
        if self._pair:
            tensor, narrow = self._pair
            tensor.copy_(narrow)
            self._pair = None
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@patch("torch.cuda.get_device_capability", reason=f"{EVERY}: it is None, and Megatron reads its first entry")
def get_device_capability(adaptor: Any, original: Any, device: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends an environment variable that has the same effect
        return original(device) or CAPABILITY


class _Properties:
    """The properties of an NPU, with an NVIDIA GPU's version numbers if there are none."""

    def __init__(self, properties: Any) -> None:
        self._properties = properties

    major, minor = CAPABILITY

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)

    def __repr__(self) -> str:
        return repr(self._properties)


@patch(
    "torch.cuda.get_device_properties",
    reason=f"{EVERY}: its result has no major and minor, which Megatron compares",
)
def get_device_properties(adaptor: Any, original: Any, device: Any = None) -> _Properties:
    return _Properties(original(device))


mark_nothing = patch(
    "torch.cuda.nvtx.range_push",
    "torch.cuda.nvtx.range_pop",
    "torch.cuda.nvtx.mark",
    reason=f"{EVERY}: it raises where torch was not built for CUDA",
)(always())


# Megatron.

quantize_param_shard = replace(
    cpu.quantize_param_shard,
    reason=f"{EVERY}: without Transformer Engine 0.12's distributed optimizer raises even when there is no FP8 "
    "parameter to quantize",
)
norm = replace(
    cpu.norm,
    reason=f"{EVERY}: it refuses sequence parallelism, with which torch's norms work once their parameters are marked",
)


@patch(
    "megatron.core.utils.local_multi_tensor_l2_norm",
    reason=f"{EVERY}: fixes Megatron: without apex its gradient norm makes the host wait once per parameter; here one "
    "reduction per dtype",
)
def local_multi_tensor_l2_norm(
    adaptor: Any, original: Any, chunk_size: Any, noop_flag: Any, tensor_lists: Any, per_tensor: Any, *args: Any
) -> tuple[torch.Tensor, None]:
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in (tensor for tensors in tensor_lists for tensor in tensors):
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    norms = [torch.stack(torch._foreach_norm(tensors)).float() for tensors in by_dtype.values()]
    return torch.linalg.vector_norm(torch.cat(norms)).reshape(1), None


# In a tuple, so that rows_of() skips them; npu_checkout_patches() uses them.
CHECKOUT = (
    replace(
        checkout.compile_helpers,
        reason=f"{EVERY}: Megatron's Makefile compiles for the first python3 of the PATH, each time; this compiles "
        "once, for the Python that runs",
        when=(without_checkout,),
    ),
    replace(
        checkout.load_fused_kernels,
        reason=f"{EVERY}: it calls nvcc; Megatron has plain versions of these kernels",
    ),
)
