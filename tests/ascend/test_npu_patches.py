"""Each failure of Megatron on an NPU: red without its row of patches/machine/npu.py, green with it, on torch_npu."""

import bed
import pytest
import torch

GENERATORS = "torch.cuda.default_generators"
NORM = "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__"
QUANTIZE = "megatron.core.fp8_utils.quantize_param_shard"
SEQUENCE_PARALLEL = dict(world=2, tp=2, options=dict(sequence_parallel=True))
DISTRIBUTED = dict(world=2, algorithm="megatron_cp_algo", options=dict(bf16=True, distributed_optimizer=True))

# name -> (job, its arguments, the rows of the table that it needs, what is said without them)
FAILURES = {
    "first clipped step": ("train", dict(steps=1), ["torch.Tensor.type"], r"AssertionError.*torch\.cuda\.FloatTensor"),
    "bf16 optimizer": (
        "train",
        dict(steps=1, options=dict(bf16=True)),
        ["torch.Tensor.type"],
        r"TypeError: Wrapped parameters must be one of torch\.cuda\.FloatTensor.*torch\.npu\.BFloat16Tensor",
    ),
    "sequence parallel": (
        "train",
        dict(steps=1, **SEQUENCE_PARALLEL),
        [NORM],
        "AssertionError: sequence parallel not supported by torch LayerNorm",
    ),
    "start of training": (
        "reduce_start_time",
        dict(world=2),
        ["torch.distributed.all_reduce"],
        "HCCL allreduce: Unsupported data type at::kDouble",
    ),
    "asynchronous float64": (
        "reduce_start_time",
        dict(world=2, asynchronous=True),
        ["torch.distributed.all_reduce"],
        "HCCL allreduce: Unsupported data type at::kDouble",
    ),
    "state before the first use": (
        "seed_generators",
        dict(before_first_use=True),
        ["torch.cuda._lazy_call"],
        "before the NPU's first use was lost",
    ),
    "jit_fuser": ("compiled", {}, ["torch.compile"], "torch.compile"),
    "architecture": ("properties_only", {}, ["torch.cuda.get_device_properties"], "TypeError.*NoneType"),
    "capability": ("device_questions", {}, ["torch.cuda.get_device_capability"], "TypeError.*NoneType"),
    "nvtx push": ("device_questions", {}, ["torch.cuda.nvtx.range_push"], "NVTX functions not installed"),
    "nvtx pop": ("device_questions", {}, ["torch.cuda.nvtx.range_pop"], "NVTX functions not installed"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_it_fails_without_its_patch_and_works_with_it(server, name):
    job, arguments, targets, message = FAILURES[name]
    if name.startswith("nvtx") and torch.version.cuda is not None:
        pytest.skip("this torch was built for CUDA and has NVTX")
    server.run(job, **arguments)
    with pytest.raises(bed.JobFailed, match=f"(?s){message}"):
        server.run(job, **arguments, without=targets)


def test_the_reduced_value_reaches_the_callers_tensor(server):
    for asynchronous in (False, True):
        assert server.run("reduce_start_time", 2, asynchronous=asynchronous) == [[10.0, "torch.float64"]] * 2


def test_releases_that_leave_the_generators_empty_need_them(server):
    """2.13.0 fills them lazily; what fills them is taken out, as in the sources of 2.5 to 2.9."""
    assert server.run("rows")[0][GENERATORS] == "this release fills them"
    server.run("seed_generators")
    server.run("seed_generators", old_release=True)
    with pytest.raises(bed.JobFailed, match="IndexError"):
        server.run("seed_generators", old_release=[GENERATORS])


def test_distributed_optimizer_without_transformer_engine(server):
    server.run("train", steps=1, **DISTRIBUTED)
    if server.run("version")[0].startswith("0.12"):
        with pytest.raises(bed.JobFailed, match="quantize_param_shard|transformer_engine|Transformer"):
            server.run("train", steps=1, **DISTRIBUTED, without=[QUANTIZE])


def test_undo_restores_every_attribute_to_the_identical_object(server):
    assert server.run("undo") == [[]]


def test_the_device_is_an_npu_whatever_torch_was_built_for(server):
    assert server.run("device_type") == ["npu"]
    assert server.run("device_type", cuda_build="13.0") == ["npu"]


def test_names_that_mindspeed_has_patched_are_left_to_it(server):
    statuses = server.run("rows_after_mindspeed")[0]
    assert statuses["torch.Tensor.type"] == statuses[NORM] == "MindSpeed has patched it"
    assert statuses["torch.compile"] == "applied"
