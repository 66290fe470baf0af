"""Patches of pipeline stages: the micro-batch that a stage runs, and the shapes that it exchanges."""

import inspect
from functools import wraps

from mindspeed_cp.patches.manager import Patch


def pipeline_patches(state):
    """The table; ``state`` is the AdaptorState that all replacements share."""
    return [
        Patch(
            "megatron.core.transformer.transformer_block.TransformerBlock.forward",
            _run_with_shape(state),
            "pipeline stages without a batch, and layers, learn the true length of the micro-batch",
        ),
        Patch(
            "megatron.core.pipeline_parallel.schedules.get_tensor_shapes",
            _tensor_shapes(state),
            "pipeline stages exchange seq_length / cp rows, which differs between ranks for uneven lengths",
        ),
    ]


def _run_with_shape(state):
    def build(original):
        @wraps(original)
        def forward(self, hidden_states, *args, **kwargs):
            if (
                state.cp_size == 1
                or kwargs.get("inference_context") is not None
                or kwargs.get("inference_params") is not None
            ):
                return original(self, hidden_states, *args, **kwargs)
            local = hidden_states if self.pre_process else self.input_tensor
            with state.running(block_shape(state, self, local.size(0))):
                return original(self, hidden_states, *args, **kwargs)

        return forward

    return build


def block_shape(state, block, num_rows):
    """The shape of the micro-batch that enters a TransformerBlock; ``num_rows`` is the first dimension of its input."""
    config = block.config
    local_len = num_rows * config.tensor_model_parallel_size if config.sequence_parallel else num_rows
    return state.shape_for(local_len, batch_is_known=block.pre_process or block.post_process)


def _tensor_shapes(state):
    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def get_tensor_shapes(*args, **kwargs):
            shapes = original(*args, **kwargs)
            if state.cp_size == 1:
                return shapes
            given = signature.bind(*args, **kwargs).arguments
            config, seq_len = given["config"], given.get("decoder_seq_length") or given["seq_length"]
            rows = state.layout(seq_len).length(state.cp_rank)
            if config.sequence_parallel:
                rows //= config.tensor_model_parallel_size
            return [(rows, *shape[1:]) if shape else shape for shape in shapes]

        return get_tensor_shapes

    return build
