"""Invariant 4: what a rank holds does not grow with the context-parallel size; what each cache policy saves, by
formula.
"""

import gc
import time
from math import lcm

import pytest
import torch
from cases import Case
from distributed import run_ranks
from measured import prepared, saved_bytes
from pairs import drawn

from mindspeed_cp.comm.host_memory import LINE
from mindspeed_cp.planner.memory import LiveBytes

pytestmark = pytest.mark.cpu_only
FLOAT32 = 4  # bytes


def peak_bytes(rank, case):
    """(most bytes alive at once in forward and backward: what they made, and what this rank keeps from call to call;
    bytes of shared memory).

    Two calls before that make the reused buffers, of which pairs take turns.
    """
    call, leaves, grad_out, groups = prepared(rank, case)
    for _ in range(2):
        call().backward(grad_out)
    before = groups.workspace.num_bytes
    for leaf in leaves:
        leaf.grad = None
    with LiveBytes() as live:
        out = call()
        out.backward(grad_out)
    assert leaves[0].grad is not None
    assert groups.workspace.num_bytes == before
    return live.peak + before, groups.cp.carrier.num_bytes if groups.cp and groups.cp.carrier else 0


UNREAD = 8  # messages of a rank that its peers may not have read yet: two of each kind, and one more of the gradients


def peak_of_all(case):
    """The largest peak of a rank; shared memory holds no more than the messages that may be under way at once."""
    peaks, shared = zip(*run_ranks(case.cp, peak_bytes, case))
    message = LOCAL * case.batch * case.kv_heads * (case.dk + case.dv) * FLOAT32  # the memory may be a case's before
    assert max(shared) <= UNREAD * (message + 2 * LINE)
    return max(peaks)


def test_the_meter_sees_what_lives_and_forgets_what_died():
    outside = torch.zeros(100)
    with LiveBytes() as live:
        outside[:3].add_(1)
        assert live.now == 0
        first = torch.zeros(1000)
        view = first[:10]
        for _ in range(5):
            torch.zeros(500)
        assert live.now == 4000 and live.peak == 6000
        del first
        assert live.now == 4000, "a view keeps the memory"
        del view
        assert live.now == 0


LOCAL = 64  # tokens per rank, whatever the size


@pytest.mark.parametrize(
    "options, dtype, overlap",
    drawn([{}, {"kv_exchange": "direct"}, {"attention_mask_type": "full"}], ["float32", "bfloat16"], [False, True]),
    ids=str,
)
def test_peak_memory_of_a_ring_does_not_grow_with_its_size(options, dtype, overlap):
    def peak(cp):
        config = {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", "send_recv_overlap": overlap, **options}
        return peak_of_all(Case(config, seq_len=cp * LOCAL, heads=4, kv_heads=4, dk=32, dv=32, dtype=dtype))

    # From 4 ranks on both buffers of every pair exist when the last kernel runs.
    assert peak(4) == peak(6) == peak(8)


MESH_ROWS = 210  # of a rank; 3, 5 and 7 others, each of which sends a slice, divide them and their halves


@pytest.mark.parametrize("mask_type", ["causal", "full"])
def test_peak_memory_of_the_mesh_exchange_does_not_grow_with_its_size(mask_type):
    def peak(cp):
        config = {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", "kv_exchange": "mesh"}
        config |= {"attention_mask_type": mask_type, "send_recv_overlap": True}
        case = Case(config, seq_len=cp * MESH_ROWS, dk=8, dv=8, dtype="float32", share_from=None)
        return max(peak for peak, _ in run_ranks(cp, peak_bytes, case))

    assert peak(4) == peak(6) == peak(8)


@pytest.mark.parametrize("exchange", ["direct", "mesh"])
def test_what_holds_a_step_exists_once_for_every_step_in_flight_and_once_more(exchange):
    """Four buffers of a step's size. Direct: keys and values, gradients on the wire, packed, and landing. Mesh: what is
    packed and what lands, of both; a step is computed with in one buffer more, whatever is in flight.
    """

    def peak(in_flight):
        config = {"context_parallel_size": 8, "algorithm": "megatron_cp_algo", "kv_exchange": exchange}
        config |= {"attention_mask_type": "full", "send_recv_overlap": True, "in_flight": in_flight}
        case = Case(config, seq_len=8 * MESH_ROWS, dk=8, dv=8, dtype="float32", share_from=None)
        return {peak for peak, _ in run_ranks(8, peak_bytes, case)}

    (one,), (three,) = peak(1), peak(3)
    assert three - one == 2 * 4 * MESH_ROWS * 4 * (8 + 8) * FLOAT32


@pytest.mark.parametrize("documents", [(0, 30, 37, 200, 256), (0, 256), tuple(range(0, 257, 16))], ids=len)
def test_peak_memory_of_the_balanced_layout_is_not_above_the_zigzags(documents):
    zigzag = {"context_parallel_size": 4, "algorithm": "megatron_cp_algo", "batch_layout": "zigzag"}
    case = Case(zigzag, seq_len=256, heads=4, kv_heads=4, dk=32, dv=32, dtype="float32", cu_seqlens=documents)
    assert peak_of_all(case.with_config(batch_layout="balanced", kv_exchange="auto")) <= peak_of_all(case)


@pytest.mark.parametrize("overlap", [False, True], ids=["awaited", "overlap"])
def test_peak_memory_of_a_double_ring_does_not_grow_with_its_size(overlap):
    def peak(cp, window):
        config = {
            "context_parallel_size": cp,
            "algorithm": "megatron_cp_algo",
            "window_size": window,
            "send_recv_overlap": overlap,
        }
        return peak_of_all(Case(config, seq_len=cp * LOCAL, dk=32, dv=32, dtype="float32"))

    assert peak(8, 2) == peak(6, 2)


def test_a_full_cache_holds_every_received_shard_and_so_grows_with_the_size():
    """The opposite fact: the measurement can tell."""

    def peak(cp):
        config = {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", "kv_cache_policy": "full"}
        return peak_of_all(Case(config, seq_len=cp * LOCAL, dk=32, dv=32, dtype="float32"))

    shard = LOCAL * 4 * 64 * 4
    assert peak(8) - peak(4) == 4 * shard


def saved(case):
    return run_ranks(case.cp, saved_bytes, case)


@pytest.mark.parametrize("cp, window", [(2, 1), (3, 1), (4, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("exchange", ["ring", "direct"])
def test_a_ring_cache_saves_the_received_keys_and_values(cp, window, exchange):
    if exchange == "direct" and window > 1:
        window = 1
    config = {
        "context_parallel_size": cp,
        "algorithm": "megatron_cp_algo",
        "window_size": window,
        "kv_exchange": exchange,
    }
    case = Case(config, seq_len=cp * 8, batch=2, heads=4, kv_heads=2, dk=6, dv=4, dtype="float32")
    without, full, half = (saved(case.with_config(kv_cache_policy=policy)) for policy in (None, "full", "half"))
    key, value = (8 * 2 * 2 * dim * 4 for dim in (6, 4))
    for rank in range(cp):
        assert full[rank] - without[rank] == (cp - 1) * (key + value)
        assert half[rank] - without[rank] == (cp - 1) * key


@pytest.mark.parametrize(
    "cp, heads, kv_heads", [(2, 4, 4), (2, 4, 1), (4, 8, 2), (4, 4, 1), (3, 6, 2), (4, 12, 6), (8, 8, 1)]
)
def test_a_ulysses_cache_policy_saves_the_replicated_heads_of_keys_and_values(cp, heads, kv_heads):
    """Without replication (kv_heads % cp == 0) there is nothing to save, and the numbers say so."""
    case = Case(
        {"context_parallel_size": cp},
        seq_len=cp * 8,
        batch=2,
        heads=heads,
        kv_heads=kv_heads,
        dk=6,
        dv=4,
        dtype="float32",
    )
    without, full, half = (saved(case.with_config(kv_cache_policy=policy)) for policy in (None, "full", "half"))
    extra = (lcm(kv_heads, cp) - kv_heads) * 8 * case.batch * 4
    for rank in range(cp):
        assert without[rank] - full[rank] == extra * (case.dk + case.dv)
        assert without[rank] - half[rank] == extra * case.dk


def test_a_layer_outside_the_interval_saves_as_if_there_were_no_policy():
    config = {"context_parallel_size": 2, "algorithm": "megatron_cp_algo"}
    plain = saved(Case(config, seq_len=16))
    cached = {**config, "kv_cache_policy": "full", "kv_cache_interval": 1}
    assert saved(Case(cached, seq_len=16, layer_number=2)) == plain
    assert saved(Case(cached, seq_len=16, layer_number=1))[0] > plain[0]


def unreferenced_after(rank, case):
    """Bytes still alive after forward, backward and the loss of every reference but the gradients' and the
    workspace's.
    """
    call, leaves, grad_out, groups = prepared(rank, case)
    with LiveBytes() as live:
        call().backward(grad_out)
        for leaf in leaves:
            leaf.grad = None
        groups.workspace.clear()
        # gloo's own thread may hold a tensor for a moment after it has been sent.
        deadline = time.monotonic() + 2
        while live.now and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        return live.now


@pytest.mark.parametrize("algorithm", ["ulysses_cp_algo", "megatron_cp_algo", "kvallgather_cp_algo"])
def test_nothing_outlives_the_backward_pass(algorithm):
    for policy in (None, "full", "half"):
        case = Case(
            {"context_parallel_size": 4, "algorithm": algorithm, "kv_cache_policy": policy}, seq_len=32, dtype="float32"
        )
        assert run_ranks(4, unreferenced_after, case) == [0] * 4, policy


def intermediates(rank, case):
    """Most bytes alive in a forward pass without a graph and in a backward pass, beyond what was there and results."""
    call, leaves, grad_out, groups = prepared(rank, case)
    for _ in range(2):
        call().backward(grad_out)
    with torch.no_grad(), LiveBytes() as forward:
        out = call()
    result = out.untyped_storage().nbytes()
    out = call()
    with LiveBytes() as backward:
        grads = torch.autograd.grad(out, leaves, grad_out)
    named = sum(buffer.nbytes for (name, *_), buffer in groups.workspace._buffers.items() if "a2a" in name)
    return forward.peak - result, backward.peak - sum(grad.untyped_storage().nbytes() for grad in grads) + named


@pytest.mark.parametrize("kv_heads", [8, 16])
@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_chunks_of_heads_divide_what_ulysses_holds(chunks, kv_heads):
    """One chunk is computed with and its output made, the next arrives: two of C chunks, of all one where C is 1."""
    heads, dim, cp = 16, 16, 2
    case = Case({"context_parallel_size": cp}, seq_len=cp * LOCAL, heads=heads, kv_heads=kv_heads, dk=dim, dv=dim)
    ((forward, backward),) = {*run_ranks(cp, intermediates, case.with_config(ulysses_chunks=chunks))}
    rows = LOCAL * 8  # bytes of a column of float64, all heads of the own tokens or a rank's heads of all tokens
    query, keys_values, lse = rows * heads * dim, 2 * rows * kv_heads * dim, rows * heads
    held, of_rank = min(chunks, 2), kv_heads // cp
    if chunks <= of_rank:
        assert forward == (held * (query + keys_values) + query + 2 * lse) / chunks
    else:  # a KV head stays for two chunks, beside the query that it came with
        assert forward == (3 * query + query + 2 * lse) / chunks + 2 * keys_values / of_rank
    if kv_heads == heads:  # the output's gradient, and gradients of query, key and value
        assert backward == held * 4 * query / chunks
