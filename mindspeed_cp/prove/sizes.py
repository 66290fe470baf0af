"""Smaller models of the same kind: all kinds of layers and the relations between sizes are kept."""

import re
from dataclasses import dataclass

from mindspeed_cp.planner.megatron_flags import layer_pattern
from mindspeed_cp.prove import own_layers
from mindspeed_cp.prove.words import Words

HEAD = 16  # head dimension
LONG, SHORT = 512, 128  # tokens of a sequence: with documents, and without
VOCABULARY = 4224  # tokens of Megatron's mock data count up to the length of a document, which is at most 4096
HYBRID = ("--hybrid-layer-pattern", "--hybrid-override-pattern")
DOCUMENTS = ("--reset-attention-mask", "--reset-position-ids", "--sft", "--eod-mask-loss")
MOCK_TOKENIZERS = ("NullTokenizer", "NullMultimodalTokenizer")


@dataclass(frozen=True)
class Ranks:
    """Parallel sizes of both runs, and of the run with context parallelism."""

    tp: int
    pp: int
    cp: int
    virtual: int = 1  # model chunks of a pipeline rank


def shrink(words: Words, ranks: Ranks, own: Ranks) -> None:
    """Make the model of a command small.

    Args:
        words: changed in place.
        own: the parallel sizes of the original command.

    Raises:
        ValueError: a flag's value is not a number, or a list of layers cannot be parsed.
    """
    _layers(words, ranks)
    scale = _width(words, ranks, own)
    _latents(words)
    _state_space(words, ranks)
    _experts(words)
    _sequence(words, ranks, own)
    _batch(words, ranks)
    _vocabulary(words)
    if scale > 1:
        # Smaller layers with the same deviation would have tiny outputs, so the deviation grows to keep their size.
        deviation = float(words.text("--init-method-std", "0.02"))
        words.set("--init-method-std", f"{min(deviation * scale, 0.2):.4g}")


def _layers(words: Words, ranks: Ranks) -> None:
    """One layer of each kind, and at least one per stage."""
    count = words.number("--num-layers", 2)
    stages = ranks.pp * ranks.virtual
    flag = next((flag for flag in HYBRID if flag in words), None)
    if flag is not None:
        pattern = short_pattern(words.text(flag), stages)
        words.set(flag, pattern)
        left = len(pattern.partition("/")[0].replace("|", ""))
        if "--num-layers" in words:
            words.set("--num-layers", left)
        for flag, chosen in own_layers.kinds_of(words, left).items():
            own_layers.write(words, flag, chosen)
        return
    kinds = ("--moe-layer-freq", "--window-attn-skip-freq", "--linear-attention-freq")
    patterns = {flag: _pattern(flag, words.text(flag), count) for flag in kinds if words.text(flag)}
    own = own_layers.kinds_of(words, count)
    together = list(dict.fromkeys(zip(*patterns.values(), *(each[:count] for each in own.values()))))
    fewest = min(max(count, stages), max(2, len(together)))
    layers = -(-fewest // stages) * stages
    for place, flag in enumerate(patterns):
        switches = [str(int(bool(kind[place]))) for kind in together]
        words.set(flag, f"[{','.join((switches * layers)[:layers])}]")
    for place, (flag, kinds_of_all) in enumerate(own.items(), len(patterns)):
        like = [kind[place] for kind in together]
        own_layers.write(words, flag, [*(like * layers)[:layers], *kinds_of_all[count:][:2]])
    words.set("--num-layers", layers)
    if ranks.virtual == 1:
        words.drop(["--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"])
    elif "--num-layers-per-virtual-pipeline-stage" in words:
        words.set("--num-layers-per-virtual-pipeline-stage", layers // stages)
    else:
        words.set("--num-virtual-stages-per-pipeline-rank", ranks.virtual)
    words.replace("--recompute-num-layers", 1)
    if words.number("--mtp-num-layers", 0) > 2:
        words.set("--mtp-num-layers", 2)


def _pattern(flag: str, text: str, count: int) -> list[int]:
    """As ``layer_pattern``, but for windows a number N means that every N-th layer, from 1, has none."""
    if flag == "--window-attn-skip-freq" and text.isdecimal():
        return [int(layer % int(text) != 0) for layer in range(1, count + 1)]
    return list(layer_pattern(text, count))


def short_pattern(pattern: str, stages: int) -> str:
    """One layer of each kind of a hybrid model, the same number per stage; "|" ends a stage, "/" the main model."""
    model, *predictions = pattern.split("/")
    kinds = "".join(dict.fromkeys(re.sub(r"[|\s]", "", model)))
    each = -(-len(kinds) // stages)
    layers = (kinds * stages)[: each * stages]
    parts = [layers[place : place + each] for place in range(0, len(layers), each)]
    short = ("|" if "|" in model and stages > 1 else "").join(parts)
    return "/".join([short, *("".join(dict.fromkeys(part)) for part in predictions[:2])])


def _state_space(words: Words, ranks: Ranks) -> None:
    """Heads and groups that can be split over the ranks; Megatron's defaults are for large layers."""
    if not any(flag in words for flag in HYBRID):
        return
    groups = min(words.number("--mamba-num-groups", 8), 2 * ranks.tp)
    sizes = {"--mamba-head-dim": HEAD, "--mamba-state-dim": HEAD, "--mamba-num-groups": groups}
    for flag, size in sizes.items():
        words.set(flag, size)
    words.replace("--mamba-num-heads", 2 * ranks.tp * ranks.cp)


def _width(words: Words, ranks: Ranks, own: Ranks) -> float:
    """Hidden size, heads and feed-forward size; returns the factor by which outputs of a layer would shrink."""
    hidden, heads = words.number("--hidden-size", 64), words.number("--num-attention-heads", 4)
    groups = words.number("--num-query-groups", 1) if "--group-query-attention" in words else heads
    shared = ranks.tp * ranks.cp
    fewer = _few_groups(groups, own, ranks)
    ratio = max(1, heads // max(groups, 1))
    per_group = min(ratio, 4)
    while fewer * per_group % shared:
        per_group += 1
    if groups == heads:
        fewer, per_group = max(shared, 4 // shared * shared), 1
    new_heads = fewer * per_group
    words.set("--num-attention-heads", new_heads)
    if "--group-query-attention" in words:
        words.set("--num-query-groups", fewer)
    new_hidden = new_heads * HEAD
    words.set("--hidden-size", new_hidden)
    words.replace("--kv-channels", HEAD)
    words.replace("--ffn-hidden-size", 2 * new_hidden)
    words.replace("--moe-ffn-hidden-size", new_hidden)
    words.replace("--moe-shared-expert-intermediate-size", new_hidden)
    return float((hidden / new_hidden) ** 0.5)


def _few_groups(groups: int, own: Ranks, ranks: Ranks) -> int:
    """KV heads: in the same relation to the ranks as before, so that they are replicated if they were."""
    shared = ranks.tp * ranks.cp
    if groups < own.tp * own.cp:
        return min(groups, ranks.tp)
    return min(groups, max(shared, 2))


def _latents(words: Words) -> None:
    if "--multi-latent-attention" not in words:
        return
    words.replace("--q-lora-rank", 24)
    words.set("--kv-lora-rank", 24)
    equal = words.text("--v-head-dim", "128") == words.text("--qk-head-dim", "128")
    words.set("--qk-head-dim", HEAD)
    words.set("--qk-pos-emb-head-dim", HEAD // 2)
    words.set("--v-head-dim", HEAD if equal else HEAD - 4)


def _experts(words: Words) -> None:
    count = words.number("--num-experts", 0)
    if not count:
        return
    words.set("--num-experts", min(count, 4))
    words.set("--moe-router-topk", min(words.number("--moe-router-topk", 2), 2))
    if words.number("--moe-router-num-groups", 0):
        words.set("--moe-router-num-groups", 2)
        words.set("--moe-router-group-topk", min(words.number("--moe-router-group-topk", 1), 2))


def _sequence(words: Words, ranks: Ranks, own: Ranks) -> None:
    """A shorter sequence, divisible as before, with windows that still end within it."""
    length = words.number("--seq-length", SHORT)
    has_documents = any(flag in words for flag in DOCUMENTS)
    multiple = 2 * ranks.cp * ranks.tp
    short = min(length, LONG if has_documents else SHORT)
    if length % (2 * own.cp) == 0:
        short = max(multiple, short // multiple * multiple)
    elif own.cp > 1 and length % own.cp == 0:  # as aligned Ulysses requires
        short = max(multiple, short // multiple * multiple) - multiple // 2
    else:
        short = max(short // multiple * multiple - (ranks.tp if "--sequence-parallel" in words else 3), ranks.cp + 1)
    words.set("--seq-length", short)
    words.replace("--max-position-embeddings", short)
    if "--window-size" in words:
        words.set("--window-size", *_window(words, length, short))


def _window(words: Words, length: int, short: int) -> list[str]:
    """A window with the same share of the sequence, at least a few tokens; in the same notation as before."""
    values = words.values("--window-size") or []
    numbers = [int(number) for number in re.findall(r"-?\d+", " ".join(values))]
    fewer = [number if number <= 0 else max(5, min(number * short // length, short // 3)) for number in numbers]
    texts = [str(number) for number in fewer]
    return texts if len(values) > 1 else [",".join(texts)]


def _batch(words: Words, ranks: Ranks) -> None:
    micro = min(words.number("--micro-batch-size", 1), 2)
    words.set("--micro-batch-size", micro)
    words.set("--global-batch-size", 2 * micro * ranks.pp)


def _vocabulary(words: Words) -> None:
    """A smaller vocabulary for synthetic tokens; real text needs its own vocabulary."""
    mocked = "--mock-data" in words or "--data-path" not in words
    if mocked and words.text("--tokenizer-type") in MOCK_TOKENIZERS and "--vocab-size" in words:
        words.set("--vocab-size", min(words.number("--vocab-size", VOCABULARY), VOCABULARY))
