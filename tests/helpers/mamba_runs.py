"""The exchange around the kernels of Megatron's state-space layers, which themselves need a GPU."""

from dataclasses import replace
from inspect import signature

import torch
import torch.distributed as dist

SEQ, STATE, HEADS = 48, 2, 4  # heads are groups too, and each has two inner dimensions
SIZES = {"z": 2, "x": 2, "B": STATE, "C": STATE, "dt": 1}  # width of each part per head


def exchange():
    """Megatron's MambaContextParallel for four heads."""
    from megatron.core import parallel_state
    from megatron.core.ssm.mamba_context_parallel import MambaContextParallel

    sizes = (2 * HEADS, HEADS, HEADS, STATE)
    weights = [None] * (len(signature(MambaContextParallel).parameters) - len(sizes) - 2)  # six from 0.19 on
    return MambaContextParallel(parallel_state.get_context_parallel_group(), *sizes, *weights, False)


def whole_input(seq_len):
    """(S, 1, width): the parts z, x, B, C, dt of all heads, part by part."""
    width = HEADS * sum(SIZES.values())
    return torch.arange(seq_len * width, dtype=torch.float32).view(seq_len, 1, width)


def of_head(whole, head):
    """The parts of one head, in sequence order."""
    parts = whole.split([HEADS * size for size in SIZES.values()], dim=-1)
    return torch.cat([part[..., head * size : (head + 1) * size] for part, size in zip(parts, SIZES.values())], dim=-1)


def difference(layout):
    """Largest difference of the layer's input from the whole sequence, and of its output from this rank's part."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron.records import MicroBatch

    state, rank, whole = megatron_adaptor.state(), dist.get_rank(), whole_input(layout.seq_len)
    with state.running(MicroBatch(layout)):
        around = exchange()
        seen = around.pre_conv_ssm(layout.shard(whole, rank))
        back = around.post_conv_ssm(seen[..., : SIZES["z"]])
    expected = layout.shard(whole[..., : HEADS * SIZES["z"]], rank)
    return max(float((seen - of_head(whole, rank)).abs().max()), float((back - expected).abs().max()))


def features_difference(layout):
    """The same for the functions that frameworks call for their own layers: shares of sections of features."""
    from megatron.core import parallel_state
    from megatron.core.ssm import mamba_context_parallel as megatron

    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.compat.delta_net import tensor_a2a_cp2hp, tensor_a2a_hp2cp
    from mindspeed_cp.megatron.records import MicroBatch

    state, rank, whole = megatron_adaptor.state(), dist.get_rank(), whole_input(layout.seq_len)
    local, group = layout.shard(whole, rank), parallel_state.get_context_parallel_group()
    widths = [HEADS * size for size in SIZES.values()]
    with state.running(MicroBatch(layout)):
        seen = tensor_a2a_cp2hp(local, 0, -1, group, split_sections=widths)
        as_held = tensor_a2a_cp2hp(local, 0, -1, group, widths, undo_attention_load_balancing=False)
        ordered = megatron._undo_attention_load_balancing(as_held, HEADS)
        held = megatron._redo_attention_load_balancing(ordered, HEADS)
        back = tensor_a2a_hp2cp(seen, 0, -1, group, split_sections=list(SIZES.values()))
    pairs = [(seen, of_head(whole, rank)), (ordered, seen), (held, as_held), (back, local)]
    return max(float((found - expected).abs().max()) for found, expected in pairs)


def of_documents(config):
    """The difference for packed documents that are exchanged one by one, and the message if their layout is wrong."""
    from megatron.core import parallel_state

    from mindspeed_cp import SequenceLayout, megatron_adaptor
    from mindspeed_cp.compat.delta_net import tensor_a2a_cp2hp
    from mindspeed_cp.megatron.records import MicroBatch

    state, rank, whole, documents = megatron_adaptor.state(), dist.get_rank(), whole_input(SEQ), (0, 8, 32, SEQ)
    group, width = parallel_state.get_context_parallel_group(), whole.size(-1) // HEADS
    mine, said = whole[..., rank * width : (rank + 1) * width], ""
    for kind in ("document_zigzag", "contiguous"):
        layout = SequenceLayout.build(replace(config, batch_layout=kind), SEQ, documents)
        pieces = layout.shard(whole, rank).split([(high - low) // HEADS for low, high in zip(documents, documents[1:])])
        with state.running(MicroBatch(layout)):
            try:
                seen = torch.cat([tensor_a2a_cp2hp(piece, 0, -1, group) for piece in pieces])
            except ValueError as error:
                said = str(error)
    return float((seen - mine).abs().max()), said


def cases(config):
    """name -> layout of SEQ tokens."""
    from mindspeed_cp import SequenceLayout

    documents = (0, 8, 32, SEQ)
    kinds = ("auto", "zigzag", "contiguous", "document_zigzag")
    layouts = {kind: SequenceLayout.build(replace(config, batch_layout=kind), SEQ, documents) for kind in kinds}
    turned = [layouts["zigzag"].runs(rank)[::-1] for rank in range(layouts["zigzag"].cp_size)]
    return layouts | {"runs": SequenceLayout.from_runs(config, turned)}


def compare(config):
    """Largest difference over the layouts, uneven ones included, of Mamba's exchange and of frameworks' own."""
    from mindspeed_cp import SequenceLayout

    layouts = [*cases(config).values(), SequenceLayout.build(config, SEQ - 1)]
    return max(map(difference, layouts)), max(map(features_difference, layouts)), *of_documents(config)
