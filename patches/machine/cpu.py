"""A CPU stand-in for ``torch.cuda`` on machines without an accelerator.

Megatron uses CUDA in its device arguments, streams, random states and process groups. Each row maps such a name to the
CPU: CUDA tensors are CPU tensors, streams are no-ops because operations run in order, the CUDA random state is the CPU
generator's, nccl is gloo.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from mindspeed_cp.patches.machine import streams  # a module import, because undo rebinds copies of its classes
from mindspeed_cp.patches.rows import always, arguments_of, patch, replacement

CPU = torch.device("cpu")
FACTORIES = (
    "tensor as_tensor scalar_tensor empty empty_strided zeros ones full arange linspace eye rand randn randint "
    "randperm empty_like zeros_like ones_like full_like rand_like randn_like randint_like tril_indices triu_indices"
).split()
ON_THE_CPU = "device='cuda' means the CPU, and there is no pinned memory"
STAYS = "a move to 'cuda' stays on the CPU, and there is no pinned memory"
TENSOR_FACTORIES = ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full")


# Devices.


current_device = patch(
    "torch.cuda.current_device", reason="there is one device, and what is made on it lies on the CPU"
)(always(0))
set_device = patch("torch.cuda.set_device", reason="there is one device")(always())
do_nothing = patch(
    "torch.cuda.synchronize",
    "torch.cuda.reset_peak_memory_stats",
    "torch.cuda._lazy_init",
    "torch.cuda.nvtx.range_push",
    "torch.cuda.nvtx.range_pop",
    reason="a build without CUDA raises, and on a CPU there is nothing to wait for, to measure or to mark",
)(always())
is_current_stream_capturing = patch("torch.cuda.is_current_stream_capturing", reason="there are no CUDA graphs")(
    always(False)
)


@patch("torch.cuda.mem_get_info", reason="the memory of the device is that of the machine")
def mem_get_info(adaptor: Any, original: Any, device: Any = None) -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


@replacement("torch.compile", reason="Megatron's fused activations would start the compiler at the first step")
def compile_(adaptor: Any, original: Any) -> Any:
    def compile_(model: Any = None, **kwargs: Any) -> Any:
        return (lambda function: function) if model is None else model

    vars(compile_)["compiles_nothing"] = True
    return compile_


# Streams.


IN_ORDER = "CPU operations run in order"
stream_class = replacement("torch.cuda.Stream", reason=IN_ORDER)(always(streams.Stream))
event_class = replacement("torch.cuda.Event", reason="CPU operations are complete when they return")(
    always(streams.Event)
)
set_stream = patch("torch.cuda.set_stream", reason=IN_ORDER)(always())


@patch("torch.cuda.stream", reason=IN_ORDER)
def stream(adaptor: Any, original: Any, stream: Any) -> AbstractContextManager[Any]:
    return nullcontext(stream)


@replacement("torch.cuda.current_stream", "torch.cuda.default_stream", reason=IN_ORDER)
def only_stream(adaptor: Any, original: Any) -> Callable[..., streams.Stream]:
    stream = streams.Stream()
    return lambda device=None: stream


# Random numbers.


class _Generators:
    """A sequence in which every CUDA device's generator is the CPU's."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


OF_THE_CPU = "CPU operators draw from the CPU generator"
default_generators = replacement("torch.cuda.default_generators", reason=OF_THE_CPU)(always(_Generators()))


@patch("torch.cuda._lazy_call", reason="a build without CUDA queues it for ever")
def lazy_call(adaptor: Any, original: Any, call: Callable[[], None], **kwargs: Any) -> None:
    call()


@patch("torch.cuda.get_rng_state", "torch.cuda.random.get_rng_state", reason=OF_THE_CPU)
def get_rng_state(adaptor: Any, original: Any, device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


@patch("torch.cuda.set_rng_state", "torch.cuda.random.set_rng_state", reason=OF_THE_CPU)
def set_rng_state(adaptor: Any, original: Any, new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


@patch(
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.cuda.random.manual_seed",
    "torch.cuda.random.manual_seed_all",
    reason="a build without CUDA queues the seed and never uses it",
)
def seed_cpu(adaptor: Any, original: Any, seed: int) -> None:
    # Not torch.manual_seed, which calls this function.
    torch.default_generator.manual_seed(seed)


# Tensors. torch.Tensor inherits most of its methods from a base class in C++.


@patch(*(f"torch.{name}" for name in FACTORIES), reason=ON_THE_CPU)
def factory(adaptor: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **_on_the_cpu(kwargs))


@patch(*(f"torch.Tensor.{name}" for name in TENSOR_FACTORIES), reason=ON_THE_CPU, inherited=True)
def tensor_factory(adaptor: Any, original: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return original(self, *args, **_on_the_cpu(kwargs))


@patch(
    "torch.jit._builtins._find_builtin",
    "torch.jit._recursive._find_builtin",
    reason="torch.jit.script knows torch's operators by their objects, and means these functions by their names",
)
def find_builtin(adaptor: Any, original: Any, function: Any) -> str | None:
    name = getattr(function, "__name__", "")
    return f"aten::{name}" if name in FACTORIES and getattr(torch, name) is function else original(function)


@patch("torch.nn.Module.to", reason=STAYS)
def module_to(adaptor: Any, original: Any, self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return to(adaptor, original, self, *args, **kwargs)


@patch("torch.Tensor.to", reason=STAYS, inherited=True)
def to(adaptor: Any, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if args and _names_cuda(args[0]):
        args = (CPU, *args[1:])
    if _names_cuda(kwargs.get("device")):
        kwargs["device"] = CPU
    return original(self, *args, **kwargs)


@patch("torch.Tensor.cuda", "torch.Tensor.pin_memory", reason=STAYS, inherited=True)
def stay(adaptor: Any, original: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


@patch("torch.nn.Module.cuda", reason=STAYS)
def module_cuda(adaptor: Any, original: Any, self: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    return self


@patch(
    "torch.Tensor.type",
    reason="Megatron's optimizers recognise parameters by the name torch.cuda.FloatTensor",
    inherited=True,
)
def type_(adaptor: Any, original: Any, self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return original(self).replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.")
    return original(self, dtype, *args, **kwargs)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.split(":")[0] == "cuda") or type(device) is int


def _on_the_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A factory's keyword arguments, without pinned memory and with the CPU instead of a CUDA device."""
    if kwargs:
        kwargs.pop("pin_memory", None)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
    return kwargs


# Process groups.


@patch("torch.distributed.init_process_group", reason="nccl needs CUDA; gloo runs on the CPU")
def init_process_group(adaptor: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    return _make_group(original, 0, args, kwargs)


@patch("torch.distributed.new_group", reason="nccl needs CUDA; gloo runs on the CPU")
def new_group(adaptor: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    return _make_group(original, 2, args, kwargs)


def _make_group(original: Any, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A process group with gloo instead of nccl; ``place`` is the backend's index among positional arguments."""
    if len(args) > place and "nccl" in str(args[place]):
        args = (*args[:place], "gloo", *args[place + 1 :])
    if "nccl" in str(kwargs.get("backend")):
        kwargs["backend"] = "gloo"
    kwargs = {name: value for name, value in kwargs.items() if name not in ("pg_options", "device_id")}
    return original(*args, **kwargs)


@patch("torch.distributed.barrier", reason="gloo takes no device_ids")
def barrier(adaptor: Any, original: Any, *args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


# Megatron's own checks, which expect Transformer Engine or apex; neither runs on a CPU.


@patch(
    "megatron.core.fp8_utils.quantize_param_shard",
    reason="without Transformer Engine 0.12 raises even when there is no FP8 parameter to quantize",
)
def quantize_param_shard(adaptor: Any, original: Any, model_params: Any, *args: Any, **kwargs: Any) -> Any:
    return original(model_params, *args, **kwargs) if len(model_params) else None


@patch(
    "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
    reason="torch's norms work with sequence parallelism once their parameters are marked for the gradient all-reduce",
)
def norm(adaptor: Any, original: Any, cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
    if not config.sequence_parallel:
        return original(cls, config, *args, **kwargs)
    plain = copy.copy(config)
    plain.sequence_parallel = False
    made = original(cls, plain, *args, **kwargs)
    for parameter in made.parameters():
        parameter.sequence_parallel = True  # the attribute that Megatron's fused norms set
    return made


@patch(
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
    reason="the CUDA and the CPU random state are one here, so a fork always changes the CPU's",
)
@contextmanager
def fork(adaptor: Any, original: Any, self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def is_news(record: logging.LogRecord) -> bool:
        return record.getMessage() != "CPU RNG state changed within GPU RNG context"

    logger.addFilter(is_news)
    try:
        with original(self, *args, **kwargs):
            yield
    finally:
        logger.removeFilter(is_news)


@patch(
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
    reason="counts that are on the CPU already stay tensors, which expert parallelism's all-to-all does not take",
)
def maybe_move_tensor_to_cpu(
    adaptor: Any, original: Any, tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


@patch(
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding.YarnRotaryEmbedding.__init__",
    reason="it enters torch.device(0), which names an accelerator",
)
def yarn(adaptor: Any, original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    given = arguments_of(original, (self, *args), kwargs)
    original(**given | {"use_cpu_initialization": True})


@patch(
    "megatron.core.model_parallel_config.ModelParallelConfig.__post_init__",
    reason="Megatron frees a pipeline stage's output while it is sent, which streams make safe: gloo would send other "
    "numbers",
)
def keep_what_is_sent(adaptor: Any, original: Any, self: Any) -> None:
    original(self)
    self.deallocate_pipeline_outputs = False
