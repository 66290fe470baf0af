"""Time context-parallel attention on this machine (CPU and gloo).

``python scripts/bench attention``         forward + backward relative to the ideal T(1 rank) / ranks, per algorithm,
                                           and the floor: all ranks compute their share of heads, no communication.
                                           T(1 rank) is measured with this project's kernel and, in a separate column,
                                           with torch's operator
``python scripts/bench attention --stub``  only communication, merging and copying: the kernel returns empty outputs;
                                           CPU time per rank, compared with a simple reference ring
"""

import statistics
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from bench.measuring import attention_of, head, in_turns, on_ranks, parser_of, row, sample, step, timed
from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.kernels import select_kernel

FLOOR = "floor: no communication"
TORCH = "torch's operator"
ALONE, REFERENCE = "1 rank", "reference ring"


def variants(ranks):
    """name -> settings of ContextParallelConfig."""
    ring = {"algorithm": "megatron_cp_algo", "send_recv_overlap": True}
    table = {
        "ulysses": {"algorithm": "ulysses_cp_algo"},
        "ring": ring,
        "ring direct": {**ring, "kv_exchange": "direct"},
        "kv all-gather": {"algorithm": "kvallgather_cp_algo"},
    }
    if ranks % 2 == 0 and ranks > 2:
        table["double ring w=2"] = {**ring, "window_size": 2}
        table["hybrid u=2"] = {**ring, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2}
    return table


def torch_attention(query, key, value):
    """torch's own attention over the whole sequence, on one rank."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return out.permute(2, 0, 1, 3)


def cases_of(options, kernel, whole):
    """variant -> function without arguments that runs it on this rank."""
    rank, ranks, cases = dist.get_rank(), dist.get_world_size(), {}
    for name, settings in variants(ranks).items():
        config = ContextParallelConfig(context_parallel_size=ranks, **settings)
        attend, layout = attention_of(config, options.seq_length, kernel=kernel)
        *tensors, grad_out = [layout.shard(tensor, rank).clone() for tensor in whole]
        cases[name] = partial(step, attend, tensors, grad_out)
    if options.stub:
        from figures.stubbed import reference_ring_step

        cases[REFERENCE] = partial(reference_ring_step, *tensors, grad_out, kernel, dist.group.WORLD, rank)
        return cases
    single, _ = attention_of(ContextParallelConfig(), options.seq_length, kernel=kernel)
    for name, attend in ((ALONE, single), (TORCH, torch_attention)):
        cases[name] = partial(step, attend, whole[:3], whole[3]) if rank == 0 else (lambda: None)
    if options.kv_heads % ranks == 0:
        share = [
            tensor.chunk(ranks, dim=2)[rank].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for tensor in whole
        ]
        cases[FLOOR] = partial(step, single, share[:3], share[3])
    return cases


def kernel_of(options):
    if not options.stub:
        return select_kernel("cpu")
    from figures.stubbed import StubKernel

    return StubKernel()


def measure(options):
    dtype = getattr(torch, options.dtype)
    whole = sample(options.seq_length, options.heads, options.kv_heads, options.head_dim, dtype)
    cases = cases_of(options, kernel_of(options), whole)

    def seconds_and_bytes(run):
        times = timed(run)
        traffic = torch.tensor(float(times.sent))
        dist.all_reduce(traffic)
        return times.cpu if options.stub else times.wall, float(traffic)

    found = in_turns({name: partial(seconds_and_bytes, run) for name, run in cases.items()}, options.repetitions)
    if dist.get_rank() == 0:
        medians = {name: statistics.median(seconds for seconds, _ in values) for name, values in found.items()}
        report(medians, {name: values[-1][1] for name, values in found.items()}, dist.get_world_size(), options)


def report(medians, traffic, ranks, options):
    print(
        f"{ranks} ranks, S={options.seq_length}, H={options.heads}, KV heads={options.kv_heads}, D={options.head_dim}, "
        f"{options.dtype}, forward + backward, {options.repetitions} interleaved repetitions"
    )
    base = medians.pop(REFERENCE) if options.stub else medians.pop(ALONE) / ranks
    label = f"{REFERENCE}, CPU time per rank" if options.stub else f"ideal T(1 rank) / {ranks}"
    columns = {f"over {label}": base}
    if not options.stub:
        columns[f"over {TORCH}: T(1 rank) / {ranks}"] = medians.pop(TORCH) / ranks
    head("variant", "median ms:", *(f"{column}:" for column in columns), "mean MB sent per rank:")
    for name, median in {label: base, **medians}.items():
        sent = f"{traffic[name] / ranks / 1e6:.1f}" if name in traffic else ""
        row(name, f"{median * 1e3:.1f}", *(f"{median / of:.2f}" for of in columns.values()), sent)


def main():
    parser = parser_of(
        __doc__, ranks=None, seq_length=None, heads=8, kv_heads=None, head_dim=64, repetitions=7
    )  # by default 2 ranks and 4096 tokens, with --stub 4 and 8192, and as many KV heads as heads
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--stub", action="store_true", help="stub the kernel and print CPU time per rank")
    options = parser.parse_args()
    options.ranks = options.ranks or (4 if options.stub else 2)
    options.seq_length = options.seq_length or (8192 if options.stub else 4096)
    options.kv_heads = options.kv_heads or options.heads
    on_ranks(options.ranks, measure, options)
