"""Findings about a launch: what would be switched on, decided by the same rules as in training."""

import argparse
import ast
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mindspeed_cp.arguments import validate
from mindspeed_cp.arguments.algorithm import algorithm_is_given
from mindspeed_cp.arguments.launch import bare_parser, known_flags, misspelt
from mindspeed_cp.doctor import environment, hccl, launch
from mindspeed_cp.doctor.finding import Finding, problem
from mindspeed_cp.doctor.installed import ask
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionKernel
from mindspeed_cp.megatron import neighbour
from mindspeed_cp.planner import megatron_flags
from mindspeed_cp.planner.memory import attention_bytes
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.algorithms import titled
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.rules import heads_of_rank
from mindspeed_cp.settings.training_setup import TrainingSetup

ADAPTORS = ("mindspeed_cp.megatron_adaptor", "mindspeed.megatron_adaptor")


def examined(command: str, device: str) -> tuple[list[Finding], dict[str, str]]:
    """(all findings about a launch that has not been started, the variables that it sets).

    Args:
        command: as for launch.read.
        device: the device that this machine uses.
    """
    try:
        started = launch.read(command, os.environ)
    except ValueError as error:
        return [problem(str(error))], {}
    return list(findings(started, device)), started.environment


def findings(started: launch.Launch, device: str) -> Iterator[Finding]:
    """Whether the launch switches context parallelism on, the resulting configuration, its cost, and its mistakes."""
    script = str(launch.home_of(started.script))
    by_mindspeed = bool(neighbour.front_named_in(script))
    kept = mindspeeds_own(started.flags, script) if by_mindspeed else ""
    if kept:
        yield Finding("note", f"{kept}: context parallelism is left to MindSpeed, and mindspeed_cp is off")
        yield from of_parser(started, started.flags, set())
        return
    try:
        args, rest = megatron_flags.parsed(started.flags)
    except ValueError as error:
        yield problem(str(error))
        return
    if by_mindspeed and not algorithm_is_given(args):
        args.context_parallel_algo = neighbour.DEFAULT_ALGORITHM
    yield from switched_on(started)
    meant = misspelt(rest)
    for flag, likely in meant.items():
        yield Finding("warning", f"{flag} is not a flag of context parallelism", f"write {likely}")
    yield from of_parser(started, rest, set(meant))
    if started.port is not None:
        found = environment.port(started.address, started.port, "torchrun --master-port ")
        if found.level != "ok":
            yield found
    try:
        yield from resolved(args, started, device)
        yield from of_megatron(started, by_mindspeed)
    except ValueError as error:
        yield problem(str(error))
    except RuntimeError as error:
        yield Finding("problem", f"Megatron's flags were not checked: {error}", "report it with this line")


def mindspeeds_own(flags: Sequence[str], script: str) -> str:
    """Why the flags of a script that imports MindSpeed can only mean MindSpeed's context parallelism; "" otherwise."""
    parser = bare_parser("launch")
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--context-parallel-algo")
    return neighbour.of_mindspeed_alone(known_flags(parser, flags)[0], script)


def of_parser(started: launch.Launch, rest: Sequence[str], named: set[str]) -> Iterator[Finding]:
    """What the script's own parser says about its flags: whose flags they are, what it rejects and does not know.

    Args:
        rest: the part of the command line that this project's parser does not know.
        named: flags that were already mentioned in a finding.
    """
    script = launch.home_of(started.script)
    given = dict.fromkeys(token.partition("=")[0] for token in rest if token.startswith("--"))
    flags = [flag for flag in given if flag not in named]
    if not script.is_file() or not started.flags:
        return
    why = f"{script.name} has a parser of its own"
    try:
        module = "mindspeed_cp.megatron.unknown_flags"
        said = ask(module, str(script), *started.flags, environment=started.environment)
    except RuntimeError as error:
        said, why = None, str(error)
    if said is None:
        if flags:
            text = f"not checked, because {why}: {', '.join(flags)}"
            yield Finding("warning", text, f"see that {script.name} --help lists them")
        return
    for owner, owned in said["owners"].items():
        yield Finding("ok", f"{owner}'s own flags, which {script.name} knows: {', '.join(owned)}")
    added = ", ".join(f"{flag} ({file})" for flag, file in said["added"].items() if flag not in named)
    if added:
        text = f"not checked, because {script.name} adds flags of its own: {added}"
        yield Finding("warning", text, f"see that {script.name} --help lists them")
    if said["refused"]:
        yield Finding("problem", f"{script.name} refuses the line: {said['refused']}", "correct it")
    for flag in said["unknown"]:
        if flag not in named:
            text = f"{script.name} does not know {flag}"
            yield Finding("problem", text, f"leave it out; {script.name} --help lists all")


def switched_on(started: launch.Launch) -> Iterator[Finding]:
    """Whether the adaptor is imported, and before Megatron."""
    script = launch.home_of(started.script)
    if not script.is_file():
        yield Finding("problem", f"the script {started.script} does not exist", "give its path, or start elsewhere")
    elif started.runner:
        yield Finding("ok", f"{script.name} runs under {launch.RUNNER}: Megatron is patched first")
    else:
        try:
            adaptor, megatron = import_lines(script)
        except SyntaxError as error:
            yield Finding("problem", f"{script.name} is no Python: {error}", "give the path of a Python script")
            return
        way_out = f"start it through -m {launch.RUNNER} {started.script}"
        if adaptor is None:
            yield Finding("problem", f"{script.name} does not import {ADAPTORS[0]}: nothing is patched", way_out)
        elif megatron is not None and megatron < adaptor:
            text = f"{script.name} imports Megatron in line {megatron}, before the adaptor in line {adaptor}"
            yield Finding("problem", text, f"put import {ADAPTORS[0]} first, or {way_out}")
        else:
            yield Finding("ok", f"{script.name} imports the adaptor in line {adaptor}, before Megatron")


def import_lines(script: Path) -> tuple[int | None, int | None]:
    """(first line that imports the adaptor, first line that imports Megatron) at the top level of a script, or None."""
    ours = ADAPTORS[:1] if neighbour.is_importable() else ADAPTORS  # a real MindSpeed keeps its path
    found: dict[str, int] = {}
    for node in ast.parse(script.read_bytes()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            kind = "adaptor" if name.startswith(ours) else "megatron" if name.startswith("megatron.") else ""
            found.setdefault(kind, node.lineno)
    return found.get("adaptor"), found.get("megatron")


def resolved(args: argparse.Namespace, started: launch.Launch, device: str) -> Iterator[Finding]:
    """The resulting configuration, settings that are replaced or ignored, and what a layer sends and keeps.

    Raises:
        ValueError: the settings violate a rule.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config, setup = validate(args, started.world_size, started.node_ranks or None)
        layout = SequenceLayout.build(config, args.seq_length) if args.seq_length else None
    for notice in dict.fromkeys(str(warning.message) for warning in said):
        ignored = " is ignored" in notice
        yield Finding("warning" if ignored else "note", notice, f"leave out {notice.split()[0]}" if ignored else "")
    if config.context_parallel_size == 1:
        yield Finding("warning", "context parallelism is off: its size is 1", "add --context-parallel-size N, N > 1")
        return
    lengths = sorted({layout.length(rank) for rank in range(config.context_parallel_size)}) if layout else []
    tokens = " or ".join(f"{length:,}" for length in lengths) or "unknown"
    ulysses, window, windows = config.hierarchy
    hierarchy = f"ulysses {ulysses} x window {window} x windows {windows}"
    yield Finding("ok", f"{config.describe()}; {hierarchy}; {tokens} tokens on a rank")
    if device == "npu":
        yield from hccl.of_launch(config, setup, started.flags, {**os.environ, **started.environment})
    yield from cost(args, config, setup, select_kernel(args.cp_kernel, device))


def _problem(args: argparse.Namespace, setup: TrainingSetup) -> Problem | None:
    """The attention problem of one layer; None if flags are missing."""
    sized = args.kv_channels or args.hidden_size or args.multi_latent_attention
    if not (sized and args.num_attention_heads and args.seq_length):
        return None
    heads, kv_heads, dk, dv = megatron_flags.attention_sizes(args)
    tp = setup.tensor_parallel_size
    dtype = torch.bfloat16 if args.bf16 or args.fp16 else torch.float32
    latent = (args.qk_pos_emb_head_dim, args.kv_lora_rank) if args.multi_latent_attention else None
    sizes = args.seq_length, *heads_of_rank(heads, kv_heads, tp), dk, dv, args.micro_batch_size
    return Problem(*sizes, dtype, stride=tp, latent=latent)


def cost(
    args: argparse.Namespace, config: ContextParallelConfig, setup: TrainingSetup, kernel: AttentionKernel
) -> Iterator[Finding]:
    """Bytes and memory of one layer, from the planner; the larger value of the first and the last rank."""
    layer = _problem(args, setup)
    if layer is None:
        needed = "--seq-length, --num-attention-heads and --hidden-size (or --kv-channels)"
        yield Finding("note", f"bytes and memory need {needed}")
        return
    number, saved = setup.num_layers or 1, 0
    for each in config.used_by(number):
        forward, backward, kept = _of_layer(each, layer, kernel)
        saved = max(saved, kept)
        like = sum(config.of_layer(place) == each for place in range(1, number + 1))
        what = f"each of {like} layers by {titled(each.row, each.hierarchy)}" if config.entries else "a layer"
        yield Finding("ok", f"{what} sends {_size(forward)} forward and {_size(backward)} backward, per rank")
    layers = -(-number // setup.pipeline_parallel_size)
    most = "up to " if config.entries else ""
    if setup.recomputes_attention and not config.keep_attention:
        held = "of which recomputation keeps one layer's at a time"
    else:
        flying = " for every micro batch in flight" if setup.pipeline_parallel_size > 1 else ""
        held = f"{most}{_size(saved * layers)} in all{flying}"
    text = f"attention keeps {most}{_size(saved)} a layer for backward, on {layers} layers of a rank, {held}"
    yield Finding("ok", text)


def _of_layer(config: ContextParallelConfig, layer: Problem, kernel: AttentionKernel) -> tuple[int, int, int]:
    """Bytes that a layer sends forward, sends backward, and keeps: the larger of the first and the last rank."""
    ranks, order = (0, config.context_parallel_size - 1), kernel.memory_order(layer.dtype)
    forward, backward = zip(*(trace(config, layer, rank) for rank in ranks))
    sent = (max(sum(each.sent.values()) for each in passes) for passes in (forward, backward))
    return *sent, max(attention_bytes(config, layer, rank, order).saved for rank in ranks)


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def of_megatron(started: launch.Launch, by_mindspeed: bool) -> Iterator[Finding]:
    """For a script of Megatron-LM: Megatron's own flags that the patches reject.

    Args:
        by_mindspeed: the script imports MindSpeed, whose names are there where Transformer Engine's are asked for.
    """
    if started.runner and Path(started.script).name.startswith("pretrain_"):
        flags = [*started.flags, *(["--transformer-impl", "local"] if by_mindspeed else [])]
        wrong = ask("mindspeed_cp.megatron.flag_checks", *flags, environment=started.environment)
        if wrong:
            yield problem(wrong)
