"""Batches: which samples a step reads, their lengths, their documents, and this rank's part of them.

Shapes: tokens, labels, loss_mask, position_ids (batch, seq). Every rank reads the same samples and keeps its own
tokens, so batches are not sent between ranks, and every rank can start at any step.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.packed_seq_params import PackedSeqParams

import mindspeed_cp.megatron_adaptor as megatron_adaptor
from mindspeed_cp.megatron.packing import PackedSampler, pack_samples

from trainer.failures import Refused
from trainer.files import drop_broken_caches
from trainer.checks import micro_batch_length, of_same_name
from trainer.texts import ByteTokenizer


@dataclass
class Batch:
    """This rank's part of a micro batch; ``num_tokens`` is the number of tokens with a loss in the whole sequence."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None
    num_tokens: torch.Tensor
    num_positions: int


def build_datasets(args):
    """(training, validation) GPTDataset; the second is None without --eval-iters."""
    config = GPTDatasetConfig(
        **of_same_name(args, "split reset_position_ids reset_attention_mask eod_mask_loss"),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=([args.data_path], None),
        path_to_cache=args.data_cache_path,
        tokenizer=ByteTokenizer(args.vocab_size, args.eod),
        create_attention_mask=False,  # it follows from the documents' ends
    )
    counts = [args.train_iters * args.global_batch_size, args.eval_iters * args.global_batch_size, 0]
    if dist.get_rank() == 0:
        drop_broken_caches(args)
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, counts, lambda: True, config).build()
    if train is None or (args.eval_iters and valid is None):
        raise Refused(
            f"--split {args.split} leaves no documents of {args.data_path} for "
            f"{'training' if train is None else 'validation'}; use --split 90,10,0."
        )
    return train, valid if args.eval_iters else None


def batches(dataset, args, first_step, vary_length=False):
    """Yield this data-parallel rank's micro batches from step ``first_step`` on.

    Step s reads samples s*G to (s+1)*G of the dataset's shuffled order, where G is the global batch size, so that a
    step has the same samples for all parallel sizes.
    """
    if args.cp_pack:
        yield from packed_batches(dataset, args, first_step)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    index = first_step * args.num_microbatches * size + rank
    while True:
        start = index * args.micro_batch_size
        samples = [dataset[(start + i) % len(dataset)] for i in range(args.micro_batch_size)]
        whole = torch.utils.data.default_collate(samples)
        yield prepare_batch(whole, args, micro_batch_length(index, args.seq_length) if vary_length else args.seq_length)
        index += size


class Documents(torch.utils.data.Dataset):
    """The single documents of a GPTDataset's split; a document longer than ``most`` tokens is cut into several.

    ``lengths`` are the numbers of tokens that have a next token.
    """

    def __init__(self, dataset, most):
        self._texts = dataset.dataset
        self._pieces = []
        for place in dataset.indices.tolist():
            length = int(self._texts.sequence_lengths[place]) - 1
            self._pieces += [(place, start, min(start + most, length)) for start in range(0, length, most)]
        self.lengths = [stop - start for _, start, stop in self._pieces]

    def __len__(self):
        return len(self._pieces)

    def __getitem__(self, number):
        place, start, stop = self._pieces[number]
        text = torch.from_numpy(self._texts.get(place, start, stop + 1 - start).astype("int64"))
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(stop - start)}


def packed_batches(dataset, args, first_step):
    """Yield this data-parallel rank's rows of packed documents from step ``first_step`` on (--cp-pack).

    Step s reads the documents after those of step s - 1, in an order that depends on the seed, so that a step has the
    same documents for all parallel sizes.
    """
    documents = Documents(dataset, args.seq_length)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(args.seed)).tolist()
    try:
        rows = PackedSampler(
            documents.lengths,
            ranks=1,  # so that a row's documents do not depend on the number of its ranks
            tokens=args.seq_length,
            rows=args.global_batch_size,
            order=order,
            first_step=first_step,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
    except ValueError as error:
        raise Refused(f"--cp-pack: {error}") from None
    for places in rows:
        row = pack_samples([documents[place] for place in places])
        yield prepare_row(row, args)


FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def prepare_row(row, args):
    """This context-parallel rank's part of a packed row."""
    device = torch.cuda.current_device()
    return _local_part({name: row[name].to(device) for name in FIELDS}, args, row["cu_seqlens"].to(device))


def prepare_batch(whole, args, length):
    """Cut a collated sample to ``length`` tokens and keep this context-parallel rank's part."""
    device = torch.cuda.current_device()
    fields = {name: whole[name][:, :length].to(device) for name in FIELDS}
    return _local_part(fields, args, document_ends(fields["tokens"], args.eod) if args.reset_attention_mask else None)


def _local_part(fields, args, ends):
    """ends: int32 boundaries, with the leading 0, of documents that do not see each other; None if there are none."""
    num_tokens, num_positions = fields["loss_mask"].sum(), fields["tokens"].numel()
    mask = packed = None
    if ends is None:
        local = utils.get_batch_on_this_cp_rank(fields)
    elif has_mask(args):
        local, mask = fields, dense_mask(ends, len(fields["tokens"]), args.window_size)
    else:
        # Documents of all rows are concatenated to one row (Megatron's thd format). Megatron's function does not get
        # the documents, on which the layout may depend.
        row = {name: value.reshape(1, -1) for name, value in fields.items()}
        local, packed = megatron_adaptor.state().shard_batch(row, cu_seqlens=ends), packed_params(ends)
    return Batch(
        attention_mask=mask,
        packed_seq_params=packed,
        num_tokens=num_tokens,
        num_positions=num_positions,
        **local,
    )


def has_mask(args):
    """Whether the batch has a mask, which then includes the window, because Megatron's local attention applies only one
    of them, from 0.15 on the window.
    """
    return args.reset_attention_mask and args.context_parallel_size == 1


def dense_mask(ends, rows, window):
    """bool (rows, 1, seq, seq), True = masked out: causal, within documents and ``window`` (LEFT, RIGHT; -1: no limit).

    ends: int32 document boundaries, from 0, in the concatenated rows.
    """
    numbers = torch.arange(len(ends) - 1, device=ends.device)
    document = torch.repeat_interleave(numbers, ends.diff()).reshape(rows, -1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    if window is not None and window[0] >= 0:
        seen = seen.triu(-window[0])
    return ~seen[:, None]


def document_ends(tokens, eod):
    """Return int32 boundaries, from 0, of rows and documents (ended by token ``eod``) in ``tokens`` (batch, seq)."""
    batch, length = tokens.shape
    ends = (tokens.reshape(-1) == eod).nonzero().reshape(-1) + 1
    rows = torch.arange(0, (batch + 1) * length, length, device=tokens.device)
    return torch.cat([rows, ends]).unique().to(torch.int32)


def packed_params(ends):
    longest = int(ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
