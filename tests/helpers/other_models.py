"""BERT, T5 and functions of Megatron outside of any model, on two ranks; ``compare`` runs on each."""

import inspect
import warnings
import zlib
from dataclasses import replace

import torch
import torch.distributed as dist
from model_cases import MODEL, RING, ULYSSES, VERSION, VOCABULARY, samples
from model_runs import groups

SEQ, SHORT, PADDING, ROWS = 24, 16, 5, 2
POSITIONS = ("learned_absolute", "rope")
# BERT of 0.12 requests too short a rotary embedding, even without context parallelism.
CASES = [
    (name, kind)
    for name in ("BERT", "T5")
    for kind in POSITIONS
    if (name, kind, VERSION < (0, 13)) != ("BERT", "rope", True)
]
ALGORITHMS = {"ring": RING, "ulysses": ULYSSES}


def seeded(model):
    """``model`` with weights that depend only on their names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def config(cp_size):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(**MODEL, context_parallel_size=cp_size)


def batch(seq_len, padding=0):
    """This rank's part of a batch without position ids, which these models compute themselves."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    whole = next(samples(seq_len, 1, None))
    whole = {name: whole[name] for name in ("tokens", "labels", "loss_mask")}
    whole["loss_mask"][:, seq_len - padding :] = 0
    return get_batch_on_this_cp_rank(whole)


def bert_model(cp_size, positions, binary_head=False):
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    model = BertModel(
        config(cp_size),
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=VOCABULARY,
        max_sequence_length=2 * SEQ,
        position_embedding_type=positions,
        add_binary_head=binary_head,
    )
    return seeded(model)


def bert(cp_size, positions, binary_head=False):
    """(loss of this rank, model) of BERT, whose last tokens are padding."""
    model, local = bert_model(cp_size, positions, binary_head), batch(SEQ, PADDING)
    real = torch.ones(ROWS, SEQ, dtype=torch.long)
    real[:, -PADDING:] = 0
    loss, _ = model(local["tokens"], real, lm_labels=local["labels"])
    return (loss * local["loss_mask"]).sum(), model


def t5(cp_size, positions, decoder_length=SEQ):
    """(loss of this rank, model) of T5 without padding."""
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    settings = config(cp_size)
    model = T5Model(
        config=settings,
        encoder_config=settings,
        transformer_encoder_layer_spec=t5_spec.encoder_model_with_local_spec(),
        transformer_decoder_layer_spec=t5_spec.decoder_model_with_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=2 * SEQ,
        position_embedding_type=positions,
    )
    read, written = batch(SEQ), batch(decoder_length)
    masks = torch.zeros(ROWS, 1, SEQ, SEQ, dtype=torch.bool), None, None
    if cp_size == 1:
        later = torch.ones(decoder_length, decoder_length, dtype=torch.bool).triu(1).expand(ROWS, 1, -1, -1)
        masks = masks[0], later, torch.zeros(ROWS, 1, decoder_length, SEQ, dtype=torch.bool)
    loss = seeded(model)(read["tokens"], written["tokens"], *masks, lm_labels=written["labels"])
    return (loss * written["loss_mask"]).sum(), model


def outcome(build, cp_size, *args):
    """(loss, name -> gradient), summed over the ranks."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(7)
    loss, model = build(cp_size, *args)
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    found["loss"] = loss.detach().clone()
    for value in found.values() if cp_size > 1 else ():
        dist.all_reduce(value)
    return found


def off(found, expected):
    """Largest difference of gradients relative to the largest one, or of the loss relative to itself."""
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "loss")
    worst = max(float((found[name] - value).abs().max()) for name, value in expected.items() if name != "loss")
    return max(worst / largest, abs(float(found["loss"] / expected["loss"]) - 1))


def message(build, *args):
    """The message of the ValueError that is raised, "" if none."""
    try:
        build(*args)
    except ValueError as error:
        return str(error)
    return ""


def rolled():
    """The result of roll_tensor for packed documents of 8 and 12 tokens without a record, and its sum."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    if "packed_seq_params" not in inspect.signature(roll_tensor).parameters:
        return None
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=12, max_seqlen_kv=12)
    held = ([1, 2, 7, 8, 11, 12, 13, 20, 21, 22], [3, 4, 5, 6, 14, 15, 16, 17, 18, 19])[dist.get_rank()]
    group = parallel_state.get_context_parallel_group()
    mine, count = roll_tensor(torch.tensor(held), dims=0, cp_group=group, packed_seq_params=params)
    return mine.tolist(), float(count)


def refusals():
    """name -> message when a model that context parallelism cannot compute is built or called."""
    from importlib.util import find_spec

    found = {
        "BERT with a binary head": message(bert, 2, "rope", True),
        "T5 of two lengths": message(t5, 2, "rope", SHORT),
    }
    variants = "megatron.core.transformer.experimental_attention_variant"
    if find_spec(variants) is not None and VERSION < (0, 19):
        from megatron.core.transformer.experimental_attention_variant.dsa import DSAttention

        found["sparse attention"] = message(lambda: DSAttention(config(2), None, 1, None, "self"))
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    found["LLaVA"] = message(lambda: LLaVAModel(config(2), *[None] * 20))
    return found


class Gate(torch.nn.Module):
    """A user's module."""

    def forward(self, hidden):
        return hidden


def added_later():
    """The messages about modules that were added to a built model, at its first and second forward pass."""
    from megatron.core.models.bert.pooler import Pooler

    model, other = bert_model(2, "learned_absolute"), bert_model(2, "learned_absolute")
    real = torch.ones(ROWS, SEQ, dtype=torch.long)
    model.gate = Gate()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(batch(SEQ)["tokens"], real)
    other.late = Pooler(32, torch.nn.init.ones_, config(1), False)
    other.late.config = config(2)
    named = [str(warning.message) for warning in caught if "modules of your own" in str(warning.message)]
    return named, message(lambda: other(batch(SEQ)["tokens"], real))


def trusted():
    """Whether a refused module is built if it is trusted."""
    from mindspeed_cp import megatron_adaptor

    settings = megatron_adaptor.state().settings
    before, settings.setup = settings.setup, replace(settings.setup, trusted_classes="Gate,Pooler")
    try:
        return message(bert, 2, "learned_absolute", True)
    finally:
        settings.setup = before


def compare(rank):
    """(algorithm, model, positions) -> difference from cp=1; rolled -> (values, sum); refusals -> messages."""
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    models = {"BERT": (bert, "full"), "T5": (t5, "causal")}
    with groups({"context_parallel_size": 1}):
        expected = {(name, kind): outcome(models[name][0], 1, kind) for name, kind in CASES}
    found = {}
    for algorithm, value in ALGORITHMS.items():
        for name, kind in CASES:
            build, mask = models[name]
            with groups({"context_parallel_size": 2, "algorithm": value, "attention_mask_type": mask}):
                found[algorithm, name, kind] = off(outcome(build, 2, kind), expected[name, kind])
    with groups({"context_parallel_size": 2, "algorithm": ULYSSES}):
        found["rolled"], found["refusals"] = rolled(), refusals()
        found["added later"], found["trusted"] = added_later(), trusted()
    return found
