"""Which kernel computes: by device, by name, or an error with the reason; and that a new kernel is one row."""

import sys
import types

import pytest
import torch
from contributing import diff_of, row_of
from kernel_cases import CASES, check_block, forward
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_cp import kernels
from mindspeed_cp.attention.merging import merge_function, plain_merge
from mindspeed_cp.kernels import KERNELS, KernelRow, select_kernel
from mindspeed_cp.kernels.base import KernelOptions
from mindspeed_cp.sequence.blocks import Block
from mindspeed_cp.settings.notices import ContextParallelWarning


@pytest.fixture(autouse=True)
def fresh_choice():
    select_kernel.cache_clear()
    yield
    select_kernel.cache_clear()


@pytest.mark.filterwarnings("ignore::mindspeed_cp.settings.notices.ContextParallelWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cpu", "blockwise"])
def test_cpu_kernels_equal_dense_attention(name, dtype):
    kernel = select_kernel(name, "cpu")
    for case in CASES:
        if kernel.native_bands or case.block.lower is None or case.block.num_pieces == 1:
            check_block(kernel, case, dtype, strided=True)


def test_the_device_chooses_the_kernel():
    assert select_kernel(None, "cpu").name == "cpu"
    assert {row.device_type for row in KERNELS.values() if row.automatic} == {"cpu", "cuda", "npu"}


def test_a_kernel_can_be_chosen_by_name():
    assert select_kernel("blockwise", "cpu").name == "blockwise"
    assert select_kernel("blockwise", "meta").name == "blockwise"


@pytest.mark.parametrize(
    "name, device_type, message",
    [
        ("flash", "cpu", "--cp-kernel flash is not known; choose one of cpu, cuda, cudnn, npu, blockwise"),
        ("npu", "cpu", "--cp-kernel npu serves npu tensors, and these are on cpu; leave --cp-kernel out"),
        (None, "xpu", "no attention kernel serves device xpu; choose --cp-kernel blockwise"),
    ],
)
def test_a_wrong_choice_names_flag_value_rule_and_way_out(name, device_type, message):
    with pytest.raises(ValueError) as error:
        select_kernel(name, device_type)
    assert message in str(error.value)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "name, device_type, reason",
    [
        ("npu", "npu", "torch_npu"),
        (None, "npu", "torch_npu"),
        ("cudnn", "cuda", "nvidia-smi"),
        (None, "cuda", "nvidia-smi"),
    ],
)
def test_an_unavailable_kernel_raises_with_the_reason(monkeypatch, name, device_type, reason):
    """Also the automatic choice: no other kernel steps in."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # makes the import fail, installed or not
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--cp-kernel {name or device_type} cannot be used here: .*{reason}"):
        select_kernel(name, device_type)


def test_the_fused_update_is_used_where_the_kernel_has_one():
    kernel = types.SimpleNamespace(name="dummy", has_fused_merge=True, merge=lambda *args: None)
    assert merge_function(kernel, fused=True) is kernel.merge
    assert merge_function(kernel, fused=False) is plain_merge


def test_a_missing_fused_update_is_announced():
    with pytest.warns(ContextParallelWarning, match="--use-fused-ring-attention-update changes nothing: kernel cpu"):
        assert merge_function(select_kernel("cpu", "cpu"), fused=True) is plain_merge


@pytest.fixture
def mine(monkeypatch):
    """The module and the row of CONTRIBUTING.md."""
    name, row = row_of("a kernel", "mindspeed_cp/kernels/__init__.py", kernels)
    module = types.ModuleType(row.module)
    exec(diff_of("a kernel")["mindspeed_cp/kernels/mine.py"], vars(module))
    monkeypatch.setitem(sys.modules, row.module, module)
    monkeypatch.setitem(KERNELS, name, row)
    return module


def test_a_new_kernel_is_a_module_and_a_row(mine, monkeypatch):
    kernel = select_kernel("mine", "cpu")
    for case in CASES:
        check_block(kernel, case, torch.float64)
    assert mine.MyKernel.blocks == len(CASES)
    monkeypatch.setattr(mine, "unavailable", lambda: "its chip is missing.")
    select_kernel.cache_clear()
    with pytest.raises(ValueError, match="--cp-kernel mine cannot be used here: its chip is missing."):
        select_kernel("mine", "cpu")


def test_a_new_device_finds_its_kernel_by_itself(mine, monkeypatch):
    monkeypatch.setitem(KERNELS, "mine", KernelRow("xpu", mine.__name__))
    assert select_kernel(None, "xpu").name == "mine"


def test_a_dense_mask_is_never_made_once_for_each_head():
    """The largest tensor that the CPU kernel makes stays that of one mask, however many heads there are."""
    heads, length = 16, 64
    query = torch.randn(length, 1, heads, 8)
    hidden = torch.rand(1, length, length) < 0.5
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.untyped_storage().nbytes())
            return result

    block = Block((0, length), (0, length))
    with Sizes():
        forward(select_kernel("cpu"), query, query, query, block, KernelOptions(1.0), hidden)
    assert max(sizes) <= max(4 * length * length, query.numel() * 4)
