"""The server behind ``bed.Server``: one job per line of standard input, one answer per line of standard output."""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jobs
import processes

TIMEOUT = 120  # seconds of one job
GRACE = 3  # seconds that the other ranks get once one has failed


def rank_main(order, rank, folder):
    """The life of one rank; leaves folder/rank-N.json."""
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["world"]), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(order["port"]), NPU_STUB_TIMEOUT="60", LOCAL_WORLD_SIZE=str(order["world"]))
    answer = {"result": None, "error": ""}
    try:
        jobs.take_back(order["without"])
        meeting = f"file://{folder}/meeting"
        answer["result"] = getattr(jobs, order["job"])(jobs.Rank(rank, order["world"], meeting), **order["arguments"])
    except BaseException as error:
        traceback.print_exc()
        line = traceback.extract_tb(error.__traceback__)[-1].line
        answer["error"] = f"{type(error).__name__}: {error} [{line}]"
    (folder / f"rank-{rank}.part").write_text(json.dumps(answer))
    (folder / f"rank-{rank}.part").rename(folder / f"rank-{rank}.json")
    sys.stdout.flush()
    for child in processes.children(
        os.getpid()
    ):  # Megatron's checkpoints leave processes behind, which nothing else ends
        os.kill(child, signal.SIGKILL)
    os._exit(bool(answer["error"]))


def wait_for(children):
    deadline = time.monotonic() + TIMEOUT
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            children.remove(pid)
            deadline = min(deadline, time.monotonic() + GRACE) if status else deadline
        elif time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
        else:
            time.sleep(0.01)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(order):
    order["port"] = free_port()
    with tempfile.TemporaryDirectory(prefix="npu-bed-") as name:
        folder, children = Path(name), []
        for rank in range(order["world"]):
            pid = os.fork()
            if not pid:
                rank_main(order, rank, folder)
            children.append(pid)
        wait_for(children)
        answers = []
        for rank in range(order["world"]):
            path = folder / f"rank-{rank}.json"
            answers.append(json.loads(path.read_text()) if path.exists() else {"error": "the rank was ended"})
        errors = sorted((a["error"] for a in answers if a["error"]), key=lambda error: error == "the rank was ended")
        if errors and os.environ.get("NPU_BED_LOG"):
            logs = [(folder / f"rank-{rank}.log").read_text(errors="replace") for rank in range(order["world"])]
            print("\n".join(logs)[-6000:], file=sys.stderr, flush=True)
    return {"results": [answer.get("result") for answer in answers], "error": errors[0] if errors else ""}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Megatron prints is no answer
    jobs.prepare()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
