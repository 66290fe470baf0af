"""How ranks compare their settings at the start; each function runs on every rank."""

import contextlib
import io
from functools import partial

# name -> (each rank's arguments of ``agree``, the verdict)
CASES = {
    "equal": ([{"settings": {"--lr": "1"}}] * 3, ""),
    "one differs": (
        [{"settings": {"--lr": lr, "--seed": "7"}} for lr in ("1", "2", "1")],
        "the ranks were started with different settings: --lr is 1 on ranks 0 and 2 and 2 on rank 1; give all ranks "
        "the same.",
    ),
    "all differ": (
        [{"settings": {"--seed": str(rank)}} for rank in range(3)],
        "the ranks were started with different settings: --seed is 0 on rank 0 and 1 on rank 1 and 2 on rank 2; give "
        "all ranks the same.",
    ),
    "one does not know it": (
        [{"settings": {"--lr": "1"}}, {"settings": {}}, {"settings": {"--lr": "1"}}],
        "the ranks were started with different settings: --lr is 1 on ranks 0 and 2 and not there on rank 1; give all "
        "ranks the same.",
    ),
    "many differ": (
        [{"settings": {name: str(rank) for name in "abcde"} if rank < 2 else dict.fromkeys("abcde", "1")}
         for rank in range(3)],
        "the ranks were started with different settings: a is 0 on rank 0 and 1 on ranks 1 and 2; b is 0 on rank 0 and "
        "1 on ranks 1 and 2; c is 0 on rank 0 and 1 on ranks 1 and 2; 2 more differ; give all ranks the same.",
    ),
    "one refuses": (
        [{"settings": {}}, {"settings": {}, "refusal": "--lr 0 must be above 0."}, {"settings": {"--lr": "3"}}],
        "on rank 1: --lr 0 must be above 0. (ranks 0 and 2 can work with what was given there)",
    ),
    "all refuse": ([{"settings": {}, "refusal": "--lr 0 must be above 0."}] * 3, "--lr 0 must be above 0."),
}  # fmt: skip


def judge(rank):
    """name -> (verdict, what this rank printed), and the message for groups of different configurations."""
    import torch
    import torch.distributed as dist

    from mindspeed_cp import ContextParallelConfig, ContextParallelGroups
    from mindspeed_cp.settings.agreement import agree

    found = {}
    for name, (given, _) in CASES.items():
        said = []
        found[name] = _message(partial(agree, **given[rank], say=said.append)), said
    algorithm = "ulysses_cp_algo" if rank == 1 else "megatron_cp_algo"
    config = ContextParallelConfig(context_parallel_size=3, algorithm=algorithm)
    found["groups"] = _message(lambda: ContextParallelGroups.build(config)), []
    total = torch.ones(())
    dist.all_reduce(total)
    return found | {"afterwards": int(total)}


def start_megatron(rank):
    """Messages of starts with different settings, then the context-parallel size of a start that works."""
    from megatron.core import parallel_state

    from mindspeed_cp import ContextParallelConfig, megatron_adaptor

    def start(cp_size, lr, asked=2):
        megatron_adaptor.state().reset()
        megatron_adaptor.compare_on_all_ranks({"lr": lr, "rank": rank})
        megatron_adaptor.configure(ContextParallelConfig(context_parallel_size=cp_size))
        with contextlib.redirect_stdout(io.StringIO()):
            parallel_state.initialize_model_parallel(context_parallel_size=asked)

    def size_by_rank():
        start((2, 1)[rank], 0.1, asked=(2, 1)[rank])

    def configured(**keywords):
        megatron_adaptor.state().reset()
        megatron_adaptor.configure(ContextParallelConfig(context_parallel_size=2), **keywords)
        parallel_state.initialize_model_parallel(context_parallel_size=2)

    found = [
        _message(lambda: configured(documents_from_position_ids=rank == 0)),
        _message(lambda: configured(end_of_document=rank)),
        _message(lambda: configured(kernel=("cpu", "blockwise")[rank])),
        _message(lambda: start(2, (0.1, 0.2)[rank])),
        _message(lambda: start((2, 4)[rank], 0.1)),
        _message(size_by_rank),
    ]
    start(2, 0.1)
    found.append(megatron_adaptor.state().cp_size)
    parallel_state.destroy_model_parallel()
    return found


def _message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
