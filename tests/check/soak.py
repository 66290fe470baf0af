"""A training job whose ranks are killed at random, and an undisturbed one beside it.

    python tests/check soak MINUTES [--ranks 4] [--seed 1] [--every 20]

Killing stops after MINUTES, or when the job has done its steps. A loss that differs from the undisturbed run's in one
bit is an error.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from bench import free_port
from figures.network import Network, two_hosts
from faults import losses
from processes import children

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 1 --lr 2e-3 "
    "--hidden-dropout 0.1 --context-parallel-algo megatron_cp_algo --use-flash-attn "
    "--use-cp-send-recv-overlap --distributed-timeout-minutes 0.5 --log-interval 10"
).split()


@dataclass
class Job:
    """torchrun on this host, or on each of two with half of the ranks."""

    ranks: int
    network: Network | None
    folder: Path
    agents: list[subprocess.Popen] = field(default_factory=list)

    def start(self, name: str, flags: list[str], max_restarts: int) -> None:
        hosts, address = (1, "127.0.0.1") if self.network is None else (2, self.network.address)
        port = free_port()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(hosts), "--nproc-per-node",
            str(self.ranks // hosts), "--max-restarts", str(max_restarts), "--master-port", str(port),
            "--master-addr", address,
        ]  # fmt: skip
        script = [str(SCRIPTS / "pretrain_gpt.py"), *FLAGS, *flags]
        self.agents = []
        for host in range(hosts):
            output = open(self.folder / f"{name}-{host}.txt", "w", encoding="utf-8")
            whole = [*command, "--node-rank", str(host), *script]
            files = {"stdout": output, "stderr": subprocess.STDOUT}
            agent = (
                self.network.start(host, 1, whole, port, **files) if self.network else subprocess.Popen(whole, **files)
            )
            self.agents.append(agent)

    def wait(self) -> int:
        return max(agent.wait() for agent in self.agents)

    def is_running(self) -> bool:
        return all(agent.poll() is None for agent in self.agents)

    def processes(self) -> list[int]:
        """The ranks that run now: children of the agents that run the trainer."""
        return [pid for agent in self.agents for pid in children(agent.pid) if is_rank(pid)]

    def stop(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(60)


def is_rank(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"torch.distributed.run" not in command and any(part.endswith(b"pretrain_gpt.py") for part in command)


def last_step(path: Path) -> int:
    """The step that the log ends with; its last line may be half-written."""
    found = re.findall(r'"iteration": (\d+), "loss"', path.read_text(encoding="utf-8") if path.is_file() else "")
    return int(found[-1]) if found else 0


def disturb(job: Job, args: argparse.Namespace, log: Path) -> list[int]:
    """Kill a random rank every ``--every`` seconds or so until the minutes are over; returns the step of each kill."""
    draw, steps, end = random.Random(args.seed), [], time.monotonic() + 60 * args.minutes
    while job.is_running() and time.monotonic() < end:
        time.sleep(draw.uniform(0.3, 1.7) * args.every)
        ranks = job.processes()
        if ranks and job.is_running() and time.monotonic() < end:
            steps.append(last_step(log))
            os.kill(draw.choice(ranks), signal.SIGKILL)
    return steps


def resumed_steps(folder: Path) -> list[int]:
    """Where each attempt but the first went on, from what rank 0 printed; an attempt may have died before that."""
    text = (folder / "disturbed-0.txt").read_text(encoding="utf-8", errors="replace")
    return [int(step) for step in re.findall(r"going on from \S*iter_(\d+)", text)]


def soak(args: argparse.Namespace, folder: Path, network: Network | None) -> int:
    job = Job(args.ranks, network, folder)
    prefix, checkpoints = str(folder / "topics"), str(folder / "ck")
    subprocess.run([sys.executable, str(SCRIPTS / "prepare_data.py"), "--output", prefix], check=True)
    common = ["--data-path", prefix, "--context-parallel-size", str(args.ranks), "--train-iters", str(args.steps)]
    try:
        started = time.monotonic()
        job.start("undisturbed", [*common, "--log-file", str(folder / "undisturbed.jsonl")], 0)
        if job.wait():
            print((folder / "undisturbed-0.txt").read_text(encoding="utf-8"))
            return 1
        print(f"undisturbed: {args.steps} steps in {time.monotonic() - started:.0f} s", flush=True)
        started, log = time.monotonic(), folder / "disturbed.jsonl"
        flags = ["--save", checkpoints, "--load", checkpoints, "--save-interval", "10", "--keep-last", "3"]
        job.start("disturbed", [*common, *flags, "--log-file", str(log)], 10_000)
        killed = disturb(job, args, log)
        status = job.wait()
    finally:
        job.stop()
    return report(folder, args.steps, killed, status, time.monotonic() - started)


def report(folder: Path, steps: int, killed: list[int], status: int, seconds: float) -> int:
    wanted, got = losses(folder / "undisturbed.jsonl"), losses(folder / "disturbed.jsonl")
    # A step is lost when it is done and has to be done again: the step of a kill less the checkpoint gone on from.
    resumed = resumed_steps(folder)
    lost = sum(max(step - max((r for r in [0, *resumed] if r <= step), default=0), 0) for step in killed)
    differ = [step for step in range(1, steps + 1) if got.get(step) != wanted.get(step)]
    print(f"disturbed: {steps} steps in {seconds:.0f} s, exit status {status}")
    print(f"kills: {len(killed)}   restarts that reached a checkpoint: {len(resumed)}   steps lost: {lost}")
    print(f"last loss: undisturbed {wanted.get(steps)!r}, disturbed {got.get(steps)!r}")
    print(f"losses that differ in any bit: {len(differ)} of {steps}")
    return 1 if status or differ else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=10.0, help="how long ranks are killed (default: 10)")
    parser.add_argument("--ranks", type=int, default=4, help="ranks, all of them context parallel (default: 4)")
    parser.add_argument("--hosts", type=int, choices=[1, 2], default=1, help="network namespaces (default: 1)")
    parser.add_argument("--steps", type=int, help="steps of the job (default: 200 for every minute)")
    parser.add_argument("--every", type=float, default=20.0, help="mean seconds between two kills (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the random kills (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and checkpoints, and name it")
    args = parser.parse_args(argv)
    args.steps = args.steps or int(200 * args.minutes)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the job ends with this process
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        with two_hosts() if args.hosts == 2 else nullcontext() as network:
            return soak(args, folder, network)
    finally:
        if args.keep:
            print(f"logs and checkpoints: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
