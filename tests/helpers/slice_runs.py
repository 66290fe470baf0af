"""Compare GPT models on batches with slices with Megatron's own model with a dense mask or separate sequences."""

import torch
from batch_runs import (
    DOCUMENTS,
    END,
    SEQ,
    VERSION,
    batch_of,
    build,
    configure,
    difference,
    gradients,
    groups,
    losses_of,
    split,
)
from reference import allowed_pairs, sliced_pairs
from tree_runs import drawn_sequences, grpo_like

IMAGE = 7
PREFIXES = (11, 0)
RINGS = {
    "ring": {"algorithm": "megatron_cp_algo"},
    "direct, zigzag": {"algorithm": "megatron_cp_algo", "kv_exchange": "direct", "batch_layout": "zigzag"},
    "ulysses": {"algorithm": "ulysses_cp_algo"},
}


def prefix_mask():
    """(rows, 1, S, S), True where hidden; from the definition, without slices."""
    position = torch.arange(SEQ)
    rows = [(position[None] <= position[:, None]) | (position[None] < length) for length in PREFIXES]
    return ~torch.stack(rows)[:, None]


def prefix_slices(length):
    return [((0, length), (0, length), "full"), ((length, SEQ), (0, SEQ), "causal")]


def images(documents=None):
    """(batch, dense mask): two images in the first row, one across a document's end in the second."""
    batch = batch_of(DOCUMENTS)
    for row, spans in enumerate((((3, 9), (20, 27)), ((15, 19),))):
        for start, stop in spans:
            batch["tokens"][row, start:stop] = IMAGE
    if documents is not None:
        for row, ends in enumerate(documents):
            batch["tokens"][row, [end - 1 for end in ends[1:]]] = END
    rows = []
    for row, tokens in enumerate(batch["tokens"].tolist()):
        ends = None if documents is None else documents[row]
        allowed = allowed_pairs(SEQ, causal=True, cu_seqlens=ends)[0]
        number, last = torch.zeros(SEQ, dtype=torch.long), 0
        for place, token in enumerate(tokens):
            last += token == IMAGE and tokens[place - 1 : place] != [IMAGE]
            number[place] = last if token == IMAGE else 0
        together = (number[:, None] == number[None]) & (number[:, None] > 0)
        rows.append(allowed | (together & allowed_pairs(SEQ, cu_seqlens=ends)[0]))
    return batch, ~torch.stack(rows)[:, None]


def batches():
    """name -> (batch, equivalent dense mask, settings of ``configure``, settings of the model without a mask)."""
    plain, picture, packed = batch_of(DOCUMENTS), images(), images(DOCUMENTS)
    mixed = [prefix_slices(11), [((0, 30), (0, 30), "band"), ((30, 48), (7, 48), "causal")]]
    dense = ~torch.stack([sliced_pairs(row, SEQ) for row in mixed])[:, None]
    ends, row = (0, 20, SEQ), {key: value[:1] for key, value in plain.items()}
    row |= {"attention_slices": prefix_slices(11), "packed_seq_params": packed_of(ends)}
    apart = ~(sliced_pairs(prefix_slices(11), SEQ) & allowed_pairs(SEQ, cu_seqlens=ends)[0])[None, None]
    by_hand = ~torch.stack([allowed_pairs(SEQ, causal=True, cu_seqlens=ends)[0] for ends in DOCUMENTS])[:, None]
    windowed = prefix_mask() | ~allowed_pairs(SEQ, window=(9, None))
    return {
        "prefix lengths": ({**plain, "prefix_lengths": torch.tensor(PREFIXES)}, prefix_mask(), {}, {}),
        "prefix lengths, window": ({**plain, "prefix_lengths": PREFIXES}, windowed, {}, {"window_size": (9, 0)}),
        "attention slices": ({**plain, "attention_slices": mixed}, dense, {}, {}),
        "attention slices, packed": (row, apart, {}, {}),
        "documents by hand": ({**plain, "documents": DOCUMENTS}, by_hand, {}, {}),
        "images": (*picture, {"image_token_id": IMAGE}, {}),
        "images in documents": (*packed, {"image_token_id": IMAGE, "end_of_document": END}, {}),
    }


def compare(rank):
    """setup -> batch -> difference from Megatron's own model with a dense mask; the setup "alone" has one rank."""
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    given, found = batches(), {}
    with groups({}, cp_size=1):
        whole = {name: _whole(batch, mask) for name, (batch, mask, *_) in given.items()}
        found["alone"] = {
            name: _difference(whole[name], batch, *how, 1)
            for name, (batch, _, *how) in given.items()
            if VERSION >= (0, 13) or "window" not in name  # 0.12's own module does not support windows
        }
        found["alone"]["tree"] = trees(1)
    for name, settings in RINGS.items():
        with groups(settings, cp_size=2):
            found[name] = {
                kind: _difference(whole[kind], batch, *how, 2, settings) for kind, (batch, _, *how) in given.items()
            }
            batch = {key: value for key, value in given["prefix lengths"][0].items() if key != "prefix_lengths"}
            found[name]["dense prefix"] = _difference(
                whole["prefix lengths"], batch, {}, {}, 2, settings, prefix_mask()
            )
            found[name]["told"] = megatron_adaptor.state().told
            configure(settings, 2)
            found[name]["tree"] = trees(2)
            found[name]["said"] = said()
    return found


def _whole(batch, mask):
    model = build(1)
    losses = losses_of(model, batch, mask)
    return losses, gradients(model, (losses * batch["loss_mask"]).sum())


def _difference(whole, batch, more, of_model, cp_size, settings=None, mask=None):
    from mindspeed_cp import megatron_adaptor

    configure(settings or {}, cp_size, **more)
    state, model, batch = megatron_adaptor.state(), build(cp_size, **of_model), dict(batch)
    documents = batch.pop("documents", None)
    local = split(batch) if documents is None else state.shard_batch(batch, cu_seqlens=documents)
    record = state.records.find(value for value in local.values() if isinstance(value, torch.Tensor))
    losses = losses_of(model, local, mask, packed_seq_params=local.get("packed_seq_params"))
    if mask is not None:
        ((_, facts),) = state.masks._entries.values()
        assert [len(row) for row in facts.slices] == [2, 1], "a dense mask of a prefix and a causal row"
    found = gradients(model, (losses * local["loss_mask"]).sum())
    return difference(losses, found, *whole, lambda tensor: record.layout.shard(tensor, state.cp_rank, dim=1))


def trees(cp_size):
    """Largest difference of a tree of rollouts from its sequences: GRPO-like loss, gradients."""
    from mindspeed_cp import megatron_adaptor, pack_tree

    sequences = [[token + 1 for token in each] for each in drawn_sequences(3) if len(each) > 1]
    advantages = torch.linspace(-1, 1, len(sequences)).tolist()
    state, own, separate = megatron_adaptor.state(), [], build(1)
    with state.running(None), state.computing_alone():
        for sequence in sequences:
            tokens = torch.tensor(sequence)[None]
            ids, causal = torch.arange(tokens.size(1) - 1)[None], allowed_pairs(tokens.size(1) - 1, causal=True)[None]
            own.append(-separate(tokens[:, :-1], ids, ~causal, labels=tokens[:, 1:])[0])
    loss = grpo_like(own, advantages)
    expected = gradients(separate, loss)
    tree = pack_tree(sequences, one_label_per_row=True)
    local, model = split(tree.batch(multiple_of=2)), build(cp_size)
    losses = losses_of(model, local)
    whole = state.gather_sequence(losses)
    reward = grpo_like(tree.per_sequence(-whole[0, tree.rows]), advantages)
    found, scale = gradients(model, reward), max(float(value.abs().max()) for value in expected.values())
    worst = max(float((found[name] - expected[name]).abs().max()) / scale for name in found)
    return max(worst, abs(float((reward - loss).detach())))


def _with(model, **settings):
    vars(model.config).update(settings)
    return model


def packed_of(ends):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor(ends, dtype=torch.int32)
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def said():
    """Error messages for a mask with slices, for two forms of slices, and for a tree's positions in several rows."""
    from mindspeed_cp import megatron_adaptor, pack_tree

    batch, found = batch_of(DOCUMENTS), []
    slices, mask = [((0, SEQ), (0, SEQ), "causal")], ~allowed_pairs(SEQ, causal=True)[None]
    local = split({**batch, "attention_slices": slices})
    tree = pack_tree([[1, 2, 3, 4], [1, 2, 5, 6]], one_label_per_row=True).batch(multiple_of=2)
    rows = {key: torch.cat([value, value]) for key, value in tree.items() if isinstance(value, torch.Tensor)}
    rows["rotary_position_ids"][1] = torch.arange(rows["tokens"].size(1))
    state = megatron_adaptor.state()
    places = state.layout(SEQ).positions(state.cp_rank).expand(2, -1).clone()
    lost = {"tokens": local["tokens"].flip(1), "labels": local["labels"].flip(1), "position_ids": places}
    packed = packed_of((0, 20, SEQ))
    for wrong in (
        lambda: losses_of(build(2), local, mask),
        lambda: split({**batch, "attention_slices": slices, "attention_mask": mask}),
        lambda: split({**batch, "attention_slices": slices, "prefix_lengths": PREFIXES}),
        lambda: split({**batch, "prefix_lengths": (3, SEQ + 1)}),
        lambda: losses_of(build(2), split({**rows, "attention_slices": tree["attention_slices"]})),
        lambda: losses_of(build(2), lost),
        lambda: losses_of(build(2, window_size=(3, 0)), split(dict(tree))),
        lambda: losses_of(_with(build(2), mtp_num_layers=1), split(dict(tree))),
        lambda: losses_of(_with(build(2), experimental_attention_variant="gated_delta_net"), split(dict(tree))),
        lambda: losses_of(
            _with(build(2), experimental_attention_variant="dsa"), split({**batch, "attention_slices": slices})
        ),
        lambda: losses_of(build(2), {key: value[:1].clone() for key, value in lost.items()}, packed_seq_params=packed),
    ):
        try:
            wrong()
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found
