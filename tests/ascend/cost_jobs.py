"""Jobs of the test bed that count: waits of the host, operator launches, communicators and their buffers."""

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace


def host_waits(rank, algorithm, packed=False, window=None):
    """What makes the host wait for the device in the second attention call, forward and backward."""
    import npu_on_cpu
    import torch

    from mindspeed_cp import (
        ContextParallelConfig,
        ContextParallelGroups,
        SequenceLayout,
        context_parallel_attention,
    )

    rank.join()
    config = ContextParallelConfig(context_parallel_size=rank.world, algorithm=algorithm)
    groups, layout = ContextParallelGroups.build(config), SequenceLayout.build(config, 16)
    leaves = [torch.randn(16 // rank.world, 1, 4, 16, device="cuda").requires_grad_() for _ in range(3)]
    documents = torch.tensor([0, 5, 16], dtype=torch.int32, device="cuda") if packed else None
    for _ in range(2):
        del npu_on_cpu.host_waits[:]
        out = context_parallel_attention(
            *leaves, config=config, groups=groups, layout=layout, cu_seqlens=documents, sliding_window=window
        )
        out.backward(torch.ones_like(out))
    return npu_on_cpu.host_waits


def step_costs(rank, algorithm="", tp=1, options=None):
    """What the second training step costs the host: {"waits": {kind: number}, "launches": {operator: number}}."""
    import npu_on_cpu
    import tiny_gpt

    seen, step = [], tiny_gpt._step

    def counted(model, optimizer):
        npu_on_cpu.record = True
        del npu_on_cpu.host_waits[:], npu_on_cpu.calls[:]
        result = step(model, optimizer)
        names = (name.partition("::")[2].partition(".")[0] for name in npu_on_cpu.calls)
        seen.append({"waits": Counter(npu_on_cpu.host_waits), "launches": Counter(names)})
        return result

    rank.join()
    tiny_gpt._step = counted
    tiny_gpt.train(algorithm, rank.world // tp, tp, 2, tiny_gpt.Options(**(options or {})))
    return seen[-1]


def groups_messages(rank):
    """Whether batch_isend_irecv goes the way of CANN 9 on 910B and 910C."""
    import torch_npu

    return bool(getattr(torch_npu.distributed.distributed_c10d, "_CANN_VERSION", False))


def has_fused_update(rank):
    """Whether this release of torch_npu has npu_ring_attention_update."""
    import torch_npu

    return hasattr(torch_npu, "npu_ring_attention_update")


def group_buffers(rank, folder, buffers, adopts=False):
    """(ranks, MB that HCCL was asked for) of each communicator of this rank, in a group that is made or adopted."""
    import torch

    from mindspeed_cp import ContextParallelConfig, ContextParallelGroups

    log = Path(folder, f"communicators-{rank.rank}")
    os.environ["NPU_STUB_COMMUNICATORS"] = str(log)
    rank.join()
    config = ContextParallelConfig(context_parallel_size=4, algorithm="hybrid_cp_algo", ulysses_degree=2)
    if adopts:
        ContextParallelGroups.adopt(config, torch.distributed.group.WORLD, pool={}, buffers=buffers)
    else:
        ContextParallelGroups.build(config, buffers=buffers)
    return sorted(tuple(map(int, line.split()[::2])) for line in log.read_text().splitlines())


def megatron_buffers(rank, folder, seq_length):
    """MB that HCCL was asked for, of Megatron's context-parallel group in a training of such a length."""
    import torch
    from megatron.core import parallel_state

    import mindspeed_cp.megatron_adaptor as adaptor
    from mindspeed_cp import ContextParallelConfig, TrainingSetup

    os.environ["NPU_STUB_COMMUNICATORS"] = str(Path(folder, f"communicators-{rank.rank}"))
    rank.join()
    config = ContextParallelConfig(context_parallel_size=2, algorithm="ulysses_cp_algo")
    sizes = dict(num_attention_heads=32, head_dim=128, half_precision="bfloat16", seq_length=seq_length)
    adaptor.configure(config, setup=TrainingSetup(**sizes))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    torch.distributed.all_reduce(torch.ones(1, device="npu"), group=parallel_state.get_context_parallel_group())
    lines = Path(os.environ["NPU_STUB_COMMUNICATORS"]).read_text().splitlines()
    return [megabytes for size, megabytes in (tuple(map(int, line.split()[::2])) for line in lines) if size == 2]


def plain_attention(rank, asked):
    """What is said of Megatron's own attention beside context parallelism, in a model that is not split."""
    import warnings

    import tiny_gpt
    from megatron.core import parallel_state, tensor_parallel

    from mindspeed_cp.megatron.alone import name_plain_attention

    rank.join()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = tiny_gpt.model_of(1, 1, tiny_gpt.Options())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        name_plain_attention(model, asked=asked)
    return [str(each.message) for each in said if "every query with every key" in str(each.message)]


def piece_launches(rank, mindspeed=""):
    """Operators that are launched for the pieces of one layer that MindSpeed or Ascend's apex fuse.

    Forward and backward of a norm, of rotary embedding on queries and keys, and of a gated activation, as Megatron
    computes them; one step of Adam on the eight parameters of a layer, and the norm and clipping of their gradients.

    Args:
        mindspeed: the folder "mindspeed" of its repository, whose own fusions then compute what they have.
    """
    import npu_on_cpu
    import torch
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    rank.join()
    parallel_state.initialize_model_parallel()
    npu_on_cpu.record = True
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    frequencies = torch.randn(16, 1, 1, 8, device="cuda")

    def leaf(*shape):
        return torch.randn(*shape, device="cuda").requires_grad_()

    seed = torch.ones(16, 2, 64, device="cuda")

    def launches(run):
        run()  # what is made once is made now
        del npu_on_cpu.calls[:]
        run()
        return len(npu_on_cpu.calls)

    norm, adamw = torch.nn.RMSNorm(32, device="cuda"), torch.optim.AdamW
    swiglu, rotate = bias_swiglu_impl, apply_rotary_pos_emb
    if mindspeed:
        norm, swiglu, rotate, adamw = _fusions_of(Path(mindspeed))
    rows, heads, gate = leaf(16, 2, 32), leaf(16, 2, 4, 8), leaf(16, 2, 64)
    parameters = [leaf(32, 32) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam = adamw(parameters, lr=1e-3)

    def clip():
        norm = get_grad_norm_fp32([parameter.grad for parameter in parameters])
        clip_grad_by_total_norm_fp32(parameters, 0.5, norm)

    return {
        "norm": launches(lambda: norm(rows).backward(seed[..., :32])),
        "rotary": 2 * launches(lambda: rotate(heads, frequencies, config).backward(seed[..., :32].view(16, 2, 4, 8))),
        "swiglu": launches(lambda: swiglu(gate, None).backward(seed[..., :32])),
        "adam": launches(adam.step),
        "clip": launches(clip),
    }


def _fusions_of(mindspeed):
    """(norm, swiglu, rotation, optimizer) as the files of a MindSpeed have them, each loaded alone.

    Its rotation calls an operator in C++ that is built beside CANN: torch_npu's own of the same arguments stands in.
    """
    import torch_npu

    flags = SimpleNamespace(use_fused_rotary_pos_emb=True, use_fused_rmsnorm=True)
    for name, members in {
        "mindspeed.args_utils": {"get_full_args": lambda: flags},
        "mindspeed.ops.npu_rotary_position_embedding": {
            "npu_rotary_position_embedding": lambda rows, cos, sin, mode: torch_npu.npu_rotary_mul(rows, cos, sin)
        },
        "mindspeed.core.transformer.multi_head_latent_attention.mla_utils": {"yarn_get_mscale": None},
    }.items():
        sys.modules[name] = stand_in = ModuleType(name)
        vars(stand_in).update(members)

    def loaded(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return module

    fusions = mindspeed / "core" / "fusions"
    rotation = loaded(fusions / "fused_rope.py").apply_rotary_pos_emb_bshd
    return (
        loaded(fusions / "fused_rms_norm.py").RMSNorm(32, config=flags).cuda(),
        loaded(fusions / "fused_bias_swiglu.py").SwiGLUFunction.apply,
        lambda rows, frequencies, config: rotation(rows, frequencies),
        loaded(mindspeed / "core" / "optimizer" / "adamw.py").AdamW,
    )


def fused_operators(rank):
    """Which of the operators in fused_operators.py have other values or gradients than their definitions."""
    import torch
    import torch_npu
    from fused_operators import _half_turned

    rank.join()
    definitions = {
        "npu_rms_norm": lambda rows, gamma: torch.nn.functional.rms_norm(rows, (8,), gamma, 1e-6),
        "npu_rotary_mul": lambda rows, cos, sin: rows * cos + _half_turned(rows) * sin,
        "npu_swiglu": lambda rows: torch.nn.functional.silu(rows[..., :4]) * rows[..., 4:],
    }
    shapes = {"npu_rms_norm": [(5, 3, 8), (8,)], "npu_rotary_mul": [(5, 3, 2, 8), *[(5, 1, 1, 8)] * 2]}
    wrong = []
    for name, definition in definitions.items():
        inputs = [torch.randn(shape) for shape in shapes.get(name, [(5, 3, 8)])]
        found = []
        for function, device in ((definition, "cpu"), (getattr(torch_npu, name), "cuda")):
            leaves = [tensor.to(device).detach().requires_grad_() for tensor in inputs]
            out = function(*leaves)
            out = out[0] if isinstance(out, tuple) else out
            out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(device))
            found.append([each.detach().cpu() for each in (out, *(leaf.grad for leaf in leaves))])
        wrong += [name] * any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    return wrong
