"""A training loop like verl's, on megatron-core's GPTModel; ``train`` runs on each rank.

It splits packed documents itself: each is padded to a multiple of 2 * cp tokens and is a separate zigzag. Settings come
in two dicts. The loss is computed from log-probabilities that were gathered into whole rows. tests/frameworks runs verl
and ms-swift themselves, in a separate environment; this loop runs where they are not installed.
"""

import contextlib
import io

import torch
import torch.distributed as dist
from kept_groups import megatron_groups
from model_cases import MODEL, RATE, VOCABULARY

LENGTHS = (13, 1, 24, 7)  # lengths of the documents before padding
STEPS = 3


def documents(step):
    """(tokens, labels) of every document of one step."""
    generator = torch.Generator().manual_seed(step)
    rows = [torch.randint(1, VOCABULARY, (2, length), generator=generator) for length in LENGTHS]
    return [(row[0], row[1]) for row in rows]


def packed(rows, cp_rank, cp_size):
    """This rank's parts (1, local) of the concatenated padded documents, and their padded boundaries.

    Args:
        rows: one (length,) tensor per document.
    """
    chunks, parts, boundaries = 2 * cp_size if cp_size > 1 else 1, [], [0]
    for row in rows:
        padded = torch.cat([row, row.new_zeros(-len(row) % chunks)])
        pieces = padded.chunk(chunks)
        parts += [pieces[cp_rank], pieces[chunks - 1 - cp_rank]] if cp_size > 1 else [padded]
        boundaries.append(boundaries[-1] + len(padded))
    return torch.cat(parts)[None], boundaries


def packed_params(boundaries):
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor(boundaries, dtype=torch.int32)
    longest = max(stop - start for start, stop in zip(boundaries, boundaries[1:]))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends,
        cu_seqlens_kv_padded=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def local_batch(step, cp_rank, cp_size):
    """What a framework passes to the model: tokens, position ids, labels, packed parameters."""
    found = documents(step)
    tokens, boundaries = packed([tokens for tokens, _ in found], cp_rank, cp_size)
    labels, _ = packed([labels for _, labels in found], cp_rank, cp_size)
    positions, _ = packed([torch.arange(len(tokens)) for tokens, _ in found], cp_rank, cp_size)
    return tokens, positions, labels, packed_params(boundaries)


def loss_of(model, step, cp_rank, cp_size, state):
    """Log-probabilities of the rank's tokens, gathered into whole documents, then their loss."""
    tokens, positions, labels, params = local_batch(step, cp_rank, cp_size)
    logits = model(tokens, positions, None, packed_seq_params=params)
    local = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    whole = state.gather_sequence(local, of=params, dim=1)[0]
    starts = params.cu_seqlens_q_padded.tolist()
    rows = [whole[start : start + length] for start, length in zip(starts, LENGTHS)]
    return -sum(row.mean() for row in rows) / len(rows)


ALGORITHMS = {
    "ring": {"context_parallel_algo": "megatron_cp_algo"},
    "ulysses": {"context_parallel_algo": "ulysses_cp_algo"},
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
}


def losses_of(cp_size, algorithm):
    """The losses of ``STEPS`` steps of training."""
    from mindspeed.megatron_adaptor import repatch

    from mindspeed_cp import megatron_adaptor

    repatch({"multi_head_latent_attention": False, "attention_dropout": 0.0})  # the model's, then the engine's own
    repatch({"use_flash_attn": True, "context_parallel_size": cp_size, **algorithm})
    found = []
    with contextlib.redirect_stdout(io.StringIO()), megatron_groups(context_parallel_size=cp_size):
        model, state = _model(cp_size), megatron_adaptor.state()
        for step in range(STEPS):
            loss = loss_of(model, step, state.cp_rank, cp_size, state)
            loss.backward()
            found.append(float(loss.detach()))
            for parameter in model.parameters():
                if cp_size > 1:  # every rank has the gradients of its own tokens
                    dist.all_reduce(parameter.grad, group=state.groups.cp_group)
                with torch.no_grad():
                    parameter.sub_(RATE * parameter.grad)
                parameter.grad = None
    state.reset()
    return found


def _model(cp_size):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    return GPTModel(
        TransformerConfig(**MODEL, context_parallel_size=cp_size),
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
    )


def train(rank):
    """algorithm or "cp=1" -> losses."""
    return {"cp=1": losses_of(1, {}), **{name: losses_of(4, algorithm) for name, algorithm in ALGORITHMS.items()}}
