"""Numbers of parameters on ranks of Megatron's own models; ``all_held_by_megatron`` runs on each rank."""

from unittest import mock

import torch
from model_cases import MODEL, VOCABULARY


def all_held_by_megatron(rank, runs):
    from megatron.core.transformer import multi_latent_attention

    # Needed although nothing is computed and Transformer Engine is not installed.
    cuda = mock.patch.multiple(torch.cuda, Stream=mock.DEFAULT, current_device=lambda: "cpu")
    with cuda, mock.patch.object(multi_latent_attention, "TELinear", type(None), create=True):
        return [held_by_megatron(*run) for run in runs]


def held_by_megatron(settings, latent, tp, ep, etp):
    """(parameters of layers without routed experts, parameters of routed experts) on this rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.identity_op import IdentityOp

    parallel_state.initialize_model_parallel(
        tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
    )
    try:
        sizes = dict(tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
        config = (MLATransformerConfig if latent else TransformerConfig)(
            **(MODEL | settings),
            **sizes,
            sequence_parallel=tp > 1,  # required by Megatron, rejected by torch's norms
            add_bias_linear=False,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        config.sequence_parallel = False
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        for layer in spec.layer_specs:  # it has no parameters, and Megatron's own does not support latent attention
            layer.submodules.self_attention.submodules.core_attention = IdentityOp
        model = GPTModel(config, spec, VOCABULARY, 64, position_embedding_type="rope")
        counts = {True: 0, False: 0}
        for name, parameter in model.decoder.layers.named_parameters():
            counts[".experts." in name] += parameter.numel()
        return counts[False], counts[True]
    finally:
        parallel_state.destroy_model_parallel()
