"""Options and markers of the test suite; ranks of distributed tests are started once per world size and end here."""

import gc
import os
import sys

gc.disable()  # until every test is imported, of which it would take a third of the time

# Several ranks share the cores: one thread each, or they fight. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
paths = [os.path.join(os.path.dirname(__file__), "helpers", "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)
sys.path.insert(0, paths[0])

import distributed
import half_instructions
import pairs
import pytest

LONGEST = (
    "test_attention_exact",
    "test_trainer_parity",
    "test_models",
    "test_adaptor",
    "test_attention_numerics",
    "test_memory",
    "test_trainer",
    "test_two_hosts",
    "test_docs_examples",
    "test_launch",
    "test_failures",
)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda", "npu"],
        default="cpu",
        help="device on which tensors live; npu and cuda run the same parity tests on real accelerators (default: cpu)",
    )
    parser.addoption(
        "--without-half-instructions",
        action="store_true",
        help="as on a processor without instructions for bfloat16 and float16: torch's queries of it answer no",
    )
    parser.addoption("--full", action="store_true", help="take large products whole instead of drawing them by pairs")


def pytest_configure(config):
    config.addinivalue_line("markers", "device(name): needs this accelerator; skipped elsewhere with the reason")
    config.addinivalue_line("markers", "cpu_only: measures or relies on something that only the CPU path has")
    distributed.set_device_type(config.getoption("--device"))
    if config.getoption("--without-half-instructions"):
        half_instructions.ask()
    pairs.take_whole_products(config.getoption("--full"))


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--device")
    # What takes longest comes first, or one of two workers would be left with it at the end.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        needed = item.get_closest_marker("device")
        if needed and needed.args[0] != chosen:
            item.add_marker(pytest.mark.skip(reason=f"needs --device {needed.args[0]}, running with --device {chosen}"))
        if item.get_closest_marker("cpu_only") and chosen != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"a CPU test, running with --device {chosen}"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _stop_ranks():
    """The next module may not need them."""
    yield
    distributed.wake(None)


def pytest_sessionfinish():
    distributed.close_pools()


@pytest.fixture(scope="session")
def device(pytestconfig):
    """Device type of this session: "cpu", "npu" or "cuda"."""
    return pytestconfig.getoption("--device")
