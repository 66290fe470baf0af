"""Parse a launch command without starting it: number of processes, rendezvous address, script and flags.

A shell script is run with DRY_RUN=1 if it declares by the line MARKER that this starts nothing; the command that it
prints is then parsed.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mindspeed_cp.doctor.environment import DEFAULT_PORT
from mindspeed_cp.doctor.quoting import words

RUNNER = "mindspeed_cp.run"
LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch", "mindspeed_cp.torchrun")
SHELLS = ("bash", "sh")
TIMEOUT = 120  # seconds for a dry run
MARKER = "# DRY_RUN=1: prints the command behind the line '# command' and starts nothing."
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Launch:
    """What a command would start.

    Args:
        script: path of the training script.
        flags: the script's arguments.
        runner: whether the script runs under mindspeed_cp.run.
        world_size, node_ranks: processes on all nodes and on one node, 0 if the command does not say.
        address, port: rendezvous address, None if the launcher chooses it.
        environment: variables that the command itself sets.
    """

    script: str
    flags: tuple[str, ...]
    runner: bool = False
    world_size: int = 0
    node_ranks: int = 0
    address: str = "127.0.0.1"
    port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def read(command: str, environment: Mapping[str, str]) -> Launch:
    """Parse a launch command or the path of a shell script.

    Raises:
        ValueError: it cannot be parsed, or a dry run failed; the message says what to do.
    """
    try:
        tokens = words(command)
    except ValueError as error:
        raise ValueError(f"--launch {command!r} cannot be read ({error}); close the quotes.") from None
    own, tokens = _assignments(tokens)
    if not tokens:
        raise ValueError('--launch names no command; give one, such as --launch "torchrun ... pretrain_gpt.py ...".')
    is_script = tokens[0].endswith(".sh")
    if is_script or (Path(tokens[0]).name in SHELLS and len(tokens) > 1):
        printed = _dry_run(tokens if is_script else tokens[1:], {**environment, **own})
        further, tokens = _assignments(words(printed))
        own |= further
    return replace(_launch(tokens, {**environment, **own}), environment=own)


def _assignments(tokens: list[str]) -> tuple[dict[str, str], list[str]]:
    """(variable assignments before a command, with or without env; the command itself)."""
    found = {}
    rest = list(tokens)
    while rest and (rest[0] == "env" or _ASSIGNMENT.match(rest[0])):
        name, _, value = rest.pop(0).partition("=")
        if name != "env":
            found[name] = value
    return found, rest


def _dry_run(tokens: list[str], environment: dict[str, str]) -> str:
    """The command that a launch script prints with DRY_RUN=1."""
    script = Path(tokens[0])
    if not script.is_file():
        raise ValueError(f"--launch: {script} does not exist; give the path of a script, or the command itself.")
    if not _knows_dry_run(script):
        raise ValueError(
            f"--launch: {script} does not say by the line {MARKER!r} that DRY_RUN=1 starts nothing, so it is not run; "
            'give the command that it would run: --launch "torchrun ... pretrain_gpt.py ...".'
        )
    status, said, complained = _run(tokens, {"PYTHON": sys.executable, **environment, "DRY_RUN": "1"})
    if status:
        lines = [line for line in complained.splitlines() if "error: " in line] or complained.splitlines()[-1:]
        raise ValueError((lines[-1] if lines else f"{script} failed").rpartition("error: ")[2])
    _, separator, printed = said.partition("# command\n")
    if not separator:
        raise ValueError(f"--launch: {script} prints no command with DRY_RUN=1; give the command itself.")
    return printed.strip().splitlines()[-1].rpartition(" && ")[2]


def _run(tokens: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a script; at the time limit it is killed with all processes that it started."""
    running = subprocess.Popen(
        ["bash", *tokens],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = running.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        raise ValueError(
            f"--launch: {tokens[0]} took more than {TIMEOUT} s with DRY_RUN=1; give the command."
        ) from None
    return running.returncode, said, complained


def _knows_dry_run(script: Path) -> bool:
    """Whether the script, or a script of the same folder that it sources, contains the line MARKER."""
    text = script.read_text(encoding="utf-8", errors="replace")
    sourced = re.findall(r"^\s*(?:source|\.)\s.*?([\w.-]+\.sh)\b", text, re.M)
    others = [script.parent / name for name in sourced if (script.parent / name).is_file()]
    parts = (text, *(path.read_text(encoding="utf-8", errors="replace") for path in others))
    return any(MARKER in map(str.strip, part.splitlines()) for part in parts)


def _launch(tokens: list[str], environment: Mapping[str, str]) -> Launch:
    for place, token in enumerate(tokens):
        name, rest = Path(token).name, tokens[place + 1 :]
        if name == "torchrun":
            return _torchrun(rest)
        if re.fullmatch(r"python[\d.]*", name):
            rest = _without_options(rest)
            is_module = rest[:1] == ["-m"]
            if is_module and rest[1:2] and rest[1] in LAUNCHERS:
                return _torchrun(rest[2:])
            size = environment.get("WORLD_SIZE", "0")
            world = int(size) if size.isdigit() and int(size) else 0 if place else 1
            return replace(_program(rest[is_module:], is_module), world_size=world)
    raise ValueError(f"--launch {shlex.join(tokens[:4])} starts neither torchrun nor python; give that part alone.")


def _without_options(rest: list[str]) -> list[str]:
    """The rest of a command after Python's own switches, such as -u and -W ignore."""
    while rest and re.fullmatch(r"-[a-ln-zA-LN-Z]+", rest[0]):
        rest = rest[2 if rest[0][-1] in "WX" else 1 :]
    return rest


def _torchrun(rest: list[str]) -> Launch:
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = get_args_parser().parse_args(rest)
    except SystemExit:
        line = (said.getvalue().strip().splitlines() or ["it shows its help"])[-1].rpartition("error: ")[2]
        raise ValueError(f"torchrun refuses its command line: {line}; see torchrun --help.") from None
    nodes, per_node = (
        int(text) if text.isdigit() else 0 for text in (str(args.nnodes).partition(":")[0], str(args.nproc_per_node))
    )
    chooses = args.standalone or args.rdzv_endpoint
    return replace(
        _program([args.training_script, *args.training_script_args], args.module),
        world_size=nodes * per_node,
        node_ranks=per_node,
        address=args.master_addr,
        port=None if chooses or args.node_rank else int(args.master_port or DEFAULT_PORT),
    )


def _program(rest: list[str], is_module: bool) -> Launch:
    runner = is_module and rest[:1] == [RUNNER]
    if runner:
        rest = rest[1:]
    if not rest:
        raise ValueError(f"--launch names no training script; add it after {RUNNER if runner else 'python'}.")
    return Launch(rest[0], tuple(rest[1:]), runner)


def home_of(script: str) -> Path:
    return Path(os.path.expandvars(script)).expanduser()
