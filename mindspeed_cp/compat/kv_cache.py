"""MindSpeed's rule for the layers that the KV cache policy applies to (``context_parallel_kv_cache``)."""

__all__ = ["get_cache_policy"]


def get_cache_policy(layer_number: int, cache_policy_init: str | None, cache_interval: int) -> str | None:
    """``cache_policy_init`` if it applies to the layer, else None; as ``ContextParallelConfig.kv_cache_policy_for``.

    Args:
        layer_number: global, from 1.
        cache_interval: number of layers without the policy after each layer with it.
    """
    return cache_policy_init if (layer_number - 1) % (cache_interval + 1) == 0 else None
