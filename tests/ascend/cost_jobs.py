"""Jobs of the test bed that count: waits of the host, operator launches, communicators and their buffers."""

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace


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


def piece_launches(rank):
    """Operators that are launched for the pieces of one layer that MindSpeed or Ascend's apex fuse.

    Forward and backward of a norm, of rotary embedding on queries and keys, and of a gated activation, as Megatron
    computes them; one step of Adam on the eight parameters of a layer, and the norm and clipping of their gradients.
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

    norm, rows, heads, gate = torch.nn.RMSNorm(32, device="cuda"), leaf(16, 2, 32), leaf(16, 2, 4, 8), leaf(16, 2, 64)
    parameters = [leaf(32, 32) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW(parameters, lr=1e-3)

    def clip():
        norm = get_grad_norm_fp32([parameter.grad for parameter in parameters])
        clip_grad_by_total_norm_fp32(parameters, 0.5, norm)

    return {
        "norm": launches(lambda: norm(rows).backward(seed[..., :32])),
        "rotary": 2
        * launches(lambda: apply_rotary_pos_emb(heads, frequencies, config).backward(seed[..., :32].view(16, 2, 4, 8))),
        "swiglu": launches(lambda: bias_swiglu_impl(gate, None).backward(seed[..., :32])),
        "adam": launches(adam.step),
        "clip": launches(clip),
    }
