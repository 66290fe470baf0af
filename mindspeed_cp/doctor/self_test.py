"""The self test: a few ranks compare every algorithm, forward and backward, with dense attention, and measure their
links. ``python -m mindspeed_cp.doctor.self_test DEVICE`` prints the result as JSON; ``findings`` runs and judges it.

    tensors (seq, batch, heads, dim); float64 on the CPU, bfloat16 on a device
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.attention.entry import context_parallel_attention
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.messages import Message
from mindspeed_cp.doctor.finding import Finding
from mindspeed_cp.doctor.installed import ask
from mindspeed_cp.doctor.meeting import join
from mindspeed_cp.planner.search import variants
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig

MOST_RANKS = 4  # two levels of two, so that Hybrid and Double Ring can be built
SIZES = {"cpu": (96, 4, 2, 16), "cuda": (1024, 8, 4, 128), "npu": (1024, 8, 4, 128)}  # seq, heads, KV heads, dim
DTYPES = {"cpu": torch.float64, "cuda": torch.bfloat16, "npu": torch.bfloat16}
LIMITS = {"cpu": 1e-10, "cuda": 3e-2, "npu": 3e-2}  # largest permitted error, relative to the largest value
MESSAGE = {"cpu": 8 << 20, "cuda": 64 << 20, "npu": 64 << 20}  # bytes to one peer
REPEATS = 3
PATIENCE = 120  # time limit of a rank in seconds
INTERFACE = "export GLOO_SOCKET_IFNAME=lo, or the interface between the nodes (ip -br address lists them)"
REPORT = "python -m mindspeed_cp.doctor.self_test {device} shows it alone; report it with that output"


def settings(world: int) -> dict[str, ContextParallelConfig]:
    """title -> the first valid configuration with that title for ``world`` ranks; KV forwarding, no KV cache."""
    found: dict[str, ContextParallelConfig] = {}
    if world == 1:
        return {"one rank": ContextParallelConfig()}
    for _, arguments in variants(world):
        if arguments["kv_exchange"] == "ring" and arguments["kv_cache_policy"] is None:
            try:
                config = ContextParallelConfig(**arguments)
            except ValueError:
                continue
            found.setdefault(config.describe().partition(", cp=")[0], config)
    return found


def dense(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Causal attention of the whole sequence in float64 on the CPU.

    Args:
        tensors: query, key, value and the gradient of out.

    Returns:
        out, and the gradients of query, key and value.
    """
    leaves = [tensor.double().clone().requires_grad_() for tensor in tensors[:3]]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in leaves)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    # Written out, because the kernel under test may be torch's own attention.
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    out = (scores.softmax(-1) @ v).permute(2, 0, 1, 3)
    out.backward(tensors[3].double())
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def whole_tensors(device: str) -> list[torch.Tensor]:
    """Query, key, value and the gradient of out for the whole sequence; the same on every rank."""
    seq, heads, kv_heads, dim = SIZES[device]
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(seq, 1, n, dim, generator=generator, dtype=torch.float64).to(DTYPES[device])
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def largest_error(
    config: ContextParallelConfig,
    groups: ContextParallelGroups,
    device: str,
    whole: list[torch.Tensor],
    reference: list[torch.Tensor],
) -> float:
    """Largest error of out and the three gradients on this rank, relative to the reference's largest value."""
    layout = SequenceLayout.build(config, whole[0].shape[0])
    shards = [layout.shard(tensor, groups.cp_rank).to(device) for tensor in whole]
    leaves = [shard.clone().requires_grad_() for shard in shards[:3]]
    out = context_parallel_attention(*leaves, config=config, groups=groups, layout=layout)
    out.backward(shards[3])
    errors = []
    for mine, theirs in zip([out.detach(), *(leaf.grad for leaf in leaves)], reference):
        assert mine is not None
        difference = mine.double().cpu() - layout.shard(theirs, groups.cp_rank)
        # NaN must not compare as small.
        errors.append(float(difference.abs().max().nan_to_num(nan=float("inf")) / theirs.abs().max()))
    return max(errors)


def rates(link: Link, device: str) -> dict[str, float]:
    """Bytes/s that a rank sends: when all ranks send to all, and when every rank sends to the next one."""

    def fresh() -> torch.Tensor:
        return torch.ones(MESSAGE[device] // 4, dtype=torch.float32, device=device)

    leaving, arriving = ([Message(((fresh(),),), torch.float32) for _ in range(link.size)] for _ in range(2))
    following, previous = (link.rank + 1) % link.size, (link.rank - 1) % link.size
    sent, received = fresh(), fresh()
    to_all = _seconds(lambda: link.all_to_all(leaving, arriving, "test").wait(), link, device)
    to_next = _seconds(
        lambda: link.exchange([(following, [sent])], [(previous, [received])], "test").wait(), link, device
    )
    return {"all-to-all": (link.size - 1) * MESSAGE[device] / to_all, "ring": MESSAGE[device] / to_next}


def _seconds(transfer: Callable[[], None], link: Link, device: str) -> float:
    """The shortest time of several transfers."""

    def synchronize() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    best = float("inf")
    for _ in range(1 + REPEATS):  # the first transfer only establishes connections
        dist.barrier(link.group)
        synchronize()
        start = time.perf_counter()
        transfer()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def run_rank(rank: int, world: int, device: str, folder: str) -> None:
    """Run one rank, which writes its result or its error to the folder."""
    result: dict[str, Any] = {}
    try:
        result = _results(rank, world, device, folder)
    except Exception as error:
        said = str(error).strip() or traceback.format_exc().strip().splitlines()[-3].strip()
        result = {"error": f"{type(error).__name__}: {said.splitlines()[0]}"}
    path = Path(folder) / f"{rank}.json"
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)


def _results(rank: int, world: int, device: str, folder: str) -> dict[str, Any]:
    join(rank, world, device, folder, PATIENCE / 2)
    whole = whole_tensors(device)
    reference = dense(whole)
    errors: dict[str, float] = {}
    links: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for title, config in settings(world).items():
            groups = ContextParallelGroups.build(config)
            errors[title] = largest_error(config, groups, device, whole, reference)
            if groups.cp is not None and not links:
                links = rates(groups.cp, device)
            groups.destroy()
    dist.barrier()
    dist.destroy_process_group()
    return {"errors": errors, "rates": links}


def run(device: str, world: int) -> dict[str, Any]:
    """Start the ranks and collect the largest error of each setting and the lowest rates, or the first error."""
    # A forked process has torch imported already, but a process that has used a device must not be forked.
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=run_rank, args=(rank, world, device, folder)) for rank in range(world)]
        for process in ranks:
            process.start()
        results = list(_wait(ranks, Path(folder), time.monotonic() + PATIENCE))
    failed = [f"rank {rank}: {result['error']}" for rank, result in enumerate(results) if "error" in result]
    head = {"device": device, "ranks": world, "dtype": str(DTYPES[device]).partition(".")[2], "limit": LIMITS[device]}
    if failed:
        return head | {"error": failed[0]}
    return head | {
        "errors": {title: max(result["errors"][title] for result in results) for title in results[0]["errors"]},
        "rates": {name: min(result["rates"][name] for result in results) for name in results[0]["rates"]},
    }


def _wait(ranks: list[Any], folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    for rank, process in enumerate(ranks):
        process.join(max(deadline - time.monotonic(), 0))
        ended = process.exitcode
        if ended is None:
            process.kill()
            process.join()
        path = folder / f"{rank}.json"
        if path.exists():
            yield json.loads(path.read_text())
        else:
            how = f"no answer within {PATIENCE} s" if ended is None else f"it ended with status {ended}"
            yield {"error": how}


def plan(device: str) -> list[tuple[str, int]]:
    """(device, ranks) of every run: one run if there are two or more devices, else the only device alone, and gloo."""
    if device == "cpu":
        return [("cpu", MOST_RANKS)]
    count = min(getattr(torch, device).device_count(), MOST_RANKS)
    return [(device, count // 2 * 2)] if count > 1 else [(device, 1), ("cpu", MOST_RANKS)]


def findings(device: str) -> Iterator[Finding]:
    """Compare every algorithm on a few ranks with dense attention, and measure their links."""
    start = time.monotonic()
    try:
        results = ask("mindspeed_cp.doctor.self_test", device)
    except RuntimeError as error:
        yield Finding("problem", f"the self test does not run: {error}", REPORT.format(device=device))
        return
    for result in results:
        yield from judged(result)
    yield Finding("note", f"self test: {time.monotonic() - start:.0f} s")


def judged(result: dict[str, Any]) -> Iterator[Finding]:
    """Findings of one run of ``run``."""
    ranks = f"{result['ranks']} {result['device']} rank{'s' if result['ranks'] > 1 else ''}"
    if "error" in result:
        gloo = result["device"] == "cpu" and any(
            word in result["error"].lower() for word in ("gloo", "resolve", "ifname")
        )
        way_out = INTERFACE if gloo else REPORT.format(device=result["device"])
        yield Finding("problem", f"{ranks}: {result['error']}", way_out)
        return
    wrong = {title: error for title, error in result["errors"].items() if not error <= result["limit"]}
    right = [title for title in result["errors"] if title not in wrong]
    for title, error in wrong.items():
        text = f"{ranks}, {title}: error {error:.1e} against dense attention, above {result['limit']:.0e}"
        yield Finding("problem", text, REPORT.format(device=result["device"]))
    if right:
        error = max(result["errors"][title] for title in right)
        yield Finding(
            "ok", f"{ranks}, {result['dtype']}, forward and backward: {', '.join(right)}: error at most {error:.0e}"
        )
    for name, rate in result["rates"].items():
        yield Finding("ok", f"{ranks}, {name}: {rate / 1e9:.2f} GB/s sent by each rank")


if __name__ == "__main__":
    os.environ.pop("MASTER_ADDR", None)  # these ranks use a file for their rendezvous
    if sys.argv[1] == "npu":
        import torch_npu  # noqa: F401  torch.npu
    print(json.dumps([run(*each) for each in plan(sys.argv[1])]))
