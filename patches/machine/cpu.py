"""A stand-in for ``torch.cuda`` on machines without an accelerator.

Megatron names CUDA in its device arguments, streams, random states and process groups. Each row gives one such name its
meaning on a CPU: the current device is the CPU, streams are in order by nature, the CUDA random state is the CPU
generator's, nccl is gloo.
"""

import copy
import logging
from contextlib import contextmanager, nullcontext
from functools import wraps

import torch
from mindspeed_cp.patches.manager import Patch

CPU = torch.device("cpu")
FACTORIES = (
    "tensor",
    "as_tensor",
    "scalar_tensor",
    "empty",
    "empty_strided",
    "zeros",
    "ones",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "tril_indices",
    "triu_indices",
)
TENSOR_FACTORIES = ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full")


def device_patches(when):
    """The table; ``when`` is () -> "" on a machine without accelerator, else why no stand-in is needed."""
    # torch.Tensor has most of its methods from a base class in C++.
    return [
        Patch(target, build, reason, when, inherited=target.startswith("torch.Tensor."))
        for target, build, reason in (
            *_device_rows(),
            *_stream_rows(),
            *_random_rows(),
            *_tensor_rows(),
            *_distributed_rows(),
        )
    ] + _megatron_patches(when)


def _device_rows():
    yield "torch.cuda.current_device", _always(CPU), "tensors are made on the current device: the CPU"
    yield "torch.cuda.set_device", _always(None), "there is one device"
    yield "torch.cuda.synchronize", _always(None), "the CPU has nothing to wait for"
    yield "torch.cuda.reset_peak_memory_stats", _always(None), "there is no CUDA memory to measure"
    yield "torch.cuda._lazy_init", _always(None), "a build without CUDA raises when it is initialised"
    yield "torch.cuda.is_current_stream_capturing", _always(False), "there are no CUDA graphs"
    yield "torch.cuda.nvtx.range_push", _always(None), "a build without CUDA has no NVTX"
    yield "torch.cuda.nvtx.range_pop", _always(None), "a build without CUDA has no NVTX"
    yield "torch.compile", _compile, "Megatron's fused activations would start the compiler at the first step"


def _stream_rows():
    yield "torch.cuda.Stream", lambda original: Stream, "CPU operations run in order"
    yield "torch.cuda.Event", lambda original: Event, "CPU operations are complete when they return"
    yield "torch.cuda.stream", lambda original: lambda stream: nullcontext(stream), "CPU operations run in order"
    yield "torch.cuda.set_stream", _always(None), "CPU operations run in order"
    yield "torch.cuda.current_stream", _stream, "CPU operations run in order"
    yield "torch.cuda.default_stream", _stream, "CPU operations run in order"


def _random_rows():
    yield "torch.cuda.default_generators", lambda original: _Generators(), "CPU operators draw from the CPU generator"
    yield (
        "torch.cuda._lazy_call",
        lambda original: lambda call, **kwargs: call(),
        "a build without CUDA queues it for ever",
    )
    for module in ("torch.cuda", "torch.cuda.random"):
        yield (
            f"{module}.get_rng_state",
            lambda original: lambda device=None: torch.get_rng_state(),
            "CPU operators draw from the CPU generator",
        )
        yield (
            f"{module}.set_rng_state",
            lambda original: lambda new_state, device=None: torch.set_rng_state(new_state),
            "CPU operators draw from the CPU generator",
        )
        for name in ("manual_seed", "manual_seed_all"):
            yield (
                f"{module}.{name}",
                lambda original: _seed_cpu,
                "a build without CUDA queues the seed and never uses it",
            )


def _tensor_rows():
    for name in FACTORIES:
        yield f"torch.{name}", _without_cuda_device, "device='cuda' means the CPU, and there is no pinned memory"
    for name in TENSOR_FACTORIES:
        yield f"torch.Tensor.{name}", _without_cuda_device, "device='cuda' means the CPU, and there is no pinned memory"
    for name in ("torch.Tensor.to", "torch.nn.Module.to"):
        yield name, _to, "a move to 'cuda' stays on the CPU"
    yield "torch.Tensor.cuda", _identity, "a move to 'cuda' stays on the CPU"
    yield "torch.nn.Module.cuda", _identity, "a move to 'cuda' stays on the CPU"
    yield "torch.Tensor.pin_memory", _identity, "there is no pinned memory"
    yield "torch.Tensor.type", _type, "Megatron's optimizers recognise parameters by the name torch.cuda.FloatTensor"


def _distributed_rows():
    yield "torch.distributed.init_process_group", _gloo(0), "nccl needs CUDA; gloo runs on the CPU"
    yield "torch.distributed.new_group", _gloo(2), "nccl needs CUDA; gloo runs on the CPU"
    yield "torch.distributed.barrier", _without("device_ids"), "gloo takes no device_ids"


def _megatron_patches(when):
    """What Megatron itself asks of Transformer Engine or apex, neither of which runs on a CPU."""
    return [
        Patch(
            "megatron.core.fp8_utils.quantize_param_shard",
            _accept_no_parameters,
            "without Transformer Engine 0.12 raises even when there is no FP8 parameter to quantize",
            when,
        ),
        Patch(
            "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
            _norm_with_sequence_parallel,
            "torch's norms work with sequence parallelism once their parameters are marked for the gradient all-reduce",
            when,
        ),
        Patch(
            "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
            _fork_without_warning,
            "the CUDA and the CPU random state are one here, so a fork always changes the CPU's",
            when,
        ),
        Patch(
            "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
            _as_numpy_on_cpu,
            "counts that are on the CPU already stay tensors, which expert parallelism's all-to-all does not take",
            when,
        ),
    ]


def _as_numpy_on_cpu(original):
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    return maybe_move_tensor_to_cpu


class Stream:
    """A queue that is always empty."""

    def __init__(self, *args, **kwargs):
        self.device = CPU
        self.cuda_stream = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def query(self):
        return True

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        return None

    def wait_event(self, event):
        return None

    def wait_stream(self, stream):
        return None


class Event:
    """A moment that has passed."""

    def __init__(self, *args, **kwargs):
        pass

    def elapsed_time(self, end_event):
        return 0.0

    def query(self):
        return True

    def record(self, stream=None):
        return None

    def synchronize(self):
        return None

    def wait(self, stream=None):
        return None


class _Generators:
    """Every CUDA device's generator is the CPU's."""

    def __getitem__(self, device):
        return torch.default_generator

    def __len__(self):
        return 1


def _always(value):
    return lambda original: lambda *args, **kwargs: value


def _identity(original):
    return lambda self, *args, **kwargs: self


def _stream(original):
    stream = Stream()
    return lambda *args, **kwargs: stream


def _compile(original):
    def compile_(model=None, **kwargs):
        return (lambda function: function) if model is None else model

    compile_.compiles_nothing = True
    return compile_


def _seed_cpu(seed):
    # Not torch.manual_seed: that calls this function.
    torch.default_generator.manual_seed(seed)


def _names_cuda(device):
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.split(":")[0] == "cuda") or (type(device) is int)


def _without_cuda_device(original):
    @wraps(original)
    def factory(*args, **kwargs):
        if kwargs:
            kwargs.pop("pin_memory", None)
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
        return original(*args, **kwargs)

    return factory


def _to(original):
    @wraps(original)
    def to(self, *args, **kwargs):
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        return original(self, *args, **kwargs)

    return to


def _type(original):
    @wraps(original)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        return original(
            self, dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, *args, **kwargs
        )

    return type_


def _gloo(backend_index):
    def build(original):
        @wraps(original)
        def make(*args, **kwargs):
            if len(args) > backend_index and "nccl" in str(args[backend_index]):
                args = (*args[:backend_index], "gloo", *args[backend_index + 1 :])
            if "nccl" in str(kwargs.get("backend")):
                kwargs["backend"] = "gloo"
            kwargs.pop("pg_options", None)
            kwargs.pop("device_id", None)
            return original(*args, **kwargs)

        return make

    return build


def _without(name):
    def build(original):
        @wraps(original)
        def call(*args, **kwargs):
            kwargs.pop(name, None)
            return original(*args, **kwargs)

        return call

    return build


def _accept_no_parameters(original):
    @wraps(original)
    def quantize_param_shard(model_params, *args, **kwargs):
        return original(model_params, *args, **kwargs) if len(model_params) else None

    return quantize_param_shard


def _norm_with_sequence_parallel(original):
    def new(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True  # Megatron's own mark, as its fused norms set it
        return norm

    return new


def _fork_without_warning(original):
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    expected = "CPU RNG state changed within GPU RNG context"

    @contextmanager
    def fork(self, *args, **kwargs):
        drop = lambda record: record.getMessage() != expected  # noqa: E731
        logger.addFilter(drop)
        try:
            with original(self, *args, **kwargs):
                yield
        finally:
            logger.removeFilter(drop)

    return fork
