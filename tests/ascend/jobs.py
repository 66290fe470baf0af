"""What the ranks of the test bed run: small uses of what Megatron uses, and the training of a tiny GPT."""

import importlib.util
import json
import os
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from beside_jobs import beside_mindspeed, beside_mindspeeds_ring  # noqa: F401  jobs too
from cost_jobs import (  # noqa: F401  jobs too
    fused_operators,
    group_buffers,
    groups_messages,
    has_fused_update,
    host_waits,
    megatron_buffers,
    piece_launches,
    plain_attention,
    step_costs,
)


class Rank(NamedTuple):
    rank: int
    world: int
    meeting: str  # of torch.distributed.init_process_group

    def join(self):
        import torch

        torch.cuda.set_device(self.rank)
        torch.distributed.init_process_group("nccl", self.meeting, rank=self.rank, world_size=self.world)


def prepare():
    """Import what every job needs, in the order of a training script; nothing may start the NPU before the fork.

    With NPU_BED_IMPORTS=torch every job imports the rest in an order of its own.
    """
    if os.environ.get("NPU_BED_IMPORTS") == "torch":
        import_module("unneeded").install()
        return
    import_module("mindspeed_cp.megatron_adaptor")
    for name in ("distributed", "models.gpt.gpt_layer_specs", "optimizer"):
        import_module(f"megatron.core.{name}")
    if importlib.util.find_spec("megatron.training") is not None:
        import_module("megatron.training")


def take_back(targets):
    """Undo the patches of these names, as if the table had no such rows."""
    if not targets:  # a job may import the adaptor at a time of its own
        return
    from mindspeed_cp import megatron_adaptor

    manager = megatron_adaptor._manager
    for target in targets:
        rows = [index for index in manager._done if manager._patches[index].target == target]
        assert rows, f"no applied patch is called {target}"
        manager.undo(rows[-1:])


def rows(rank):
    """Status of every row of the NPU's table."""
    from mindspeed_cp import megatron_adaptor

    targets = {patch.target for patch in megatron_adaptor._tables["npu"]}
    statuses = {}
    for row in megatron_adaptor.report():
        if row.target in targets and "stand-in" not in row.status:
            statuses[row.target] = row.status
    return statuses


def undo(rank):
    """Targets whose attribute is not the identical object after undo(), and after another apply() and undo()."""
    from mindspeed_cp import megatron_adaptor as adaptor

    manager = adaptor._manager
    before = {}
    for index, done in manager._done.items():  # of several patches of one name the first found what was there
        before.setdefault(manager._patches[index].target, (done[0].owner, done[0].name, done[0].before))
    wrong = []
    for _ in range(2):
        adaptor.undo()
        for target, (owner, name, original) in before.items():
            missing = vars(owner).get(name, "absent") is not original
            if missing and not (isinstance(original, object) and type(original) is object and name not in vars(owner)):
                wrong.append(target)
        adaptor.apply()
    return wrong


def device_type(rank, cuda_build=None):
    import torch

    from mindspeed_cp import megatron_adaptor

    torch.version.cuda = cuda_build
    return megatron_adaptor._applied().device


def version(rank):
    from mindspeed_cp import megatron_adaptor

    return megatron_adaptor.megatron_version()


def rows_after_mindspeed(rank):
    """Status of the rows once something that says it is MindSpeed has wrapped a method and replaced a class."""
    import torch
    from megatron.core.transformer import torch_norm

    from mindspeed_cp import megatron_adaptor

    megatron_adaptor.undo()
    namespace = {"__name__": "mindspeed.core.megatron_basic.requirements_basic", "original": torch.Tensor.type}
    exec("def type_wrapper(self, *a): return original(self, *a).replace('npu', 'cuda')", namespace)
    torch.Tensor.type = namespace["type_wrapper"]
    torch_norm.WrappedTorchNorm = type("PTNorm", (), {"__module__": "mindspeed.core.megatron_basic.megatron_basic"})
    megatron_adaptor.apply()
    return rows(rank)


def seed_generators(rank, old_release=False, before_first_use=False):
    """model_parallel_cuda_manual_seed, then numbers that two identical states draw."""
    import torch
    import torch_npu
    from megatron.core import parallel_state, tensor_parallel

    if before_first_use:
        tensor_parallel.random._set_cuda_rng_state(torch.zeros(16, dtype=torch.uint8))
        torch.cuda.set_device(0)
        state = torch.npu.get_rng_state()
        assert not state.any(), "the state that was set before the NPU's first use was lost"
        return True
    if old_release:  # up to 2.9 transfer_to_npu leaves the generators as it found them
        torch_npu.npu._queued_calls[:] = [
            call for call in torch_npu.npu._queued_calls if "default_generators" not in call[0].__name__
        ]
        from mindspeed_cp import megatron_adaptor

        megatron_adaptor.undo()
        megatron_adaptor.apply()
        take_back(old_release if isinstance(old_release, list) else ())
    rank.join()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(4, device="cuda")
    outside = torch.rand(4, device="cuda")
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        again = torch.rand(4, device="cuda")
    assert torch.equal(inside, again) and not torch.equal(inside, outside)
    return True


def reduce_start_time(rank, asynchronous=False):
    """Megatron's first collective: MIN over float64 start times; returns what the caller's own tensor holds."""
    import torch
    import torch.distributed as dist

    rank.join()
    start = torch.tensor([10.0 + rank.rank], dtype=torch.double, device="cuda")
    work = dist.all_reduce(start, op=dist.ReduceOp.MIN, async_op=asynchronous)
    if asynchronous:
        work.wait()
    return [start.item(), str(start.dtype)]


def compiled(rank):
    """A function under Megatron's jit_fuser."""
    import torch
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    assert torch.compile(len) is len
    return bias_swiglu_impl(torch.ones(2, 8, device="cuda"), None).sum().item()


def device_questions(rank):
    import torch

    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()
    return [torch.cuda.get_device_properties(torch.device("cuda:0")).major, list(torch.cuda.get_device_capability())]


def properties_only(rank):
    import torch

    return torch.cuda.get_device_properties(torch.device("cuda:0")).major >= 8


def norm_with_sequence_parallel(rank):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = SimpleNamespace(
        sequence_parallel=True,
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )
    norm = WrappedTorchNorm(config, 8)
    return all(parameter.sequence_parallel for parameter in norm.parameters())


def load_fused_kernels(rank):
    from megatron.legacy import fused_kernels

    return fused_kernels.load(SimpleNamespace(rank=0, masked_softmax_fusion=True))


def train(rank, algorithm="", steps=3, tp=1, options=None):
    """[(loss, gradient norm)] of a tiny GPT; see ``tiny_gpt.Options`` for ``options``."""
    import tiny_gpt

    rank.join()
    return tiny_gpt.train(algorithm, rank.world // tp, tp, steps, tiny_gpt.Options(**(options or {})))


def train_with_fused_updates(rank, algorithm):
    """What ``train`` returns under --use-fused-ring-attention-update, and how often the operator was called."""
    import npu_on_cpu

    npu_on_cpu.record = True
    records = train(rank, algorithm, options=dict(fused_update=True))
    return records, sum(name.startswith("npu::npu_ring_attention_update") for name in npu_on_cpu.calls)


def collectives(rank):
    """What mindspeed_cp and Megatron ask of HCCL, compared with what it must give; returns the names that differ."""
    import torch
    import torch.distributed as dist

    rank.join()
    mine, size = rank.rank, rank.world
    wrong = []

    def check(name, got, wanted):
        if not torch.equal(got.cpu().float(), torch.as_tensor(wanted, dtype=torch.float32)):
            wrong.append(f"{name}: {got.tolist()} instead of {wanted}")

    right, left = (mine + 1) % size, (mine - 1) % size
    sent, received = torch.full((2,), float(mine), device="cuda"), torch.empty(2, device="cuda")
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, right), dist.P2POp(dist.irecv, received, left)]):
        work.wait()
    check("batch_isend_irecv", received, [left] * 2)
    received.zero_()
    # Receives first on every rank: what a synchronous network would never end.
    works = [dist.irecv(received, left), dist.isend(sent, right)]
    for work in works:
        work.wait()
    check("irecv before isend", received, [left] * 2)
    pieces = torch.empty(size, device="cuda")
    dist.all_to_all_single(pieces, torch.arange(float(size), device="cuda") + 10 * mine)
    check("all_to_all_single", pieces, [10 * other + mine for other in range(size)])
    lengths = [other + 1 for other in range(size)]
    pieces = torch.empty(size * (mine + 1), device="cuda")
    dist.all_to_all_single(pieces, torch.full((sum(lengths),), float(mine), device="cuda"), [mine + 1] * size, lengths)
    check("all_to_all_single with lengths", pieces, [other for other in range(size) for _ in range(mine + 1)])
    whole = torch.empty(2 * size, device="cuda")
    dist.all_gather_into_tensor(whole, sent)
    check("all_gather_into_tensor", whole, [other for other in range(size) for _ in range(2)])
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        total = torch.full((3,), mine + 1, device="cuda", dtype=dtype)
        dist.all_reduce(total)
        check(f"all_reduce of {dtype}", total, [size * (size + 1) // 2] * 3)
    return wrong


def duplicates_in_a_batch(rank):
    import torch
    import torch.distributed as dist

    rank.join()
    peer, tensors = 1 - rank.rank, torch.ones(2, 4, device="cuda")
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, peer) for tensor in tensors]):
        work.wait()


def script(rank, path, flags, records=""):
    """Run a script of this repository as ``python path flags``; returns the lines of its log file ``records``."""
    sys.path.insert(0, str(Path(path).parent))
    sys.argv = [path, *flags]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    return [json.loads(line) for line in Path(records).read_text().splitlines()] if records else None


def attention_calls(rank, path, flags):
    """How often a script that runs as in ``script`` calls the NPU's fused attention."""
    import npu_on_cpu

    npu_on_cpu.record = True
    script(rank, path, flags)
    return npu_on_cpu.calls.count("npu::npu_fusion_attention")


def megatron_lm(rank, checkout, flags):
    """[(loss, gradient norm)] of every step of the checkout's own pretrain_gpt.py, on the last rank."""
    import megatron_lm_runs

    records = []
    megatron_lm_runs._record_steps(records)
    sys.argv = ["-", *flags]
    try:
        megatron_lm_runs._run_script(Path(checkout, "pretrain_gpt.py"), adaptor=True)
    except SystemExit as stop:
        assert not stop.code, f"exit status {stop.code}"
    return [(record["loss"], record["grad_norm"]) for record in records]


def checkpoint(rank, folder):
    """A distributed checkpoint of a tensor on every rank comes back as it was."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    rank.join()
    parallel_state.initialize_model_parallel()
    piece = torch.arange(4.0, device="cuda") + 10 * rank.rank
    state = {"w": ShardedTensor.from_rank_offsets("w", piece, (0, rank.rank, rank.world))}
    if rank.rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, folder)
    empty = {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(4, device="cuda"), (0, rank.rank, rank.world))}
    loaded = dist_checkpointing.load(empty, folder)
    return bool(torch.equal(loaded["w"].cpu(), piece.cpu())) and loaded["w"].device.type


def schemas(rank):
    """The attention operators' schemas in torch_npu itself."""
    import torch

    names = ("npu_fusion_attention", "npu_fusion_attention_grad", "npu_ring_attention_update")
    return {name: str(getattr(torch.ops.npu, name).default._schema).split("::")[1] for name in names}
