"""Batches, groups and models that bypass the usual functions; each function runs on every rank and returns differences
from the same model without context parallelism, or error messages.
"""

import copy

import batch_runs
import torch
import torch.distributed as dist
from batch_runs import batch_of, build, configure, gradients, groups, losses_of, mask_of, split

SEQ = 24
PLAIN = ((0, SEQ),)
DOCUMENTS = ((0, 7, 15, SEQ),)
ALGORITHMS = {"ulysses": {"algorithm": "ulysses_cp_algo"}, "ring": {"algorithm": "megatron_cp_algo"}}


def alone_of(documents, **more):
    """``expected_of`` before there are groups."""
    with groups({}, cp_size=1):
        return expected_of(documents, **more)


def expected_of(documents, masked=True, batch=None, **settings):
    """(losses, gradients) of one process."""
    batch, model = batch or batch_of(documents, seq=SEQ), build(1, **settings)
    losses = losses_of(model, batch, mask_of(documents, SEQ) if masked else None)
    return losses.detach(), gradients(model, (losses * batch["loss_mask"]).sum())


def zigzag(rank, size=2, seq=SEQ):
    chunks = torch.arange(seq).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def contiguous(rank, size=2, seq=SEQ):
    return torch.arange(seq).chunk(size)[rank]


def cut(batch, held):
    """The batch that a framework passes to a rank that holds these positions."""
    return {name: tensor[..., held].contiguous() for name, tensor in batch.items()}


def told(call, *args, **more):
    """The message of the ValueError that a call raises, "" if none."""
    try:
        call(*args, **more)
    except ValueError as error:
        return str(error)
    return ""


def held_of(local):
    """The positions of a batch split by this project that this rank holds."""
    from mindspeed_cp import megatron_adaptor

    state = megatron_adaptor.state()
    return state.records.find([local["tokens"]]).layout.positions(state.cp_rank)


def of_part(model, local, held, whole, of=None, **more):
    """Largest difference of this rank's losses, and of the summed gradients, from those of one process.

    Args:
        model: the model, or another entry point of the model ``of``.
    """
    losses = losses_of(model, local, **more)
    found = gradients(of or model, (losses * local["loss_mask"]).sum())
    return batch_runs.difference(losses, found, *whole, lambda tensor: tensor[:, held])


def foreign(rank):
    """name -> difference of whole rows that somebody else split, or the error message."""
    from mindspeed_cp import megatron_adaptor

    batch, restarted = batch_of(PLAIN, seq=SEQ), batch_of(DOCUMENTS, seq=SEQ)
    whole, with_documents = alone_of(PLAIN), alone_of(DOCUMENTS)
    found = {}
    for name, settings in ALGORITHMS.items():
        with groups(settings, cp_size=2):
            model = build(2)
            cuts = {
                "zigzag": zigzag(rank),
                "contiguous": contiguous(rank),
                "5 and 19": torch.arange(SEQ).split([5, 19])[rank],
            }
            for how, held in cuts.items():
                found[name, how] = of_part(model, cut(batch, held), held, whole)
            held = zigzag(rank)
            flat = cut(batch, held) | {"position_ids": held}
            found[name, "ids of one dimension"] = of_part(model, flat, held, whole)
            found[name, "nobody"] = told(losses_of, model, batch)
            overlap = cut(batch, torch.arange(SEQ)[8 * rank : 16 + 8 * rank])
            found[name, "overlap"] = told(losses_of, model, overlap)
            missing = cut(batch, zigzag(rank)) | {"position_ids": None}
            found[name, "no ids"] = told(losses_of, model, missing)
            megatron_adaptor.configure_from(
                {"context_parallel_size": 2, "context_parallel_algo": settings["algorithm"]}
            )
            found[name, "no ids, a framework's"] = of_part(model, missing, zigzag(rank), whole)
            configure(settings | {"batch_layout": "contiguous"}, 2)
            held = contiguous(rank)
            declared = cut(batch, held) | {"position_ids": None}
            found[name, "no ids, declared contiguous"] = of_part(model, declared, held, whole)
            configure(settings, 2, documents_from_position_ids=True)
            held = zigzag(rank)
            found[name, "documents in the ids"] = of_part(model, cut(restarted, held), held, with_documents)
            configure(settings, 2, end_of_document=batch_runs.END)
            local = cut(restarted, held) | {"position_ids": batch["position_ids"][:, held]}
            expected = expected_of(DOCUMENTS, batch=restarted | {"position_ids": batch["position_ids"]})
            found[name, "end-of-document tokens"] = of_part(model, local, held, expected)
            configure(settings, 2)
            alone = build(1)
            local = split(batch)
            found[name, "a model of one rank"] = told(losses_of, alone, local)
            cloned = {key: tensor.clone() for key, tensor in local.items()}
            found[name, "a copy", "a model of one rank"] = told(losses_of, alone, cloned)
    return found


def padded(rank):
    """name -> difference of two rows, the second padded, for each way in which frameworks number padding."""
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
    """name -> difference of a copy of one of two batches whose parts on one rank are equal."""
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


def handed_over(rank):
    """name -> difference of batches whose document ends are set separately, in every order that MindSpeed allows."""
    from mindspeed_cp.compat.handed import set_actual_seq_len

    batch, others = batch_of(DOCUMENTS, seq=SEQ), batch_of(PLAIN, 9, seq=SEQ)
    whole = alone_of(DOCUMENTS)
    ends, found = list(DOCUMENTS[0][1:]), {}
    for name, settings in ALGORITHMS.items():
        with groups(settings, cp_size=2):
            model = build(2)
            held = zigzag(rank) if name == "ring" else contiguous(rank)
            set_actual_seq_len(ends)
            local = split(batch)
            found[name, "before the split"] = of_part(model, local, held_of(local), whole)
            found[name, "for a second batch too"] = of_part(model, split(batch), held, whole)
            set_actual_seq_len(None)
            local = split(batch)
            set_actual_seq_len(ends)
            found[name, "after the split"] = of_part(model, local, held, whole)
            set_actual_seq_len(list(PLAIN[0][1:]))
            split(others)
            set_actual_seq_len(ends)
            first = split(batch)
            set_actual_seq_len(list(PLAIN[0][1:]))
            split(others)
            found[name, "prefetch"] = of_part(model, first, held_of(first), whole)
            set_actual_seq_len(ends)
            counted = batch | {"position_ids": torch.arange(SEQ)[None]}
            local, expected = cut(counted, zigzag(rank)), expected_of(DOCUMENTS, batch=counted)
            found[name, "split by a framework"] = of_part(model, local, zigzag(rank), expected)
            set_actual_seq_len(None)
            first = split(batch)
            set_actual_seq_len(ends)
            split(others)
            found[name, "of one of two batches"] = told(losses_of, model, first)
            if name == "ring":
                set_actual_seq_len([end // 2 for end in (8, 16, SEQ)])
                found[name, "divided by the ring"] = of_part(
                    model, split(batch), held, expected_of(((0, 8, 16, SEQ),), batch=batch)
                )
                set_actual_seq_len([3, 5])
                found[name, "not the end"] = told(split, batch)
            set_actual_seq_len(None)
    return found


def _mla(cp_size, **settings):
    """A model with multi-latent attention, whose rotary embedding is computed, and recomputed, in each layer."""
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
    """Recompute a layer with torch's checkpoint, as scripts do."""
    from torch.utils.checkpoint import checkpoint

    forward = layer.forward
    layer.forward = lambda hidden_states, **more: checkpoint(
        lambda hidden: forward(hidden, **more), hidden_states, **how
    )


def doors(rank):
    """name -> difference of models called by ``forward``, of layers recomputed by torch, of a teacher on one rank."""
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
            if batch_runs.VERSION < (0, 13):  # later, modules hold groups themselves and cannot be copied
                core = copy.deepcopy(model.decoder.layers[0].self_attention.core_attention)
                own = parallel_state.get_context_parallel_group()
                found[name, "a copy of attention"] = float(named_group(core) is not own)
            found[name, "a teacher of one rank"] = _recomputed(batch)
    return found


def _recomputed(batch):
    """Largest difference of gradients with and without recomputation, of a model without context parallelism."""
    plain = _mla(1)
    again = _mla(1, **batch_runs.RECOMPUTE)
    again.load_state_dict(plain.state_dict())
    expected, found = (gradients(model, losses_of(model, batch).sum()) for model in (plain, again))
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


def _plan(model, local, mask=None):
    return model.build_schedule_plan(local["tokens"], local["position_ids"], mask, labels=local["labels"])


def plans(rank):
    """name -> difference of losses of a plan whose nodes run after the plan of another batch was made."""
    found = {}
    with groups({}, cp_size=1):
        plan = _plan(build(1), batch_of(DOCUMENTS, seq=SEQ), mask_of(DOCUMENTS, SEQ))
        whole = type(plan).run(plan, None).detach()
    for name, settings in ALGORITHMS.items():
        with groups(settings, cp_size=2):
            configure(settings, 2, end_of_document=batch_runs.END)
            model = build(2)
            local = split(batch_of(DOCUMENTS, seq=SEQ))
            held, plan = held_of(local), _plan(model, local)
            _plan(model, split(batch_of(PLAIN, 9, seq=SEQ)))
            losses = type(plan).run(plan, None)
            found[name] = float((losses - whole[:, held]).abs().max() / whole.abs().max())
    return found


def two_models(rank):
    """Differences of the losses of two models in one pipeline; the first stage runs their forward passes together."""
    from megatron.core import parallel_state

    from mindspeed_cp import SequenceLayout, megatron_adaptor
    from mindspeed_cp.megatron.records import MicroBatch

    rows = {"teacher": DOCUMENTS, "student": ((0, 11, 20, SEQ),)}
    found = {}
    whole = {name: alone_of(documents, num_layers=2)[0] for name, documents in rows.items()}
    with groups({"algorithm": "megatron_cp_algo"}, cp_size=2, pp_size=2):
        state = megatron_adaptor.state()
        first = parallel_state.is_pipeline_first_stage()
        pipeline = dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, num_layers=2)
        models = {name: build(2, first, not first, **pipeline) for name in rows}
        if first:
            outputs = []
            for name, documents in rows.items():
                local = state.shard_batch(batch_of(documents, seq=SEQ), cu_seqlens=documents[0])
                for _ in range(2):  # the later stage refuses the first of them
                    output = models[name](local["tokens"], local["position_ids"], None).detach()
                outputs.append(output)
            for output in outputs:
                dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
            uneven = cut(batch_of(PLAIN, seq=SEQ), torch.arange(SEQ).split([5, SEQ - 5])[state.cp_rank])
            layout = SequenceLayout.from_runs(state.config, [[(0, 5)], [(5, SEQ)]])
            with state.running(MicroBatch(layout, DOCUMENTS)):
                says = told(models["student"], uneven["tokens"], uneven["position_ids"], None)
            return {"uneven rows": says}
        for name, documents in rows.items():
            hidden = torch.empty(SEQ // 2, 1, models[name].config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            labels = {"labels": batch_of(documents, seq=SEQ)["labels"]}
            models[name].set_input_tensor(hidden)
            held = zigzag(state.cp_rank)
            other = state.shard_batch(labels, cu_seqlens=(0, 5, SEQ))["labels"]
            found[name, "labels of other documents"] = told(models[name], None, None, None, labels=other)
            losses = models[name](None, None, None, labels=split(labels)["labels"])
            found[name] = float((losses - whole[name][:, held]).abs().max() / whole[name].abs().max())
    return found
