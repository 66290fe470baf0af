"""Starts the ranks of one training of tests/check verify_runs, and collects what each of them said when one failed."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import processes

TRACEBACK = "Traceback (most recent call last)"
LAST = 15  # lines of each rank
TRACED = 40  # lines of the first traceback
TIMEOUT = 1800  # seconds of one training


class RunFailed(RuntimeError):
    """A training ended with an error; the message holds the first traceback and the last lines of every rank."""


def torchrun(folder: Path, ranks: int, script: Sequence[object], flags: Sequence[object], module: bool = False) -> str:
    """Run ``script`` on ``ranks`` processes; each writes into a folder of its own below ``folder``.

    Returns:
        The standard output of all ranks, in rank order.

    Raises:
        RunFailed: a rank failed, or the training did not end.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--log-dir", str(folder), "--redirects", "3", *(["-m"] if module else [])]
    command += [str(part) for part in (*script, *flags)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "torchrun.log", "w+", encoding="utf-8") as log:
        try:
            status = processes.run(command, TIMEOUT, stdout=subprocess.DEVNULL, stderr=log)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"it did not end within {TIMEOUT} s\n" + "\n".join(last_words(folder))) from None
        if status:
            log.seek(0)
            words = list(last_words(folder)) or log.read().splitlines()[-LAST:]
            raise RunFailed("\n".join([f"it ended with status {status}", " ".join(command[-40:]), *words]))
    return "".join(said for _, said, _ in outputs(folder))


def outputs(folder: Path) -> Iterator[tuple[int, str, str]]:
    """(rank, standard output, standard error) of every rank."""
    found = {int(path.parent.name): path.parent for path in folder.rglob("stdout.log") if path.parent.name.isdigit()}
    for rank in sorted(found):
        yield rank, *(found[rank].joinpath(f"{name}.log").read_text(errors="replace") for name in ("stdout", "stderr"))


def last_words(folder: Path) -> Iterator[str]:
    """The first traceback of the first rank that has one which is not about a lost peer, then the end of every rank."""
    ranks = list(outputs(folder))
    traced = [(rank, traceback_of(errors)) for rank, _, errors in ranks if TRACEBACK in errors]
    if traced:
        rank, lines = min(traced, key=lambda pair: is_about_a_peer(pair[1]))
        yield f"---- first traceback, rank {rank}"
        yield from lines
    for rank, said, errors in ranks:
        yield f"---- rank {rank}, last lines"
        yield from [line for line in (said + errors).splitlines() if line.strip()][-LAST:]


def traceback_of(text: str) -> list[str]:
    """The lines of the first traceback in ``text``, its middle left out where it is long."""
    lines = text[text.index(TRACEBACK) :].splitlines()
    end = next((at for at, line in enumerate(lines[1:], 1) if line and not line.startswith(" ")), len(lines) - 1)
    whole = lines[: end + 1]
    return whole if len(whole) <= TRACED else [*whole[: TRACED // 2], "  ...", *whole[-TRACED // 2 :]]


def is_about_a_peer(lines: list[str]) -> bool:
    return bool(re.search(r"Connection (reset|closed|refused)|lost rank|timed out|Broken pipe", "\n".join(lines[-3:])))
