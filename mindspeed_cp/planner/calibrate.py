"""Measure the rates of this machine's kernel and links, which the planner otherwise assumes, and write a YAML file."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from mindspeed_cp.doctor import self_test
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.kernels.base import AttentionRows, BlockTensors, KernelOptions
from mindspeed_cp.planner.cluster import CLUSTERS, DEFAULT, THIS_MACHINE, Cluster, known_device
from mindspeed_cp.sequence.blocks import Block

SIZES = {"cpu": (2048, 4, 64), "cuda": (16384, 16, 128), "npu": (16384, 16, 128)}  # seq, heads, dim
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16, "npu": torch.bfloat16}
REPEATS = 3


@dataclass(frozen=True)
class Curve:
    """FLOP/s as a function of a size: ``most`` * size / (size + ``half``)."""

    most: float
    half: float


def fitted(small: tuple[float, float], large: tuple[float, float]) -> Curve:
    """Return the curve through two points (size, FLOP/s); it is flat if the small one is no slower."""
    (x, slow), (y, fast) = small, large
    if slow >= fast:
        return Curve(max(slow, fast), 0.0)
    # If the rate is proportional to the size, its maximum is unknown; assume that the larger size reaches half of it.
    half = min(x * y * (fast - slow) / max(slow * y - fast * x, 1e-9), float(y))
    return Curve(fast * (y + half) / y, half)


def _seconds(call: Callable[[], object], device: str) -> float:
    """The shortest time of several runs."""
    best = float("inf")
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        if device != "cpu":
            getattr(torch, device).synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def product_rate(device: str, rows: int) -> float:
    """FLOP/s of the product of a matrix with ``rows`` rows and a square matrix."""
    size = 4 * SIZES[device][2] * SIZES[device][1]
    left, right = (torch.randn(count, size, device=device, dtype=DTYPES[device]) for count in (rows, size))
    return 2 * rows * size * size / _seconds(lambda: left @ right, device)


def memory_rate(device: str) -> float:
    """Bytes/s that a copy reads plus writes."""
    source = torch.ones(1 << 25, device=device)
    return 2 * source.numel() * 4 / _seconds(source.clone, device)


def kernel_rate(device: str, seq: int | None = None) -> float:
    """FLOP/s of the forward and backward pass of one causal block."""
    whole, heads, dim = SIZES[device]
    seq = seq or whole
    block, options = Block((0, seq), (0, seq), None, 0), KernelOptions(dim**-0.5)
    query, key, value, grad_out = (
        torch.randn(seq, 1, heads, dim, device=device, dtype=DTYPES[device]) for _ in range(4)
    )
    kernel = select_kernel(device)

    def both() -> None:
        tensors = BlockTensors(block, query, key, value)
        result = kernel.forward(tensors, options)
        kernel.backward(tensors, AttentionRows(grad_out, result.out, result.lse), options, result.saved)

    # Two matrix products forward, five backward, two FLOPs per multiply-add.
    return 14 * block.area * heads * dim / _seconds(both, device)


def measured(device: str) -> Cluster:
    """A cluster of machines like this one, with the same rate between nodes as within a node (see --inter-bandwidth).

    Raises:
        ValueError: the ranks that measure the links failed; the message says how.
    """
    if device != "cpu" and not (hasattr(torch, device) and getattr(torch, device).is_available()):
        raise ValueError(f"--device {device}: there is none here; use --device cpu, or a preset of --cluster.")
    seq = SIZES[device][0]
    kernel = fitted(*((length, kernel_rate(device, length)) for length in (seq // 8, seq)))
    product = fitted(*((rows, product_rate(device, rows)) for rows in (seq // 16, seq)))
    flops = max(kernel.most, product.most)
    found: dict[str, Any] = self_test.run(*self_test.plan(device)[0])
    if "error" in found or not found["rates"]:
        raise ValueError(
            f"--calibrate: {found.get('error', 'one device has no links to measure')}; use a preset of --cluster with "
            "--flops, --intra-bandwidth and --inter-bandwidth."
        )
    bandwidth = float(found["rates"]["ring"])
    per_node = found["ranks"] if device == "cpu" else getattr(torch, device).device_count()
    return Cluster(
        per_node,
        flops,
        bandwidth,
        bandwidth,
        compute_efficiency=product.most / flops,
        link_efficiency=1.0,
        attention_efficiency=kernel.most / flops,
        half_rows=product.half,
        half_tokens=kernel.half,
        memory=memory_of(device),
        memory_bandwidth=memory_rate(device),
    )


def memory_of(device: str) -> float:
    """Memory of one device, or of this machine, in bytes."""
    if device == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(getattr(torch, device).get_device_properties(0).total_memory)


def device_here() -> str | None:
    """Name of this machine's first accelerator, or None."""
    for device in ("npu", "cuda"):
        if hasattr(torch, device) and getattr(torch, device).is_available():
            return str(getattr(torch, device).get_device_name(0))
    return None


def default_cluster() -> tuple[str, str]:
    """(the preset to use if none is named, why)."""
    name = device_here()
    if name is None:
        return DEFAULT, "--cluster is not given, and no accelerator is here"
    preset = known_device(name)
    if preset:
        return preset, f"--cluster is not given, and {name} is here"
    return DEFAULT, f"--cluster is not given, and {name}, which is here, is not a preset: give --flops and the others"


def save(cluster: Cluster, path: str) -> None:
    """Write the cluster as YAML; raises ValueError if the file cannot be written."""
    try:
        Path(path).write_text(yaml.safe_dump(asdict(cluster), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--calibrate {path} cannot be written ({error.strerror}); name a file elsewhere.") from error


def read_cluster(name: str, device: str = "cpu") -> Cluster:
    """A preset, this machine as ``measured`` now, or a file written by ``save``.

    Raises:
        ValueError: the name is none of these, or this machine cannot be measured.
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
        kinds = {"devices_per_node": int, "links": int, "devices_per_adapter": int}
        numbers: dict[str, Any] = {name: kinds.get(name, float)(value) for name, value in values.items()}
        return Cluster(**numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--cluster {name}: {error}; {way_out}.") from error
