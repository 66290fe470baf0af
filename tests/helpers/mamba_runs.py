"""What Megatron's state-space layers see of a sequence: the exchange around their kernels, which need a GPU."""

import torch
import torch.distributed as dist

SEQ, STATE, HEADS = 48, 2, 4  # heads are groups too, and each has two inner dimensions
SIZES = {"z": 2, "x": 2, "B": STATE, "C": STATE, "dt": 1}  # width of each part for one head


def exchange():
    """Megatron's MambaContextParallel for four heads."""
    from megatron.core import parallel_state
    from megatron.core.ssm.mamba_context_parallel import MambaContextParallel

    return MambaContextParallel(
        parallel_state.get_context_parallel_group(), 2 * HEADS, HEADS, HEADS, STATE, None, None, None, None, False
    )


def whole_input():
    """(S, 1, width): the parts z, x, B, C, dt of all heads, one part after the other."""
    width = HEADS * sum(SIZES.values())
    return torch.arange(SEQ * width, dtype=torch.float32).view(SEQ, 1, width)


def of_head(whole, head):
    """The parts of one head, in the order of the sequence."""
    parts = whole.split([HEADS * size for size in SIZES.values()], dim=-1)
    return torch.cat([part[..., head * size : (head + 1) * size] for part, size in zip(parts, SIZES.values())], dim=-1)


def difference(layout):
    """How far what a layer sees is from the whole sequence, and what comes back from this rank's part of it."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron.records import MicroBatch

    state, rank, whole = megatron_adaptor.state(), dist.get_rank(), whole_input()
    with state.running(MicroBatch(layout)):
        around = exchange()
        seen = around.pre_conv_ssm(layout.shard(whole, rank))
        back = around.post_conv_ssm(seen[..., : SIZES["z"]])
    expected = layout.shard(whole[..., : HEADS * SIZES["z"]], rank)
    return max(float((seen - of_head(whole, rank)).abs().max()), float((back - expected).abs().max()))


def refused(layout):
    """The message about a layout that shares tokens unevenly."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron.records import MicroBatch

    try:
        with megatron_adaptor.state().running(MicroBatch(layout)):
            exchange().pre_conv_ssm(torch.zeros(layout.length(dist.get_rank()), 1, HEADS * sum(SIZES.values())))
    except ValueError as error:
        return str(error)
    return ""


def cases(config):
    """name -> layout of SEQ tokens, or of one less that is shared unevenly."""
    from dataclasses import replace

    from mindspeed_cp import SequenceLayout

    documents = (0, 8, 32, SEQ)
    kinds = ("auto", "zigzag", "contiguous", "document_zigzag")
    layouts = {kind: SequenceLayout.build(replace(config, batch_layout=kind), SEQ, documents) for kind in kinds}
    turned = [layouts["zigzag"].runs(rank)[::-1] for rank in range(layouts["zigzag"].cp_size)]
    return layouts | {"runs": SequenceLayout.from_runs(config, turned)}


def compare(config):
    """Largest difference over the layouts, and what is said of an uneven one."""
    from mindspeed_cp import SequenceLayout

    return max(map(difference, cases(config).values())), refused(SequenceLayout.build(config, SEQ - 1))
