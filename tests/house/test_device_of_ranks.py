"""Ranks are forked from servers that never read pytest's options: they are told the device of the session."""

import os
import subprocess
import sys
from pathlib import Path

import alone
import distributed
import pytest


def device_of(rank):
    return distributed.device_type()


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(distributed, "_device_type", "cuda")


@pytest.mark.cpu_only
def test_ranks_of_a_pool_compute_on_the_device_of_the_session(on_cuda):
    assert distributed.run_ranks(2, device_of, fresh=True, imported=("gloo_for_cuda",)) == ["cuda"] * 2


@pytest.mark.cpu_only
def test_a_process_alone_computes_on_the_device_of_the_session(on_cuda):
    assert alone.run_alone(device_of, 0) == "cuda"


def test_a_sitecustomize_of_the_test_bed_is_not_hidden_by_that_of_the_tests(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import gc\nprint('behind', gc.get_threshold()[0])")
    helpers = Path(distributed.__file__).parent / "site"
    path = os.pathsep.join([str(helpers), str(helpers), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", ""], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "behind 100000\n", done.stderr
