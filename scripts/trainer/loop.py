"""The whole run: set up, resume, train, validate, save."""

import dataclasses
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist

import mindspeed_cp.megatron_adaptor as megatron_adaptor

from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.data import batches, build_datasets
from trainer.initialize import initialize, shut_down
from trainer.model import build_model, build_optimizer
from trainer.report import Report
from trainer.step import evaluate, train_step


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
