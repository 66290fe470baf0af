"""Training runs for tests: ``run_training`` starts ranks once for many cases."""

import math
import os
from pathlib import Path

from distributed import run_ranks
from kept_groups import of_megatron

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 4 --train-iters 20 "
    "--lr 5e-3 --use-flash-attn"
)
# Modules that training ranks have already imported when they start; fake kernels and the adaptor come before Megatron.
IMPORTED = (
    "fake_fla",
    "fake_mamba_ssm",
    "trainer.quiet",
    "mindspeed_cp.megatron_adaptor",
    "trainer.loop",
    "prepare_data",
)


def prepare_data(folder, documents="topics"):
    """Write the standard library's help topics as a dataset in ``folder``; returns the prefix.

    Runs in a separate process, because the script patches torch.
    """
    prefix = str(folder / documents)
    run_ranks(1, _prepare_data, ["--output", prefix, "--documents", documents], fresh=True, imported=IMPORTED)
    return prefix


def _prepare_data(rank, argv):
    import prepare_data

    prepare_data.main(argv)


def environment():
    """The environment of a script that a test starts."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_training(world_size, prefix, cases, timeout=300):
    """name -> list of step records of tiny runs on the data at ``prefix``; cases: name -> further flags."""
    return run_argvs(world_size, {name: tiny(prefix, flags) for name, flags in cases.items()}, timeout)


def run_argvs(world_size, cases, timeout=300):
    """name -> list of step records; the cases (name -> list of arguments) run in sequence on the same new ranks."""
    return run_ranks(world_size, train, cases, timeout=timeout, fresh=True, imported=IMPORTED)[0]


def tiny(prefix, flags):
    return f"{TINY} --data-path {prefix} {flags}".split()


def train(rank, cases):
    """Run the cases of ``run_argvs`` on this rank."""
    import torch.distributed as dist
    from trainer.arguments import parse_args
    from trainer.loop import pretrain

    results, groups = {}, of_megatron()
    for name, argv in cases.items():
        with groups.reused():
            results[name] = pretrain(parse_args(argv, world_size=dist.get_world_size()))
    return results


def largest_difference(records, expected):
    """Largest relative difference of loss and gradient norm over all steps."""
    assert len(records) == len(expected) > 0
    pairs = [
        (record[key], reference[key])
        for record, reference in zip(records, expected, strict=True)
        for key in ("loss", "grad_norm")
    ]
    assert all(math.isfinite(value) and value > 0 for pair in pairs for value in pair)
    return max(abs(value - reference) / reference for value, reference in pairs)
