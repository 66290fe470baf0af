"""What a Megatron-LM checkout asks of a machine without an accelerator, beyond megatron-core's wishes in ``device``."""

import importlib
import importlib.util
import inspect
import subprocess
import sysconfig
import tempfile
from functools import wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import torch
from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.manager import Patch

TRITON_KERNELS = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
FUSED_KERNELS = "megatron.legacy.fused_kernels"
MLA = "megatron.core.transformer.multi_latent_attention"
EXPERTS = "megatron.core.transformer.moe.moe_utils"
CHECKPOINT_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
CHECKPOINTING = "megatron.training.checkpointing"
FP8_FIX = "fix_fp8_params_lose_precision_when_loading_dist_ckpt"


def library_patches():
    """Names that newer libraries dropped or that are missing here; megatron.training is imported after these."""
    return [
        Patch(
            TRITON_KERNELS,
            _kernels_without_triton,
            "0.16 imports its Triton kernels even when --batch-invariant-mode is off",
            _triton_is_there,
            create=True,
        ),
        Patch(
            f"{MLA}.TELinear",
            lambda original: type("TELinear", (), {}),
            "without Transformer Engine 0.16 asks isinstance of a placeholder that is no class",
            _te_linear_is_a_class,
        ),
        Patch(
            f"{EXPERTS}.te_general_gemm",
            lambda original: None,
            "without Transformer Engine 0.16 asks whether this name is None, and has not set it",
            _gemm_is_named,
            create=True,
        ),
        Patch(
            "numpy.product",
            lambda original: numpy.prod,
            "distributed checkpoints of 0.12 to 0.15 use a name that numpy 2 removed",
            _product_is_there,
            create=True,
        ),
        Patch(
            f"{CHECKPOINT_WRITER}._write_item",
            _with_serialization_format,
            "0.12 does not pass the format that newer torch requires",
            _format_is_passed,
        ),
    ]


def checkout_patches():
    """What a checkout asks of libraries that are missing, on any device."""
    return [
        Patch(
            f"{CHECKPOINTING}.{FP8_FIX}",
            lambda original: lambda state_dict: None,
            "0.12 asks for the version of Transformer Engine when it loads, installed or not; without it nothing is "
            "FP8",
            _no_fp8_fix,
        )
    ]


def checkout_device_patches(when):
    """The table; ``when`` is () -> "" on a machine without accelerator, else why no stand-in is needed."""

    def checkout():
        return when() or without_checkout()

    return [
        Patch(
            "megatron.training.initialize.initialize_megatron",
            _allow_no_cuda,
            "Megatron refuses to start without CUDA",
            checkout,
        ),
        Patch(
            "megatron.training.initialize._warmup_jit_function",
            lambda original: lambda *args, **kwargs: None,
            "nothing is compiled, and the random numbers it draws would make initial weights depend on the parallel "
            "sizes",
            checkout,
        ),
        Patch(
            "torch.cuda.device_count",
            lambda original: lambda: 1,
            "without a device Megatron makes no process groups and seeds no generator",
            checkout,
        ),
        Patch(
            "torch.cuda.get_device_properties",
            lambda original: _properties,
            "Megatron asks for the architecture of the device",
            checkout,
        ),
        Patch(
            "torch.cuda.device_memory_used",
            lambda original: lambda device=None: 0,
            "Megatron prints the memory of the device",
            checkout,
        ),
        Patch(
            "megatron.core.datasets.utils.compile_helpers",
            _compile_if_missing,
            "Megatron's Makefile compiles for the first python3 of the PATH, each time; this compiles once, for the "
            "Python "
            "that runs",
            checkout,
        ),
        Patch(
            f"{FUSED_KERNELS}.load",
            lambda original: lambda args: None,
            "the fused kernels are CUDA; legacy models have plain versions",
            lambda: when() or without_fused_kernels(),
        ),
    ]


def without_fused_kernels():
    """Why nothing is to be done about fused kernels: 0.17 and later have none."""
    why = without_checkout()
    if why:
        return why
    try:
        found = importlib.util.find_spec(FUSED_KERNELS)
    except ModuleNotFoundError:  # megatron.legacy went too
        found = None
    return "" if found else "this Megatron-LM has no fused kernels"


def _triton_is_there():
    if importlib.util.find_spec("triton") is not None:
        return "Triton is installed"
    # Looked for beside its package: finding it by name would import all of megatron.core.transformer twice over.
    package = TRITON_KERNELS.rpartition(".")[0]
    try:
        found = importlib.util.find_spec(TRITON_KERNELS)
    except ModuleNotFoundError:
        found = None
    return "" if found else f"this version has no such kernels in {package}"


def _te_linear_is_a_class():
    module = importlib.import_module(MLA)
    if not getattr(module, "HAVE_TE", False):
        return "this version asks nothing of Transformer Engine here"
    return "Transformer Engine is installed" if isinstance(module.TELinear, type) else ""


def _gemm_is_named():
    module = importlib.import_module(EXPERTS)
    if hasattr(module, "te_general_gemm"):
        return "Transformer Engine is installed"
    asked = any("te_general_gemm" in _names_in(member) for member in vars(module).values())
    return "" if asked else "this version asks nothing of Transformer Engine here"


def _names_in(member):
    """Global names and attributes that a function or the methods of a class read."""
    functions = vars(member).values() if isinstance(member, type) else (member,)
    codes = [getattr(getattr(function, "__func__", function), "__code__", None) for function in functions]
    return {name for code in codes if code is not None for name in code.co_names}


def _no_fp8_fix():
    if importlib.util.find_spec("transformer_engine") is not None:
        return "Transformer Engine is installed"
    why = without_checkout()
    return why or ("" if hasattr(importlib.import_module(CHECKPOINTING), FP8_FIX) else "this version does not ask")


def _product_is_there():
    return "numpy has it" if hasattr(numpy, "product") else ""


def _format_is_passed():
    writer = importlib.import_module(CHECKPOINT_WRITER)
    wanted = "serialization_format" in inspect.signature(writer._write_item).parameters
    return "" if wanted else "this torch wants no format"


def _with_serialization_format(original):
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    signature = inspect.signature(original)

    @wraps(original)
    def _write_item(*args, **kwargs):
        if "serialization_format" not in signature.bind_partial(*args, **kwargs).arguments:
            kwargs["serialization_format"] = SerializationFormat.TORCH_SAVE
        return original(*args, **kwargs)

    return _write_item


def _kernels_without_triton(original):
    module = ModuleType(TRITON_KERNELS)

    def enable_batch_invariant_mode(*args, **kwargs):
        raise ValueError(
            "--batch-invariant-mode needs Triton, which is not installed; install it, or leave the flag out."
        )

    module.enable_batch_invariant_mode = module.set_batch_invariant_mode = enable_batch_invariant_mode
    module.disable_batch_invariant_mode = lambda: None
    module.is_batch_invariant_mode_enabled = lambda: False
    return module


def _allow_no_cuda(original):
    def initialize_megatron(*args, **kwargs):
        # The fourth positional argument in every version; no caller passes it so.
        return original(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize_megatron


def _properties(device=None):
    return SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)


def _compile_if_missing(original):
    def compile_helpers():
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            _compile(Path(inspect.getfile(original)).parent)

    return compile_helpers


def _compile(folder):
    """Compile helpers.cpp of Megatron's datasets for the Python that runs, with the pybind11 that comes with torch."""
    name = "helpers_cpp" + sysconfig.get_config_var("EXT_SUFFIX")
    includes = [sysconfig.get_paths()["include"], str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory(dir=folder) as built:
        command = [
            "c++",
            "-O3",
            "-shared",
            "-std=c++17",
            "-fPIC",
            *(f"-I{include}" for include in includes),
            str(folder / "helpers.cpp"),
            "-o",
            str(Path(built, name)),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise RuntimeError(
                f"the dataset helpers of Megatron-LM in {folder} could not be compiled ({reason}); install a C++ "
                "compiler and Python's headers, or run make there."
            ) from error
        Path(built, name).replace(folder / name)  # at once, so that a second run never sees half a file
    importlib.invalidate_caches()
