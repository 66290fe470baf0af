"""Rows of a batch with documents of their own, in one exchange: the same numbers as dense attention, row by row."""

import pytest
import torch
from cases import Case, largest_errors, local_inputs, setup_of
from distributed import device_type, run_ranks
from reference import allowed_pairs, attention_with_gradients

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.comm import count_bytes

TOLERANCE = {"cpu": 1e-10, "cuda": 2e-3, "npu": 2e-3}
SEQ_LEN = 24
ROWS = (
    ((0, 5, 13, 24), (0, 24), (0, 24), (0, 1, 1, 20, 24)),
    ((0, 12, 24), (0, 12, 24), (0, 3, 24), (0, 3, 24)),
)
CONFIGS = {
    "ulysses": {"context_parallel_size": 2},
    "ring": {"context_parallel_size": 3, "algorithm": "megatron_cp_algo"},
    "ring-full-cache": {"context_parallel_size": 3, "algorithm": "megatron_cp_algo", "kv_cache_policy": "full"},
    "direct": {"context_parallel_size": 3, "algorithm": "megatron_cp_algo", "kv_exchange": "direct"},
    "double-ring": {"context_parallel_size": 4, "algorithm": "megatron_cp_algo", "window_size": 2},
    "hybrid": {"context_parallel_size": 4, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2},
    "allgather": {"context_parallel_size": 3, "algorithm": "kvallgather_cp_algo", "kv_cache_policy": "half"},
}


def attend_rows(rank, case, rows, mask_type):
    """This rank's out and gradients, and the messages of forward."""
    from mindspeed_cp import context_parallel_attention

    config, groups = setup_of({**case.config, "attention_mask_type": mask_type})
    layout = SequenceLayout.build(config, case.seq_len)
    leaves, _, grad_out, mask = local_inputs(rank, case, layout)
    with count_bytes() as traffic:
        out = context_parallel_attention(
            *leaves, config=config, groups=groups, layout=layout, cu_seqlens=rows, attention_mask=mask
        )
    out.backward(grad_out)
    tensors = {"out": out.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("qkv", leaves)}}
    return {name: tensor.cpu() for name, tensor in tensors.items()}, dict(traffic.messages)


def dense(case, rows, mask_type):
    """The reference, a row of the batch at a time."""
    tensors, parts = case.inputs(), []
    for index, documents in enumerate(rows):
        row = [tensors[name][:, index : index + 1] for name in ("query", "key", "value", "grad_out")]
        allowed = allowed_pairs(
            case.seq_len,
            causal=mask_type == "causal",
            cu_seqlens=documents,
            attention_mask=tensors["attention_mask"],
        )
        parts.append(attention_with_gradients(*row, allowed))
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


@pytest.mark.parametrize("mask_type", ["causal", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_with_documents_of_their_own_match_dense_attention_in_one_exchange(name, mask_type):
    for rows in ROWS:
        for dense_mask in (None, "shared"):
            case = Case(CONFIGS[name], SEQ_LEN, batch=4, kv_heads=2, dense=dense_mask)
            config = ContextParallelConfig(**case.config, attention_mask_type=mask_type)
            results = run_ranks(case.cp, attend_rows, case, rows, mask_type)
            layout = SequenceLayout.build(config, case.seq_len)
            got = {
                key: layout.unshard([shard[key] for shard, _ in results]).double() for key in ("out", "dq", "dk", "dv")
            }
            errors = largest_errors(got, dense(case, rows, mask_type))
            assert max(errors.values()) < TOLERANCE[device_type()], (rows, errors)
            alike = run_ranks(case.cp, attend_rows, case, ((0, SEQ_LEN),) * 4, mask_type)
            for (_, messages), (_, one_row) in zip(results, alike):
                assert sum(messages.values()) <= sum(one_row.values()), "no more than for one document"


def messages_of_masks(rank):
    """Messages of Megatron's attention for masks of four rows: plain causal, and with documents of their own."""
    from adaptors import adaptor_of

    from mindspeed_cp.megatron.bridge import CoreAttention, attention

    config, groups = setup_of({"context_parallel_size": 2, "algorithm": "megatron_cp_algo"})
    adaptor = adaptor_of(config, groups=groups)
    query, sent = torch.ones(SEQ_LEN // 2, 4, 2, 8), []
    for rows in (((0, SEQ_LEN),) * 4, ROWS[0]):
        visible = [allowed_pairs(SEQ_LEN, causal=True, cu_seqlens=documents) for documents in rows]
        with count_bytes() as traffic:
            attention(
                adaptor,
                adaptor.main,
                CoreAttention(1, True, 0.3),
                query,
                query,
                query,
                torch.stack(visible).logical_not().view(4, 1, SEQ_LEN, -1),
            )
        sent.append(traffic.total_messages)
    return sent


@pytest.mark.cpu_only
def test_a_mask_whose_rows_have_documents_of_their_own_makes_one_exchange_too():
    assert run_ranks(2, messages_of_masks) == [[1, 1]] * 2
