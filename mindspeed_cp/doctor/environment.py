"""Environment variables that matter, each with the line to add; network interfaces and the rendezvous port."""

import fcntl
import socket
import struct
from collections.abc import Iterator, Mapping

from mindspeed_cp.doctor.finding import Finding

DEFAULT_PORT = 29500  # torchrun's
# device -> variable -> (value, why); what scripts/launch/common.sh sets.
WANTED = {
    "npu": {
        "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments:True", "long sequences fragment the memory"),
        "TASK_QUEUE_ENABLE": ("2", "operators are enqueued by the thread that computes"),
        "CPU_AFFINITY_CONF": ("1", "threads move away from the cores near their device"),
        "HCCL_CONNECT_TIMEOUT": ("1800", "a slow node breaks the start"),
        "HCCL_EXEC_TIMEOUT": ("1800", "HCCL gives up at another time than Megatron"),
        "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "Megatron asserts it for tensor and sequence parallelism"),
    },
    "cuda": {
        "CUDA_DEVICE_MAX_CONNECTIONS": ("1", "Megatron asserts it, and transfers may not overlap as they should"),
    },
    "cpu": {"OMP_NUM_THREADS": ("1", "several ranks on one machine compete for its cores")},
}
# variable -> (odd values, what they do)
ODD = {
    "ASCEND_LAUNCH_BLOCKING": ({"1"}, "every operator waits for the one before: nothing overlaps"),
    "CUDA_LAUNCH_BLOCKING": ({"1"}, "every kernel waits for the one before: nothing overlaps"),
    "NCCL_P2P_DISABLE": ({"1"}, "GPUs of a node exchange through host memory"),
    "NCCL_IB_DISABLE": ({"1"}, "nodes exchange over TCP"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ({"0"}, "a lost rank makes the others hang"),
    "NCCL_ASYNC_ERROR_HANDLING": ({"0"}, "a lost rank makes the others hang"),
    "CUDA_VISIBLE_DEVICES": ({"", "-1"}, "no GPU is visible"),
    "ASCEND_RT_VISIBLE_DEVICES": ({""}, "no NPU is visible"),
}
NUMBERS = ("HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "OMP_NUM_THREADS", "MASTER_PORT")
INTERFACES = {"cpu": "GLOO_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME", "npu": "HCCL_SOCKET_IFNAME"}
LEFT_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def findings(shell: Mapping[str, str], own: Mapping[str, str], device: str) -> Iterator[Finding]:
    """Findings about the environment of the ranks. Variables that the command itself sets must be changed there.

    Args:
        shell: the variables of this shell.
        own: variables that a launch command sets itself; they take precedence.
        device: the device that this machine uses.
    """
    yield from variables(shell, own, device)
    yield from interfaces(shell, own, device)
    yield from meeting(shell, own)


def _put(name: str, value: str, own: Mapping[str, str]) -> str:
    return f"begin the command with {name}={value}" if name in own else f"export {name}={value}"


def _drop(name: str, own: Mapping[str, str]) -> str:
    return f"leave {name} out of the command" if name in own else f"unset {name}"


def variables(shell: Mapping[str, str], own: Mapping[str, str], device: str) -> Iterator[Finding]:
    """Missing and odd variables."""
    environment = {**shell, **own}
    for name, (value, why) in WANTED[device].items():
        if not environment.get(name):
            yield Finding("warning", f"{name} is not set: {why}", _put(name, value, own))
    for name, (values, what) in ODD.items():
        if environment.get(name) in values:
            yield Finding("warning", f"{name}={environment[name]}: {what}", _drop(name, own))
    for name in NUMBERS:
        value = environment.get(name, "1")
        if not value.isdigit() or int(value) < 1:
            wanted = WANTED[device].get(name)
            way_out = _put(name, wanted[0], own) if wanted else _drop(name, own)
            yield Finding("problem", f"{name}={value} must be a whole number above 0", way_out)
    if environment.get("MINDSPEED_CP_DEVICE", "") not in ("", "cpu"):
        given = environment["MINDSPEED_CP_DEVICE"]
        yield Finding("problem", f"MINDSPEED_CP_DEVICE={given} is not known", _drop("MINDSPEED_CP_DEVICE", own))
    left = [name for name in LEFT_BY_TORCHRUN if name in shell and name not in own]
    if left:
        yield Finding("warning", f"{', '.join(left)} of another launch still in this shell", f"unset {' '.join(left)}")


def interfaces(shell: Mapping[str, str], own: Mapping[str, str], device: str) -> Iterator[Finding]:
    """Whether there is a network interface for the ranks' rendezvous."""
    environment = {**shell, **own}
    known = [name for _, name in socket.if_nameindex()]
    # gloo is always needed: ranks use it to agree on settings, also if NCCL or HCCL transfers the data.
    for variable in dict.fromkeys(("GLOO_SOCKET_IFNAME", INTERFACES[device])):
        value = environment.get(variable)
        if value and not _matches(value, known, exact=variable.startswith("GLOO")):
            way_out = f"{_put(variable, _usable(known), own)}; there are {', '.join(known)}"
            yield Finding("problem", f"{variable}={value} names no interface of this machine", way_out)
    if not environment.get("GLOO_SOCKET_IFNAME"):
        host = socket.gethostname()
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            yield Finding(
                "warning",
                f"gloo finds no interface by itself: the host name {host} has no address",
                f"export GLOO_SOCKET_IFNAME={_usable(known)}",
            )


def _matches(value: str, known: list[str], exact: bool) -> bool:
    if exact:
        return all(name in known for name in value.split(","))
    if value.startswith("^"):
        return any(not name.startswith(tuple(value[1:].split(","))) for name in known)
    # NCCL and HCCL take prefixes of names, and whole names after "=".
    names = value.removeprefix("=").split(",")
    return any(name == wanted or (not value.startswith("=") and name.startswith(wanted))
               for name in known for wanted in names)  # fmt: skip


def _usable(known: list[str]) -> str:
    """An interface with an address, preferably not the loopback, so that other machines can reach it."""
    return next((name for name in sorted(known, key="lo".__eq__) if _has_address(name)), "lo")


def _has_address(name: str) -> bool:
    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking.fileno(), 0x8915, request)  # SIOCGIFADDR of Linux
        except OSError:
            return False
    return True


def port(address: str, number: int, put: str = "export MASTER_PORT=") -> Finding:
    """Whether rank 0 could open the port: a problem if another program listens on it, a note for another host.

    Args:
        put: text that selects a port when the port's number is appended.
    """
    if not 0 < number < 1 << 16:
        return Finding("problem", f"port {number} is not one of 1 to 65535", f"{put}{_free_port()}")
    try:
        is_here = address in ("localhost", "127.0.0.1", socket.gethostname()) or socket.gethostbyname(
            address
        ) == socket.gethostbyname(socket.gethostname())
    except OSError:
        return Finding("warning", f"MASTER_ADDR={address} has no address here", "export MASTER_ADDR=ADDRESS_OF_NODE_0")
    if not is_here:
        return Finding("note", f"whether port {number} is free can be said on {address} alone: run the doctor there")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", number))
        except OSError as error:
            return Finding("problem", f"port {number} is in use ({error.strerror})", f"{put}{_free_port()}")
    return Finding("ok", f"port {number} is free")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        number: int = listener.getsockname()[1]
        return number


def meeting(shell: Mapping[str, str], own: Mapping[str, str]) -> Iterator[Finding]:
    """The port that the environment names, or torchrun's default."""
    environment = {**shell, **own}
    given = environment.get("MASTER_PORT", str(DEFAULT_PORT))
    if given.isdigit() and int(given):  # a value that is not a number was reported before
        yield port(environment.get("MASTER_ADDR", "127.0.0.1"), int(given), _put("MASTER_PORT", "", own))
