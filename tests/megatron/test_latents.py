"""Multi-latent attention of Megatron whose latents travel: hidden states, all gradients, bytes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from distributed import run_ranks
from latent_runs import RUNS, SPLIT, compare, runs
from trainer_runs import IMPORTED

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.megatron import latents

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]


def check(ranks):
    wrong = [
        (rank, name, *found)
        for rank, results in enumerate(ranks)
        for name, found in results.items()
        if not found[0] < 1e-10 or (found[2] and found[1] != found[2])
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_hidden_states_and_all_gradients_equal_those_of_one_process():
    check(run_ranks(2, compare, runs(RUNS), timeout=200, fresh=True, imported=IMPORTED))


def test_latents_travel_beside_tensor_and_sequence_parallelism():
    check(run_ranks(4, compare, runs(SPLIT), timeout=200, fresh=True, imported=IMPORTED))


class Ours(torch.nn.Module):
    def forward(self):
        pass

    forward.exchanges_context_parallel = forward.holds_latents_back = True


class Another(torch.nn.Module):
    pass


class Attention(SimpleNamespace):
    """Megatron's MLASelfAttention as far as it is read."""

    def get_query_key_value_tensors(self):
        pass

    get_query_key_value_tensors.ends_as_latents = True


class Changing(Attention):
    def get_query_key_value_tensors(self):
        pass


def module(core=Ours, linear=Ours, bias=None, config=(), kind=Attention, forward=None, **attributes):
    """An attention module; ``forward`` is put in front of its up-projection's."""
    settings = dict(qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128, apply_rope_fusion=False, fp8=None)
    up = linear()
    up.weight, up.bias = torch.empty(16 * 256, 512, device="meta"), bias
    if forward is not None:
        up.forward = forward
    for name, value in attributes.items():
        setattr(up.weight if name.startswith("__") else up, name, value)
    return kind(
        layer_number=2,
        config=SimpleNamespace(**(settings | dict(config))),
        core_attention=core(),
        linear_kv_up_proj=up,
        num_attention_heads_per_partition=16,
        recompute_up_proj=False,
    )


def travels(given, exchange="latent", cp=4, sizes=(), **settings):
    """What ``latents_of`` says of a module."""
    config = ContextParallelConfig(
        context_parallel_size=cp, algorithm="megatron_cp_algo", mla_exchange=exchange, **settings
    )
    groups = SimpleNamespace(topology="switch")
    groups.of = lambda config: groups
    scope = SimpleNamespace(config=config, alone=cp == 1, groups=groups)
    return latents.latents_of(SimpleNamespace(scope_of=lambda of: scope, sizes=dict(sizes)), given)


REFUSED = {
    "core attention is a Another": module(core=Another),
    "up-projection is a Another, which may do more": module(linear=Another),
    "up-projection is a Ours, which may do more": module(forward=lambda latent: latent),
    "get_query_key_value_tensors of Changing may do more": module(kind=Changing),
    "has a bias": module(bias=torch.zeros(3)),
    "in fp8 or fp4": module(config={"fp8": "hybrid"}),
    "--delay-wgrad-compute takes": module(config={"delay_wgrad_compute": True}),
    "--no-rope-fusion": module(config={"apply_rope_fusion": True}),
    "fully sharded weight": module(__fsdp_param__=True),
    "shared out and gathered": module(gtp_remat_size=2),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_send_latents_is_refused_where_they_are_asked_for_and_sends_heads_else(says):
    with pytest.raises(ValueError, match=f"--cp-mla-exchange latent: .*{says}.*; use --cp-mla-exchange heads"):
        travels(REFUSED[says])
    with pytest.warns(UserWarning, match=f"auto sends heads: .*{says}"):
        assert travels(REFUSED[says], "auto") is None
    assert travels(REFUSED[says], "heads") is None


def test_autocast_sends_heads_for_its_types_are_not_those_of_the_weight():
    given = module()
    given.linear_kv_up_proj.weight = torch.empty(16 * 256, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="autocast computes its up-projection .*; use --cp-mla-exchange heads"):
            travels(given)
        with pytest.warns(UserWarning, match="auto sends heads: autocast"):
            assert travels(given, "auto") is None
    assert travels(given, "auto") is not None


def test_a_module_sends_latents_where_that_is_asked_for_or_worth_it():
    assert travels(module()).expansion.widths == (64, 512)
    assert travels(module(), "auto") is not None and travels(module(), "heads") is None
    assert travels(module(), cp=1) is None
    assert travels(module(), layer_algorithms="1:cp-mla-exchange=heads") is None, "layer 2 of Megatron"
    assert travels(module(), "heads", layer_algorithms="1:cp-mla-exchange=latent") is not None
    with pytest.raises(ValueError, match="several context-parallel sizes"):
        travels(module(), sizes={2: None})


def held_back(rank=512):
    found = travels(module())
    return latents.UpProjected(replace(found), torch.arange(2.0 * rank).view(2, 1, rank))


def test_what_is_held_back_goes_through_megatrons_steps_and_ends_as_what_travels():
    made = held_back()
    assert made.size() == (2, 1, 16 * 256) and made.size(-1) == 16 * 256
    key, value = torch.split(made.view(2, 1, 16, 256), [128, 128], dim=-1)
    rotated = torch.ones(2, 1, 1, 64).expand(-1, -1, 16, -1)
    assert torch.cat([key, rotated], dim=-1).contiguous().shape == (2, 1, 1, 64)
    assert torch.equal(value.contiguous().squeeze(2), torch.arange(1024.0).view(2, 1, 512))


@pytest.mark.parametrize(
    "step",
    [
        lambda made: torch.ones(1) + made,
        lambda made: made + torch.ones(1),
        lambda made: made * 1.5,
        lambda made: made.view(2, 16 * 256),
        lambda made: made.permute(1, 0, 2),
        lambda made: made.contiguous(),
        lambda made: torch.split(made, [100, 156], dim=-1),
        lambda made: torch.split(made, [128, 128], dim=-1)[0].contiguous(),
        lambda made: torch.nn.functional.pad(made, [0, 1]),
        lambda made: torch.stack([made, made]),
    ],
)
def test_any_other_step_of_megatron_is_refused_with_the_way_out(step):
    with pytest.raises(ValueError, match="--cp-mla-exchange heads"):
        step(held_back())


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_the_norm_inside_transformer_engines_linear_comes_before_the_latent_travels(normalization):
    latent, gamma, beta = (torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((3, 1, 8), 8, 8))
    linear = SimpleNamespace(
        layer_norm_weight=gamma, layer_norm_bias=beta, zero_centered_gamma=True, eps=1e-3, normalization=normalization
    )
    centered = latent - latent.mean(-1, keepdim=True) if normalization == "LayerNorm" else latent
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + gamma)
    torch.testing.assert_close(
        latents._normed(linear, latent), expected + beta if normalization == "LayerNorm" else expected
    )
    assert latents._normed(SimpleNamespace(), latent) is latent
