"""The bed itself: every task queue, both ways of batched messages, and torch's autoload switched off."""

import re
import subprocess
import sys

import bed
import pytest
from table import CANN_9, CHECKS, table


@pytest.mark.slow
@pytest.mark.parametrize("queue, cann", [("1", ""), ("2", ""), ("0", "9"), ("2", "9")])
def test_training_passes_on_every_task_queue_and_with_grouped_messages(queue, cann):
    server = bed.Server(TASK_QUEUE_ENABLE=queue, NPU_BED_CANN=cann)
    try:
        groups = server.run("groups_messages")[0]
        if cann and not groups:
            pytest.skip(f"torch_npu {bed.RELEASE} has one implementation of batched messages")
        assert groups == bool(cann)
        for name in CANN_9:
            CHECKS[name](server)
    finally:
        server.close()


def test_the_table_in_the_docs_has_the_rows_of_the_script():
    text = (bed.REPOSITORY / "docs/devices.md").read_text()
    for row in table([])[2:]:
        assert f"\n{row.rpartition(' |')[0]}" in text, row


PROGRAM = "import torch_npu, torch; print(torch.ones(2, device='npu').sum().item())"


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_the_bed_computes_with_and_without_torchs_autoload(autoload):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=bed.environment(TORCH_DEVICE_BACKEND_AUTOLOAD=autoload),
    )
    assert run.stdout.split()[-1:] == ["2.0"], run.stderr


@pytest.mark.slow
def test_verify_npu_asks_the_device_inside_its_ranks():
    """What docs/npu.md tells a user to run first was red here: ranks computed on the CPU beside a real torch_npu."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "npu"]
        + ["tests/kernels/test_kernel_parity.py"],
        capture_output=True,
        text=True,
        cwd=bed.REPOSITORY,
        env=bed.environment(),
    )
    assert run.returncode == 0 and re.search("[34] passed", run.stdout), run.stdout[
        -3000:
    ]  # one is of a newer operator
