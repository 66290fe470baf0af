"""Training loops in the manner of two frameworks, on megatron-core's GPTModel; ``train`` runs on each rank.

Both split packed documents themselves: each is padded to a multiple of 2 * cp tokens and is a separate zigzag.

    log-probability driver  like verl: settings in two dicts, logits -> log-probabilities -> whole rows -> loss
    token-loss driver       like ms-swift: all settings in one dict, the model's own loss per token
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
    """What a framework passes to the model: tokens, position ids, labels, the loss mask, packed parameters."""
    found = documents(step)
    tokens, boundaries = packed([tokens for tokens, _ in found], cp_rank, cp_size)
    labels, _ = packed([labels for _, labels in found], cp_rank, cp_size)
    positions, _ = packed([torch.arange(len(tokens)) for tokens, _ in found], cp_rank, cp_size)
    counted, _ = packed([torch.ones(len(tokens)) for tokens, _ in found], cp_rank, cp_size)
    return tokens, positions, labels, counted, packed_params(boundaries)


def log_probability_loss(model, step, cp_rank, cp_size, state):
    """Like verl: log-probabilities of the rank's tokens, gathered into whole documents, then their loss."""
    tokens, positions, labels, _, params = local_batch(step, cp_rank, cp_size)
    logits = model(tokens, positions, None, packed_seq_params=params)
    local = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    whole = state.gather_sequence(local, of=params, dim=1)[0]
    starts = params.cu_seqlens_q_padded.tolist()
    rows = [whole[start : start + length] for start, length in zip(starts, LENGTHS)]
    return -sum(row.mean() for row in rows) / len(rows), 1.0


def token_loss(model, step, cp_rank, cp_size, state):
    """Like ms-swift: the model's loss per token; every rank sums its own, and the sums are added."""
    tokens, positions, labels, counted, params = local_batch(step, cp_rank, cp_size)
    losses = model(tokens, positions, None, labels=labels, packed_seq_params=params)
    return (losses * counted).sum() / sum(LENGTHS), None


DRIVERS = {"log-probabilities": log_probability_loss, "token losses": token_loss}
ALGORITHMS = {
    "ring": {"context_parallel_algo": "megatron_cp_algo"},
    "ulysses": {"context_parallel_algo": "ulysses_cp_algo"},
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
}


def activate(driver, cp_size, algorithm):
    """Pass the framework's settings to MindSpeed, as the framework does."""
    from mindspeed.megatron_adaptor import repatch

    if driver == "log-probabilities":  # the override of the transformer's configuration, then the engine's settings
        repatch({"multi_head_latent_attention": False, "attention_dropout": 0.0})
        repatch({"use_flash_attn": True, "context_parallel_size": cp_size, **algorithm})
        return
    everything = {"context_parallel_size": cp_size, "use_flash_attn": True, "learning_rate": 1e-4, "lora_rank": None}
    repatch({**everything, "num_layers": 2, "cp_comm_type": None, "optimizer": object(), **algorithm})


def losses_of(driver, cp_size, algorithm):
    """The losses of ``STEPS`` steps of training."""
    from mindspeed_cp import megatron_adaptor

    activate(driver, cp_size, algorithm)
    found = []
    with contextlib.redirect_stdout(io.StringIO()), megatron_groups(context_parallel_size=cp_size):
        model, state = _model(cp_size), megatron_adaptor.state()
        for step in range(STEPS):
            loss, alike = DRIVERS[driver](model, step, state.cp_rank, cp_size, state)
            loss.backward()
            if cp_size > 1:
                _add_up(model, loss if alike is None else None, state)
            found.append(float(loss.detach()))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(RATE * parameter.grad)
                    parameter.grad = None
    state.reset()
    return found


def _add_up(model, loss, state):
    """Sum gradients over the ranks, and the loss too, unless all ranks computed the same one."""
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=state.groups.cp_group)
    if loss is not None:
        dist.all_reduce(loss.detach(), group=state.groups.cp_group)


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
    """(driver, algorithm or "cp=1") -> losses."""
    found = {}
    for driver in DRIVERS:
        found[driver, "cp=1"] = losses_of(driver, 1, {})
        for name, algorithm in ALGORITHMS.items():
            found[driver, name] = losses_of(driver, 4, algorithm)
    return found
