"""A tiny transformer that trains on separate sequences, and on the tree of them over several ranks."""

import random

import torch
import torch.distributed as dist
from reference import allowed_pairs, attention

VOCABULARY, WIDTH, HEADS, KV_HEADS, LONGEST = 13, 16, 4, 2, 64


def parameters():
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5).requires_grad_()

    size = WIDTH // HEADS
    layer = {"q": WIDTH, "k": KV_HEADS * size, "v": KV_HEADS * size, "out": WIDTH, "up": 2 * WIDTH}
    return {
        "embedding": draw(VOCABULARY, WIDTH),
        "positions": draw(LONGEST, WIDTH),
        **{f"{number}.{name}": draw(WIDTH, width) for number in range(2) for name, width in layer.items()},
        **{f"{number}.down": draw(2 * WIDTH, WIDTH) for number in range(2)},
    }


def log_probabilities(weights, tokens, position_ids, attend):
    """(n,) tokens of a sequence or of a rank -> (n, vocabulary)."""

    def heads(rows, count):
        return rows.unflatten(-1, (count, -1)).unsqueeze(1)

    x = weights["embedding"][tokens] + weights["positions"][position_ids]
    for number in range(2):
        layer = {name.split(".")[1]: value for name, value in weights.items() if name.startswith(f"{number}.")}
        attended = attend(
            heads(x @ layer["q"], HEADS), heads(x @ layer["k"], KV_HEADS), heads(x @ layer["v"], KV_HEADS)
        )
        x = x + attended.flatten(1) @ layer["out"]
        x = x + torch.tanh(x @ layer["up"]) @ layer["down"]
    return (x @ weights["embedding"].T).log_softmax(-1)


def of_labels(log_probs, rows, labels):
    return log_probs[rows].gather(-1, labels[:, None])[:, 0]


def grpo_like(per_sequence, advantages):
    """Clipped ratios to frozen log-probabilities, averaged over the tokens of each sequence."""
    total = 0.0
    for advantage, values in zip(advantages, per_sequence):
        ratio = (values - values.detach() * 0.9).exp()
        total = total + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return -total / len(advantages)


def separate(sequences, weights, advantages):
    """(weighted loss, GRPO-like loss, log-probabilities of each sequence, gradients of the sum of both)."""
    model = parameters()
    found, loss = [], 0.0
    for sequence, own in zip(sequences, weights):
        tokens = torch.tensor(sequence)
        causal = allowed_pairs(len(tokens), causal=True)

        def attend(query, key, value, causal=causal):
            return attention(query, key, value, causal)

        log_probs = log_probabilities(model, tokens, torch.arange(len(tokens)), attend)
        found.append(of_labels(log_probs, torch.arange(len(tokens) - 1), tokens[1:]))
        loss = loss - (own[1:] * found[-1]).sum()
    reward = grpo_like(found, advantages)
    (loss + reward).backward()
    return loss.item(), reward.item(), [each.detach() for each in found], {n: p.grad for n, p in model.items()}


def as_a_tree(rank, settings, sequences, weights, advantages, one_label_per_row):
    """The same results as ``separate``, from the packed tree over the ranks."""
    from cases import setup_of

    from mindspeed_cp import SequenceLayout, context_parallel_attention, gather_sequence, pack_tree

    tree = pack_tree(sequences, weights=weights, one_label_per_row=one_label_per_row)
    config, groups = setup_of(settings)
    layout = SequenceLayout.build(config, len(tree))
    model, held = parameters(), tree.held(layout, rank)

    def attend(query, key, value):
        return context_parallel_attention(
            query, key, value, config=config, groups=groups, layout=layout, attention_slices=tree.attention_slices
        )

    tokens, position_ids = (layout.shard(part, rank) for part in (tree.tokens, tree.position_ids))
    own = of_labels(log_probabilities(model, tokens, position_ids, attend), held.rows, held.labels)
    loss = -(held.weights * own).sum()
    per_sequence = tree.per_sequence(gather_sequence(own, groups=groups, layout=held.layout))
    reward = grpo_like(per_sequence, advantages)
    (loss + reward).backward()
    total = loss.detach().clone()
    for tensor in (total, *(parameter.grad for parameter in model.values())):
        if layout.cp_size > 1:
            dist.all_reduce(tensor)
    gradients = {name: parameter.grad for name, parameter in model.items()}
    return total.item(), reward.item(), [each.detach() for each in per_sequence], gradients


def drawn_sequences(seed, count=6, longest=14):
    """Random sequences with branches; some are prefixes of others, some are equal, and one is a single token."""
    rng = random.Random(seed)
    found = [[rng.randrange(VOCABULARY)]]
    while len(found) < count:
        stem = rng.choice(found)
        kept = rng.randint(0, len(stem))
        found.append(stem[:kept] + [rng.randrange(3) for _ in range(rng.randint(1 - min(kept, 1), longest - kept))])
    rng.shuffle(found)
    return found
