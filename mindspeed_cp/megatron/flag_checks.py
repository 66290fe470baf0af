"""Flags of Megatron-LM that do not work with context parallelism or on this machine.

``python -m mindspeed_cp.megatron.flag_checks FLAGS...`` checks a command line without Megatron and prints what is wrong
as a JSON string, or "".
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

# Megatron's own assertions about legacy models, which patches/training.py disables.
NOT_WITH_LEGACY = ("rotary_interleaved", "mtp_num_layers", "decoupled_lr", "decoupled_min_lr", "overlap_param_gather")


def check_flags(args: Any) -> None:
    """Raise ValueError for Megatron's flags that do not work with context parallelism; size 1 is left to Megatron."""
    if args.context_parallel_size == 1:
        return
    if getattr(args, "use_legacy_models", False):
        _check_legacy(args)
    elif not getattr(args, "spec", None):  # a model built from --spec does not read the flag below
        _check_transformer_engine(args)


def _check_legacy(args: Any) -> None:
    if args.ckpt_format != "torch":
        raise ValueError(
            f"--ckpt-format {args.ckpt_format} does not work with --use-legacy-models; use --ckpt-format torch."
        )
    for name in NOT_WITH_LEGACY:
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} does not work with --use-legacy-models; leave one of them out."
            )


def _check_transformer_engine(args: Any) -> None:
    if getattr(args, "transformer_impl", "local") == "transformer_engine" and not _is_there("transformer_engine"):
        raise ValueError(
            "--transformer-impl transformer_engine (Megatron's default) needs Transformer Engine, which is not "
            "installed; use --transformer-impl local, or install it."
        )


def _is_there(library: str) -> bool:
    # A framework may have put its own module without a spec there, for which importlib.util.find_spec raises.
    return sys.modules.get(library) is not None or importlib.util.find_spec(library) is not None


def wrong_flags(argv: Sequence[str]) -> str:
    """The error of ``check_flags`` for a command line of pretrain_gpt.py with Megatron's defaults; "" if none."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--ckpt-format", default="torch_dist")
    parser.add_argument("--spec", nargs="*")
    for name in ("hybrid_context_parallel", "use_legacy_models", *NOT_WITH_LEGACY):
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="?", const=True, default=False)
    try:
        check_flags(parser.parse_known_args(argv)[0])
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(json.dumps(wrong_flags(sys.argv[1:])))
