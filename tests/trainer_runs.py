"""Training runs for tests: ``run_training`` starts ranks once for many cases."""

import math
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from distributed import run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --global-batch-size 4 --train-iters 20 "
    "--lr 5e-3 --use-flash-attn"
)
# What ranks that train find imported when they start; the adaptor stands before Megatron.
IMPORTED = ("trainer.quiet", "mindspeed_cp.megatron_adaptor", "trainer.loop", "prepare_data")


def prepare_data(folder, documents="topics"):
    """Write the standard library's help topics below ``folder``; returns the prefix.

    In a process of its own, because the script patches torch.
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
    """name -> list of step records; the cases (name -> list of arguments) run one after the other in the same new
    ranks.
    """
    return run_ranks(world_size, train, cases, timeout=timeout, fresh=True, imported=IMPORTED)[0]


def tiny(prefix, flags):
    return f"{TINY} --data-path {prefix} {flags}".split()


def train(rank, cases):
    """What each rank of ``run_argvs`` does."""
    import torch.distributed as dist
    from trainer.arguments import parse_args
    from trainer.loop import pretrain

    results, groups = {}, MegatronsGroups()
    for name, argv in cases.items():
        with groups.reused():
            results[name] = pretrain(parse_args(argv, world_size=dist.get_world_size()))
    return results


class MegatronsGroups:
    """Gives a run the process groups of the runs before it: Megatron makes dozens, and making and ending them takes
    seconds.

    The n-th group of the same ranks that a run asks for is the n-th that others asked for, so that no two groups of one
    run share a communicator. Our own groups are made and ended by every run.
    """

    def __init__(self):
        import torch.distributed as dist
        from megatron.core import parallel_state

        self._create, self._destroy, self._groups = parallel_state.create_group, dist.destroy_process_group, {}

    @contextmanager
    def reused(self):
        """Stands in for Megatron's ``create_group`` during one run."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        asked = Counter()

        def create_group(ranks, timeout=None, **options):
            asked[tuple(ranks), timeout] += 1
            key = tuple(ranks), timeout, asked[tuple(ranks), timeout]
            if key not in self._groups:
                self._groups[key] = self._create(ranks, timeout=timeout, **options)
            return self._groups[key]

        def destroy_process_group(group=None):
            if not any(group is kept for kept in self._groups.values()):
                self._destroy(group)

        with (
            patch.object(parallel_state, "create_group", create_group),
            patch.object(dist, "destroy_process_group", destroy_process_group),
        ):
            yield


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
    pairs = [
        (record[key], reference[key])
        for record, reference in zip(records, expected, strict=True)
        for key in ("loss", "grad_norm")
    ]
    assert all(math.isfinite(value) and value > 0 for pair in pairs for value in pair)
    return max(abs(value - reference) / reference for value, reference in pairs)
