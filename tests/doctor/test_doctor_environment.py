"""The doctor on variables, interfaces and ports: each finding has the line to add."""

import re
import socket
from pathlib import Path

import pytest

from mindspeed_cp.doctor import environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only


def only(findings, level):
    (found,) = [finding for finding in findings if finding.level == level]
    return found


def todos(findings):
    return {finding.text.split("=")[0].split(" ")[0]: finding.todo for finding in findings}


def test_missing_and_odd_variables_have_the_line_to_add():
    assert todos(environment.variables({}, {}, "npu"))["TASK_QUEUE_ENABLE"] == "export TASK_QUEUE_ENABLE=2"
    assert todos(environment.variables({}, {}, "cpu")) == {"OMP_NUM_THREADS": "export OMP_NUM_THREADS=1"}
    odd = {"OMP_NUM_THREADS": "1", "ASCEND_LAUNCH_BLOCKING": "1", "HCCL_BUFFSIZE": "big", "RANK": "3"}
    odd["MINDSPEED_CP_DEVICE"] = "tpu"
    found = list(environment.variables(odd, {}, "cpu"))
    assert todos(found) == {
        "ASCEND_LAUNCH_BLOCKING": "unset ASCEND_LAUNCH_BLOCKING",
        "HCCL_BUFFSIZE": "unset HCCL_BUFFSIZE",
        "MINDSPEED_CP_DEVICE": "unset MINDSPEED_CP_DEVICE",
        "RANK": "unset RANK",
    }
    assert [finding.level for finding in found] == ["warning", "problem", "problem", "warning"]


def test_variables_that_the_launch_sets_win_and_are_mended_in_its_command():
    shell = {"ASCEND_LAUNCH_BLOCKING": "1", "RANK": "3", "MASTER_PORT": "x"}
    own = {"OMP_NUM_THREADS": "4", "ASCEND_LAUNCH_BLOCKING": "0", "RANK": "0", "MASTER_PORT": "29511"}
    assert list(environment.variables(shell, own, "cpu")) == []
    assert [finding.text for finding in environment.findings(shell, own, "cpu")][-1].startswith("port 29511 is ")
    own = {"OMP_NUM_THREADS": "0", "NCCL_P2P_DISABLE": "1", "GLOO_SOCKET_IFNAME": "none7"}
    found = todos(environment.findings({}, own, "cpu"))
    assert found["OMP_NUM_THREADS"] == "begin the command with OMP_NUM_THREADS=1"
    assert found["NCCL_P2P_DISABLE"] == "leave NCCL_P2P_DISABLE out of the command"
    assert found["GLOO_SOCKET_IFNAME"].startswith("begin the command with GLOO_SOCKET_IFNAME=")


def test_the_wanted_variables_are_those_of_the_launch_scripts():
    text = (ROOT / "scripts" / "launch" / "common.sh").read_text()
    assert "put CUDA_DEVICE_MAX_CONNECTIONS 1" in text
    for name, part in (("npu", "npu)"), ("cpu", "cpu)")):
        block = text.split("put CUDA_DEVICE_MAX_CONNECTIONS 1")[1].split(part)[1].split(";;")[0]
        put = dict(re.findall(r'put (\w+) ("[^"]*"|\S+)', block))
        for variable, (value, _) in environment.WANTED[name].items():
            if variable not in ("CUDA_DEVICE_MAX_CONNECTIONS", "HCCL_EXEC_TIMEOUT"):
                assert put[variable] == value
        assert "HCCL_EXEC_TIMEOUT" in put or name == "cpu"


def test_a_port_in_use_is_a_problem_with_a_free_one():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        number = other.getsockname()[1]
        (found,) = environment.meeting({"MASTER_PORT": str(number)}, {})
        assert found.level == "problem" and f"port {number} is in use" in found.text
        free = int(found.todo.removeprefix("export MASTER_PORT="))
    assert environment.port("localhost", free).level == "ok" and free != number


def test_a_port_of_another_host_is_not_said_to_be_free(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", {"node0": "10.0.0.1", socket.gethostname(): "10.0.0.2"}.__getitem__)
    (found,) = environment.meeting({"MASTER_ADDR": "node0", "MASTER_PORT": "29511"}, {})
    assert found.level == "note" and found.text.startswith("whether port 29511 is free can be said on node0 alone")


@pytest.mark.parametrize("number", [0, 65_536, 295_000])
def test_a_number_that_is_no_port_is_a_problem(number):
    found = environment.port("localhost", number)
    assert found.level == "problem" and f"port {number} is not one of 1 to 65535" in found.text


def test_gloo_without_a_usable_interface_is_named(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "down0"), (3, "eth0")])
    assert not environment._has_address("none7") and environment._usable(["none7"]) == "lo"
    monkeypatch.setattr(environment, "_has_address", lambda name: name != "down0")
    (found,) = environment.interfaces({"GLOO_SOCKET_IFNAME": "ib7"}, {}, "cpu")
    assert found.level == "problem" and found.todo.startswith("export GLOO_SOCKET_IFNAME=eth0;")
    assert list(environment.interfaces({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth"}, {}, "cuda")) == []
    assert list(environment.interfaces({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^lo"}, {}, "cuda")) == []
    assert only(
        environment.interfaces({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=eth"}, {}, "cuda"), "problem"
    )

    def unknown(*arguments):
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    (found,) = environment.interfaces({}, {}, "cpu")
    assert found.level == "warning" and found.todo == "export GLOO_SOCKET_IFNAME=eth0"
