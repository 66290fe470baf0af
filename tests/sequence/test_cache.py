"""Plans are kept by the bytes that they hold, so that documents that change in every step do not fill the memory."""

import sys

import numpy as np
import torch

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.attention import ring_plan as ring_plans
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.sequence import balance, layout, masks, staircases
from mindspeed_cp.sequence.cache import LEAST_KEPT, ByteCache
from mindspeed_cp.sequence.masks import attention_masks


def deep_bytes(value, seen):
    """Memory of a value and all that it refers to."""
    if id(value) in seen or isinstance(value, (type, torch.Tensor)) or callable(value):
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, np.ndarray):
        return size
    if isinstance(value, dict):
        return size + sum(deep_bytes(each, seen) for pair in value.items() for each in pair)
    if isinstance(value, (tuple, list, set)):
        return size + sum(deep_bytes(each, seen) for each in value)
    return size + (deep_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0)


def test_results_are_kept_while_there_is_room_and_those_used_last_stay():
    made = []

    def make(number, factor=1):
        made.append(number)
        return [number] * factor

    cache = ByteCache(make, limit=10, size=len)
    assert cache(1, factor=4) is cache(1, factor=4) and made == [1]
    cache(2, factor=4)
    cache(1, factor=4)  # used again: 2 goes first
    cache(3, factor=4)
    assert cache.num_bytes == 8
    cache(1, factor=4)
    cache(2, factor=4)
    assert made == [1, 2, 3, 2]
    grown = cache(4)
    grown.extend(range(20))  # as plans do while they are used
    cache(5)
    cache(6)
    assert cache.num_bytes == LEAST_KEPT, "what grew too large went"
    cache.cache_clear()
    assert cache.num_bytes == 0


def test_plans_of_documents_that_change_in_every_step_hold_a_bounded_memory(monkeypatch):
    config = ContextParallelConfig(context_parallel_size=4, algorithm="megatron_cp_algo", batch_layout="balanced")
    caches = (
        ring_plan,
        balance.balanced_rings,
        staircases.stretches,
        masks._document_mask,
        masks._slices_mask,
        layout._even,
        layout._balanced,
    )
    assert ring_plan._limit <= 48 << 20 and all(cache._limit <= 8 << 20 for cache in caches[1:])
    for cache in caches:
        cache.cache_clear()
        monkeypatch.setattr(cache, "_limit", cache._limit // 16)
    generator = torch.Generator().manual_seed(0)
    seq_len, peak = 1 << 15, 0
    for _ in range(60):
        ends = torch.randperm(seq_len - 1, generator=generator)[:400].sort().values + 1
        documents = (0, *ends.tolist(), seq_len)
        made = SequenceLayout.build(config, seq_len, documents)
        plan = ring_plan(made, attention_masks(True, seq_len, 1, documents), False, exact=True)
        for source in range(4):
            plan.tasks(0, source)
            plan.rows_needed(0, source)
    seen = set()
    for cache in caches:
        held, told = sum(deep_bytes(value, seen) for value in cache._kept.values()), cache.num_bytes
        assert told <= cache._limit
        assert held <= 2 * told + (1 << 16), f"{cache._function.__name__} holds {held} bytes and says {told}"
        peak += held
    assert len(ring_plan._kept) < 60 and peak < sum(cache._limit for cache in caches)
    for cache in caches:
        cache.cache_clear()
    assert ring_plans.INT_BYTES >= sys.getsizeof(1 << 20) + 8
