"""Patches of recomputation: it must see the micro-batch of its forward pass, whatever was split since."""

from functools import wraps

from mindspeed_cp.patches.manager import Patch

RANDOM = "megatron.core.tensor_parallel.random"


def recompute_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{RANDOM}.checkpoint",
            _checkpoint(state),
            "recomputation must see the micro-batch of its forward pass",
        ),
        Patch(
            f"{RANDOM}.CheckpointWithoutOutput.checkpoint",
            _checkpoint_without_output(state),
            "recomputation must see the micro-batch of its forward pass",
        ),
    ]


def _checkpoint(state):
    def build(original):
        @wraps(original)
        def checkpoint(function, *args, **kwargs):
            return original(function if state.cp_size == 1 else state.bound(function), *args, **kwargs)

        return checkpoint

    return build


def _checkpoint_without_output(state):
    def build(original):
        @wraps(original)
        def checkpoint(self, run_function, *args, **kwargs):
            return original(self, run_function if state.cp_size == 1 else state.bound(run_function), *args, **kwargs)

        return checkpoint

    return build
