"""Shrink a training command so that it runs on a laptop: with the same script, model class, data and dataloader."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindspeed_cp.prove import flags, own_layers, sizes
from mindspeed_cp.prove.own_layers import divisor, takes_degree
from mindspeed_cp.prove.ranks import Run
from mindspeed_cp.prove.sizes import Ranks
from mindspeed_cp.prove.words import Words
from mindspeed_cp.prove.yaml_files import with_files

ALGORITHM = "--context-parallel-algo"
SIZE = "--context-parallel-size"
AT_LEAST_1 = """
    --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups --seq-length
    --micro-batch-size --global-batch-size --tensor-model-parallel-size --pipeline-model-parallel-size --vocab-size
    --num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank --context-parallel-size
""".split()
ALONE = "cp=1"  # name of the run without context parallelism
DEGREE, WINDOW = "--ulysses-degree-in-cp", "--cp-window-size"


@dataclass(frozen=True)
class Wish:
    """The user's options for prove.

    Args:
        cp: context-parallel size; None: 2, or 4 if the algorithm has two levels.
        ranks: processes of the run with context parallelism, including pipeline and tensor parallelism.
        device: "cpu", "cuda" or "npu".
        real_sizes: whether the model keeps its size.
        ours: whether to use this project's context parallelism, not the script's own.
        limit: seconds that a run may take.
    """

    cp: int | None = None
    ranks: int = 4
    device: str = "cpu"
    real_sizes: bool = False
    ours: bool = True
    steps: int = 3
    seed: int = 1234
    dtype: str = "float32"
    limit: float = 600.0


@dataclass(frozen=True)
class Plan:
    """Two runs of one script, without and with context parallelism.

    Args:
        changed: what differs from the user's command, one line each.
        uncovered: what the runs therefore do not test.
    """

    wish: Wish
    ranks: Ranks
    alone: Run
    shared: Run
    changed: tuple[str, ...]
    uncovered: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, Run]:
        return self.alone, self.shared


def plan(script: str, command: Sequence[str], wish: Wish, folder: Path) -> Plan:
    """Plan the two runs for a training command.

    Args:
        folder: a temporary folder for the runs' files.

    Raises:
        ValueError: a flag cannot be parsed, or the parallel sizes do not fit into the ranks.
    """
    given = with_files(Words(command))
    words = given.copy()
    for flag in AT_LEAST_1:
        if words.number(flag, 1) < 1:
            raise ValueError(f"{flag} {words.text(flag)} must be at least 1; correct the command.")
    kind = kind_of(script)
    own = _own(words)
    ranks = _ranks(words, own, wish)
    _without_side_effects(words, kind, wish, folder)
    uncovered = _fold(words, ranks)
    if not wish.real_sizes:
        words.drop(flags.STAGES)
        sizes.shrink(words, ranks, own)
    uncovered += _plainer(words, kind, wish)
    if kind == "other":  # a script with its own parser may not know flags that the user did not pass
        words.drop([flag for flag in words.flags() if flag not in given])
    if "--reset-attention-mask" in words and kind == "trainer":
        words.set("--micro-batch-size", 1)  # it concatenates the rows of a batch
    alone, shared = words.copy(), words.copy()
    alone.drop(flags.of_context_parallelism())
    if "--reset-attention-mask" in words:
        alone.drop(["--no-create-attention-mask-in-dataloader"])  # otherwise attention would not know the documents
    _share(shared, ranks)
    uncovered += _uncovered(given, wish)

    def run(name: str, words: Words, cp: int) -> Run:
        world, how = ranks.tp * ranks.pp * cp, (wish.ours, wish.device, wish.limit)
        return Run(name, script, tuple(words.line()), world, str(folder), *how)

    runs = run(ALONE, alone, 1), run(f"cp={ranks.cp}", shared, ranks.cp)
    return Plan(wish, ranks, *runs, tuple(_changes(given, shared)), tuple(uncovered))


def kind_of(script: str) -> str:
    """ "megatron-lm" (the script uses megatron.training, or is in a checkout and runs another script of it), "trainer"
    (this project's trainer), or "other".
    """
    text = Path(script).read_text(encoding="utf-8", errors="replace")
    if re.search(r"\bmegatron\.training\b", text) or Path(script).with_name("megatron").joinpath("training").is_dir():
        return "megatron-lm"
    return "trainer" if re.search(r"\btrainer\.loop\b", text) else "other"


def _own(words: Words) -> Ranks:
    per_stage = words.number("--num-layers-per-virtual-pipeline-stage", 0)
    virtual = words.number("--num-virtual-stages-per-pipeline-rank", 1)
    pp = words.number("--pipeline-model-parallel-size", 1)
    if per_stage:
        virtual = max(words.number("--num-layers", pp) // pp // per_stage, 1)
    pieces = words.text("--hybrid-layer-pattern").partition("/")[0].count("|") + 1
    if pieces > pp:
        virtual = pieces // pp
    return Ranks(words.number("--tensor-model-parallel-size", 1), pp, words.number(SIZE, 1), virtual)


def _ranks(words: Words, own: Ranks, wish: Wish) -> Ranks:
    """The sizes that fit: context parallelism first, then pipeline and tensor parallelism, each at most 2."""
    cp = wish.cp if wish.cp is not None else (4 if _levels(words) else 2)
    if cp < 2:
        raise ValueError(f"--cp {cp} compares a run with itself; give at least 2.")
    if cp > wish.ranks:
        raise ValueError(f"--cp {cp} needs as many --ranks, and they are {wish.ranks}; use --ranks {cp}.")
    room = wish.ranks // cp
    if wish.real_sizes:
        if own.tp * own.pp > room:
            raise ValueError(
                f"--real-sizes keeps tensor x pipeline parallel size {own.tp} x {own.pp}, which with --cp {cp} needs "
                f"--ranks {own.tp * own.pp * cp}; they are {wish.ranks}."
            )
        return replace(own, cp=cp)
    pp = min(own.pp, room, 2)
    tp = min(own.tp, room // pp, 2)
    return Ranks(tp, pp, cp, min(own.virtual, 2) if pp > 1 else 1)


def _levels(words: Words) -> bool:
    """Whether the algorithm has two levels and thus needs four ranks: Hybrid and Double Ring."""
    of_run = takes_degree(words.text(ALGORITHM)) or words.number(WINDOW, 1) > 1
    return of_run or "a2a+p2p" in words.text("--cp-comm-type") or own_layers.has_levels(words)


def _without_side_effects(words: Words, kind: str, wish: Wish, folder: Path) -> None:
    """Change flags so that none of the user's files is written and every run ends after a few deterministic steps."""
    words.drop((*flags.FILES, *flags.SCHEDULE))
    steady = flags.DROPOUT | flags.STEADY | {"--train-iters": wish.steps, "--seed": wish.seed}
    for flag, value in steady.items():
        words.set(flag, value)
    if kind != "other" and "--mock-data" not in words:
        words.set("--data-cache-path", folder / "cache")


def _fold(words: Words, ranks: Ranks) -> list[str]:
    """Set the parallel sizes to those that fit into the ranks; returns what is then not tested."""
    lost = []
    for flag, size in (("--tensor-model-parallel-size", ranks.tp), ("--pipeline-model-parallel-size", ranks.pp)):
        if size == 1 and words.number(flag, 1) > 1:
            lost.append(f"{flag} {words.number(flag, 1)} (--ranks {2 * ranks.cp * ranks.tp * ranks.pp} keeps 2)")
        words.replace(flag, size)
    if ranks.tp == 1:
        words.drop(["--sequence-parallel", "--tp-comm-overlap"])
    if words.number("--expert-model-parallel-size", 1) > 1:
        lost.append("experts on several ranks (the run with cp=1 has no second rank for them)")
    words.drop(["--expert-model-parallel-size", "--expert-tensor-parallel-size"])
    return lost


def _plainer(words: Words, kind: str, wish: Wish) -> list[str]:
    """Remove flags that hide gradients, change the precision or need a device; returns what is then not tested."""
    lost = [flags.OPTIMIZER[flag] for flag in words.drop(flags.OPTIMIZER)]
    precise = [flag for flag in words.drop(flags.PRECISION) if flag in ("--bf16", "--fp16", "--fp8-format")]
    if wish.dtype == "bfloat16":
        words.set("--bf16")
    elif precise:
        lost.append(f"{precise[0]}: rounding in the precision of the training (this ran in float32)")
    if wish.device == "cpu":
        lost += [flags.DEVICE[flag] for flag in words.drop(flags.DEVICE)]
        if words.text("--moe-token-dispatcher-type") == "flex":
            words.set("--moe-token-dispatcher-type", "alltoall")
            lost.append("the flex dispatcher of experts")
        if kind == "megatron-lm":
            if words.text("--transformer-impl", "transformer_engine") != "local":
                lost.append("Transformer Engine's layers (Megatron's local ones ran)")
            words.set("--transformer-impl", "local")
            for flag in flags.PLAIN_CPU:
                words.set(flag)
    return list(dict.fromkeys(lost))


def _share(words: Words, ranks: Ranks) -> None:
    """Adapt the flags of context parallelism to the number of ranks."""
    words.set(SIZE, ranks.cp)
    if DEGREE in words:
        words.set(DEGREE, divisor(words.number(DEGREE, 2), ranks.cp))
    if words.number(WINDOW, 1) > 1:
        ring = ranks.cp // words.number(DEGREE, 1) if takes_degree(words.text(ALGORITHM)) else ranks.cp
        words.set(WINDOW, divisor(words.number(WINDOW, 1), ring))
    words.replace("--hierarchical-context-parallel-sizes", 2, ranks.cp // 2)
    layers = words.number("--num-layers", 2)
    if words.number("--context-parallel-cache-interval", 0) >= layers:
        words.set("--context-parallel-cache-interval", layers - 1)
    own_layers.fit(words, ranks.cp, words.text(ALGORITHM), words.number(DEGREE, 2))


def _uncovered(given: Words, wish: Wish) -> list[str]:
    lines = []
    if any(float(given.text(flag, "0.1")) > 0 for flag in flags.DROPOUT):
        lines.append("dropout (off in both runs)")
    if wish.device == "cpu":
        lines.append("attention kernels and collectives of the device (the CPU's kernel and gloo ran)")
    lines.append("validation, checkpoints, more than one data-parallel rank")
    return lines


def _changes(given: Words, words: Words) -> list[str]:
    """flag old -> new, several per line; flags that only make runs short and harmless are omitted."""
    silent = {*flags.FILES, *flags.SCHEDULE, *flags.STEADY, *flags.PLAIN_CPU}
    silent |= {"--data-cache-path", "--seed", "--train-iters"}
    changed = []
    for flag in dict.fromkeys([*given.flags(), *words.flags()]):
        before, after = given.values(flag), words.values(flag)
        if before == after or flag in silent:
            continue
        old, new = (" ".join(values) or "on" if values is not None else "-" for values in (before, after))
        changed.append(f"{flag[2:]} {old} -> {new}")
    lines: list[str] = []
    for change in changed:
        if lines and len(lines[-1]) + len(change) < 100:
            lines[-1] += f", {change}"
        else:
            lines.append(change)
    return lines
