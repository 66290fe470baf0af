"""Patches of state-space layers, which see the whole sequence and put it in order for that themselves.

Megatron gathers the sequence from all ranks for a part of the heads, undoes the zigzag over the whole row that it takes
every batch to have, runs the layer, and redoes it. Here it is the layout of the batch that is undone and redone.
s: tokens of this rank, S: of the whole sequence.
"""

import importlib
import importlib.util
from functools import wraps

import torch
from mindspeed_cp.patches.manager import Patch

SSM = "megatron.core.ssm"
CONTEXT_PARALLEL = f"{SSM}.mamba_context_parallel"


def mamba_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            f"{CONTEXT_PARALLEL}.MambaContextParallel.pre_conv_ssm",
            _refuse_uneven(state),
            "Megatron's all-to-all of state-space layers takes equal lengths only",
            _without_own_context_parallelism,
        ),
        Patch(
            f"{CONTEXT_PARALLEL}._undo_attention_load_balancing",
            _in_order(state),
            "the batch may have another layout than Megatron's zigzag over the whole row",
            _without_own_context_parallelism,
        ),
        Patch(
            f"{CONTEXT_PARALLEL}._redo_attention_load_balancing",
            _by_rank(state),
            "the batch may have another layout than Megatron's zigzag over the whole row",
            _without_own_context_parallelism,
        ),
        Patch(
            f"{SSM}.mamba_mixer.MambaMixer.__init__",
            _refuse_layer("a Mamba layer", "a megatron-core of 0.13 or later"),
            "before 0.13 a Mamba layer takes a rank's part for the whole sequence",
            lambda: "this version's Mamba has context parallelism" if _has_own() else _missing("mamba_mixer"),
        ),
        Patch(
            f"{SSM}.gated_delta_net.GatedDeltaNet.__init__",
            _refuse_layer("a gated delta net", "attention or Mamba layers"),
            "a gated delta net takes a rank's part for the whole sequence; its split from 0.18 on was not tried",
            lambda: _missing("gated_delta_net"),
            inherited=True,  # from 0.19 on
        ),
    ]


def _has_own():
    return importlib.util.find_spec(CONTEXT_PARALLEL) is not None


def _without_own_context_parallelism():
    return "" if _has_own() else "this version's Mamba has no context parallelism"


def _missing(name):
    """Why a layer of megatron.core.ssm needs no patch: it is not there, or what it needs is not."""
    if importlib.util.find_spec(f"{SSM}.{name}") is None:
        return "this version has no such layer"
    try:
        importlib.import_module(f"{SSM}.{name}")
    except ImportError as error:
        return f"it cannot be imported: {error}"
    return ""


def _refuse_uneven(state):
    def build(original):
        @wraps(original)
        def pre_conv_ssm(self, input_, *args, **kwargs):
            if state.cp_size > 1:
                layout = state.micro_batch(input_.size(0)).layout
                if not layout.is_even:
                    raise ValueError(
                        f"state-space layers need equally many tokens on every rank, and a sequence of "
                        f"{layout.seq_len} tokens in the layout {layout.kind} is shared unevenly by the "
                        f"--context-parallel-size {layout.cp_size} ranks; use a length that 2 x {layout.cp_size} "
                        "divides."
                    )
            return original(self, input_, *args, **kwargs)

        return pre_conv_ssm

    return build


def _in_order(state):
    def build(original):
        @wraps(original)
        def undo_attention_load_balancing(input_, cp_size, *args, **kwargs):
            """(S, b, h), rank after rank -> the same in the order of the sequence."""
            if cp_size != state.cp_size or cp_size == 1:
                return original(input_, cp_size, *args, **kwargs)
            return _layout(state, input_).unshard(input_.chunk(cp_size))

        return undo_attention_load_balancing

    return build


def _by_rank(state):
    def build(original):
        @wraps(original)
        def redo_attention_load_balancing(input_, cp_size, *args, **kwargs):
            """(S, b, h) in the order of the sequence -> the same, rank after rank."""
            if cp_size != state.cp_size or cp_size == 1:
                return original(input_, cp_size, *args, **kwargs)
            layout = _layout(state, input_)
            return torch.cat([layout.shard(input_, rank) for rank in range(cp_size)])

        return redo_attention_load_balancing

    return build


def _layout(state, whole):
    return state.micro_batch(whole.size(0) // state.cp_size).layout


def _refuse_layer(what, instead):
    def build(original):
        @wraps(original)
        def __init__(self, config, *args, **kwargs):
            if config.context_parallel_size > 1:
                raise ValueError(
                    f"{what} of this megatron-core is not supported with context parallelism: it may take the tokens "
                    f"of one rank for the whole sequence; use --context-parallel-size 1, or {instead}."
                )
            original(self, config, *args, **kwargs)

        return __init__

    return build
