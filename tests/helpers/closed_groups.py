"""Process groups that others made; each function runs on every rank, like those of closed_runs."""

import contextlib

import torch
import torch.distributed as dist
from batch_runs import batch_of, build, configure, losses_of, split
from closed_runs import ALGORITHMS, PLAIN, SEQ, alone_of, contiguous, of_part, told, zigzag
from kept_groups import megatron_groups


@contextlib.contextmanager
def collection(size):
    """Process groups that are not registered with Megatron, as a ProcessGroupCollection."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    one = [dist.new_group([other]) for other in range(dist.get_world_size())][dist.get_rank()]
    cp = dist.new_group(list(range(size))) if size > 1 else one
    found = ProcessGroupCollection()
    for name in ("tp", "pp", "dp", "mp", "embd", "pos_embd", "ep", "expt_tp", "tp_ep", "expt_dp", "tp_ep_pp"):
        setattr(found, name, one)
    found.cp = found.dp_cp = found.tp_cp = found.tp_dp_cp = cp
    found.hcp = []
    yield found


def others(rank):
    """name -> difference with groups made before the import, or the message for groups that do not fit."""
    from megatron.core import parallel_state

    from mindspeed_cp import megatron_adaptor

    batch, found, whole = batch_of(PLAIN, seq=SEQ), {}, alone_of(PLAIN)
    for name, settings in ALGORITHMS.items():
        held = zigzag(rank) if name == "ring" else contiguous(rank)
        megatron_adaptor.undo()
        with megatron_groups(context_parallel_size=2):
            megatron_adaptor.apply()
            configure(settings, 2)
            found[name, "made before the import"] = of_part(build(2), split(batch), held, whole)
            megatron_adaptor.undo()
            megatron_adaptor.apply()
            configure(settings, 2)
            found[name, "undo and apply"] = of_part(build(2), split(batch), held, whole)
        megatron_adaptor.state().reset()
    with megatron_groups(context_parallel_size=1):
        found["another size"] = told(build, 2)
    with contextlib.suppress(Exception):
        parallel_state.destroy_model_parallel()
    found["no group"] = told(_attention_without_groups)
    return found


def _attention_without_groups():
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, context_parallel_size=2)
    DotProductAttention(config, 1, AttnMaskType.causal, "self")


def _overlapping(rank):
    """Whether the other ranks hang if one rank knows a pattern of position ids from another group."""
    from mindspeed_cp import megatron_adaptor

    state = megatron_adaptor.state()
    state.reset()
    configure({"algorithm": "megatron_cp_algo"}, 2)
    wrong = 0.0
    for members in ([0, 1], [0, 2]):
        group = dist.new_group(members)
        if rank in members:
            scope = state.scopes.of(group)
            held = contiguous(scope.rank)
            layout = state.foreign.record(state, scope, held, None, "").layout
            wrong += float((layout.positions(scope.rank) - held).abs().max())
    return {"groups that overlap": wrong}


def _ended():
    """Largest difference of attention over groups of the same ranks, each made after the previous one was destroyed."""
    from mindspeed_cp import context_parallel_attention, megatron_adaptor

    state, wrong = megatron_adaptor.state(), 0.0
    state.reset()
    configure({"algorithm": "hybrid_cp_algo", "ulysses_degree": 2}, 4)
    ones = torch.ones(4, 1, 4, 8)
    for _ in range(2):
        group = dist.new_group(list(range(4)))
        scope = state.scopes.of(group)
        layout = state.layout(16, scope=scope)
        out = context_parallel_attention(ones, ones, ones, config=scope.config, groups=scope.groups, layout=layout)
        wrong = max(wrong, float((out - 1).abs().max()))
        dist.destroy_process_group(group)
    assert len(state.scopes.items()) == 1
    return {"groups that were ended": wrong}


def collections(rank):
    """name -> difference of models whose groups come only from a ProcessGroupCollection."""
    import zlib

    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.utils import get_batch_on_this_cp_rank
    from model_cases import MODEL, VOCABULARY

    from mindspeed_cp import megatron_adaptor

    def model_of(size, groups_of):
        with contextlib.suppress(Exception):
            parallel_state._set_global_memory_buffer()
        model_parallel_cuda_manual_seed(3, tp_rank=0, ep_rank=0, etp_rank=0)
        settings = MODEL | {"num_query_groups": 2, "cross_entropy_loss_fusion": True}
        config = TransformerConfig(**settings, cross_entropy_fusion_impl="native", context_parallel_size=size)
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=2 * SEQ,
            position_embedding_type="rope",
            pg_collection=groups_of,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    def rebind(model, size, groups_of):
        """As frameworks do whose evaluation uses other sizes than their training."""
        model.config.context_parallel_size = size
        for module in model.modules():
            for name, value in (
                ("pg_collection", groups_of),
                ("cp_group", groups_of.cp),
                ("tp_cp_group", groups_of.cp),
            ):
                if getattr(module, name, None) is not None:
                    setattr(module, name, value)

    def results(model, groups_of):
        size, batch = model.config.context_parallel_size, batch_of(PLAIN, seq=SEQ)
        model.zero_grad()
        local = get_batch_on_this_cp_rank(dict(batch), cp_group=groups_of.cp) if size > 1 else batch
        losses = losses_of(model, local)
        (losses * local["loss_mask"]).sum().backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        if size > 1:
            for gradient in found.values():
                dist.all_reduce(gradient, group=groups_of.cp)
        return losses.detach(), found

    found = _overlapping(rank) | _ended()

    def difference(model, groups_of, where):
        mine, gradients = results(model, groups_of)
        return max(
            float((mine - losses[:, where]).abs().max()),
            *(float((gradients[key] - expected[key]).abs().max()) / scale for key in expected),
        )

    with collection(1) as one:
        losses, expected = results(model_of(1, one), one)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    cases = {
        "ulysses": ({"algorithm": "ulysses_cp_algo"}, lambda: contiguous(rank, 4)),
        "ring": ({"algorithm": "megatron_cp_algo"}, lambda: zigzag(rank, 4)),
        "hybrid": ({"algorithm": "hybrid_cp_algo", "ulysses_degree": 2}, None),
        "nothing said": (None, lambda: contiguous(rank, 4)),
    }
    for name, (settings, held) in cases.items():
        megatron_adaptor.state().reset()
        with collection(4) as four:
            if settings is not None:
                configure(settings, 4)
            model = model_of(4, four)
            layout = megatron_adaptor.state().scopes.of(four.cp)
            where = megatron_adaptor.state().layout(SEQ, scope=layout).positions(rank) if held is None else held()
            found[name] = difference(model, four, where)
            rebind(model, 1, one)
            found[name, "rebound to one rank"] = difference(model, one, slice(None))
            rebind(model, 4, four)
            found[name, "and back"] = difference(model, four, where)
    return found
