"""npu_fusion_attention, its gradient and npu_ring_attention_update, according to the published documentation.

Everything is converted to (batch, heads, seq, dim) and computed densely, per batch entry or document. Rows of
softmax_max and softmax_sum are float32 with eight equal lanes.
"""

import collections
import itertools
from dataclasses import dataclass

import torch

from fake_torch_npu.refusals import check_attention, check_gradient, check_ring_update, kv_head_num

LANES = 8
HIDDEN = -3.4e38  # a masked score; finite, so that the output of a row without keys is the mean of the values, not 0


@dataclass
class Sequence:
    """One batch entry or document: query (heads, rows, dim), key and value (kv_heads, cols, dim), mask or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None

    def probabilities(self, scale, softmax_max=None, softmax_sum=None):
        """float32 (heads, rows, cols) and the statistics; computed from given statistics in the backward pass."""
        group = self.query.shape[0] // self.key.shape[0]
        scores = self.query.float() @ self.key.float().repeat_interleave(group, 0).transpose(1, 2) * scale
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden, HIDDEN)
        if softmax_max is None:
            softmax_max = scores.amax(-1, keepdim=True)
            softmax_sum = (scores - softmax_max).exp().sum(-1, keepdim=True)
        return (scores - softmax_max).exp() / softmax_sum, softmax_max, softmax_sum


class Operators:
    """The implementations that one release registers; ``calls`` records (operator, arguments) for tests."""

    def __init__(self, schemas, tnd_order, cann=(8, 3)):
        self._schemas, self._tnd_order, self._cann, self.calls = schemas, tnd_order, cann, []
        self._uninitialised = itertools.count(7_000_001)  # contents of memory that was not written
        self._given = collections.deque(maxlen=4096)

    def implementation(self, name):
        function = getattr(self, "_" + name, None)

        def run(*args, **kwargs):
            if function is None:
                raise RuntimeError(f"the fake torch_npu does not compute {name}")
            arguments = _bind(self._schemas[name], args, kwargs)
            arguments.cann = self._cann
            self.calls.append((name, arguments))
            return function(arguments)

        return run

    def _npu_fusion_attention(self, a):
        check_attention(a)
        outs, maxima, sums, keep = [], [], [], _Dropout(a, seed=None)
        for sequence in _sequences(a):
            probs, softmax_max, softmax_sum = sequence.probabilities(a.scale)
            group = sequence.query.shape[0] // sequence.key.shape[0]
            outs.append(keep.apply(probs) @ sequence.value.float().repeat_interleave(group, 0))
            maxima.append(softmax_max[..., 0])
            sums.append(softmax_sum[..., 0])
        out = _to_layout(outs, a).to(a.query.dtype)
        return (
            out,
            self._statistics(maxima, a),
            self._statistics(sums, a),
            a.query.new_empty(0),
            *((keep.seed, keep.offset, keep.numels) if a.keep_prob < 1 else self._garbage()),
        )

    def _garbage(self):
        numbers = [next(self._uninitialised) for _ in range(3)]
        self._given.extend(numbers)
        return numbers

    def _npu_fusion_attention_grad(self, a):
        check_gradient(a, self._given)
        keep = _Dropout(a, seed=a.seed)
        if (a.offset, a.numels) != (keep.offset, keep.numels) and a.keep_prob < 1:
            raise RuntimeError("offset and numels are not those that the forward pass returned")
        stats = [self._split_statistics(statistic, a) for statistic in (a.softmax_max, a.softmax_sum)]
        grads = []
        for sequence, grad, out, maxima, sums in zip(
            _sequences(a), _from_layout(a.dy, a.head_num, a), _from_layout(a.attention_in, a.head_num, a), *stats
        ):
            grads.append(_gradients(sequence, grad.float(), out.float(), maxima, sums, a.scale_value, keep))
        parts = tuple(_to_layout(list(part), a).to(a.query.dtype) for part in zip(*grads))
        extra = ("sink" in a.names) + 1
        return (*parts, *(a.query.new_empty(0) for _ in range(extra)))

    def _npu_ring_attention_update(self, a):
        check_ring_update(a)
        maximum = torch.maximum(a.prev_softmax_max, a.cur_softmax_max)
        prev, cur = (
            s * (m - maximum).exp()
            for m, s in ((a.prev_softmax_max, a.prev_softmax_sum), (a.cur_softmax_max, a.cur_softmax_sum))
        )
        total = prev + cur

        def weight(part):
            factor = (part / total)[..., 0].unsqueeze(-1)
            return factor.permute(2, 0, 1, 3) if a.input_layout == "SBH" else factor

        prev_out, cur_out = (tensor.float() for tensor in (a.prev_attn_out, a.cur_attn_out))
        if a.input_layout == "SBH":
            prev_out, cur_out = (tensor.unflatten(-1, (maximum.shape[1], -1)) for tensor in (prev_out, cur_out))
        out = prev_out * weight(prev) + cur_out * weight(cur)
        return out.reshape(a.prev_attn_out.shape).to(a.prev_attn_out.dtype), maximum, total

    def _statistics(self, rows, a):
        """Per-sequence (heads, rows) -> the operator's tensor with lanes."""
        if a.input_layout != "TND":
            flat = torch.stack(rows)
        elif a.softmax_layout == "TND":
            flat = torch.cat([row.t() for row in rows])
        else:
            by_document = torch.cat([row.reshape(-1) for row in rows])
            joined = torch.cat(rows, dim=1) if self._tnd_order == "heads" else by_document
            flat = joined.reshape(-1, rows[0].shape[0])  # the declared shape is (T, N, 8), whatever the memory order
        return flat.float().unsqueeze(-1).repeat_interleave(LANES, -1)

    def _split_statistics(self, statistic, a):
        """The inverse: per-sequence (heads, rows, 1)."""
        flat = statistic[..., 0]
        if a.input_layout != "TND":
            return [row.unsqueeze(-1) for row in flat]
        lengths = _lengths(a.actual_seq_qlen)
        if a.softmax_layout == "TND":
            rows = [piece.t() for piece in flat.split(lengths)]
        elif self._tnd_order == "heads":
            rows = flat.reshape(a.head_num, -1).split(lengths, dim=1)
        else:
            pieces = flat.reshape(-1).split([length * a.head_num for length in lengths])
            rows = [piece.view(a.head_num, -1) for piece in pieces]
        return [row.unsqueeze(-1) for row in rows]


class _Dropout:
    """Drops probabilities by (seed, offset, numels); a forward pass draws a new seed from torch's generator."""

    def __init__(self, a, seed):
        self._keep_prob, self.offset = a.keep_prob, 0
        if seed is None:  # a call without dropout draws nothing
            seed = int(torch.randint(1, 1 << 31, ())) if a.keep_prob < 1 else 0
        self.seed = seed
        sizes = (a.head_num * s.query.shape[1] * s.key.shape[1] for s in _sequences(a))
        self.numels = sum(sizes) if a.keep_prob < 1 else 0
        self._generator = torch.Generator().manual_seed(self.seed)

    def factors(self, probs):
        if self._keep_prob == 1:
            return torch.ones_like(probs)
        return (torch.rand(probs.shape, generator=self._generator) < self._keep_prob) / self._keep_prob

    def apply(self, probs):
        return probs * self.factors(probs)


def _gradients(sequence, grad, out, softmax_max, softmax_sum, scale, keep):
    probs, _, _ = sequence.probabilities(scale, softmax_max, softmax_sum)
    kv_heads, group = sequence.key.shape[0], sequence.query.shape[0] // sequence.key.shape[0]
    factors = keep.factors(probs)
    key, value = (tensor.float().repeat_interleave(group, 0) for tensor in (sequence.key, sequence.value))
    dscores = probs * (factors * (grad @ value.transpose(1, 2)) - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = dscores.transpose(1, 2) @ sequence.query.float(), (probs * factors).transpose(1, 2) @ grad
    return dscores @ key, *(part.unflatten(0, (kv_heads, group)).sum(1) for part in (dk, dv))


class _Arguments:
    """A call's arguments by name, with the schema's defaults; softmax_layout is "" if a release lacks it."""

    def __init__(self, values):
        self.names = set(values)
        self.__dict__.update(values)
        self.softmax_layout = values.get("softmax_layout", "")


def _bind(schema, args, kwargs):
    parsed = torch._C.parse_schema(schema)
    values = {argument.name: argument.default_value for argument in parsed.arguments if argument.has_default_value()}
    values.update(zip((argument.name for argument in parsed.arguments), args))
    values.update(kwargs)
    return _Arguments(values)


def _lengths(cumulative):
    return [stop - start for start, stop in zip([0, *cumulative[:-1]], cumulative)]


def _from_layout(tensor, heads, a, lengths=None):
    """Per batch entry or document, (heads, rows, dim)."""
    if a.input_layout == "TND":
        return [piece.transpose(0, 1) for piece in tensor.split(lengths or _lengths(a.actual_seq_qlen))]
    if a.input_layout == "SBH":
        return list(tensor.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3))
    if a.input_layout == "BSH":
        return list(tensor.unflatten(-1, (heads, -1)).transpose(1, 2))
    return list(tensor if a.input_layout == "BNSD" else tensor.transpose(1, 2))


def _to_layout(parts, a):
    if a.input_layout == "TND":
        return torch.cat([part.transpose(0, 1) for part in parts])
    whole = torch.stack(parts)
    if a.input_layout == "SBH":
        return whole.permute(2, 0, 1, 3).flatten(2)
    if a.input_layout == "BSH":
        return whole.transpose(1, 2).flatten(2)
    return whole if a.input_layout == "BNSD" else whole.transpose(1, 2)


def _sequences(a):
    kv_heads, is_packed = kv_head_num(a), a.input_layout == "TND"
    k_lengths = _lengths(a.actual_seq_kvlen) if is_packed else None
    keys, values = (_from_layout(tensor, kv_heads, a, k_lengths) for tensor in (a.key, a.value))
    for index, (query, key, value) in enumerate(zip(_from_layout(a.query, a.head_num, a), keys, values)):
        yield Sequence(query, key, value, _hidden(a, index, query.shape[1], key.shape[1]))


def _hidden(a, index, rows, cols):
    """The mask of one sequence, bool (1 or heads, rows, cols); None if nothing is hidden."""
    if a.atten_mask is None:
        return None  # documented: sparse_mode, pre_tockens and next_tockens then have no effect
    offset = torch.arange(cols) - torch.arange(rows).unsqueeze(1)
    if a.sparse_mode == 2:
        return (offset > 0)[None]
    if a.sparse_mode in (3, 4):
        offset = offset - (cols - rows)
        low, high = (a.pre_tockens, a.next_tockens) if a.sparse_mode == 4 else (rows + cols, 0)
        return ((offset > high) | (offset < -low))[None]
    mask = a.atten_mask.bool()
    if mask.dim() == 2:
        return mask[None, :rows, :cols]
    return mask[index if mask.shape[0] > 1 else 0]
