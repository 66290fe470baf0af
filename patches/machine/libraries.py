"""Names that newer libraries removed, or that are missing without an optional library; on any device."""

import importlib
import inspect
from types import ModuleType
from typing import Any

import numpy

from mindspeed_cp.patches.checkout import without_checkout
from mindspeed_cp.patches.rows import absent, always, installed, patch, present, replacement, signature_of, uninstalled

TRITON_KERNELS = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
MLA = "megatron.core.transformer.multi_latent_attention"
EXPERTS = "megatron.core.transformer.moe.moe_utils"
CHECKPOINT_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
FP8_FIX = "megatron.training.checkpointing.fix_fp8_params_lose_precision_when_loading_dist_ckpt"
TRANSFORMER_ENGINE = "Transformer Engine is installed"
NOT_ASKED = "this version does not need Transformer Engine here"


WITHOUT_KERNELS = uninstalled(
    TRITON_KERNELS, f"this version has no such kernels in {TRITON_KERNELS.rpartition('.')[0]}"
)


@replacement(
    TRITON_KERNELS,
    reason="0.16 imports its Triton kernels even when --batch-invariant-mode is off",
    when=(installed("triton", "Triton is installed"), WITHOUT_KERNELS),
    create=True,
)
def kernels_without_triton(adaptor: Any, original: Any) -> ModuleType:
    def enable_batch_invariant_mode(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "--batch-invariant-mode needs Triton, which is not installed; install it, or leave the flag out."
        )

    module = ModuleType(TRITON_KERNELS)
    vars(module).update(
        enable_batch_invariant_mode=enable_batch_invariant_mode,
        set_batch_invariant_mode=enable_batch_invariant_mode,
        disable_batch_invariant_mode=lambda: None,
        is_batch_invariant_mode_enabled=lambda: False,
    )
    return module


def linear_is_a_class() -> str:
    module = importlib.import_module(MLA)
    if not getattr(module, "HAVE_TE", False):
        return NOT_ASKED
    return TRANSFORMER_ENGINE if isinstance(module.TELinear, type) else ""


@replacement(
    f"{MLA}.TELinear",
    reason="without Transformer Engine, 0.16 calls isinstance with a placeholder that is not a class",
    when=linear_is_a_class,
)
def linear(adaptor: Any, original: Any) -> type:
    return type("TELinear", (), {})


def gemm_is_named() -> str:
    module = importlib.import_module(EXPERTS)
    if hasattr(module, "te_general_gemm"):
        return TRANSFORMER_ENGINE
    asked = any("te_general_gemm" in _names_in(member) for member in vars(module).values())
    return "" if asked else NOT_ASKED


def _names_in(member: Any) -> set[str]:
    """Global names and attributes that a function, or the methods of a class, reads."""
    functions = vars(member).values() if isinstance(member, type) else (member,)
    codes = [getattr(getattr(function, "__func__", function), "__code__", None) for function in functions]
    return {name for code in codes if code is not None for name in code.co_names}


no_gemm = replacement(
    f"{EXPERTS}.te_general_gemm",
    reason="without Transformer Engine, 0.16 tests whether this name is None but does not define it",
    when=gemm_is_named,
    create=True,
)(always())

product = replacement(
    "numpy.product",
    reason="distributed checkpoints of 0.12 to 0.15 use a name that numpy 2 removed",
    when=present("numpy.product", "numpy has it"),
    create=True,
)(always(numpy.prod))


def format_is_passed() -> str:
    writer = importlib.import_module(CHECKPOINT_WRITER)
    wanted = "serialization_format" in inspect.signature(writer._write_item).parameters
    return "" if wanted else "this torch needs no format"


@patch(
    f"{CHECKPOINT_WRITER}._write_item",
    reason="0.12 does not pass the format that newer torch requires",
    when=format_is_passed,
)
def write_item(adaptor: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    if "serialization_format" not in signature_of(original).bind_partial(*args, **kwargs).arguments:
        kwargs["serialization_format"] = SerializationFormat.TORCH_SAVE
    return original(*args, **kwargs)


no_fp8_fix = patch(
    FP8_FIX,
    reason="0.12 reads Transformer Engine's version when it loads, even if that is not installed and nothing is FP8",
    when=(
        installed("transformer_engine", TRANSFORMER_ENGINE),
        without_checkout,
        absent(FP8_FIX, "this version does not read it"),
    ),
)(always())
