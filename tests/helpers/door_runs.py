"""Entries of a model, recomputation, padding and copies of batches; run on every rank, as in closed_runs."""

import copy

import batch_runs
import torch
from batch_runs import batch_of, build, configure, gradients, groups, losses_of, split
from closed_runs import (
    ALGORITHMS,
    DOCUMENTS,
    PLAIN,
    SEQ,
    alone_of,
    contiguous,
    cut,
    expected_of,
    held_of,
    of_part,
    told,
    zigzag,
)


def padded(rank):
    """name -> difference of two rows, the second of them padded, in each way in which frameworks count padding."""
    batch, found = batch_of(PLAIN * 2, seq=SEQ), {}
    real = {
        "left": torch.arange(SEQ) >= torch.tensor([[5], [9]]),
        "right": torch.arange(SEQ) < torch.tensor([[15], [9]]),
    }
    for side, mask in real.items():
        places = mask.cumsum(1) - 1
        ways = {
            "zeros": places * mask,
            "ones": places.where(mask, 1),
            "clipped": places.clamp(min=0),
            "counted on": places,
        }
        for way, ids in ways.items():
            rows = batch | {"position_ids": ids, "loss_mask": batch["loss_mask"] * mask}
            with groups({}, cp_size=1):
                whole = expected_of(PLAIN * 2, masked=False, batch=rows)
            with groups(ALGORITHMS["ulysses"], cp_size=2):
                for name, held in {"zigzag": zigzag(rank), "contiguous": contiguous(rank)}.items():
                    found[side, way, name] = of_part(build(2), cut(rows, held), held, whole)
    return found


def beginnings(rank):
    """name -> difference of a copy of one of two batches that one rank holds the same part of."""
    from mindspeed_cp import megatron_adaptor

    batch, found = batch_of(DOCUMENTS, seq=SEQ), {}
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["tokens"][:, SEQ // 2 :], other["labels"][:, SEQ // 2 :] = 1, 2
    whole, state = alone_of(DOCUMENTS), megatron_adaptor.state()
    with groups(ALGORITHMS["ulysses"], cp_size=2):
        model, held = build(2), contiguous(rank)
        local = state.shard_batch(batch, cu_seqlens=DOCUMENTS[0])
        later = state.shard_batch(other, cu_seqlens=(0, 9, SEQ))
        cloned = {name: tensor.clone() for name, tensor in local.items()}
        found["a common beginning"] = of_part(model, cloned, held, whole)
        again = state.shard_batch(batch, cu_seqlens=(0, 9, SEQ))
        found["equal batches"] = told(losses_of, model, cloned)
        del later, again
    return found


def _mla(cp_size, **settings):
    """A model of multi-latent attention, whose rotary embedding is computed in each layer, recomputed with it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from model_cases import MLA, MODEL, VOCABULARY

    model_parallel_cuda_manual_seed(3)
    config = MLATransformerConfig(**(MODEL | MLA | settings), context_parallel_size=cp_size)
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    return GPTModel(config, spec, VOCABULARY, 2 * SEQ, position_embedding_type="rope")


def _by_torch(layer, **how):
    """Recompute a layer as scripts do that know torch's checkpoint alone."""
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward
    layer.forward = lambda hidden_states, **more: checkpoint(
        lambda hidden: forward(hidden, **more), hidden_states, **how
    )


def doors(rank):
    """name -> difference of models entered by ``forward``, of layers recomputed by torch, of a teacher of one rank."""
    from megatron.core import parallel_state

    from mindspeed_cp.megatron.scopes import named_group

    batch, whole, found = batch_of(DOCUMENTS, seq=SEQ), alone_of(DOCUMENTS), {}
    for name, settings in ALGORITHMS.items():
        with groups(settings, cp_size=2):
            configure(settings, 2, end_of_document=batch_runs.END)
            model, local = build(2), split(batch)
            held = held_of(local)
            found[name, "forward"] = of_part(model.forward, local, held, whole, of=model)
            for reentrant in (False, True):
                model = build(2)
                for layer in model.decoder.layers:
                    _by_torch(layer, use_reentrant=reentrant)
                found[name, f"torch's checkpoint, reentrant {reentrant}"] = of_part(model, local, held, whole)
            if batch_runs.VERSION < (0, 13):  # later modules hold groups themselves, and cannot be copied
                core = copy.deepcopy(model.decoder.layers[0].self_attention.core_attention)
                own = parallel_state.get_context_parallel_group()
                found[name, "a copy of attention"] = float(named_group(core) is not own)
            found[name, "a teacher of one rank"] = _recomputed(batch)
    return found


def _recomputed(batch):
    """Largest difference of gradients with and without recomputation, of a model that computes alone."""
    plain = _mla(1)
    again = _mla(1, **batch_runs.RECOMPUTE)
    again.load_state_dict(plain.state_dict())
    expected, found = (gradients(model, losses_of(model, batch).sum()) for model in (plain, again))
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale
