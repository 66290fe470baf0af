"""What the NPU kernel does not do: make the host wait, or make a tensor of sequence squared elements."""

import pytest
import torch
from kernel_cases import BY_NAME, backward, forward, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_cp.kernels import npu_calls
from mindspeed_cp.kernels.base import KernelOptions
from mindspeed_cp.sequence.blocks import Block


class HostSynchronisations(TorchDispatchMode):
    """Counts the operators for which the host waits on a device: a number or a copy on the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        to_host = name == "_to_copy" and "cpu" in str((kwargs or {}).get("device"))
        waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2")
        self.count += to_host or name in waits
        return function(*args, **(kwargs or {}))


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["full", "causal", "band_window", "band_left_only", "packed_causal", "packed_full"])
def test_no_block_makes_the_host_wait_for_the_device(kernel, name, monkeypatch):
    """The lanes' check inside the fake is no part of it: the operators are replaced after one warm-up call."""
    case, options = BY_NAME[name], KernelOptions(0.25)
    query, key, value, grad_out, _ = tensors(case, torch.float32, "cpu")
    out, lse, rng = forward(kernel, query, key, value, case.block, options)
    recorded = {
        operator: getattr(kernel._npu, operator) for operator in ("npu_fusion_attention", "npu_fusion_attention_grad")
    }
    with HostSynchronisations() as mode:

        def outside(operator):
            def call(*args, **kwargs):
                before = mode.count
                result = recorded[operator](*args, **kwargs)
                mode.count = before
                return result

            return call

        for operator in recorded:
            monkeypatch.setattr(kernel._npu, operator, outside(operator))
        forward(kernel, query, key, value, case.block, options)
        backward(kernel, grad_out, query, key, value, out, lse, case.block, options, rng)
    assert mode.count == 0


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


LONG = 2112  # its square exceeds the one compressed mask of 2048 x 2048


@pytest.mark.parametrize(
    "block",
    [
        Block((0, LONG), (0, LONG), None, 0),
        Block((0, 1024, LONG), (0, 1024, LONG), None, 0),
        Block((0, LONG), (0, LONG), 0, None),
        Block((0, LONG), (0, LONG)),
    ],
    ids=["causal", "packed", "band", "full"],
)
def test_no_tensor_of_sequence_squared_elements_exists(kernel, block, where):
    npu_calls.compressed_mask.cache_clear()
    query = torch.randn(LONG, 1, 1, 16, dtype=torch.bfloat16, device=where)
    with LargestTensor() as mode, torch.no_grad():
        out, lse, rng = forward(kernel, query, query, query, block, KernelOptions(0.25))
        backward(kernel, out, query, query, query, out, lse, block, KernelOptions(0.25), rng)
    assert LONG * 16 <= mode.largest <= 2048 * 2048 < LONG * LONG
