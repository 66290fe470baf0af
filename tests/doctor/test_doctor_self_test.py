"""The doctor's self test: one real run, and what is said of runs that fail."""

import pytest

from mindspeed_cp.doctor import installed, self_test

pytestmark = pytest.mark.cpu_only


def test_the_self_test_computes_every_algorithm_and_measures_two_rates():
    from mindspeed_cp.settings.algorithms import ALGORITHMS

    (result,) = installed.ask("mindspeed_cp.doctor.self_test", "cpu")
    titles = {title.partition(" (")[0] for title in result["errors"]}
    assert titles == {row.title for row in ALGORITHMS.values()} | {"Double Ring"}
    assert 0 < max(result["errors"].values()) < 1e-13
    assert all(1e6 < result["rates"][name] < 1e12 for name in ("all-to-all", "ring"))
    findings = list(self_test.judged(result))
    assert [finding.level for finding in findings] == ["ok"] * 3


RESULT = {"device": "cuda", "ranks": 2, "dtype": "bfloat16", "limit": 3e-2, "rates": {}}


@pytest.mark.parametrize("error", [0.5, float("inf"), float("nan")])
def test_an_algorithm_that_computes_something_else_is_a_problem(error):
    right, wrong = sorted(
        self_test.judged(RESULT | {"errors": {"Ulysses": 0.01, "Ring": error}}), key=lambda finding: finding.level
    )
    assert "Ulysses" in right.text and right.level == "ok"
    assert "Ring" in wrong.text and wrong.level == "problem" and "self_test cuda" in wrong.todo


def test_ranks_that_find_no_interface_or_do_not_answer_are_a_problem(monkeypatch):
    (found,) = self_test.judged(RESULT | {"device": "cpu", "error": "rank 0: RuntimeError: [gloo] no usable interface"})
    assert found.level == "problem" and found.todo.startswith("export GLOO_SOCKET_IFNAME=lo")
    (found,) = self_test.judged(RESULT | {"error": "rank 1: no answer within 120 s"})
    assert found.level == "problem" and "self_test cuda" in found.todo

    def fails(*arguments):
        raise RuntimeError("No module named x")

    monkeypatch.setattr(self_test, "ask", fails)
    (found,) = self_test.findings("cpu")
    assert found.level == "problem" and "No module named x" in found.text


@pytest.mark.parametrize(
    "count, runs", [(1, [("cuda", 1), ("cpu", 4)]), (2, [("cuda", 2)]), (3, [("cuda", 2)]), (8, [("cuda", 4)])]
)
def test_the_devices_decide_what_the_self_test_runs(monkeypatch, count, runs):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert self_test.plan("cuda") == runs
    assert self_test.plan("cpu") == [("cpu", 4)]
    assert {"Ulysses", "Ring", "KV all-gather"} == set(self_test.settings(2))
