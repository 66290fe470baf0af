"""Two features in one: context parallelism, and attention without it."""

ATTENTION = "megatron.core.transformer.dot_product_attention.DotProductAttention"


class Features:
    def register_args(self, parser):
        parser.add_argument("--context-parallel-algo", default="megatron_cp_algo")
        parser.add_argument("--attention-mask-type", default="causal", choices=["causal", "general"])

    def register_patches(self, manager, args):
        if int(getattr(args, "context_parallel_size", 1)) > 1:
            from mindspeed.core.context_parallel.adaptor import MindSpeedCPDotProductAttention

            manager.register_patch(ATTENTION, MindSpeedCPDotProductAttention)
        else:
            from mindspeed.core.fused_attention import dot_product_attention_forward

            manager.register_patch(f"{ATTENTION}.forward", dot_product_attention_forward)


from mindspeed.features_manager import features_manager  # noqa: E402, F401  as MindSpeed's package does
