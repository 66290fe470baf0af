"""The effects of a framework's settings and of a TransformerConfig on ranks with Megatron."""

import contextlib
import io
from argparse import Namespace
from dataclasses import dataclass
from unittest import mock

from kept_groups import megatron_groups

RING, ULYSSES, HYBRID, GATHER = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"


def transformer_config(cp_size, cp_comm_type=None):
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        context_parallel_size=cp_size,
        cp_comm_type=cp_comm_type,
        masked_softmax_fusion=False,
    )


@contextlib.contextmanager
def process_groups(**sizes):
    """Context manager: Megatron's process groups; yields what was printed when they were made."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        with megatron_groups(**sizes) as said:
            printed.write(said)
            yield printed


def attention_error(cp_size, cp_comm_type):
    """Largest difference of Megatron's attention from dense attention, with the current algorithm."""
    import reference
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from mindspeed_cp import megatron_adaptor

    attention = DotProductAttention(
        transformer_config(cp_size, cp_comm_type), 1, AttnMaskType.causal, "self", attention_dropout=0.0
    )
    state = megatron_adaptor.state()
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(16, 1, 4, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    layout = state.layout(16)
    out = attention(*(layout.shard(tensor, state.cp_rank) for tensor in whole), None)
    allowed = reference.allowed_pairs(16, causal=True)
    expected = reference.attention(*whole, allowed=allowed).flatten(2)
    return float((out - layout.shard(expected, state.cp_rank)).abs().max())


def decided():
    from mindspeed_cp import megatron_adaptor

    config = megatron_adaptor.state().config
    return config.algorithm, config.ulysses_degree


def outcome(settings=None, comm_type=None, sizes=None, config_first=False):
    """(algorithm, degree) and the attention error, or the message of the ValueError."""
    from mindspeed_cp import megatron_adaptor

    try:
        if settings is not None:
            megatron_adaptor.configure_from(settings)
        if config_first:
            transformer_config(4, comm_type)
        levels = {} if sizes is None else {"hierarchical_context_parallel_sizes": sizes}
        with process_groups(context_parallel_size=4, **levels):
            error = attention_error(4, comm_type)
            return *decided(), error
    except ValueError as error:
        return str(error)
    finally:
        megatron_adaptor.state().reset()


CASES = {
    "nothing said": ({}, (ULYSSES, None)),
    "p2p": ({"comm_type": "p2p"}, (RING, None)),
    "a2a": ({"comm_type": "a2a"}, (ULYSSES, None)),
    "all_gather": ({"comm_type": "all_gather"}, (GATHER, None)),
    "one for each layer": ({"comm_type": ["p2p", "p2p"]}, (RING, None)),
    "a2a+p2p": ({"comm_type": "a2a+p2p", "sizes": [2, 2]}, (HYBRID, 2)),
    "sizes, then p2p": ({"comm_type": "p2p", "sizes": [2, 2]}, (RING, None)),
    "before the groups": ({"comm_type": "p2p", "config_first": True}, (RING, None)),
    "one of its own for each layer": ({"comm_type": ["p2p", "a2a"]}, (RING, None)),
    "two levels in one layer": ({"comm_type": ["a2a+p2p", "a2a"], "sizes": [2, 2]}, (HYBRID, 2)),
    "a list, before the groups": ({"comm_type": ["a2a", "allgather"], "config_first": True}, (ULYSSES, None)),
    "a2a+p2p without sizes": ({"comm_type": "a2a+p2p"}, "--hierarchical-context-parallel-sizes 2 2"),
    "dict": ({"settings": {"context_parallel_size": 4, "use_flash_attn": True}}, (ULYSSES, None)),
    "dict, then p2p": ({"settings": {"context_parallel_size": 4}, "comm_type": "p2p"}, (RING, None)),
    "dict without the size": ({"settings": {"multi_head_latent_attention": True}}, (ULYSSES, None)),
    "algorithm without the size": ({"settings": {"context_parallel_algo": GATHER}}, (GATHER, None)),
    "algorithm wins": ({"settings": {"context_parallel_algo": RING}, "comm_type": "a2a"}, (RING, None)),
    "dict's own p2p": ({"settings": {"context_parallel_size": 4, "cp_comm_type": "p2p"}}, (RING, None)),
    "hybrid": (
        {"settings": {"context_parallel_algo": HYBRID, "ulysses_degree_in_cp": "2", "num_attention_heads": 4}},
        (HYBRID, 2),
    ),
    "namespace": ({"settings": Namespace(context_parallel_size=4, context_parallel_algo=RING)}, (RING, None)),
    "namespace with Megatron's default": (
        {"settings": Namespace(context_parallel_size=4, cp_comm_type=["p2p"])},
        (ULYSSES, None),
    ),
    "another size": ({"settings": {"context_parallel_size": 2}}, "pass the same size to both"),
    "heads": ({"settings": {"context_parallel_size": 4, "num_attention_heads": 6}}, "--num-attention-heads 6"),
    "refused": ({"settings": {"context_parallel_algo": "adaptive_cp_algo"}}, "adaptive_cp_algo is not supported"),
    "nonsense": ({"settings": {"context_parallel_size": "two"}}, "--context-parallel-size two"),
    "a flag of another kind": ({"settings": {"use_cp_send_recv_overlap": "maybe"}}, "must be True or False"),
}


def decide(rank):
    """The rank's outcomes of CASES, and what happens if settings are passed again."""
    return {name: outcome(**said) for name, (said, _) in CASES.items()} | {
        "again": again(),
        "model": named_by_the_model(),
        "layers": sent_by_layers(),
        "newer": newer_megatrons(),
    }


def newer_megatrons():
    """What is said of settings that Megatron has after 0.19, by which it exchanges hidden states or groups itself."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    from mindspeed_cp.patches import process_groups as rows

    @dataclass
    class Newer(TransformerConfig):
        linear_cp_layout: str = "zigzag"
        attention_cp_layout: str = "zigzag"

    def config(**layouts):
        return Newer(num_layers=2, hidden_size=32, num_attention_heads=4, context_parallel_size=4, **layouts)

    with process_groups(context_parallel_size=4):
        config()
        config(linear_cp_layout="contiguous", attention_cp_layout="contiguous")
        layouts = _refused(lambda: config(linear_cp_layout="contiguous"))
    with mock.patch.object(rows, "arguments_of", lambda *given: {"dynamic_context_parallel": True}):
        return layouts, _refused(lambda: parallel_state.initialize_model_parallel(context_parallel_size=4))


def sent_by_layers():
    """(layer number, purposes of what was sent) of the first calls of attention in a model of two layers, with a
    cp_comm_type for each, and one of multi-token prediction.
    """
    import model_runs
    from model_cases import MTP, Case

    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.comm import count_bytes
    from mindspeed_cp.megatron import bridge

    calls, attend = [], bridge.context_parallel_attention

    def noted(*tensors, **keywords):
        with count_bytes() as sent:
            out = attend(*tensors, **keywords)
        calls.append((keywords["layer_number"], sorted(purpose for purpose, size in sent.bytes.items() if size)))
        return out

    with process_groups(context_parallel_size=4), mock.patch.object(bridge, "context_parallel_attention", noted):
        case = Case(MTP | {"mtp_num_layers": 1, "cp_comm_type": ["a2a", "p2p"]})
        model_runs.Trainer(case, 4, 32).run()
    megatron_adaptor.state().reset()
    return calls[:3]


def again():
    """configure_from before the groups, twice, and while they exist; then with two models that disagree."""
    from mindspeed_cp import megatron_adaptor

    found = []
    megatron_adaptor.repatch({"context_parallel_size": 2, "context_parallel_algo": RING})
    megatron_adaptor.repatch({"context_parallel_size": 4, "context_parallel_algo": GATHER, "kv_lora_rank": 512})
    with process_groups(context_parallel_size=4):
        found.append(decided())
        megatron_adaptor.repatch({"context_parallel_size": 4, "use_flash_attn": True})
        found.append(decided())
        megatron_adaptor.repatch({"context_parallel_algo": HYBRID, "ulysses_degree_in_cp": 2})
        found.append((*decided(), attention_error(4, None)))
        found.append(_refused(lambda: megatron_adaptor.repatch({"context_parallel_size": 2})))
        found.append(decided())
    megatron_adaptor.state().reset()
    with process_groups(context_parallel_size=4) as printed:
        transformer_config(4, "p2p")
        found.append(printed.getvalue().count("Context parallelism: "))
        transformer_config(1, "a2a")
        transformer_config(4, "p2p")
        found.append(_refused(lambda: transformer_config(4, "all_gather")))
        found.append(decided())
    megatron_adaptor.state().reset()
    with process_groups(context_parallel_size=4) as printed:  # made before any settings, as in ms-swift
        megatron_adaptor.repatch({"context_parallel_size": 4, "learning_rate": 1e-4})
        found.append((*decided(), attention_error(4, None), printed.getvalue()))
    megatron_adaptor.state().reset()
    return found


def named_by_the_model():
    """A TransformerConfig with MindSpeed's names: after the same repatch, without it, set later, after configure."""
    from megatron.core.transformer import TransformerConfig

    from mindspeed_cp import ContextParallelConfig, megatron_adaptor

    said = {"context_parallel_algo": HYBRID, "ulysses_degree_in_cp": 2}
    plain = dict(num_layers=2, hidden_size=32, num_attention_heads=4, context_parallel_size=4)
    found = []
    for first in (lambda: megatron_adaptor.repatch({"context_parallel_size": 4, **said}), lambda: None):
        first()
        with process_groups(context_parallel_size=4):
            config = TransformerConfig(**plain, **said)
            found.append((*decided(), config.ulysses_degree_in_cp, attention_error(4, None)))
        megatron_adaptor.state().reset()
    with process_groups(context_parallel_size=4):
        config = TransformerConfig(**plain)
        vars(config).update(said)
        config.__post_init__()  # as Megatron-Bridge does after setting all fields
        found.append((*decided(), config.ulysses_degree_in_cp, attention_error(4, None)))
    megatron_adaptor.state().reset()
    megatron_adaptor.configure(ContextParallelConfig(context_parallel_size=4, algorithm=RING))
    found.append(_refused(lambda: TransformerConfig(**plain, **said)))
    megatron_adaptor.state().reset()
    return found


def _refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
