"""Every test of this folder needs torch_npu on the test bed: bash scripts/test_npu_contract.sh."""

import sys
from pathlib import Path

import bed
import pytest

OLD_MEGATRON = Path(sys.prefix, "megatron-core-0.12.1")


def pytest_collection_modifyitems(config, items):
    why = bed.missing()
    for item in items:
        if Path(item.path).parent != bed.HERE:
            continue
        item.add_marker("npu_contract")
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        elif item.get_closest_marker("slow") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="a longer run: bash scripts/test_npu_contract.sh, or --full"))


@pytest.fixture(scope="module", params=["default", "0.12.1"])
def server(request):
    """The test bed's server with the environment's megatron-core, and with the oldest supported one (--full)."""
    folders = []
    if request.param != "default":
        if not request.config.getoption("--full"):
            pytest.skip("the oldest megatron-core: bash scripts/test_npu_contract.sh, or --full")
        if not OLD_MEGATRON.is_dir():
            pytest.skip(f"no megatron-core 0.12.1 in {OLD_MEGATRON}: bash scripts/test.sh installs it")
        folders = [OLD_MEGATRON]
    started = bed.Server(*folders)
    yield started
    started.close()
