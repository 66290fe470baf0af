"""Pipelines with the inputs that Megatron passes: tokens to the first stage, labels to the last, nothing to others."""

import torch
from batch_runs import END, RECOMPUTE, ROWS, SEQ, VERSION, batch_of, build, configure, difference, groups, split, summed
from model_cases import packed_params, picture_positions

MICRO_BATCHES = 4
LAYERS = {"num_layers": 4}
MULTIMODAL = {"mrope_section": [2, 1, 1]}
FIRST, LAST = ("tokens", "position_ids"), ("labels", "loss_mask")


def stages(pp_size, vpp_size, cp_size, **settings):
    """The model chunks of this pipeline rank."""
    from megatron.core import parallel_state

    found = []
    for stage in range(vpp_size or 1):
        if vpp_size is not None and VERSION < (0, 13):
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        where = {"ignore_virtual": False} | ({"vp_stage": stage} if VERSION >= (0, 13) else {})
        found.append(
            build(
                cp_size,
                parallel_state.is_pipeline_first_stage(**where),
                parallel_state.is_pipeline_last_stage(**where),
                stage if vpp_size else None,
                pipeline_model_parallel_size=pp_size,
                virtual_pipeline_model_parallel_size=vpp_size,
                pipeline_dtype=torch.float32,
                overlap_p2p_comm=vpp_size is not None,  # two interleaved stages are neighbours on both sides
                batch_p2p_comm=vpp_size is None,
                **LAYERS,
                **settings,
            )
        )
    return found


def batches(model, documents, seq, first_is_told=None):
    """A stage's inputs for each micro-batch, all of them split before the first one runs.

    Args:
        first_is_told: if given, only the first stage gets the documents, as "cu_seqlens" or "slices".
    """
    from mindspeed_cp import megatron_adaptor

    state, found = megatron_adaptor.state(), []
    given = FIRST * model.pre_process + LAST * model.post_process
    for seed, rows in documents:
        batch = {name: tensor if name in given else None for name, tensor in batch_of(rows, seed, seq).items()}
        if model.config.mrope_section:  # every stage reads them
            batch["position_ids"] = places_of(rows, seq)
        if first_is_told == "slices" and model.pre_process:
            batch["attention_slices"] = [[((a, b), (a, b), "causal") for a, b in zip(row, row[1:])] for row in rows]
        if first_is_told == "cu_seqlens" and model.pre_process:
            found.append((state.shard_batch(batch, cu_seqlens=rows), {}))
            continue
        if state.config.batch_layout != "balanced":
            found.append((split(batch), {}))
            continue
        local = state.shard_batch(batch, cu_seqlens=rows[0]) if given else batch
        assert not given or state.records.find(local.values()).layout != state.layout(seq), "as good as the zigzag"
        found.append((local, {"packed_seq_params": packed_params(rows[0][:-1], seq)}))
    return found


def places_of(rows, seq):
    """(3, rows, seq) position ids, with an image in each row."""
    return torch.stack([picture_positions(seq, row=row) for row in range(len(rows))], dim=1)


def run(pp_size, vpp_size, documents, seq, whole, first_is_told=None, **settings):
    """Largest difference of losses and gradients on this rank; ``whole`` is (losses of each, summed gradients)."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mindspeed_cp import megatron_adaptor

    state, losses = megatron_adaptor.state(), []
    chunks = stages(pp_size, vpp_size, state.cp_size, **settings)
    iterators = [iter(batches(chunk, documents, seq, first_is_told)) for chunk in chunks]

    def forward_step(iterator, model):
        local, packed = next(iterator)
        output = model(local["tokens"], local["position_ids"], None, labels=local["labels"], **packed)

        def loss(output):
            losses.append((output.detach(), state.records.find(local.values()).layout))
            return (output * local["loss_mask"]).sum(), {}

        return output, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if vpp_size else iterators[0],
        model=chunks if vpp_size else chunks[0],
        num_microbatches=len(documents),
        seq_length=seq,
        micro_batch_size=len(documents[0][1]),
        forward_only=False,
    )
    expected, gradients = whole
    worst = 0.0
    for (found, layout), alone in zip(losses, expected, strict=bool(losses)):
        mine = layout.shard(alone, state.cp_rank, dim=1)
        worst = max(worst, float((found - mine).abs().max() / alone.abs().max()))
    # The schedule multiplies a loss by cp and divides it by the number of micro-batches.
    scale = len(documents) / state.cp_size
    own = {name: value * scale for chunk in chunks for name, value in summed(chunk).items()}
    nothing = torch.zeros(1)
    return max(worst, difference(nothing, own, nothing + 1e-30, gradients, lambda tensor: nothing))


def kept(settings, pp_size, vpp_size, documents, whole):
    """(difference with the attention kept, bytes sent without recomputation, with it, and with the attention kept)."""
    from mindspeed_cp.comm import count_bytes

    sent, worst = [], 0.0
    for keep, recompute in ((False, {}), (False, RECOMPUTE), (True, RECOMPUTE)):
        named = {} if "batch_layout" in settings else {"end_of_document": END}
        configure({**settings, "keep_attention": keep}, 2, **named)
        with count_bytes() as traffic:
            worst = max(worst, run(pp_size, vpp_size, documents, SEQ, whole, **recompute))
        sent.append(traffic.total_bytes)
    return worst, sent


def expected_of(documents, seq, masked, **settings):
    """(losses of each micro-batch, summed gradients) of one process."""
    from batch_runs import gradients, losses_of, mask_of

    losses, total = [], {}
    for seed, rows in documents:
        batch, model = batch_of(rows, seed, seq), build(1, **LAYERS, **settings)
        batch |= {"position_ids": places_of(rows, seq)} if settings else {}
        losses.append(losses_of(model, batch, mask_of(rows if masked else ((0, seq),) * len(rows), seq)))
        for name, gradient in gradients(model, (losses[-1] * batch["loss_mask"]).sum()).items():
            total[name] = total.get(name, 0) + gradient
    return [loss.detach() for loss in losses], total


BALANCED = {"algorithm": "megatron_cp_algo", "batch_layout": "balanced", "kv_exchange": "auto"}
RUNS = {
    "ring": {"algorithm": "megatron_cp_algo"},
    "ulysses": {"algorithm": "ulysses_cp_algo"},
}


def compare(rank):
    """(name -> difference, name -> bytes sent without recomputation, with it, and with the attention kept)."""
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    ends = [((0, 7 + 7 * index, SEQ), (0, 30 - index, SEQ)) for index in range(MICRO_BATCHES)]
    documents, plain = list(enumerate(ends)), list(enumerate(((0, SEQ - 1),) * ROWS for _ in ends))
    with groups({}, cp_size=1):
        whole, odd = expected_of(documents, SEQ, True), expected_of(plain, SEQ - 1, False)
        pictures = expected_of(plain, SEQ - 1, False, **MULTIMODAL)
        packed = [(seed, rows[:1]) for seed, rows in documents]
        alone = expected_of(packed, SEQ, True)
    found, sent = {}, {}
    for name, settings in RUNS.items():
        with groups(settings, cp_size=2, pp_size=2):
            for title, vpp_size in (("one after the other", None), ("interleaved", 2)):
                virtual_stages(vpp_size)
                configure(settings, 2)
                found[f"{name}, by hand, {title}"] = run(2, vpp_size, documents, SEQ, whole, "cu_seqlens")
                configure(settings, 2, end_of_document=END)
                found[f"{name}, {title}"], sent[f"{name}, {title}"] = kept(settings, 2, vpp_size, documents, whole)
                if name == "ring":
                    run_name = f"packed and balanced, {title}"
                    found[run_name], sent[run_name] = kept(BALANCED, 2, vpp_size, packed, alone)
                    configure(settings, 2)
                    found[f"ring, slices, {title}"] = run(2, vpp_size, documents, SEQ, whole, "slices")
                    configure(settings, 2)
                    found[f"odd length, {title}"] = run(2, vpp_size, plain, SEQ - 1, odd)
                    pictured = run(2, vpp_size, plain, SEQ - 1, pictures, **MULTIMODAL)
                    found[f"multimodal positions, {title}"] = pictured
    return found, sent


def virtual_stages(count):
    from megatron.core import parallel_state

    parallel_state.set_virtual_pipeline_model_parallel_world_size(count)
    parallel_state.set_virtual_pipeline_model_parallel_rank(None if count is None else 0)
