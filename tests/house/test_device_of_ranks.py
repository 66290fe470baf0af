"""Ranks are forked from servers that never read pytest's options: they are told the device of the session."""

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
