"""What a Megatron-LM checkout needs on a machine without an accelerator, in addition to megatron-core (``cpu``)."""

import importlib
import inspect
import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.rows import always, patch, uninstalled

FUSED_KERNELS = "megatron.legacy.fused_kernels"


@patch(
    "megatron.training.initialize.initialize_megatron",
    reason="Megatron refuses to start without CUDA and without CUDA_DEVICE_MAX_CONNECTIONS",
)
def initialize_megatron(adaptor: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # allow_no_cuda is the fourth positional argument in every version, but no caller passes it by position.
    return original(*args, **{**kwargs, "allow_no_cuda": True})


warmup_jit_function = patch(
    "megatron.training.initialize._warmup_jit_function",
    reason="nothing is compiled, and the random numbers it draws would make initial weights depend on the parallel "
    "sizes",
)(always())
device_count = patch(
    "torch.cuda.device_count", reason="without a device Megatron makes no process groups and seeds no generator"
)(always(1))
get_device_properties = patch(
    "torch.cuda.get_device_properties", reason="Megatron asks for the architecture of the device"
)(always(SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)))
device_memory_used = patch("torch.cuda.device_memory_used", reason="Megatron prints the memory of the device")(
    always(0)
)


@patch(
    "megatron.core.datasets.utils.compile_helpers",
    reason="Megatron's Makefile compiles for the first python3 of the PATH, each time; this compiles once, for the "
    "Python that runs",
)
def compile_helpers(adaptor: Any, original: Any) -> None:
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        _compile(Path(inspect.getfile(original)).parent)


load_fused_kernels = patch(
    f"{FUSED_KERNELS}.load",
    reason="the fused kernels are CUDA; legacy models have plain versions",
    when=(without_checkout, uninstalled(FUSED_KERNELS, "this Megatron-LM has no fused kernels")),  # 0.17 and later
)(always())


def _compile(folder: Path) -> None:
    """Compile helpers.cpp of Megatron's datasets for the running Python, with the pybind11 that comes with torch."""
    name = "helpers_cpp" + sysconfig.get_config_var("EXT_SUFFIX")
    includes = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory(dir=folder) as built:
        command = ["c++", "-O3", "-shared", "-std=c++17", "-fPIC", *(f"-I{include}" for include in includes)]
        command += [str(folder / "helpers.cpp"), "-o", str(Path(built, name))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise RuntimeError(
                f"the dataset helpers of Megatron-LM in {folder} could not be compiled ({reason}); install a C++ "
                "compiler and Python's headers, or run make there."
            ) from error
        Path(built, name).replace(folder / name)  # atomic, so that another run never sees half a file
    importlib.invalidate_caches()
