"""The table "check x release x task queue" of docs/devices.md.

    TORCH_NPU=2.13.0 TABLE=2.13.0.json bash scripts/test_npu_contract.sh     one release, on each task queue
    python tests/ascend/table.py print *.json                                the table of several
    python tests/ascend/table.py launches [DIR/mindspeed]     operators that the pieces of a layer launch (docs/npu.md)

A release needs an environment of its own, which the script makes; the rows are small jobs of the bed, each against what
one process without context parallelism gives.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import bed

QUEUES = ("0", "1", "2")
RING, ULYSSES = "megatron_cp_algo", "ulysses_cp_algo"
TOLERANCE = {False: 1e-5, True: 1e-2}  # by bf16


class AbsentError(Exception):
    """What a check is about is not in this release; the message says what."""


def close(got, wanted, bf16=False):
    pairs = [(a, b) for step, reference in zip(got, wanted, strict=True) for a, b in zip(step, reference)]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    assert worst <= TOLERANCE[bf16], f"differs by {worst:.1e}"


def trains(algorithm="", world=2, tp=1, bf16=False, **options):
    """A check: three steps give the losses and gradient norms of one process."""

    def check(server: bed.Server) -> None:
        own = dict(options, bf16=bf16)
        got = server.run("train", world, algorithm=algorithm, tp=tp, options=own)[0]
        close(got, server.run("train", options=dict(bf16=bf16))[0], bf16)

    return check


def collectives(server):
    for world in (2, 3):
        assert server.run("collectives", world) == [[]] * world


def fused_update(server):
    if not server.run("has_fused_update")[0]:
        raise AbsentError("no such operator")
    losses, updates = server.run("train_with_fused_updates", 2, algorithm=RING)[0]
    assert updates, "the operator was not called"
    close(losses, server.run("train")[0])


def waits(server):
    costs = server.run("step_costs", 2, algorithm=RING, options=dict(layers=4))[0]["waits"]
    assert sum(costs.values()) <= 4, costs


def checkpoint(server):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert server.run("checkpoint", 2, folder=folder) == ["npu"] * 2


def buffers(server):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        server.run("group_buffers", 4, folder=folder, buffers={"ulysses": 385, "ring": 33})


CHECKS: dict[str, Callable[[bed.Server], None]] = {
    "collectives and messages of HCCL": collectives,
    "Ring": trains(RING),
    "Ulysses": trains(ULYSSES),
    "Hybrid, four ranks": trains("hybrid_cp_algo", 4, cp_options=[["ulysses_degree", 2]]),
    "Double Ring, four ranks": trains(RING, 4, cp_options=[["window_size", 2]]),
    "KV all-gather": trains("kvallgather_cp_algo"),
    "Ring, direct exchange": trains(RING, cp_options=[["kv_exchange", "direct"]]),
    "sequence parallel, tp=2": trains(RING, 4, 2, sequence_parallel=True),
    "bf16, distributed optimizer": trains(ULYSSES, bf16=True, distributed_optimizer=True),
    "full recompute": trains(RING, recompute="full"),
    "fused ring update": fused_update,
    "distributed checkpoint": checkpoint,
    "buffer size of each group": buffers,
    "at most 4 host waits a step": waits,
}
GROUPED = "messages grouped as with CANN 9: "  # before the names of those that are run so as well
CANN_9 = ("collectives and messages of HCCL", "Ring", "Double Ring, four ranks", "Ring, direct exchange")


def outcomes(queue: str) -> dict[str, str]:
    """Check -> "yes", or what went wrong, of the installed release."""
    found = {}
    for cann, names in (("", tuple(CHECKS)), ("9", CANN_9)):
        server = bed.Server(TASK_QUEUE_ENABLE=queue, NPU_BED_CANN=cann)
        for name in names:
            found[(GROUPED if cann else "") + name] = outcome(server, name, grouped=bool(cann))
        server.close()
    return found


def outcome(server: bed.Server, name: str, *, grouped: bool) -> str:
    try:
        if grouped and not server.run("groups_messages")[0]:
            raise AbsentError("no such way")
        CHECKS[name](server)
        return "yes"
    except AbsentError as absent:
        return str(absent)
    except AssertionError as error:
        return f"no: {str(error).splitlines()[0][:120]}"


def run(path: Path) -> int:
    result = {}
    for queue in QUEUES:
        result[queue] = outcomes(queue)
        path.write_text(json.dumps({bed.RELEASE: result}, indent=1))
    failed = [
        f"queue {queue}, {name}: {said}"
        for queue, each in result.items()
        for name, said in each.items()
        if said[:3] == "no:"
    ]
    print(*failed, f"{len(failed)} of {sum(map(len, result.values()))} checks failed on {bed.RELEASE}", sep="\n")
    return bool(failed)


def table(paths: list[Path]) -> list[str]:
    """The lines of the table; a cell says for which task queues a check passed."""
    releases = {release: each for path in paths for release, each in json.loads(path.read_text()).items()}
    lines = [f"| check | {' | '.join(releases)} |", "|---|" + "---|" * len(releases)]
    for name in [*CHECKS, *(GROUPED + name for name in CANN_9)]:
        lines.append(f"| {name} | {' | '.join(cell(each, name) for each in releases.values())} |")
    return lines


def cell(queues: dict[str, dict[str, str]], name: str) -> str:
    said = {queue: queues.get(queue, {}).get(name, "not run") for queue in QUEUES}
    if len(set(said.values())) == 1 and "yes" not in said.values():
        return said[QUEUES[0]]
    passed = [queue for queue, each in said.items() if each == "yes"]
    others = [f"{queue}: {each}" for queue, each in said.items() if each != "yes"]
    return "; ".join([*([", ".join(passed)] if passed else []), *others])


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(run(Path(sys.argv[2])))
    if sys.argv[1] == "launches":
        server = bed.Server()
        print(json.dumps(server.run("piece_launches", mindspeed="".join(sys.argv[2:]))[0]))
        sys.exit(server.close())
    print(*table([Path(name) for name in sys.argv[2:]]), sep="\n")
