"""The order in which keys and values arrive, when transfers are posted and awaited, and how long buffers live."""

import queue
import random
import threading
import time

import pairs
import pytest
import torch
import torch.distributed as dist
from cases import Case, arguments, attend_many, expected, largest_errors, local_inputs, setup_of, whole
from distributed import run_ranks

from mindspeed_cp import SequenceLayout
from mindspeed_cp.comm.schedule import forward_schedule
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionKernel

RINGS = [(window, windows) for window in range(1, 9) for windows in range(1, 9) if window * windows <= 12]


def test_double_ring_arrival_order_is_the_published_one():
    assert forward_schedule(0, 2, 4) == [0, 1, 6, 7, 4, 5, 2, 3]


def test_a_plain_ring_receives_from_one_further_back_each_step():
    assert forward_schedule(2, 5, 1) == [2, 1, 0, 4, 3]


@pytest.mark.parametrize("window, windows", RINGS)
def test_every_rank_sees_every_shard_once_and_its_own_first(window, windows):
    for rank in range(window * windows):
        order = forward_schedule(rank, window, windows)
        assert order[0] == rank
        assert sorted(order) == list(range(window * windows))


@pytest.mark.parametrize("window, windows", RINGS)
def test_step_j_t_computes_with_the_published_source(window, windows):
    for rank in range(window * windows):
        place_w, place_i = divmod(rank, window)
        want = [
            (place_w - j) % windows * window + (place_i - t) % window for j in range(windows) for t in range(window)
        ]
        assert forward_schedule(rank, window, windows) == want


@pytest.mark.parametrize("window, windows", RINGS)
def test_no_two_ranks_hold_the_same_shard_at_one_step(window, windows):
    orders = [forward_schedule(rank, window, windows) for rank in range(window * windows)]
    for step in zip(*orders):
        assert sorted(step) == list(range(window * windows))


class TracingKernel(AttentionKernel):
    """The CPU kernel, noting when blocks start; key rows tell nothing of their source, so only the order counts."""

    def __init__(self, trace):
        self._kernel, self._trace = select_kernel("cpu"), trace
        self.name, self.native_bands = "tracing", self._kernel.native_bands

    def forward(self, *args):
        self._trace.append("block")
        return self._kernel.forward(*args)

    def backward(self, *args):
        self._trace.append("block")
        return self._kernel.backward(*args)


def traced(rank, case):
    """Events of forward and of backward on this rank: "post" per batch of transfers or collective, "wait" per message,
    "block" per kernel call. Gloo carries everything; what shares memory is read in place.
    """
    from mindspeed_cp import context_parallel_attention
    from mindspeed_cp.comm import batch, link

    config, groups = setup_of(case.config, None)
    layout = SequenceLayout.build(config, case.seq_len)
    leaves, sinks, grad_out, mask = local_inputs(rank, case, layout)
    trace = []

    def noting(event, function):
        def noted(*args, **kwargs):
            trace.append(event)
            return function(*args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.Batch, "post", staticmethod(noting("post", batch.Batch.post)))
        patch.setattr(link, "_all_gather", noting("post", link._all_gather))
        for module in (batch, link):
            patch.setattr(module, "wait_for", noting("wait", module.wait_for))
        keywords = arguments(case, config, groups, layout, sinks, mask)
        out = context_parallel_attention(*leaves, **{**keywords, "kernel": TracingKernel(trace)})
        forward, trace[:] = list(trace), []
        out.backward(grad_out)
    return forward, list(trace)


def merged_waits(trace):
    """Consecutive waits, one for each end of a transfer, as one."""
    return [event for before, event in zip([None, *trace], trace) if not event == before == "wait"]


TRACED = [
    pytest.param(
        {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", "attention_mask_type": "full", **options},
        id=f"cp{cp}-{'-'.join(map(str, options.values())) or 'ring'}",
    )
    for cp, options in [
        (2, {}),
        (3, {}),
        (4, {}),
        (5, {}),
        (7, {}),
        (4, {"kv_exchange": "direct"}),
        (5, {"kv_exchange": "direct"}),
        (4, {"kv_exchange": "mesh"}),
        (5, {"kv_exchange": "mesh"}),
        (4, {"window_size": 2}),
        (6, {"window_size": 3}),
        (8, {"window_size": 2}),
    ]
]
GATHERED = pytest.param(
    {"context_parallel_size": 4, "algorithm": "kvallgather_cp_algo", "attention_mask_type": "full"}, id="allgather"
)


@pytest.mark.parametrize("overlap", [False, True], ids=["awaited", "overlap"])
@pytest.mark.parametrize("config", [*TRACED, GATHERED])
def test_the_first_local_block_starts_before_any_wait(config, overlap):
    for passes in run_ranks(config["context_parallel_size"], traced, Case({**config, "send_recv_overlap": overlap})):
        for trace in passes:
            assert "block" in trace and "wait" in trace
            assert trace.index("block") < trace.index("wait"), trace


@pytest.mark.parametrize("config", [p for p in TRACED if "window_size" not in p.values[0]])
def test_with_overlap_each_transfer_is_posted_before_the_block_that_hides_it_and_awaited_after(config):
    steps = config["context_parallel_size"] - 1
    for forward, _ in run_ranks(steps + 1, traced, Case({**config, "send_recv_overlap": True})):
        assert merged_waits(forward) == ["post", "block", "wait"] * steps + ["block"]


@pytest.mark.parametrize("config", [p for p in TRACED if "window_size" not in p.values[0]])
def test_without_overlap_each_transfer_is_awaited_at_once(config):
    steps = config["context_parallel_size"] - 1
    for forward, _ in run_ranks(steps + 1, traced, Case(config)):
        assert merged_waits(forward) == ["block", "post", "wait"] * steps + ["block"]


@pytest.mark.parametrize("config", [p for p in TRACED if "window_size" in p.values[0]])
def test_with_overlap_the_transfer_to_the_next_window_is_posted_at_the_start_of_the_inner_ring(config):
    window = config["window_size"]
    windows = config["context_parallel_size"] // window
    inner = ["post", "block", "wait"] * (window - 1) + ["block"]
    want = (["post", *inner, "wait"] * (windows - 1)) + inner
    for forward, _ in run_ranks(config["context_parallel_size"], traced, Case({**config, "send_recv_overlap": True})):
        assert merged_waits(forward) == merged_waits(want)


@pytest.mark.parametrize("config", TRACED)
def test_with_overlap_backward_posts_the_next_transfer_before_every_block_but_the_last(config):
    size = config["context_parallel_size"]
    for _, backward in run_ranks(size, traced, Case({**config, "send_recv_overlap": True})):
        posts = 0
        blocks = 0
        for event in backward:
            posts += event == "post"
            if event == "block":
                blocks += 1
                # Keys and values of the next step, on top of the gradients that the steps before sent away.
                assert posts >= blocks or blocks == size, backward
        assert blocks == size


class LateWork:
    """A send that really starts some time after it was posted."""

    def __init__(self):
        self.started, self.work = threading.Event(), None

    def wait(self, *args):
        assert self.started.wait(60), "the delayed send never started"
        return self.work.wait(*args)


class LateSender(threading.Thread):
    """Posts sends in their order, each after a random pause; a buffer that is reused too early is sent with wrong
    contents.
    """

    def __init__(self, seed):
        super().__init__(daemon=True)
        self._queue, self._rng = queue.Queue(), random.Random(seed)

    def run(self):
        while (item := self._queue.get()) is not None:
            op, late = item
            time.sleep(self._rng.choice([0, 0.002, 0.006]))
            late.work = dist.isend(
                op.tensor, group=op.group, group_dst=dist.get_group_rank(op.group or dist.group.WORLD, op.peer)
            )
            late.started.set()

    def batch(self, ops):
        works = []
        for op in ops:
            if op.op is dist.irecv:
                works.append(
                    dist.irecv(
                        op.tensor, group=op.group, group_src=dist.get_group_rank(op.group or dist.group.WORLD, op.peer)
                    )
                )
            else:
                works.append(LateWork())
                self._queue.put((op, works[-1]))
        return works

    def stop(self):
        self._queue.put(None)
        self.join()


def attend_with_late_sends(rank, cases):
    sender = LateSender(rank)
    sender.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", sender.batch)
        try:
            return attend_many(rank, cases)
        finally:
            sender.stop()


@pytest.mark.cpu_only
@pytest.mark.parametrize("overlap", [False, True], ids=["awaited", "overlap"])
@pytest.mark.parametrize(
    "cp, window, degree",
    [(3, 1, None), (5, 1, None), (7, 1, None), (6, 3, None), (8, 4, None), (8, 2, None), (6, 2, None), (6, 1, 2)],
)
def test_results_do_not_depend_on_when_a_send_really_starts(cp, window, degree, overlap):
    config = {
        "context_parallel_size": cp,
        "algorithm": "hybrid_cp_algo" if degree else "megatron_cp_algo",
        "window_size": window,
        "send_recv_overlap": overlap,
        **({"ulysses_degree": degree} if degree else {}),
    }
    cases = [
        Case(
            {**config, "attention_mask_type": mask_type, "kv_cache_policy": policy, "kv_exchange": exchange},
            seq_len=4 * cp,
            dtype="float32",
            dk=16,
            dv=16,
            share_from=None,
        )
        for mask_type, policy, exchange in pairs.drawn(
            ("causal", "full"), (None, "half"), ("ring", "direct") if window == 1 else ("ring",)
        )
    ]
    results = run_ranks(cp, attend_with_late_sends, cases)
    for index, case in enumerate(cases):
        errors = largest_errors(whole(case, [shard[index] for shard in results]), expected(case))
        assert max(errors.values()) < 1e-4, (str(case), errors)


def test_one_ranks_delay_does_not_change_a_bit():
    case = Case(
        {"context_parallel_size": 3, "algorithm": "megatron_cp_algo", "send_recv_overlap": True},
        dtype="float32",
        share_from=None,
    )
    prompt, late = (run_ranks(3, function, [case]) for function in (attend_many, attend_with_late_sends))
    for a, b in zip(prompt, late):
        assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
