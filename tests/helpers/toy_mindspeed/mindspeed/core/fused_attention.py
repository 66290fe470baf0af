"""MindSpeed's replacement for Megatron's attention without context parallelism."""


def dot_product_attention_forward(self, *args, **kwargs):
    return "fused"
