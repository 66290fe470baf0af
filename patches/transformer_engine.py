"""Transformer Engine's core attention: what its module does not keep, and what only its own attention can do."""

import inspect
from functools import wraps

# Field of TransformerConfig -> how the user names it, and why nothing here can honour it.
REFUSED = {
    "fp8_dot_product_attention": (
        "fp8_dot_product_attention of the model's configuration",
        "attention is computed in the type of its tensors",
    ),
    "fp8_multi_head_attention": (
        "fp8_multi_head_attention of the model's configuration",
        "attention is computed in the type of its tensors",
    ),
    "qk_clip": ("--qk-clip", "attention does not return its largest logit"),
    "log_max_attention_logit": ("--log-max-attention-logit", "attention does not return its largest logit"),
}


def keep_arguments(bridge):
    """Builds an ``__init__`` of TEDotProductAttention that keeps its scale and dropout.

    Transformer Engine hands the scale to its kernels' modules and keeps none itself.
    """

    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def __init__(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            config, dropout = given["config"], given.get("attention_dropout")
            if config.context_parallel_size > 1 or bridge.is_dynamic:
                _refuse(config)
            original(self, *args, **kwargs)
            self.asked_softmax_scale = given.get("softmax_scale")
            self.asked_dropout = config.attention_dropout if dropout is None else dropout

        return __init__

    return build


def _refuse(config):
    for field, (name, why) in REFUSED.items():
        if getattr(config, field, False):
            raise ValueError(
                f"{name} is not supported with context parallelism, where {why}; leave it out, or use "
                "--context-parallel-size 1."
            )
