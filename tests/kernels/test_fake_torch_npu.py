"""The stand-in for torch_npu refuses what the operators refuse: a kernel that passes on it can pass on a device."""

import fake_torch_npu
import pytest
import torch

from mindspeed_cp.kernels import npu_calls as npu


@pytest.fixture(params=fake_torch_npu.RELEASES)
def torch_npu(request):
    with fake_torch_npu.installed(request.param) as module:
        yield module


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(atten_mask=torch.ones(9, 9, dtype=torch.bool).triu(1)), "compressed mask of 2048 x 2048"),
        (dict(query=torch.zeros(9, 1, 64, dtype=torch.float64)), "must be float16, bfloat16 or float32"),
        (dict(head_num=3), "must divide by head_num"),
        (dict(key=torch.zeros(9, 1, 48), value=torch.zeros(9, 1, 48)), "multiple of 3 KV heads"),
        (dict(value=torch.zeros(9, 1, 128)), "must not exceed key's"),
        (dict(keep_prob=0.0), r"must lie in \(0, 1\]"),
        (dict(actual_seq_qlen=[9], actual_seq_kvlen=[9]), "TND only"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_the_fake_refuses_what_the_documentation_refuses(torch_npu, change, message):
    arguments = dict(
        query=torch.zeros(9, 1, 64),
        key=torch.zeros(9, 1, 64),
        value=torch.zeros(9, 1, 64),
        head_num=4,
        input_layout="SBH",
        atten_mask=npu.compressed_mask(torch.device("cpu")),
        sparse_mode=2,
    )
    torch_npu.npu_fusion_attention(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(**arguments | change)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sparse_mode=3, query=torch.zeros(9, 1, 64), key=torch.zeros(8, 1, 64)), "as many key rows"),
        (dict(sparse_mode=4, pre_tockens=-1, next_tockens=3), "negative pre_tockens"),
        (dict(sparse_mode=4, pre_tockens=4, next_tockens=-1), "negative next_tockens"),
        (dict(sparse_mode=4, pre_tockens=4, next_tockens=2147483647), "adds in int32"),
    ],
    ids=["right-down with more queries", "pre", "next", "overflow"],
)
def test_the_fake_refuses_what_the_tilings_refuse(torch_npu, change, message):
    arguments = dict(query=torch.zeros(9, 1, 64), key=torch.zeros(9, 1, 64)) | change
    mask = npu.compressed_mask(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(
            **arguments, value=arguments["key"], head_num=4, input_layout="SBH", atten_mask=mask
        )


@pytest.mark.cpu_only
def test_the_fake_refuses_a_document_without_keys_and_uninitialised_numbers(torch_npu):
    rows = torch.zeros(9, 4, 16)
    with pytest.raises(RuntimeError, match="must have key rows"):
        torch_npu.npu_fusion_attention(rows, rows, rows, 4, "TND", actual_seq_qlen=[4, 9], actual_seq_kvlen=[9, 9])
    q = torch.zeros(9, 1, 64)
    out, maximum, total, _, seed, offset, numels = torch_npu.npu_fusion_attention(q, q, q, 4, "SBH")
    statistics = dict(softmax_max=maximum, softmax_sum=total, attention_in=out)
    torch_npu.npu_fusion_attention_grad(q, q, q, q, 4, "SBH", **statistics)
    with pytest.raises(RuntimeError, match="uninitialised"):
        torch_npu.npu_fusion_attention_grad(q, q, q, q, 4, "SBH", **statistics, seed=seed, offset=offset, numels=numels)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "ends, message", [([0, 4, 9], "must not begin with 0"), ([4, 8], "ends at 8"), ([9, 4], "decrease")], ids=str
)
def test_the_fake_refuses_wrong_cumulative_lengths(torch_npu, ends, message):
    rows = torch.zeros(9, 4, 16)
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(rows, rows, rows, 4, "TND", actual_seq_qlen=ends, actual_seq_kvlen=[4, 9])


@pytest.mark.cpu_only
def test_the_published_schemas_reject_wrong_names_and_positional_keywords(torch_npu):
    rows = torch.zeros(9, 1, 64)
    with pytest.raises(RuntimeError, match="attn_mask"):
        torch_npu.npu_fusion_attention(rows, rows, rows, 4, "SBH", attn_mask=None)
    with pytest.raises(RuntimeError, match="positional"):
        torch_npu.npu_fusion_attention_grad(rows, rows, rows, rows, 4, "SBH", None)
