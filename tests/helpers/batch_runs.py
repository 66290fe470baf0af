"""Whole GPT models with batches in all forms that frameworks use; ``compare`` runs on each rank.

The expected result is always that of the same model without context parallelism, with Megatron's own dense mask of the
documents.
"""

import contextlib
import zlib
from importlib.util import find_spec

import mamba_runs
import reference
import torch
import torch.distributed as dist
from kept_groups import megatron_groups
from megatron_version import MINOR as VERSION
from model_cases import MODEL, VOCABULARY

SEQ, ROWS, END = 48, 2, 0
DOCUMENTS = ((0, 5, 6, 29, SEQ), (0, 17, 40, SEQ))  # per row of the batch
OTHERS = ((0, 13, SEQ), (0, 44, SEQ))
ALGORITHMS = {
    "ulysses": {"algorithm": "ulysses_cp_algo"},
    "ring": {"algorithm": "megatron_cp_algo"},
    "double ring": {"algorithm": "megatron_cp_algo", "window_size": 2},
    "hybrid": {"algorithm": "hybrid_cp_algo", "ulysses_degree": 2},
    "kv all-gather": {"algorithm": "kvallgather_cp_algo"},
}
# Three more ways to exchange; what they are given is found as for the first two, so these cases are left to --full.
VARIANTS = ("double ring", "hybrid", "kv all-gather")
LEFT_OUT = (
    "position ids",
    "mask of the dataloader, full",
    "mask of the dataloader, causal",
    "prefetch, recomputed",
    "packed elsewhere, recomputed",
)
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def build(cp_size, pre=True, post=True, stage=None, **settings):
    """GPTModel whose weights depend only on their names, on any stage."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    model_parallel_cuda_manual_seed(3)
    positions = "mrope" if "mrope_section" in settings else "rope"
    config = TransformerConfig(
        **(MODEL | {"num_query_groups": 2, "variable_seq_lengths": False} | settings), context_parallel_size=cp_size
    )
    where = {} if stage is None or VERSION < (0, 13) else {"vp_stage": stage}
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=2 * SEQ,
        pre_process=pre,
        post_process=post,
        position_embedding_type=positions,
        **where,
    )
    with torch.no_grad():
        for name, parameter in named(model):
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def named(model):
    """(name with the global number of the layer, parameter)"""
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, rest = name.split(".", 3)
            name = f"layer {model.decoder.layers[int(index)].layer_number}.{rest}"
        yield name, parameter


def batch_of(documents, seed=5, seq=SEQ):
    """A whole batch with an END token after each document, and position ids that restart with each."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(1, VOCABULARY, (2, len(documents), seq), generator=generator)
    places = torch.arange(seq).repeat(len(documents), 1)
    for row, ends in enumerate(documents):
        for start, stop in zip(ends, ends[1:]):
            tokens[row, stop - 1] = END
            places[row, start:stop] = torch.arange(stop - start)
    counted = (torch.rand(tokens.shape, generator=generator) > 0.25).float()
    return {"tokens": tokens, "labels": labels, "loss_mask": counted, "position_ids": places}


def mask_of(documents, seq=SEQ):
    """(rows, 1, S, S) as in Megatron's dataloader, True where masked out."""
    rows = [reference.allowed_pairs(seq, causal=True, cu_seqlens=ends) for ends in documents]
    return ~torch.cat([allowed.reshape(1, 1, seq, seq) for allowed in rows])


def losses_of(model, batch, mask=None, **more):
    return model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"], **more)


def gradients(model, loss):
    """name -> gradient of the sum of the ranks' losses."""
    model.zero_grad()
    loss.backward()
    return summed(model)


def summed(model):
    found = {name: parameter.grad.clone() for name, parameter in named(model)}
    if model.config.context_parallel_size > 1:
        from megatron.core import parallel_state

        for gradient in found.values():
            dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
    return found


def split(batch):
    from megatron.core.utils import get_batch_on_this_cp_rank

    return get_batch_on_this_cp_rank(dict(batch))


def difference(losses, found, whole, expected, take):
    """Largest difference of this rank's losses and of the gradients, relative to the largest value."""
    worst = float((losses - take(whole)).detach().abs().max() / whole.detach().abs().max())
    assert set(found) <= set(expected) and found
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        worst = max(worst, float((gradient - expected[name]).abs().max()) / scale)
    return worst


def configure(settings, cp_size=4, **documents):
    from mindspeed_cp import ContextParallelConfig, megatron_adaptor

    megatron_adaptor.configure(ContextParallelConfig(context_parallel_size=cp_size, **settings), **documents)


@contextlib.contextmanager
def groups(settings, cp_size=4, pp_size=1):
    configure(settings, cp_size)
    with megatron_groups(context_parallel_size=cp_size, pipeline_model_parallel_size=pp_size):
        yield


def expected_of(documents, seed=5, **settings):
    """(losses, gradients) without context parallelism, with the dense mask."""
    batch, model = batch_of(documents, seed), build(1, **settings)
    losses = losses_of(model, batch, mask_of(documents))
    return losses, gradients(model, (losses * batch["loss_mask"]).sum())


def _own_difference(whole, batch, mask=None, seed=None, **settings):
    """Difference of a batch that this project splits."""
    from mindspeed_cp import megatron_adaptor

    state, model, local = megatron_adaptor.state(), build(state_size(), **settings), split(batch)
    record = state.records.find(local.values())
    losses = losses_of(model, local, mask)
    found = gradients(model, (losses * local["loss_mask"]).sum())
    return difference(losses, found, *whole, lambda tensor: record.layout.shard(tensor, state.cp_rank, dim=1))


def state_size():
    from mindspeed_cp import megatron_adaptor

    return megatron_adaptor.state().cp_size


def _prefetched(first, second, **settings):
    """Two batches are split before the first forward pass, and both forward passes run before any backward pass."""
    from mindspeed_cp import megatron_adaptor

    state, results = megatron_adaptor.state(), []
    locals_ = [split(batch_of(DOCUMENTS)), split(batch_of(OTHERS, 6))]
    models = [build(state_size(), **settings) for _ in locals_]
    runs = [losses_of(model, local) for model, local in zip(models, locals_)]
    for model, local, losses, whole in zip(models, locals_, runs, (first, second)):
        record = state.records.find(local.values())
        found = gradients(model, (losses * local["loss_mask"]).sum())
        results.append(
            difference(losses, found, *whole, lambda t, layout=record.layout: layout.shard(t, state.cp_rank, dim=1))
        )
    return max(results)


def chunks_of(boundaries, cp_size, cp_rank):
    """Positions of a rank in Megatron's convention: two of the 2 cp chunks of every document."""
    found = []
    for start, stop in zip(boundaries, boundaries[1:]):
        pieces = torch.arange(start, stop).chunk(2 * cp_size)
        found += [pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]]
    return torch.cat(found)


PADDED, TRUE = (0, 8, 32, SEQ), (0, 5, 29, 40)  # documents of a packed row, padded to 2 cp chunks and unpadded


def packed_params(true=TRUE, padded=PADDED):
    from megatron.core.packed_seq_params import PackedSeqParams

    true, padded = (torch.tensor(ends, dtype=torch.int32) for ends in (true, padded))
    longest = int((padded[1:] - padded[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=true,
        cu_seqlens_kv=true,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def packed_batch():
    """A packed row whose padding has no loss, and the documents of the equivalent dense mask."""
    batch = batch_of((PADDED,))
    for start, stop, length in zip(PADDED, PADDED[1:], (after - before for before, after in zip(TRUE, TRUE[1:]))):
        batch["loss_mask"][0, start + length : stop] = 0
    return batch


def expected_packed(**settings):
    batch, model = packed_batch(), build(1, **settings)
    losses = losses_of(model, batch, mask_of((PADDED,))) * batch["loss_mask"]
    return losses, gradients(model, losses.sum())


def _packed_difference(whole, positions=True, **settings):
    """Difference of a packed batch that a framework split, not this project."""
    from mindspeed_cp import megatron_adaptor

    state, model = megatron_adaptor.state(), build(4, **settings)
    mine = chunks_of(PADDED, 4, dist.get_rank())
    local = {name: value[:, mine].contiguous() for name, value in packed_batch().items()}
    params = packed_params()
    if not positions:
        local["position_ids"] = None
    losses = losses_of(model, local, packed_seq_params=params)
    losses = losses * local["loss_mask"]
    gathered = state.gather_sequence(losses.detach(), of=params)
    found = difference(losses, gradients(model, losses.sum()), *whole, lambda tensor: tensor[:, mine])
    return max(found, float((gathered - whole[0].detach()).abs().max()))


def compare(rank, algorithms, whole):
    """algorithm -> case -> difference; without ``whole`` VARIANTS leave out some."""
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    results = {}
    with groups({}, cp_size=1):
        first, second, packed = expected_of(DOCUMENTS), expected_of(OTHERS, 6), expected_packed()
        shorter = _evaluated(batch_of(((0, 24),), seq=24))
    for name in algorithms:
        settings = ALGORITHMS[name]
        with groups(settings):
            left_out = LEFT_OUT if name in VARIANTS and not whole else ()
            results[name] = _all_cases(settings, first, second, packed, shorter, left_out)
    return results


def _all_cases(settings, first, second, packed, shorter, left_out):
    from mindspeed_cp import megatron_adaptor

    found, batch = {}, batch_of(DOCUMENTS)
    for flag in ("general", "full", "causal"):
        if f"mask of the dataloader, {flag}" in left_out:
            continue
        configure(settings | {"attention_mask_type": flag})
        found[f"mask of the dataloader, {flag}"] = _own_difference(first, batch, mask_of(DOCUMENTS))
    configure(settings, end_of_document=END)
    found["end-of-document tokens"] = _own_difference(first, batch)
    found["prefetch"] = _prefetched(first, second)
    if "prefetch, recomputed" not in left_out:
        found["prefetch, recomputed"] = _prefetched(first, second, **RECOMPUTE)
    if "position ids" not in left_out:
        configure(settings, documents_from_position_ids=True)
        found["position ids"] = _own_difference(first, batch)
    configure(settings)
    found["by hand"], found["by hand, lost"] = _by_hand(first)
    found["packed elsewhere"] = _packed_difference(packed)
    if "packed elsewhere, recomputed" not in left_out:
        found["packed elsewhere, recomputed"] = _packed_difference(packed, positions=False, **RECOMPUTE)
    if find_spec("megatron.core.ssm.mamba_context_parallel"):
        found["state-space layers"] = mamba_runs.compare(megatron_adaptor.state().config)
    found["inference"] = _refused_inference()
    found["evaluation"] = float((_evaluated(batch_of(((0, 24),), seq=24)) - shorter).abs().max())
    return found


def _evaluated(batch):
    """Whole losses without gradients, in sequence order, of a model that trains on another length."""
    from mindspeed_cp import megatron_adaptor

    size = state_size()
    model = build(size)
    local = split(batch) if size > 1 else batch
    model.eval()
    with torch.no_grad():
        losses = losses_of(model, local)
        return megatron_adaptor.state().gather_sequence(losses)


def _by_hand(whole):
    """Difference of copies of a batch with explicit documents, and the message for tokens that are not from the batch.

    Frameworks make copies when they move tensors, and different tokens when they pad them.
    """
    from mindspeed_cp import megatron_adaptor

    state, model = megatron_adaptor.state(), build(4)
    local = state.shard_batch(batch_of(DOCUMENTS), cu_seqlens=DOCUMENTS)
    record, said = state.records.find(local.values()), ""
    losses = losses_of(model, {name: tensor.clone() for name, tensor in local.items()})
    padded = {name: tensor.clone() for name, tensor in local.items()}
    padded["tokens"][:, -1] += 1
    padded["labels"][:, -1] += 1
    try:
        losses_of(model, padded)
    except ValueError as error:
        said = str(error)
    with state.running(record):
        losses_of(model, padded)
    found = gradients(model, (losses * local["loss_mask"]).sum())
    return difference(losses, found, *whole, lambda t: record.layout.shard(t, state.cp_rank, dim=1)), said


def _refused_inference():
    """The message for Megatron's inference contexts."""
    from megatron.core.inference.contexts import StaticInferenceContext

    try:
        with torch.no_grad():
            losses_of(build(4).eval(), split(batch_of(DOCUMENTS)), inference_context=StaticInferenceContext(ROWS, SEQ))
    except ValueError as error:
        return str(error)
    return ""
