"""Causal attention of one layer, forward and backward, by this project's ring and by MindSpeed's own where it is
installed: the same tensors, the same kernel, a row each. tests/check verify_runs starts it with torchrun.

Shapes: query, key, value and out are (tokens of the rank, batch 1, heads x head_dim).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from verify_machine import device_module

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
WARM_UP, STEPS = 2, 5
NAMES = ("out", "dq", "dk", "dv")
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the difference's norm over the values' norm
HEAD = ("| attention of one layer | median forward and backward, ms | peak memory, GiB |", "|---|---|---|")
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


def our_ring(length: int, heads: int) -> Attend:
    """Overlapping sends and receives, as MindSpeed's."""
    config = ContextParallelConfig(
        context_parallel_size=dist.get_world_size(), algorithm="megatron_cp_algo", send_recv_overlap=True
    )
    groups = ContextParallelGroups.build(config)
    layout = SequenceLayout.build(config, length)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.unflatten(-1, (heads, -1)) for tensor in tensors)
        return context_parallel_attention(query, key, value, config=config, groups=groups, layout=layout).flatten(-2)

    return attend


def mindspeeds_ring(heads: int) -> Attend:
    from mindspeed.core.context_parallel.ring_context_parallel.ring_context_parallel import ringattn_context_parallel

    ranks = list(range(dist.get_world_size()))
    first, second = dist.new_group(ranks), dist.new_group(ranks)
    parameters = dict(causal=True, cp_group=first, cp_size=len(ranks), rank=dist.get_rank(), cp_global_ranks=ranks)
    parameters["cp_group_for_send_recv_overlap"] = second
    return lambda query, key, value: ringattn_context_parallel(query, key, value, heads, parameters)


def measured(attend: Attend, tensors: Sequence[torch.Tensor], grad: torch.Tensor, module) -> tuple[float, float, list]:
    """(median seconds, GiB at the highest, [out, dq, dk, dv])."""
    seconds, results = [], []
    if module is not None:
        module.reset_peak_memory_stats()
    for _ in range(WARM_UP + STEPS):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        dist.barrier()
        start = time.perf_counter()
        out = attend(*leaves)
        out.backward(grad)
        if module is not None:
            module.synchronize()
        seconds.append(time.perf_counter() - start)
        results = [out.detach(), *(leaf.grad for leaf in leaves)]
    peak = module.max_memory_allocated() / 2**30 if module is not None else 0.0
    return statistics.median(seconds[WARM_UP:]), peak, results


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, of all ranks."""
    sums = torch.stack([(got.float() - wanted.float()).square().sum(), wanted.float().square().sum()])
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


def lines(device: str, length: int, heads: int, dim: int, dtype: torch.dtype) -> Iterator[str]:
    """The rows of both, and how far MindSpeed's results are from this project's.

    Raises:
        AssertionError: the results differ by more than rounding explains.
    """
    module = None if device == "cpu" else device_module(device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = length // dist.get_world_size(), 1, heads * dim
    *tensors, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    results = []
    yield from HEAD
    for name, attend in (("ring", our_ring(length, heads)), ("MindSpeed's ring", mindspeeds_ring(heads))):
        seconds, peak, found = measured(attend, tensors, grad, module)
        results.append(found)
        yield f"| {name} | {seconds * 1e3:.1f} | {peak:.2f} |"
    gaps = {name: difference(theirs, ours) for name, ours, theirs in zip(NAMES, *results, strict=True)}
    yield ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()) + " between both"
    assert max(gaps.values()) <= LIMITS[dtype], gaps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(BACKENDS), default="npu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    for name in ("length", "heads", "dim"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    if args.device != "cpu":
        device_module(args.device).set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKENDS[args.device])
    for line in lines(args.device, args.length, args.heads, args.dim, getattr(torch, args.dtype)):
        if dist.get_rank() == 0:
            print(line, flush=True)
    dist.destroy_process_group()
    return 0
