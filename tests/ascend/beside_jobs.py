"""A job of the test bed with a real MindSpeed beside this project: who patches when, and what trains then."""

import contextlib
import io
import os
import sys
import warnings


def beside_mindspeed(rank, order, flags=(), settings=None, train=True):
    """What a tiny GPT trains to when both are imported in an order.

    Args:
        order: "ours" and "mindspeed" are imports, "repatch" is MindSpeed's call with context-parallel size 2, "plain"
            with size 1 and attention without a kernel, "off" sets MINDSPEED_CP.
        flags: the command line, as MindSpeed reads it at its import.
        settings: what "repatch" is given besides the sizes.
        train: else it ends with the imports.

    Returns:
        losses: [(loss, gradient norm)] of every step.
        calls: how often this project's kernel computed a block.
        said: what was printed of who does what.
        lost: targets of this project that somebody else has taken.
        applied: how many of them hold.
    """
    sys.argv = ["train.py", *flags]
    warnings.simplefilter("ignore", DeprecationWarning)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for step in order:
            STEPS[step](settings or {})
        if "repatch" not in order and "plain" not in order:
            _as_megatrons_parser()
        calls, losses = _train(rank) if train else ([], [])
    report = sys.modules["mindspeed_cp.megatron_adaptor"].report() if "ours" in order else []
    return {
        "losses": losses,
        "calls": len(calls),
        "said": [line for line in said.getvalue().splitlines() if "ontext parallelism" in line and "+--" not in line],
        "lost": [row.target for row in report if row.is_lost],
        "applied": sum(row.applied for row in report),
    }


def beside_mindspeeds_ring(rank):
    """The lines of scripts/verify_npu.sh about one layer of attention, by this project's ring and by MindSpeed's."""
    import torch
    import verify_ring
    from fake_torch_npu import attention

    # It passes on seed, offset and numels, which nothing reads without dropout; this project must not.
    attention.check_gradient = lambda asked, uninitialised: None
    sys.argv = ["verify_ring"]
    rank.join()
    return list(verify_ring.lines("npu", 64, 4, 16, torch.float32))


def _as_megatrons_parser():
    """Without megatron.training MindSpeed reads Megatron's flags as text, and its own rules want numbers."""
    from mindspeed.args_utils import get_full_args

    values = vars(get_full_args())
    values.update({name: int(value) for name, value in values.items() if isinstance(value, str) and value.isdigit()})


def _train(rank):
    """(one entry for every block that this project's kernel computed, [(loss, gradient norm)])."""
    import tiny_gpt

    from mindspeed_cp.kernels.npu import NpuKernel

    calls, forward = [], NpuKernel.forward
    NpuKernel.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    rank.join()
    return calls, tiny_gpt.train("", rank.world, 1, 3, tiny_gpt.Options())


def _ours(settings):
    import mindspeed_cp.megatron_adaptor  # noqa: F401


def _mindspeed(settings):
    import mindspeed.megatron_adaptor  # noqa: F401


def _repatch(settings):
    from mindspeed.megatron_adaptor import repatch

    repatch({"context_parallel_size": 2, "seq_length": 32, "num_attention_heads": 4, **settings})


def _plain(settings):
    from mindspeed.megatron_adaptor import repatch

    repatch({"micro_batch_size": 2, "seq_length": 32})


def _off(settings):
    os.environ["MINDSPEED_CP"] = "off"


STEPS = {"off": _off, "ours": _ours, "mindspeed": _mindspeed, "plain": _plain, "repatch": _repatch}
