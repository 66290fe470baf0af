"""The NPU's table of patches where there is no NPU: what each replacement does. On torch_npu itself: tests/ascend."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.patches.machine import npu
from mindspeed_cp.patches.manager import PatchManager

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]


class NpuTensor:
    """As much of a float64 tensor on an NPU as all_reduce touches."""

    dtype, device = torch.float64, torch.device("meta")

    def __init__(self, value):
        self.value, self.device = value, SimpleNamespace(type="npu")

    def float(self):
        narrow = NpuTensor(self.value)
        narrow.dtype = torch.float32
        return narrow

    def copy_(self, other):
        self.value = other.value


def hccl(tensor, op=None, async_op=False):
    """A reduction that adds 5, and refuses float64 as HCCL does."""
    if tensor.dtype == torch.float64:
        raise RuntimeError("HCCL allreduce: Unsupported data type at::kDouble")

    def finish():
        tensor.value += 5
        return True

    if async_op:
        return SimpleNamespace(wait=finish, is_completed=lambda: False)
    finish()


def test_float64_is_reduced_in_float32_and_the_caller_reads_its_own_tensor():
    all_reduce, tensor = npu.all_reduce.builder(None)(hccl), NpuTensor(2)
    assert all_reduce(tensor, op="max") is None and tensor.value == 7
    work = all_reduce(tensor, async_op=True)
    assert tensor.value == 7 and not work.is_completed()
    assert work.wait() and tensor.value == 12
    other = SimpleNamespace(dtype=torch.float64, device=SimpleNamespace(type="cpu"))
    with pytest.raises(RuntimeError, match="kDouble"):
        all_reduce(other)  # only what lies on an NPU is touched


def test_type_names_are_cudas_in_both_directions():
    asked = []
    type_ = npu.type_.builder(None)(lambda self, *arguments: asked.append(arguments) or "torch.npu.FloatTensor")
    assert type_(None) == "torch.cuda.FloatTensor"
    type_(None, "torch.cuda.HalfTensor")
    type_(None, torch.float16)
    assert asked == [(), ("torch.npu.HalfTensor",), (torch.float16,)]


def test_properties_and_capability_answer_as_a_gpu_with_bfloat16():
    properties = npu.get_device_properties(None, lambda device: SimpleNamespace(name="Ascend910B2"), 0)
    assert (properties.name, properties.major, properties.minor) == ("Ascend910B2", 8, 0)
    assert npu.get_device_capability(None, lambda device: None) == (8, 0)
    assert npu.get_device_capability(None, lambda device: (9, 0)) == (9, 0)  # TORCH_NPU_DEVICE_CAPABILITY


def test_every_row_says_which_releases_need_it_and_nothing_is_applied_elsewhere():
    tables = npu.npu_patches, npu.npu_checkout_patches
    manager = PatchManager(patch for table in tables for patch in table(lambda: "no NPU is in use"))
    before = torch.Tensor.type, torch.compile, torch.distributed.all_reduce
    manager.apply()
    assert {row.status for row in manager.report()} == {"no NPU is in use"}
    assert all(row.reason.startswith(("every release: ", "2.5 to 2.9 (read): ")) for row in manager.report())
    assert before == (torch.Tensor.type, torch.compile, torch.distributed.all_reduce)


def test_a_name_that_mindspeed_has_patched_is_left_to_it(monkeypatch):
    namespace = {"__name__": "mindspeed.core.megatron_basic.requirements_basic"}
    exec("def dummy_compile(*args, **kwargs): pass", namespace)
    assert npu.by_mindspeed("torch.compile") == ""
    monkeypatch.setattr(torch, "compile", namespace["dummy_compile"])
    assert npu.by_mindspeed("torch.compile") == "MindSpeed has patched it"
    # This project's own answers to MindSpeed's import paths are no MindSpeed.
    namespace["__name__"] = "mindspeed_cp.patches.machine.cpu"
    exec("def _compile(*args, **kwargs): pass", namespace)
    monkeypatch.setattr(torch, "compile", namespace["_compile"])
    assert npu.by_mindspeed("torch.compile") == ""
