"""Read settings from files as flags: Megatron's --yaml-cfg, and --cp-config with MindFormers' keys.

A flag on the command line wins over the file.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mindspeed_cp.arguments import declared
from mindspeed_cp.arguments.launch import read_flags
from mindspeed_cp.prove.words import Words

MEGATRON, MINDFORMERS = "--yaml-cfg", "--cp-config"
# Names in Megatron's configurations that differ from the flags' names.
RENAMED = {
    "num_moe_experts": "--num-experts",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "fp8": "--fp8-format",
}
# Settings that are on unless a flag switches them off.
ON_UNLESS = {
    "add_bias_linear": "--disable-bias-linear",
    "add_position_embedding": "",  # deprecated; position_embedding_type says it
    "apply_rope_fusion": "--no-rope-fusion",
    "async_tensor_model_parallel_allreduce": "--no-async-tensor-model-parallel-allreduce",
    "bert_binary_head": "--bert-no-binary-head",
    "bias_dropout_fusion": "--no-bias-dropout-fusion",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
    "bias_swiglu_fusion": "--no-bias-swiglu-fusion",
    "check_for_nan_in_loss_and_grad": "--no-check-for-nan-in-loss-and-grad",
    "gradient_accumulation_fusion": "--no-gradient-accumulation-fusion",
    "manual_gc_eval": "--no-manual-gc-eval",
    "masked_softmax_fusion": "--no-masked-softmax-fusion",
    "persist_layer_norm": "--no-persist-layer-norm",
}
# Settings without a flag: they follow from others, are functions, or concern only the device.
WITHOUT_FLAG = """
    init_method output_layer_init_method perform_initialization params_dtype timers gated_linear_unit
    bias_activation_fusion memory_efficient_layer_norm clone_scatter_output_in_embedding moe_token_dropping
    virtual_pipeline_model_parallel_size finalize_model_grads_func pipeline_dtype grad_scale_func enable_autocast
    autocast_dtype num_microbatches_with_partial_activation_checkpoints overlap_p2p_comm batch_p2p_comm batch_p2p_sync
    use_ring_exchange_p2p deallocate_pipeline_outputs no_sync_func grad_sync_func param_sync_func barrier_with_L1_time
    scatter_gather_tensors_in_pipeline align_grad_reduce align_param_gather fp8_wgrad log_loss_scale_to_tensorboard
    onnx_safe local_rank lazy_mpu_init standalone_embedding_stage encoder_num_layers decoder_num_layers
""".split()
STARTS = ("tp_comm_split", "tp_comm_atomic", "tp_comm_bulk", "cpu_offloading", "_")


def with_files(words: Words) -> Words:
    """The flags, with each file replaced by the flags that it contains.

    Raises:
        ValueError: a file cannot be read, or its keys conflict.
    """
    found = words.copy()
    if MEGATRON in words:
        found.drop([MEGATRON])
        for flag, values in _megatron(words.text(MEGATRON)):
            if flag not in words:
                found.set(flag, *values)
    if MINDFORMERS in words:
        _mindformers(found)
        found.drop([MINDFORMERS])
    return found


def _megatron(path: str) -> Iterator[tuple[str, list[Any]]]:
    """(flag, values) of every setting of a file with sections one level deep; None and False are skipped."""
    try:
        tree = yaml.safe_load(os.path.expandvars(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{MEGATRON} {path} cannot be read ({error}); give the path of a YAML file.") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{MEGATRON} {path} has no settings; give a file with lines such as 'num_layers: 24'.")
    for key, value in tree.items():
        for name, setting in value.items() if isinstance(value, dict) else [(key, value)]:
            yield from _flag(str(name), setting)


def _flag(name: str, value: Any) -> Iterator[tuple[str, list[Any]]]:
    if value is None or name in WITHOUT_FLAG or name.startswith(STARTS):
        return
    if name == "activation_func":
        if value in ("swiglu", "squared_relu"):
            yield f"--{value.replace('_', '-')}", []
    elif name in ON_UNLESS:
        if not value and ON_UNLESS[name]:
            yield ON_UNLESS[name], []
    elif value is not False and value != "":
        flag = RENAMED.get(name, f"--{name.replace('_', '-')}")
        yield flag, [] if value is True else list(value) if isinstance(value, list) else str(value).split()


def _mindformers(words: Words) -> None:
    """Set the flags of context parallelism that a MindFormers file gives."""
    args, _ = read_flags(words.line(), "prove")
    for each in declared.declared():
        value = getattr(args, each.dest, None)
        if each.dest in args.cp_given and not any(flag in words for flag in each.flags) and value not in (None, False):
            words.set(each.flag, *([] if value is True else [value]))
