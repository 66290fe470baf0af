"""Training runs for tests: ``train`` is what every rank of ``run_ranks`` calls, once for a list of cases."""

import math
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = ("--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 4 --train-iters 20 "
        "--lr 5e-3 --use-flash-attn")


def prepare_data(folder, documents="topics"):
    """Write the standard library's help topics below ``folder``; returns the prefix.

    In a process of its own, because the script patches torch.
    """
    prefix = str(folder / documents)
    subprocess.run([sys.executable, str(REPOSITORY / "scripts/prepare_data.py"), "--output", prefix, "--documents", documents],
                   check=True, env=environment(), stdout=subprocess.DEVNULL)
    return prefix


def environment():
    """The environment of a script that a test starts."""
    import os

    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def train(rank, prefix, cases):
    """Run each case (name -> flags) one after the other in this process group; returns name -> list of step records."""
    import torch.distributed as dist
    import trainer.quiet  # noqa: F401
    from trainer.arguments import parse_args
    from trainer.loop import pretrain

    import mindspeed_cp.megatron_adaptor  # noqa: F401

    results = {}
    for name, flags in cases.items():
        argv = f"{TINY} --data-path {prefix} {flags}".split()
        results[name] = pretrain(parse_args(argv, world_size=dist.get_world_size()))
        _release_groups()
    return results


def _release_groups():
    """End every process group but the world: Megatron only forgets its groups, and each keeps threads that poll."""
    import gc

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    dist.barrier()  # nobody closes a connection that another still reads from
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def largest_difference(records, expected):
    """Largest relative difference of loss and gradient norm over all steps."""
    assert len(records) == len(expected) > 0
    pairs = [(record[key], reference[key]) for record, reference in zip(records, expected, strict=True)
             for key in ("loss", "grad_norm")]
    assert all(math.isfinite(value) and value > 0 for pair in pairs for value in pair)
    return max(abs(value - reference) / reference for value, reference in pairs)
