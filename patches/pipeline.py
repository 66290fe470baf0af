"""Patches of pipeline stages: the micro-batch that a stage runs, and the shapes that stages exchange."""

import inspect
from functools import wraps

from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.models import packed_params_in, refuse_inference

from mindspeed_cp.megatron.packed import packed_batch

SCHEDULES = "megatron.core.pipeline_parallel.schedules"


def pipeline_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            "megatron.core.transformer.transformer_block.TransformerBlock.forward",
            _run_with_record(state),
            "pipeline stages without a batch, and layers, learn the true length of the micro-batch",
        ),
        Patch(
            f"{SCHEDULES}.get_tensor_shapes",
            _tensor_shapes(state),
            "pipeline stages exchange seq_length / cp rows, which differs between ranks for uneven lengths",
        ),
        Patch(
            f"{SCHEDULES}.forward_backward_pipelining_with_interleaving",
            _interleaved(state),
            "the same where stages are interleaved",
        ),
    ]


def _run_with_record(state):
    def build(original):
        @wraps(original)
        def forward(self, hidden_states, *args, **kwargs):
            if state.cp_size == 1:
                return original(self, hidden_states, *args, **kwargs)
            values = (hidden_states, *args, *kwargs.values())
            refuse_inference(values)
            local = hidden_states if self.pre_process else self.input_tensor
            with state.running(block_record(state, self.config, local.size(0), packed_params_in(values))):
                return original(self, hidden_states, *args, **kwargs)

        return forward

    return build


def block_record(state, config, num_rows, params=None):
    """The record of the micro-batch that enters a block of layers.

    Args:
        config: TransformerConfig.
        num_rows: first dimension of the block's input, which sequence parallelism has split again.
        params: PackedSeqParams in thd, None for whole sequences.
    """
    local_len = num_rows * config.tensor_model_parallel_size if config.sequence_parallel else num_rows
    if state.active is None and params is not None:
        return packed_batch(state, params, local_len)
    return state.micro_batch(local_len)


def _rows(state, config, seq_len):
    """Rows of activations that this rank exchanges with the stages before and behind it."""
    rows = state.layout(seq_len).length(state.cp_rank)
    return rows // config.tensor_model_parallel_size if config.sequence_parallel else rows


def _tensor_shapes(state):
    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def get_tensor_shapes(*args, **kwargs):
            shapes = original(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            if state.cp_size == 1 or given["config"].variable_seq_lengths:  # stages tell each other their shapes
                return shapes
            rows = _rows(state, given["config"], given.get("decoder_seq_length") or given["seq_length"])
            return [(rows, *shape[1:]) if shape else shape for shape in shapes]

        return get_tensor_shapes

    return build


def _interleaved(state):
    def build(original):
        from megatron.core.utils import get_model_config

        signature = inspect.signature(original)

        @wraps(original)
        def forward_backward_pipelining_with_interleaving(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            model = given.arguments["model"]
            if state.cp_size == 1 or get_model_config(model[0]).variable_seq_lengths:
                return original(*args, **kwargs)
            # The schedule divides the length by cp and makes nothing else of it.
            rows = state.layout(given.arguments["seq_length"]).length(state.cp_rank)
            given.arguments["seq_length"] = rows * state.cp_size
            return original(*given.args, **given.kwargs)

        return forward_backward_pipelining_with_interleaving

    return build
