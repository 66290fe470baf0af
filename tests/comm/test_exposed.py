"""What an exchange leaves exposed, read from the order of events, and what each link carries at each step.

A transfer is hidden where a block is computed between its start and its wait. The engine runs here on tensors without
memory and links that only take notes.
"""

from dataclasses import replace

import pytest
from exchange_model import rows_sent

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.attention.ring_plan import ring_plan
from mindspeed_cp.comm.schedule import RingPlace
from mindspeed_cp.planner.events import Compute, Post, Wait
from mindspeed_cp.planner.trace import Problem, trace
from mindspeed_cp.sequence.masks import attention_masks

PROBLEM = Problem(seq_len=256, heads=16, kv_heads=8, dk=4, dv=4)
RING = dict(context_parallel_size=4, algorithm="megatron_cp_algo", attention_mask_type="full", send_recv_overlap=True)
ULYSSES = dict(context_parallel_size=2, attention_mask_type="full")
HYBRID = {**RING, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2}


CAUSAL = {**RING, "attention_mask_type": "causal"}
EIGHT = {**RING, "context_parallel_size": 8}


def events_of(arguments, rank=0, problem=PROBLEM):
    return [each.events for each in trace(ContextParallelConfig(**arguments), problem, rank)]


def exposed(events):
    """(number of transfers, of which no block is computed between post and wait: their numbers, from 0)."""
    posts = [event.number for event in events if isinstance(event, Post)]
    found = []
    for index, event in enumerate(events):
        if isinstance(event, Wait):
            since = events[
                events.index(next(e for e in events if isinstance(e, Post) and e.number == event.number)) : index
            ]
            if not any(isinstance(each, Compute) for each in since):
                found.append(posts.index(event.number))
    return len(posts), found


def order(events):
    return "".join({Compute: "c", Post: "p", Wait: "w"}[type(event)] for event in events)


EXPOSED = {
    # name: (settings, transfers and exposed ones forward, the same backward)
    "ring": (RING, (3, []), (6, [5])),
    "ring, kept": ({**RING, "kv_cache_policy": "full"}, (3, []), (3, [2])),
    "direct": ({**RING, "kv_exchange": "direct"}, (3, []), (6, [5])),
    "direct, all in flight": ({**RING, "kv_exchange": "direct", "in_flight": 3}, (3, []), (6, [5])),
    "direct, causal, in two pieces": ({**CAUSAL, "kv_exchange": "direct", "in_flight": 3}, (6, []), (12, [11])),
    "mesh": ({**RING, "kv_exchange": "mesh"}, (3, []), (6, [5])),
    "mesh, two in flight": ({**RING, "kv_exchange": "mesh", "in_flight": 2}, (3, []), (6, [5])),
    "double ring": ({**RING, "window_size": 2}, (3, []), (6, [4, 5])),
    "double ring, two in flight": ({**EIGHT, "window_size": 4, "in_flight": 2}, (7, []), (14, [12, 13])),
    "all-gather": ({**RING, "algorithm": "kvallgather_cp_algo"}, (1, []), (4, [3])),
    "ulysses": (ULYSSES, (2, [0, 1]), (2, [0, 1])),
    "ulysses in 2": ({**ULYSSES, "ulysses_chunks": 2}, (4, [0, 3]), (4, [0, 3])),
    "ulysses in 8": ({**ULYSSES, "ulysses_chunks": 8}, (16, [0, 15]), (16, [0, 15])),
    "hybrid": (HYBRID, (3, [0, 2]), (4, [0, 2, 3])),
    "hybrid in 2": ({**HYBRID, "ulysses_chunks": 2}, (6, [0, 5]), (8, [0, 3, 6, 7])),
}


@pytest.mark.parametrize("name", EXPOSED)
def test_at_most_the_first_and_the_last_transfer_of_a_round_are_exposed(name):
    """A ring's last gradients, those of Double Ring's last window and their way to the owner, and Ulysses' first and
    last exchange have no block to hide behind; Hybrid has a ring in each round.
    """
    arguments, *want = EXPOSED[name]
    assert [exposed(events) for events in events_of(arguments)] == want


def test_unaligned_ulysses_exposes_what_ulysses_does():
    problem = replace(PROBLEM, seq_len=61)  # three ranks hold 21, 20 and 20 tokens, and 6, 5 and 5 heads
    settings = {**ULYSSES, "context_parallel_size": 3}
    for rank in range(3):
        assert [exposed(events) for events in events_of(settings, rank, problem)] == [(2, [0, 1])] * 2


def test_first_pieces_of_all_steps_in_flight_come_first_and_their_gradients_leave_before_the_second_are_awaited():
    """Rank 3 sends both chunks to all; rank 0 needs all of everything, and waits for second pieces after three sends of
    gradients (c: compute, p: post).
    """
    settings = {**CAUSAL, "kv_exchange": "direct", "in_flight": 3}
    half = 256 // 8 * 2 * 8 * (4 + 4)
    forward, _ = events_of(settings, 3)
    assert by_link(forward) == 2 * [{0: half}, {1: half}, {2: half}]
    _, backward = events_of(settings, 0)
    assert order(backward) == "p" * 6 + "cw" + 3 * "cpw" + 3 * "cpw" + 5 * "w"


def test_without_overlap_every_transfer_of_a_ring_is_exposed():
    """The opposite fact: the measurement can tell."""
    forward, _ = events_of({**RING, "send_recv_overlap": False})
    assert exposed(forward) == (3, [0, 1, 2])


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_chunks_of_heads_start_the_next_exchange_before_a_block_and_send_its_result_behind_it(chunks):
    """p: post, w: wait, c: compute. The result of a chunk is awaited behind the block of the next."""
    first, middle, last = "pw", "pcpw" + "pcwpw" * (chunks - 2), "cwpw"
    want = "pwcpw" if chunks == 1 else first + middle + last
    assert [order(events) for events in events_of({**ULYSSES, "ulysses_chunks": chunks})] == [want, want]


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("exchange", ["direct", "mesh"])
def test_as_many_steps_are_posted_ahead_as_may_be_in_flight(exchange, steps):
    config = {**RING, "context_parallel_size": 8, "kv_exchange": exchange, "in_flight": steps}
    forward, _ = events_of(config)
    ahead = min(steps, 7)
    assert order(forward) == "p" * ahead + "cwp" * (7 - ahead) + "cw" * ahead + "c"


def by_link(events):
    """Bytes to every peer, of each transfer that was posted."""
    return [event.sent for event in events if isinstance(event, Post)]


def test_a_step_of_the_mesh_fills_all_links_alike_and_a_step_of_the_others_one():
    """Each of 7 others gets a seventh of the shard in each of 7 steps; 8 does not divide by 7 without a remainder."""
    config, problem = {**RING, "context_parallel_size": 8}, replace(PROBLEM, seq_len=8 * 70)
    row, others = 2 * 8 * (4 + 4), [rank for rank in range(8) if rank != 3]

    def sent(**more):
        forward, _ = trace(ContextParallelConfig(**config | more), problem, 3)
        return by_link(forward.events)

    assert sent(kv_exchange="mesh") == [dict.fromkeys(others, 10 * row)] * 7
    assert sent(kv_exchange="direct") == [{(3 + step) % 8: 70 * row} for step in range(1, 8)]
    assert sent() == [{4: 70 * row}] * 7


def work_of_steps(events):
    """FLOPs of the blocks before each wait, and after the last."""
    work = [0]
    for event in events:
        if isinstance(event, Wait):
            work.append(0)
        elif isinstance(event, Compute):
            work[-1] += event.flops
    return work


@pytest.mark.parametrize("rank", [0, 2, 7])
def test_causal_slices_are_of_equal_rows_and_of_equal_work(rank):
    """Of every shard a reader gets as many rows in each step, and so computes as much: links and kernels are even."""
    arguments = {**RING, "context_parallel_size": 8, "kv_exchange": "mesh", "attention_mask_type": "causal"}
    forward, _ = trace(ContextParallelConfig(**arguments), replace(PROBLEM, seq_len=8 * 2 * 70), rank)
    assert len({tuple(step.items()) for step in by_link(forward.events)}) == 1
    work = work_of_steps(forward.events)
    assert len(set(work[1:])) == 1 and work[1] > 0


@pytest.mark.parametrize(
    "masked, most",
    [({"cu_seqlens": (0, 100, 130, 500, 520, 900, 1120)}, 1.1), ({"sliding_window": (200, 0)}, 1.2)],
    ids=["packed", "window"],
)
def test_slices_are_of_equal_rows_and_nearly_of_equal_work_under_other_masks(masked, most):
    """Equal rows keep links even, which is what a step is for; the work of a step is at most this much of the mean."""
    arguments = {**RING, "context_parallel_size": 8, "kv_exchange": "mesh", "attention_mask_type": "causal"}
    for rank in (0, 3, 7):
        forward, _ = trace(ContextParallelConfig(**arguments), replace(PROBLEM, seq_len=8 * 2 * 70, **masked), rank)
        row = 2 * 8 * (4 + 4)
        for peer in set(range(8)) - {rank}:
            sizes = [step.get(peer, 0) for step in by_link(forward.events)]
            assert max(sizes) - min(sizes) <= row
        work = work_of_steps(forward.events)[1:]
        assert max(work) <= most * sum(work) / len(work)


@pytest.mark.parametrize("mask_type, most", [("full", 1), ("causal", 2)])
def test_a_step_of_the_mesh_is_as_few_blocks_as_a_shard(mask_type, most):
    arguments = {**RING, "context_parallel_size": 8, "kv_exchange": "mesh", "attention_mask_type": mask_type}
    for rank in range(8):
        forward, _ = trace(ContextParallelConfig(**arguments), replace(PROBLEM, seq_len=8 * 2 * 70), rank)
        steps = order(forward.events).split("w")[1:]
        assert [step.count("c") <= most for step in steps] == [True] * 7


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_size": 2},
        {"kv_exchange": "direct"},
        {"kv_exchange": "mesh"},
        {"algorithm": "kvallgather_cp_algo"},
    ],
    ids=str,
)
def test_the_model_of_rows_is_what_the_engine_sends(settings):
    """For every rank and step, of a causal mask and documents of odd lengths."""
    problem = replace(PROBLEM, seq_len=211, cu_seqlens=(0, 3, 90, 91, 211), batch=2)
    config = ContextParallelConfig(**{**RING, "context_parallel_size": 8, "attention_mask_type": "causal", **settings})
    layout, row = problem.layout(config), 2 * 8 * (4 + 4) * 2
    masks = attention_masks(True, 211, 2, problem.cu_seqlens)
    exchange = "allgather" if "algorithm" in settings else config.kv_exchange
    plan = ring_plan(layout, masks, True, exact=exchange in ("direct", "mesh"))
    for rank in range(8):
        forward, _ = trace(config, problem, rank)
        model = rows_sent(plan, exchange, RingPlace(rank, *config.hierarchy[1:]))
        want = [{peer: rows * row for peer, rows in step.items()} for step in model]
        key = str if "window_size" in settings else lambda step: 0  # windows cross ahead of the steps before
        assert sorted((step for step in by_link(forward.events) if step), key=key) == sorted(
            filter(None, want), key=key
        )
