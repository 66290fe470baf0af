"""The NPU kernel on the fake of every release, or with --device npu on the device."""

import fake_torch_npu
import pytest

from mindspeed_cp.kernels import npu

VARIANTS = [(release, "documents") for release in fake_torch_npu.RELEASES]
VARIANTS += [(release, "heads") for release in fake_torch_npu.UNORDERED_RELEASES]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(variant))
def torch_npu(request, device):
    """The fake of every release, or once the real module."""
    if device == "npu":
        if request.param != VARIANTS[0]:
            pytest.skip("a real torch_npu is one release")
        yield pytest.importorskip("torch_npu")
        return
    with fake_torch_npu.installed(*request.param) as module:
        yield module


@pytest.fixture
def kernel(torch_npu):
    return npu.build()


@pytest.fixture
def where(device):
    return "npu" if device == "npu" else "cpu"
