"""The whole run: join the world, set up, resume, train, validate, save, release the groups."""

import dataclasses
import logging
import os
import random
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

import mindspeed_cp.megatron_adaptor as megatron_adaptor
from mindspeed_cp.comm import count_bytes

from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.checks import of_same_name
from trainer.data import batches, build_datasets
from trainer.model import build_model, build_optimizer
from trainer.rendezvous import attempt_store
from trainer.report import Report

# With --calculate-per-token-loss megatron-core 0.12 sums token counts only over the data-parallel ranks, so each must
# be that of the whole sequence; later versions also sum over the context-parallel ranks.
_COUNT_IS_OF_WHOLE_SEQUENCE = core_version.startswith("0.12.")


def pretrain(args):
    """Train as ``args`` say; returns one record per step (as in --log-file)."""
    made = initialize(args)
    train_set, valid_set = build_datasets(args)
    chunks = build_model(args)
    optimizer, scheduler = build_optimizer(args, chunks)
    first = load_checkpoint(args, chunks, optimizer, scheduler) if args.resume else 0
    if first and dist.get_rank() == 0:
        print(f"going on from {args.resume.path}, saved at {args.resume.saved_at}", flush=True)
    with Report(args, first) as report:
        records = _train(args, (chunks, optimizer, scheduler), (train_set, valid_set), first, report)
    # Not after a failure, because ranks would wait for a lost peer or hide the error.
    shut_down(made)
    return records


def _train(args, parts, datasets, first, report):
    chunks, optimizer, scheduler = parts
    # One iterator per virtual stage, since every stage reads the same samples.
    iterators = [batches(datasets[0], args, first, args.variable_seq_lengths) for _ in chunks]
    log, records = megatron_adaptor.state().log, []
    for iteration in range(first + 1, args.train_iters + 1):
        start, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
        with nullcontext() if log is None else log.step():
            result = train_step(chunks, optimizer, scheduler, iterators, args)
        seconds = time.perf_counter() - start
        record = {"iteration": iteration, "learning_rate": rate, "seconds": seconds} | result
        record |= {
            "tokens_per_second": result["tokens"] / seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        }
        figures = log.interval() if log is not None and iteration % args.log_interval == 0 else None
        if figures is not None:
            record["context_parallelism"] = dataclasses.asdict(figures)
        records.append(record)
        report.step(record, figures)
        last = iteration == args.train_iters or bool(args.exit_interval and iteration % args.exit_interval == 0)
        if args.eval_iters and (iteration % args.eval_interval == 0 or last):
            report.validation(iteration, evaluate(chunks, [batches(datasets[1], args, 0) for _ in chunks], args))
        if args.save and (last or args.save_interval and iteration % args.save_interval == 0):
            save_checkpoint(args, chunks, optimizer, scheduler, iteration)
        if last:
            break
    return records


def initialize(args):
    """Join the world, make Megatron's groups, seed everything. Returns whether this call made the default group."""
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)  # its messages are irrelevant here
    made = not dist.is_initialized()
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    if made:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _defaults_for_one_process()
        rank = int(os.environ["RANK"])
        store = attempt_store(rank, args.world_size, timeout)
        dist.init_process_group("nccl", timeout=timeout, world_size=args.world_size, rank=rank, store=store)
    megatron_adaptor.compare_on_all_ranks(args, program="pretrain_gpt.py")
    megatron_adaptor.configure(args.cp_config_resolved, setup=args.cp_setup, kernel=args.cp_kernel)
    parallel_state.initialize_model_parallel(
        **of_same_name(args, "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size"),
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    _seed_everything(args)
    return made


def _defaults_for_one_process():
    """Set the variables that torchrun would set, so that plain python can start the trainer."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, value)


def _seed_everything(args):
    """Pipeline stages draw different weights; context-parallel and data-parallel ranks draw the same."""
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def shut_down(made):
    """Release Megatron's groups, and the default group if ``initialize`` made it."""
    parallel_state.destroy_model_parallel()
    # megatron-core 0.12 does not reset these, and the next run in this process may have another pipeline.
    parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
    if made:
        dist.destroy_process_group()


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
