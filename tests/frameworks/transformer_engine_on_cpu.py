"""Transformer Engine's norms, linears and attention on the CPU, so that frameworks which need them can run here.

``install()`` puts the names of release 2.11.0 into ``sys.modules``, with its signatures (tests/helpers/
fake_transformer_engine), and lets the classes that a GPT model is built of compute what the published ones compute, in
plain torch and without tensor parallelism. Whatever else is called refuses. Without the fused optimizers Megatron takes
torch's.

s: tokens, b: rows, t: tokens of all documents, h: heads, d: head size.
"""

import contextlib
import sys

import fake_transformer_engine
import torch
import torch.nn.functional as F

RELEASE = "2.11.0"
LEFT_OUT = "transformer_engine.pytorch.optimizers"  # Megatron falls back to torch's
CAUSAL, FULL = ("causal", "padding_causal"), ("no_mask", "padding")


def install():
    """``import transformer_engine`` gives the stand-in from now on; call it before anything imports Megatron."""
    fake_transformer_engine.install(RELEASE)
    del sys.modules[LEFT_OUT], sys.modules["transformer_engine.pytorch"].optimizers
    module = sys.modules["transformer_engine.pytorch"]
    for name, build in COMPUTED.items():
        checked = getattr(module, name)
        setattr(module, name, type(name, (build(checked),), {"__module__": module.__name__}))
    module.fp8_autocast = module.fp8.fp8_autocast = module.autocast = _full_precision
    module.fp8_model_init = module.quantized_model_init = _full_precision
    module.cpu_offload.get_cpu_offload_context = _no_offload


@contextlib.contextmanager
def _full_precision(enabled=True, **given):
    if enabled:
        raise NotImplementedError("there is no FP8 on the CPU; switch it off")
    yield


def _no_offload(enabled=False, *given, **named):
    """(context of the forward pass, function that is called with its output) without any offloading."""
    if enabled:
        raise NotImplementedError("the stand-in offloads nothing")
    return contextlib.nullcontext(), lambda output: output


def _make_parameter(module, name, shape, given, initialize):
    """Make a parameter as Transformer Engine does: from the tracker's random state, where there is one."""
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=given.get("params_dtype") or torch.get_default_dtype()))
    setattr(module, name, parameter)
    tracker = (given.get("get_rng_state_tracker") or (lambda: None))()
    named = given.get("rng_tracker_name")
    with contextlib.nullcontext() if tracker is None else tracker.fork(*[named] if named else []), torch.no_grad():
        initialize(parameter)
    return parameter


def _normalized(x, weight, bias, eps, zero_centered):
    """LayerNorm where there is a bias, else RMSNorm; over the last dimension, in float32 or better."""
    weight = weight + 1 if zero_centered else weight
    wide = x if x.dtype == torch.float64 else x.float()
    if bias is not None:
        return F.layer_norm(wide, wide.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
    return F.rms_norm(wide, wide.shape[-1:], weight.to(wide), eps).to(x.dtype)


def _norm(with_bias):
    def build(checked):
        class Norm(checked):
            def __init__(self, normalized_shape=None, **given):
                super().__init__(normalized_shape, **given)
                self.eps, self.zero_centered = given.get("eps", 1e-5), given.get("zero_centered_gamma", False)
                size = normalized_shape or given["hidden_size"]
                start = torch.nn.init.zeros_ if self.zero_centered else torch.nn.init.ones_
                self.weight = _make_parameter(self, "weight", size, given, start)
                self.bias = _make_parameter(self, "bias", size, given, torch.nn.init.zeros_) if with_bias else None
                for parameter in self.parameters():
                    parameter.sequence_parallel = given.get("sequence_parallel")

            def forward(self, x):
                return _normalized(x, self.weight, self.bias, self.eps, self.zero_centered)

        return Norm

    return build


def _linear(checked):
    class Linear(checked):
        def __init__(self, in_features, out_features, **given):
            super().__init__(in_features, out_features, **given)
            if given.get("tp_size", 1) > 1 or given.get("fuse_wgrad_accumulation"):
                raise NotImplementedError("the stand-in has no tensor parallelism and no fused gradient accumulation")
            self.in_features, self.out_features, self.tp_size = in_features, out_features, 1
            self.use_bias, self.return_bias = given.get("bias", True), given.get("return_bias", False)
            self.parallel_mode, self.apply_bias = given.get("parallel_mode"), self.use_bias and not self.return_bias
            normal = given.get("init_method") or (lambda weight: torch.nn.init.normal_(weight, 0.0, 0.023))
            _make_parameter(self, "weight", (out_features, in_features), given, normal)
            self.bias = None
            if self.use_bias:
                _make_parameter(self, "bias", out_features, given, torch.nn.init.zeros_)

        def forward(self, x, is_first_microbatch=None, **given):
            out = F.linear(x, self.weight, self.bias if self.apply_bias else None)
            return (out, self.bias) if self.return_bias else out

    return Linear


def _norm_linear(checked):
    class LayerNormLinear(_linear(checked)):
        def __init__(self, in_features, out_features, **given):
            super().__init__(in_features, out_features, **given)
            self.eps, self.zero_centered = given.get("eps", 1e-5), given.get("zero_centered_gamma", False)
            start = torch.nn.init.zeros_ if self.zero_centered else torch.nn.init.ones_
            _make_parameter(self, "layer_norm_weight", in_features, given, start)
            self.layer_norm_bias = None
            if given.get("normalization", "LayerNorm") == "LayerNorm":
                _make_parameter(self, "layer_norm_bias", in_features, given, torch.nn.init.zeros_)
            self.return_layernorm_output = given.get("return_layernorm_output", False)

        def forward(self, x, is_first_microbatch=None, **given):
            x = _normalized(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered)
            out = super().forward(x, is_first_microbatch, **given)
            return (out, x) if self.return_layernorm_output else out

    return LayerNormLinear


def _attention(checked):
    class DotProductAttention(checked):
        calls = 0  # of the stand-in, which computes nothing where mindspeed_cp's attention runs

        def __init__(self, num_attention_heads, kv_channels, **given):
            super().__init__(num_attention_heads, kv_channels, **given)
            self.qkv_format = given.get("qkv_format", "sbhd")
            self.softmax_scale = given.get("softmax_scale")
            if given.get("softmax_type", "vanilla") != "vanilla" or given.get("window_size") not in (None, (-1, 0)):
                raise NotImplementedError("the stand-in has neither windows nor softmax offsets")

        def forward(self, query_layer, key_layer, value_layer, attention_mask=None, **given):
            DotProductAttention.calls += 1
            kind = given.get("attn_mask_type") or "causal"
            if (given.get("qkv_format") or self.qkv_format) != "thd":
                return self._rows(query_layer, key_layer, value_layer, kind, attention_mask).flatten(2)
            padded = given.get("cu_seqlens_q_padded")
            ends = (given["cu_seqlens_q"] if padded is None else padded).tolist()
            pieces = [
                self._rows(*(x[start:stop, None] for x in (query_layer, key_layer, value_layer)), kind, None)[:, 0]
                for start, stop in zip(ends, ends[1:])
            ]
            return torch.cat(pieces).flatten(1)

        def _rows(self, query, key, value, kind, mask):
            """(s, b, h, d) of whole rows."""
            if kind not in CAUSAL + FULL + ("arbitrary",):
                raise NotImplementedError(f"the stand-in has no mask of the kind {kind}")
            groups = query.size(2) // key.size(2)
            key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
            allowed = None
            if kind in CAUSAL:
                allowed = torch.ones(len(query), len(key), dtype=torch.bool).tril()
            if mask is not None and not kind == "causal":
                allowed = ~mask if allowed is None else allowed & ~mask
            rows = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
            out = F.scaled_dot_product_attention(*rows, attn_mask=allowed, scale=self.softmax_scale)
            return out.permute(2, 0, 1, 3)

    return DotProductAttention


COMPUTED = {
    "LayerNorm": _norm(True),
    "RMSNorm": _norm(False),
    "Linear": _linear,
    "LayerNormLinear": _norm_linear,
    "DotProductAttention": _attention,
}
