"""Command lines drawn at random for fuzz.py and prove_drawn.py: most can run, some break a rule, some hold nonsense."""

import random
from dataclasses import dataclass

from mindspeed_cp.arguments.declared import our_flags
from mindspeed_cp.settings.algorithms import ALGORITHMS

from trainer.arguments import build_parser

NONSENSE = ("-1", "0", "nan", "a", "", "1.5", "-5,0", "99999999999", "inf")
# Flags that say how the sequence is shared, and nothing of the model; a run without them must lose the same.
SHARING = {each.flag for each in our_flags() if each.shares}
# Their values depend on sizes, on the model or on the machine.
_BY_HAND = {
    "--context-parallel-size", "--context-parallel-algo", "--ulysses-degree-in-cp", "--cp-window-size",
    "--context-parallel-kv-cache-policy", "--context-parallel-cache-interval", "--use-ulysses-allgather-kv",
    "--gather-size-calculator", "--cp-kernel", "--cp-keep-attention", "--cp-trust",
    "--cp-layer-algo",
}  # fmt: skip

_LAYERS = (
    "0:megatron_cp_algo,1-:kvallgather_cp_algo", "1-/2:ulysses_cp_algo", "0-/2:megatron_cp_algo:cp-kv-exchange=direct",
    "0:hybrid_cp_algo", "1:megatron_cp_algo:cp-window-size=2", "0-:kvallgather_cp_algo", "0-3:cp-ulysses-chunks=2",
    "3-1:",
)  # fmt: skip


@dataclass(frozen=True)
class CommandLine:
    """Flags (a value of None: a switch) and the ranks that get them."""

    settings: tuple[tuple[str, str | None], ...]
    world_size: int

    def flags(self) -> list[str]:
        return [word for pair in self.settings for word in pair if word is not None]

    def without_context_parallelism(self) -> "CommandLine":
        """The same model, micro batches, tensor and pipeline parallelism, on as few ranks as these need."""
        kept = {flag: value for flag, value in self.settings if flag not in SHARING}
        sizes = (kept.get(f"--{kind}-model-parallel-size") or "1" for kind in ("tensor", "pipeline"))
        first, second = (int(size) for size in sizes)
        return CommandLine(tuple(kept.items()), first * second)


def draw(rng: random.Random) -> CommandLine:
    """One command line with all its sizes; the same numbers from ``rng`` draw the same one."""
    settings: dict[str, str | None] = {}

    def maybe(probability: float, flag: str, *values: str) -> bool:
        taken = rng.random() < probability
        if taken:
            settings[flag] = rng.choice(values) if values else None
        return taken

    _draw_model(rng, settings, maybe)
    _draw_training(settings, maybe)
    world_size = _draw_sharing(rng, settings, maybe)
    settings = {flag: value for flag, value in settings.items() if flag in build_parser()._option_string_actions}
    if rng.random() < 0.08:
        flag = rng.choice([flag for flag, value in settings.items() if value is not None])
        settings[flag] = rng.choice(NONSENSE)
    if rng.random() < 0.04:
        world_size = rng.randint(1, 4)
    return CommandLine(tuple(settings.items()), world_size)


def _draw_model(rng, settings, maybe):
    heads = rng.choice((4, 4, 8, 6, 12))
    settings["--num-layers"] = rng.choice(("2", "4", "4"))
    settings["--num-attention-heads"] = str(heads)
    settings["--hidden-size"] = str(heads * rng.choice((8, 16)))
    settings["--seq-length"] = rng.choice(("64", "64", "48", "96", "63", "37", "17", "5", "3"))
    settings["--vocab-size"] = "512"
    if maybe(0.3, "--group-query-attention"):
        settings["--num-query-groups"] = rng.choice(("1", "2", "3", "4"))
    maybe(0.5, "--position-embedding-type", "rope", "none", "learned_absolute")
    maybe(0.1, "--rotary-percent", "0.5")
    maybe(0.3, "--normalization", "RMSNorm")
    maybe(0.1, "--kv-channels", "12", "5")
    maybe(0.15, "--window-size", "10,0", "3,0", "70,0")
    maybe(0.1, "--cp-attention-mask-type", "full")
    for flag in ("--swiglu", "--disable-bias-linear", "--add-qkv-bias", "--untie-embeddings-and-output-weights"):
        maybe(0.15, flag)


def _draw_training(settings, maybe):
    settings |= {"--train-iters": "3", "--lr": "5e-3", "--global-batch-size": "8", "--use-flash-attn": None}
    maybe(0.3, "--global-batch-size", "4", "12")
    maybe(0.3, "--micro-batch-size", "2", "2", "2", "3")
    maybe(0.1, "--bf16")
    maybe(0.2, "--calculate-per-token-loss")
    maybe(0.15, "--recompute-granularity", "full", "selective")
    if settings.get("--recompute-granularity") == "full":
        maybe(0.4, "--recompute-method", "uniform", "block")
        maybe(0.4, "--recompute-num-layers", "1", "2", "9")
    maybe(0.15, "--use-distributed-optimizer")
    maybe(0.1, "--overlap-grad-reduce")
    maybe(0.1, "--eval-iters", "1")
    packed = maybe(0.2, "--reset-attention-mask")
    maybe(0.8 if packed else 0.05, "--reset-position-ids")
    maybe(0.2, "--eod-mask-loss")
    maybe(0.1, "--variable-seq-lengths")


def _draw_sharing(rng, settings, maybe):
    """Parallel sizes and algorithm; returns the number of ranks that they need."""
    algorithm, row = rng.choice(list(ALGORITHMS.items()))
    hybrid = row.takes_degree
    cp = rng.choice((4, 4, 4, 2) if hybrid else (2, 2, 2, 3, 4, 4, 1))
    room = 4 // cp
    tp = rng.choice((1, 1, 2)) if room >= 2 else 1
    pp = rng.choice((1, 1, 2)) if room // tp >= 2 else 1
    settings["--context-parallel-size"] = str(cp)
    settings["--context-parallel-algo"] = algorithm
    if tp > 1:
        settings["--tensor-model-parallel-size"] = str(tp)
        maybe(0.4, "--sequence-parallel")
    if pp > 1:
        settings["--pipeline-model-parallel-size"] = str(pp)
        maybe(0.3, "--num-virtual-stages-per-pipeline-rank", "2")
    maybe(0.97 if hybrid else 0.02, "--ulysses-degree-in-cp", *(("2",) * 9), "3")
    maybe(0.3 if row.takes_window and cp == 4 else 0.02, "--cp-window-size", "2", "4")
    if maybe(0.2 if cp > 1 else 0.02, "--context-parallel-kv-cache-policy", "full", "half"):
        maybe(0.3, "--context-parallel-cache-interval", "1", "1", "1", "7")
    maybe(0.3 if cp > 1 else 0.02, "--cp-keep-attention")
    unaligned = not row.any_length
    maybe(0.7 if unaligned else 0.02, "--gather-size-calculator", "dynamic", "dynamic", "default")
    maybe(0.05 if unaligned else 0.01, "--use-ulysses-allgather-kv")
    maybe(0.05, "--cp-kernel", "blockwise")
    maybe(0.2 if cp > 1 else 0.02, "--cp-layer-algo", *_LAYERS)
    for each in our_flags():
        if each.shares and each.flag not in _BY_HAND:
            taken = each.taken_by is None or each.taken_by(row)
            maybe(0.2 if taken else 0.02, each.flag, *(*each.choices, *(("1", "2", "4") if each.whole else ())))
    return tp * pp * cp * (rng.choice((1, 2)) if tp * pp * cp <= 2 else 1)
