"""One training step and one validation, on Megatron's pipeline schedules."""

from functools import partial

import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from mindspeed_cp.comm import count_bytes

# With --calculate-per-token-loss megatron-core 0.12 sums token counts only over the data-parallel ranks, so each must
# be that of the whole sequence; later versions also sum over the context-parallel ranks.
_COUNT_IS_OF_WHOLE_SEQUENCE = core_version.startswith("0.12.")


def forward_step(iterator, model, *, args, counts):
    """Megatron's forward_step_func: run one micro batch and return (output, loss function)."""
    batch = next(iterator)
    counts[2] += batch.num_positions
    output = model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels,
        packed_seq_params=batch.packed_seq_params,
    )
    return output, partial(loss_function, batch, args=args, counts=counts)


def loss_function(batch, losses, *, args, counts):
    """Megatron's loss_func for one micro batch.

    Args:
        losses: (batch, local seq) cross entropy of every token.
        counts: float64 (loss sum, tokens with a loss, tokens), accumulated in place for the report.
    """
    loss_sum = (losses.float() * batch.loss_mask).sum()
    local_tokens = batch.loss_mask.sum()
    counts[0] += loss_sum.detach()
    counts[1] += local_tokens
    if args.calculate_per_token_loss:
        num_tokens = batch.num_tokens if _COUNT_IS_OF_WHOLE_SEQUENCE else local_tokens
        return loss_sum, num_tokens.to(torch.int), {}
    # Megatron multiplies by the context-parallel size and averages gradients over its ranks, which gives the sum over
    # the ranks; so the divisor is the token count of the whole sequence, not of this rank.
    return loss_sum / batch.num_tokens.clamp(min=1), {}


def _run(chunks, iterators, args, forward_only):
    counts = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    with count_bytes() as traffic:
        get_forward_backward_func()(
            forward_step_func=partial(forward_step, args=args, counts=counts),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=args.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.seq_length,
            forward_only=forward_only,
        )
    counts[3] = traffic.total_bytes
    return counts, traffic


def _loss_of_all(counts):
    """Sum ``counts`` over the world; tensor-parallel ranks repeat loss and tokens equally, other stages add 0."""
    dist.all_reduce(counts)
    return float(counts[0] / counts[1].clamp(min=1)) if counts[1] else float("nan")


def train_step(chunks, optimizer, scheduler, iterators, args):
    """Forward, backward, optimizer and schedule of one step.

    Returns:
        The contents of the step's record, the same on all ranks except for the bytes by purpose, which are the rank's.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    counts, traffic = _run(chunks, iterators, args, forward_only=False)
    _, grad_norm, _ = optimizer.step()
    scheduler.step(increment=1)
    loss = _loss_of_all(counts)
    # Every rank and virtual stage has counted the tokens of its data-parallel rank.
    repeats = dist.get_world_size() // parallel_state.get_data_parallel_world_size() * len(chunks)
    return {
        "loss": loss,
        "grad_norm": float(grad_norm or 0.0),
        "tokens": round(float(counts[2]) / repeats),  # an NPU sums in float32
        "cp_bytes_per_rank": float(counts[3]) / dist.get_world_size(),
        "cp_bytes_of_rank_0": dict(traffic.bytes),
    }


def evaluate(chunks, iterators, args):
    """Mean validation loss over --eval-iters steps, with the same samples every time."""
    for chunk in chunks:
        chunk.eval()
    total = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    with torch.no_grad():
        for _ in range(args.eval_iters):
            total += _run(chunks, iterators, args, forward_only=True)[0]
    for chunk in chunks:
        chunk.train()
    return _loss_of_all(total)
