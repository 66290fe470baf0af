"""Which kernel computes: by device, by name, or an error with the reason; and that a new kernel is one row."""

import sys
import types

import pytest
import torch
from kernel_cases import CASES, check_block

from mindspeed_cp.kernels import KERNELS, KernelRow, merge_function, select_kernel
from mindspeed_cp.kernels.blockwise import BlockwiseKernel
from mindspeed_cp.notices import ContextParallelWarning
from mindspeed_cp.softmax import merge_attention


@pytest.fixture(autouse=True)
def fresh_choice():
    select_kernel.cache_clear()
    yield
    select_kernel.cache_clear()


@pytest.mark.filterwarnings("ignore::mindspeed_cp.notices.ContextParallelWarning")
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
    kernel = types.SimpleNamespace(name="dummy", merge=lambda *args: None)
    assert merge_function(kernel, fused=True) is kernel.merge
    assert merge_function(kernel, fused=False) is merge_attention


def test_a_missing_fused_update_is_announced():
    with pytest.warns(ContextParallelWarning, match="--use-fused-ring-attention-update changes nothing: kernel cpu"):
        assert merge_function(select_kernel("cpu", "cpu"), fused=True) is merge_attention


class DummyKernel(BlockwiseKernel):
    """The documented ten lines: a name, native_bands, forward and backward."""

    name = "dummy"
    blocks = 0

    def forward(self, *args, **kwargs):
        DummyKernel.blocks += 1
        return super().forward(*args, **kwargs)


def test_a_new_kernel_is_a_module_and_a_row(monkeypatch):
    module = types.ModuleType("dummy_kernel")
    module.build, module.unavailable = DummyKernel, lambda: ""
    monkeypatch.setitem(sys.modules, "dummy_kernel", module)
    monkeypatch.setitem(KERNELS, "dummy", KernelRow("cpu", "dummy_kernel", automatic=False))
    kernel = select_kernel("dummy", "cpu")
    for case in CASES:
        check_block(kernel, case, torch.float64)
    assert DummyKernel.blocks == len(CASES)
    module.unavailable = lambda: "its chip is missing."
    select_kernel.cache_clear()
    with pytest.raises(ValueError, match="--cp-kernel dummy cannot be used here: its chip is missing."):
        select_kernel("dummy", "cpu")


def test_a_new_device_finds_its_kernel_by_itself(monkeypatch):
    module = types.ModuleType("dummy_kernel")
    module.build, module.unavailable = DummyKernel, lambda: ""
    monkeypatch.setitem(sys.modules, "dummy_kernel", module)
    monkeypatch.setitem(KERNELS, "dummy", KernelRow("xpu", "dummy_kernel"))
    assert select_kernel(None, "xpu").name == "dummy"
