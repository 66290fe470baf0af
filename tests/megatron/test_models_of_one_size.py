"""Models whose layers know one context-parallel size are refused by name, whoever made their classes."""

from types import SimpleNamespace

import pytest

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.megatron import decision, sizes


class GPTModel:
    """Megatron's, as far as dynamic context parallelism asks it."""

    def __init__(self, **settings):
        self.config = SimpleNamespace(**{"calculate_per_token_loss": True, "num_moe_experts": None, **settings})


class OfAFramework(GPTModel):
    pass


class MambaModel:
    config = SimpleNamespace(calculate_per_token_loss=True)


@pytest.mark.parametrize(
    "model, says",
    [
        (MambaModel(), "MambaModel has layers that know one size for all; only GPTModel"),
        (GPTModel(calculate_per_token_loss=False), "needs --calculate-per-token-loss"),
        (GPTModel(multi_latent_attention=True), "--multi-latent-attention knows one size for all"),
        (OfAFramework(num_moe_experts=4), "--num-experts knows one size for all"),
        (GPTModel(mtp_num_layers=1), "--mtp-num-layers knows one size for all"),
        (GPTModel(experimental_attention_variant="dsa"), "--experimental-attention-variant knows one size for all"),
    ],
    ids=["another model", "loss", "latent attention", "experts", "multi-token prediction", "layers with a state"],
)
def test_models_whose_layers_know_one_size_are_refused_by_name(model, says):
    with pytest.raises(
        ValueError, match=f"--hybrid-context-parallel gives.*{says}.*leave out --hybrid-context-parallel"
    ):
        sizes.check_model(model)
    sizes.check_model(OfAFramework(multi_latent_attention=False, mtp_num_layers=None))


def test_a_hybrid_without_its_ring_drops_what_speaks_of_one():
    hybrid = ContextParallelConfig(
        context_parallel_size=4,
        algorithm="hybrid_cp_algo",
        ulysses_degree=2,
        kv_exchange="direct",
        send_recv_overlap=True,
        kv_cache_policy="full",
    )
    small, whole = (decision.of_size(hybrid, size, None) for size in (2, 4))
    assert (small.algorithm, small.kv_exchange, small.kv_cache_policy) == ("ulysses_cp_algo", "ring", None)
    assert not small.send_recv_overlap and whole == hybrid
