"""Measures what the planner otherwise assumes: the rates of this machine's kernel and links, into a YAML file."""

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from mindspeed_cp.doctor import self_test
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions
from mindspeed_cp.planner.cluster import CLUSTERS, THIS_MACHINE, Cluster
from mindspeed_cp.sequence.blocks import Block

SIZES = {"cpu": (2048, 4, 64), "cuda": (16384, 16, 128), "npu": (16384, 16, 128)}  # seq, heads, dim
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16, "npu": torch.bfloat16}
REPEATS = 3


def kernel_rate(device: str) -> float:
    """FLOP/s of forward and backward of one causal block, the best of a few."""
    seq, heads, dim = SIZES[device]
    block, options = Block((0, seq), (0, seq), None, 0), KernelOptions(dim**-0.5)
    query, key, value, grad_out = (
        torch.randn(seq, 1, heads, dim, device=device, dtype=DTYPES[device]) for _ in range(4)
    )
    kernel, best = select_kernel(device), float("inf")
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        tensors = BlockTensors(block, query, key, value)
        result = kernel.forward(tensors, options)
        kernel.backward(tensors, AttentionRows(grad_out, result.out, result.lse), options, result.saved)
        if device != "cpu":
            getattr(torch, device).synchronize()
        best = min(best, time.perf_counter() - start)
    return 14 * block.area * heads * dim / best  # two products forward, five backward, two FLOPs each


def measured(device: str) -> Cluster:
    """A cluster of machines like this one; between nodes the rate within one is taken, give --inter-bandwidth.

    Raises:
        ValueError: the ranks that measure the links failed; the message says how.
    """
    if device != "cpu" and not (hasattr(torch, device) and getattr(torch, device).is_available()):
        raise ValueError(f"--device {device}: there is none here; use --device cpu, or a preset of --cluster.")
    rate = kernel_rate(device)
    found: dict[str, Any] = self_test.run(*self_test.plan(device)[0])
    if "error" in found or not found["rates"]:
        raise ValueError(
            f"--calibrate: {found.get('error', 'one device has no links to measure')}; use a preset of --cluster with "
            "--flops, --intra-bandwidth and --inter-bandwidth."
        )
    bandwidth = float(found["rates"]["ring"])
    per_node = found["ranks"] if device == "cpu" else getattr(torch, device).device_count()
    return Cluster(per_node, rate, bandwidth, bandwidth, compute_efficiency=1.0, link_efficiency=1.0)


def save(cluster: Cluster, path: str) -> None:
    """Raises ValueError where the file cannot be written."""
    try:
        Path(path).write_text(yaml.safe_dump(asdict(cluster), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--calibrate {path} cannot be written ({error.strerror}); name a file elsewhere.") from error


def read_cluster(name: str, device: str = "cpu") -> Cluster:
    """A preset, this machine as ``measured`` finds it now, or what ``save`` wrote.

    Raises:
        ValueError: none of them, or this machine cannot be measured.
    """
    if name in CLUSTERS:
        return CLUSTERS[name]
    if name == THIS_MACHINE:
        return measured(device)
    known = {field.name for field in fields(Cluster)}
    way_out = f"choose one of {', '.join(CLUSTERS)}, {THIS_MACHINE}, or a file that --calibrate wrote"
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--cluster {name} is neither known nor a file that can be read; {way_out}.") from error
    if not isinstance(values, dict) or not set(values) <= known:
        raise ValueError(f"--cluster {name} does not hold {', '.join(sorted(known))} alone; {way_out}.")
    try:
        kinds = {"devices_per_node": int}
        numbers: dict[str, Any] = {name: kinds.get(name, float)(value) for name, value in values.items()}
        return Cluster(**numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--cluster {name}: {error}; {way_out}.") from error
