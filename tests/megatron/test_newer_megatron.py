"""What Megatron 0.17 and later changed, by stand-ins of their signatures and modules; no Megatron is needed.

The versions themselves are tried by scripts/test_megatron_lm.sh and, where they are installed, by every test that
touches Megatron.
"""

import importlib
import importlib.util
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from adaptors import RING, adaptor_of

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.patches import batches, experts, rotary
from mindspeed_cp.patches import multi_token_prediction as mtp
from mindspeed_cp.patches.computing import COMPUTING_OVER
from mindspeed_cp.patches.machine import libraries
from mindspeed_cp.patches.machine import triton as without_triton
from mindspeed_cp.settings.notices import ContextParallelWarning

pytestmark = pytest.mark.cpu_only
ALONE = ContextParallelConfig(context_parallel_size=1)
SEQ = 8
PAGED_STASH = """
import torch
import triton
import triton.language as tl
from math import pi

@triton.jit
def copy_kernel(pointer, SIZE: tl.constexpr):
    pass
"""


def split(original, batch, config=RING, adaptor=None, **more):
    adaptor = adaptor or adaptor_of(config)
    return batches.get_batch_on_this_cp_rank(adaptor, original, batch, **more)


def as_in_0_16(batch, cp_group=None):
    return {"original": True}


def as_in_0_18(batch, is_hybrid_cp, cp_group=None, hybrid_cp_group_func=None):
    return {"original": True, "is_hybrid_cp": is_hybrid_cp}


def as_in_0_19(batch, is_hybrid_cp, cp_group=None, hybrid_cp_group_func=None, use_per_sequence_balancing=False):
    return {"original": True, "is_hybrid_cp": is_hybrid_cp}


def batch_of(**more):
    tokens = torch.arange(SEQ)[None]
    return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(1, SEQ), "position_ids": tokens, **more}


@pytest.mark.parametrize("original", [as_in_0_16, as_in_0_18, as_in_0_19])
def test_code_written_for_another_version_splits_batches(original):
    assert split(original, batch_of())["tokens"].tolist() == [[0, 1, 6, 7]]
    alone = split(original, batch_of(), ALONE)
    assert alone["original"] and alone.get("is_hybrid_cp", False) is False


@pytest.mark.parametrize("padded", [None, torch.tensor([[0, 4, 8]])], ids=["as they are", "padded"])
@pytest.mark.parametrize("original", [as_in_0_18, as_in_0_19])
def test_documents_that_a_batch_brings_are_used_and_stay_whole(original, padded):
    adaptor, ends = adaptor_of(), torch.tensor([[0, 3, 6]] if padded is not None else [[0, 3, 8]])
    more = dict(cu_seqlens=ends, cu_seqlens_padded=padded, max_seqlen=torch.tensor([5]), local_cp_size=None)
    local = split(original, batch_of(**more), adaptor=adaptor, is_hybrid_cp=False)
    assert local["cu_seqlens"] is ends and local["cu_seqlens_padded"] is padded and local["max_seqlen"].tolist() == [5]
    (found,) = adaptor.records.find([local["tokens"]]).documents
    assert found == ((0, 3, 8) if padded is None else (0, 3, 4, 7, 8))


def test_boundaries_as_many_as_tokens_are_not_split():
    ends = torch.tensor([[0, 1, 2, 3, 4, 5, 6, SEQ]])
    local = split(as_in_0_19, batch_of(cu_seqlens=ends), is_hybrid_cp=False)
    assert ends.size(1) == SEQ and torch.equal(local["cu_seqlens"], ends)


def test_what_is_not_known_by_name_is_split_by_its_length_and_named():
    weights, statistics = torch.arange(SEQ)[None], torch.zeros(1, 3)
    with pytest.warns(ContextParallelWarning, match="weights_of_tokens: not known by name, and split"):
        local = split(as_in_0_16, batch_of(weights_of_tokens=weights, statistics=statistics))
    assert local["weights_of_tokens"].tolist() == [[0, 1, 6, 7]] and local["statistics"] is statistics
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(as_in_0_16, batch_of(statistics=statistics))


def test_batches_without_a_known_name_are_split_too():
    """One of a pipeline stage, or of a loop of its own that names its sequences."""
    from mindspeed_cp.megatron import splitting

    with pytest.warns(ContextParallelWarning, match="hidden: not known by name"):
        assert split(as_in_0_16, {"hidden": torch.arange(SEQ)[None]})["hidden"].tolist() == [[0, 1, 6, 7]]
    adaptor, batch = adaptor_of(), {"hidden": torch.arange(SEQ)[None]}
    local = splitting.sharded(adaptor, adaptor.main, batch, None, ("hidden",))
    assert local["hidden"].tolist() == [[0, 1, 6, 7]]


@pytest.mark.parametrize("more", [{"cu_seqlens": torch.tensor([[0, SEQ]])}, {}], ids=["packed", "one sequence"])
def test_dynamic_context_parallelism_is_refused_by_name(more):
    with pytest.raises(ValueError, match="--hybrid-context-parallel gives every micro-batch.*leave out"):
        split(as_in_0_18, batch_of(local_cp_size=torch.tensor(1), **more), is_hybrid_cp=True)


def mtp_loss_of_0_19(labels, loss_mask, config, input_ids=None, cp_group=None):
    """What is left of Megatron's: the factor on each token's loss, after one shift."""
    before = loss_mask.sum()
    with COMPUTING_OVER.set(ADAPTORS[cp_group].main):
        mask, num_tokens = mtp.roll_tensor(ADAPTORS[cp_group], roll_until_0_13, loss_mask)
    return mask * (before if config.calculate_per_token_loss else 1) / num_tokens.clamp(min=1)


def roll_until_0_13(tensor, shifts=-1, dims=-1):
    raise AssertionError("not Megatron's own")


def test_a_whole_batch_is_shifted_as_megatron_does_before_it_is_split():
    """As MindSpeed-LLM does for its own layers of multi-token prediction, by more than one place too."""

    def roll(tensor, shifts=-1, dims=-1):
        return torch.roll(tensor, shifts, dims), "whole"

    assert mtp.roll_tensor(adaptor_of(), roll, torch.arange(3), shifts=-2)[0].tolist() == [2, 0, 1]


ADAPTORS = [adaptor_of(cp_rank=rank) for rank in range(2)]
for of_rank in ADAPTORS:
    of_rank.fixed.groups.cp_group = "the ranks"


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("targets", [1, 3, 7])
def test_fewer_targets_than_ranks_weigh_as_without_context_parallelism(targets, per_token, monkeypatch):
    whole = torch.tensor([[0.0, *[1.0] * targets, *[0.0] * (SEQ - 1 - targets)]])
    masks = [ADAPTORS[0].layout(SEQ).shard(whole, rank, dim=1) for rank in range(2)]
    monkeypatch.setattr(mtp, "record_of_length", lambda adaptor, *args: SimpleNamespace(layout=adaptor.layout(SEQ)))
    size_of_ones = mtp.Counted(torch.ones(1), ADAPTORS[0].main).mask
    monkeypatch.setattr(mtp, "gather_sequence", lambda mine, **how: whole * size_of_ones)
    monkeypatch.setattr(mtp.dist, "all_reduce", lambda total, group: total.copy_(2 * whole.sum()))
    config = SimpleNamespace(calculate_per_token_loss=per_token, context_parallel_size=2)
    weights = []
    for rank, adaptor in enumerate(ADAPTORS):
        weights.append(mtp.process_mtp_loss(adaptor, mtp_loss_of_0_19, masks[rank], masks[rank], config, cp_group=rank))
    # A loss per token is added over the ranks and divided by all tokens later; others are averaged over the ranks.
    found = sum(float(weight.sum()) for weight in weights) / (1 if per_token else 2)
    assert found == pytest.approx(targets if per_token else 1)


def test_labels_that_are_not_given_are_the_next_tokens_and_the_last_one_has_no_loss(monkeypatch):
    shifted = SimpleNamespace(
        roll_tensor=lambda tensor, **how: (torch.cat([tensor[:, 1:], 0 * tensor[:, :1]], 1), None)
    )
    monkeypatch.setattr(mtp.importlib, "import_module", lambda name: shifted)
    given = {}

    def process_mtp_loss(labels, loss_mask, config, input_ids=None, cp_group=None):
        given.update(labels=labels.tolist(), mask=loss_mask.tolist())

    config = SimpleNamespace(calculate_per_token_loss=False, context_parallel_size=2)
    mtp.process_mtp_loss(ADAPTORS[0], process_mtp_loss, None, torch.ones(1, 3), config, torch.tensor([[5, 6, 7]]))
    assert given == {"labels": [[6, 7, 0]], "mask": [[2, 2, 0]]}


def test_several_packed_rows_are_refused():
    rows = {"tokens": torch.zeros(2, SEQ), "cu_seqlens": torch.tensor([[0, SEQ], [0, SEQ]])}
    with pytest.raises(ValueError, match="a packed batch is one row; use --micro-batch-size 1"):
        split(as_in_0_19, rows, is_hybrid_cp=False)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module that imports Triton, and one that tries to, where there is no Triton."""
    package = tmp_path / "a_megatron"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "paged_stash.py").write_text(PAGED_STASH)
    (package / "careful.py").write_text("try:\n    import triton\nexcept ImportError:\n    triton = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "meta_path", [without_triton.WithoutTriton("a_megatron.paged_stash"), *sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_megatron"]:
        del sys.modules[name]


def test_the_module_with_kernels_alone_is_imported_without_triton(library):
    module = importlib.import_module("a_megatron.paged_stash")
    assert module.torch is torch and module.pi > 3
    with pytest.raises(ValueError, match="kernel copy_kernel needs Triton, which is not installed"):
        module.copy_kernel[(1,)](None)
    assert importlib.import_module("a_megatron.careful").triton is None
    with pytest.raises(ImportError):
        importlib.import_module("triton")


def router_of(by_ranks):
    """megatron.core.transformer.moe.router, as far as a loss is attached: until 0.18, and from 0.19 on."""
    module = SimpleNamespace(MoEAuxLossAutoScaler=None, get_moe_metrics_tracker=None)

    def attach_and_log_load_balancing_loss(
        self,
        activation,
        aux_loss_coeff,
        aux_loss,
        aux_loss_name,
        reduce_group,
        needs_dp_avg=True,
        valid_token_count=None,
    ):
        module.get_moe_metrics_tracker().record(aux_loss_name, aux_loss / aux_loss_coeff, self.layer_number)
        tokens = activation.shape[0] * (self.tp_cp_group.size() if by_ranks else 1)
        return module.MoEAuxLossAutoScaler.apply(activation, aux_loss * tokens if self.calculate_per_token_loss else 0)

    module.TopKRouter = SimpleNamespace(attach_and_log_load_balancing_loss=attach_and_log_load_balancing_loss)
    return module


@pytest.mark.parametrize("by_ranks", [False, True])
def test_whether_a_router_counts_the_ranks_itself_is_asked_and_leaves_it_as_it_was(by_ranks, monkeypatch):
    router = router_of(by_ranks)
    monkeypatch.setitem(sys.modules, f"{experts.MOE}.router", router)
    monkeypatch.setattr(experts.importlib, "import_module", sys.modules.__getitem__)
    assert experts._multiplies_by_ranks.__wrapped__() is by_ranks
    assert router.MoEAuxLossAutoScaler is router.get_moe_metrics_tracker is None


def module_of(folder, source, **names):
    """A module with a file, as Megatron's are; ``names`` are there before its source runs."""
    path = folder / "stand_in.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("stand_in", path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(names)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "factor, scales",
    [
        ("loss_scale * cp_group_size", True),
        ("cp_group_size * loss_scale", True),
        ("loss_scale  # no longer loss_scale * cp_group_size", False),
    ],
)
def test_whether_megatron_scales_losses_of_experts_is_asked_whatever_its_words(factor, scales, tmp_path, monkeypatch):
    scaler = SimpleNamespace(main_loss_backward_scale=1)
    source = f"""
def forward_step_calc_loss(model, output_tensor, loss_func, cp_group_size):
    loss_scale = 1
    scaler.main_loss_backward_scale = {factor}
"""
    schedules = SimpleNamespace(schedules=module_of(tmp_path, source, scaler=scaler))
    monkeypatch.setitem(sys.modules, "megatron.core.pipeline_parallel", schedules)
    monkeypatch.setitem(sys.modules, f"{experts.MOE}.moe_utils", SimpleNamespace(MoEAuxLossAutoScaler=scaler))
    assert experts._scales_with_cp.__wrapped__() is scales and scaler.main_loss_backward_scale == 1


def test_a_patch_that_is_needed_is_not_left_out_for_a_word_in_a_comment(tmp_path, monkeypatch):
    writer = module_of(
        tmp_path,
        "# serialization_format: torch's default\ndef _write_item(item, serialization_format):\n    return item\n",
    )
    monkeypatch.setitem(sys.modules, libraries.CHECKPOINT_WRITER, writer)
    assert libraries.format_is_passed() == ""


@pytest.mark.parametrize("needs", [False, True])
def test_a_patch_is_applied_for_what_is_read_and_not_for_a_word_in_a_comment(needs, tmp_path, monkeypatch):
    reads = "te_general_gemm is None" if needs else "True  # without te_general_gemm"
    module = module_of(tmp_path, f"def gemm():\n    return {reads}\n")
    monkeypatch.setitem(sys.modules, libraries.EXPERTS, module)
    assert libraries.gemm_is_named() == ("" if needs else "this version does not need Transformer Engine here")


def test_what_only_the_packed_embedding_takes_stays_with_it(monkeypatch):
    """From 0.20 on Megatron's latent attention hands the longest document's length to the packed embedding."""
    utils = SimpleNamespace(
        _get_thd_freqs_on_this_cp_rank=lambda cp_rank, cp_size, x, freqs, offset=0: freqs,
        _apply_rotary_pos_emb_bshd=lambda t, freqs, mscale=1.0: t * freqs.unsqueeze(-1) * mscale,
    )
    monkeypatch.setattr(rotary.importlib, "import_module", lambda name: utils)

    def own(t, cu_seqlens, freqs, mscale=1.0, cp_group=None, max_seqlen=None):
        pytest.fail("not Megatron's own")

    freqs, ends = torch.arange(8.0).view(8, 1, 1), torch.tensor([0, 4, 8])
    more = dict(mscale=2.0, cp_group=None, max_seqlen=5)
    turned = rotary.apply_packed(adaptor_of(cp_rank=1), own, torch.ones(4, 1, 2), ends, freqs, **more)
    assert turned[:, 0, 0].tolist() == [2.0, 4.0, 10.0, 12.0]  # of the zigzag of each document


def fused_until_0_18(t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None):
    return "fused"


def fused_from_0_19(t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None, mla_rotary_interleaved=False):
    return "fused"


@pytest.mark.parametrize(
    "original, given, passed_on",
    [
        (fused_until_0_18, {}, {"multi_latent_attention": True}),
        (fused_from_0_19, {"mla_rotary_interleaved": False}, {"mla_rotary_interleaved": False}),
        (fused_from_0_19, {"mla_rotary_interleaved": True}, {"mla_rotary_interleaved": True}),
    ],
)
def test_who_says_how_latent_heads_are_interleaved_says_it_without_fusion_too(original, given, passed_on, monkeypatch):
    def thd(t, cu_seqlens, freqs, rotary_interleaved=False, mla_rotary_interleaved=None, mscale=1.0, cp_group=None,
            multi_latent_attention=None):  # fmt: skip
        return {
            "multi_latent_attention": multi_latent_attention, "mla_rotary_interleaved": mla_rotary_interleaved,
            "mscale": mscale,
        }  # fmt: skip

    monkeypatch.setattr(rotary.importlib, "import_module", lambda name: SimpleNamespace(_apply_rotary_pos_emb_thd=thd))
    config = SimpleNamespace(
        apply_rope_fusion=True, multi_latent_attention=True, rotary_interleaved=False, context_parallel_size=2
    )
    adaptor = adaptor_of()
    found = rotary.unfused_when_packed(adaptor, original, "t", "freqs", config, cu_seqlens="ends", mscale=2.0, **given)
    assert {name: value for name, value in found.items() if value is not None} == {**passed_on, "mscale": 2.0}
    assert rotary.unfused_when_packed(adaptor, original, "t", "freqs", config) == "fused"
