"""The planner's command line: its own flags, completed from Megatron's flags or a launch command."""

import argparse
import dataclasses
import os
import re
import shlex
from collections.abc import Sequence

from mindspeed_cp.doctor import launch
from mindspeed_cp.planner import calibrate, megatron_flags
from mindspeed_cp.planner.cluster import CLUSTERS, DEFAULT, THIS_MACHINE, Cluster
from mindspeed_cp.planner.hugging_face import hf_model
from mindspeed_cp.planner.models import MODELS, ModelShape, named_model
from mindspeed_cp.settings.fields import MASK_TYPES
from mindspeed_cp.settings.layers import FLAG
from mindspeed_cp.settings.rules import tokens

SCALES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
SCALES |= {f"{prefix}i": 2.0 ** (10 * power) for power, prefix in enumerate("KMGT", 1)}
LEAST_BYTES = 1e5  # a --memory below this, without a unit, is in gigabytes
QUANTITY = re.compile(rf"(.*\d\.?) ?({'|'.join(sorted(SCALES, key=len, reverse=True))})(FLOPS|FLOP/s|bit/s|B/s|B|s|)")


def quantity(text: str) -> float:
    """Parse bytes, bytes/s, FLOP/s or seconds, a number with SI prefix and unit: 6.4e10, 64GB, 200Gbit/s, 10us.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number.
    """
    match = QUANTITY.fullmatch(text)
    try:
        number, prefix, unit = match.groups() if match else (text, "", "")
        return float(number) * SCALES[prefix] / (8 if unit == "bit/s" else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number with a unit; write 64GB, 320TFLOP/s, 25GB/s, 200Gbit/s, 10us or 6.4e10"
        ) from None


def _tokens(text: str) -> int:
    try:
        return tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mindspeed-cp plan",
        usage="%(prog)s [flags] [-- Megatron's flags, or the command that launches it]",
        description="Predict which setting of context parallelism is fastest for a model on a cluster, and why.",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    model.add_argument("--hf-config", help="a Hugging Face config.json")
    parser.add_argument("--launch", metavar="COMMAND", help="a launch command or script; take model and sizes from it")
    parser.add_argument("--devices", type=int, help="plan a whole training on this number of devices; given sizes stay")
    parser.add_argument("--tp", type=int, help="tensor parallel size (default: 1, with --devices any)")
    parser.add_argument("--pp", type=int, help="with --devices: pipeline parallel size")
    parser.add_argument("--vpp", type=int, help="with --devices: parts of a pipeline stage; 1 is no interleaving")
    parser.add_argument("--ep", type=int, help="with --devices: expert parallel size")
    parser.add_argument("--etp", type=int, help="with --devices: tensor parallel size of an expert (default: 1 or tp)")
    parser.add_argument("--cp", type=int, help="context parallel size; needed without --devices")
    parser.add_argument("--global-batch", type=int, help="with --devices: sequences of a step (default: --devices)")
    parser.add_argument(
        "--memory",
        type=quantity,
        metavar="GB",
        help="with --devices: of a device, such as 80 or 80GB (default: --cluster's)",
    )
    parser.add_argument("--seq-length", type=_tokens, help="tokens, such as 4096 or 128k")
    parser.add_argument("--window", type=_tokens, help="tokens that a query sees in every layer, such as 4k")
    parser.add_argument("--vocab-size", type=int, help="if Megatron's flags name a tokenizer instead")
    parser.add_argument("--documents", help="packed documents: a dataset's .idx, or lognormal:6.5,1.3 and the like")
    parser.add_argument("--pack", action="store_true", help="with --documents: fill rows by length (pack_documents)")
    parser.add_argument("--micro-batch", type=int, help="sequences (default: 1)")
    parser.add_argument("--mask-type", choices=[name for name in MASK_TYPES if name != "general"])
    parser.add_argument(
        "--cluster",
        help=f"{', '.join(CLUSTERS)}, {THIS_MACHINE} (measured now), or a file of --calibrate; flags override it "
        f"(default: of this machine's devices, else {DEFAULT})",
    )
    parser.add_argument("--calibrate", metavar="FILE.yaml", help="measure this machine, write the file, plan nothing")
    parser.add_argument(
        "--device", choices=calibrate.SIZES, default="cpu", help=f"that --calibrate and {THIS_MACHINE} measure"
    )
    for field in dataclasses.fields(Cluster):
        if field.name == "memory":
            continue
        kind = int if field.type in ("int", int) else quantity
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, metavar="NUMBER", help=field.metadata["help"])
    parser.add_argument(
        "--shell", action="store_true", help="with --devices: print the first plan as variables of the launch scripts"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="plot time over length, for each algorithm")
    parser.add_argument("--json", action="store_true", help="everything, machine-readable")
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, completed with the sizes of the line after -- or of --launch, which is stored as ``line``.

    Raises:
        ValueError: a size is below 1, flags conflict, or the line cannot be parsed.
    """
    own, behind = list(arguments), []
    if "--" in own:
        place = own.index("--")
        own, behind = own[:place], own[place + 1 :]
    given = parser().parse_args(own)
    if given.launch and behind:
        raise ValueError("--launch and flags behind -- are two trainings; give one of them.")
    command = given.launch or (shlex.join(behind) if behind and not behind[0].startswith("-") else None)
    started = launch.read(command, os.environ) if command else None
    flags = started.flags if started else behind
    given.line = megatron_flags.read(flags) if flags else None
    if started and given.devices is None and given.cp is None:
        given.devices = started.world_size or None
    if given.devices is None and (given.pp or given.vpp or given.ep or given.etp or given.global_batch or given.shell):
        raise ValueError(
            "--pp, --vpp, --ep, --etp, --global-batch and --shell belong to a whole training; give --devices."
        )
    for name, value in (given.line.sizes if given.line else {}).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.mask_type = given.mask_type or (given.line.mask_type if given.line else "causal")
    given.micro_batch = 1 if given.micro_batch is None else given.micro_batch
    given.notes = []
    if given.line and given.line.args.cp_layer_algo:
        given.notes.append(
            f"{FLAG} {given.line.args.cp_layer_algo} is not planned: every layer gets one setting; mindspeed-cp doctor "
            "--launch says what each of these layers sends."
        )
    if given.memory is not None and 1 <= given.memory < LEAST_BYTES:
        given.notes.append(f"--memory {given.memory:g} is read as {given.memory:g} GB.")
        given.memory *= 1e9
    for name in ("devices", *megatron_flags.SIZES, "vpp", "vocab_size", "memory"):
        if getattr(given, name) is not None and not getattr(given, name) >= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1.")
    return given


def model(given: argparse.Namespace) -> ModelShape:
    """The model that is named, or described by a config.json or by Megatron's flags.

    Raises:
        ValueError: the model is not known, or its description is not complete.
    """
    described: ModelShape
    if given.model:
        described = named_model(given.model)
    elif given.hf_config:
        described = hf_model(given.hf_config)
    else:
        described = given.line.model(given.vocab_size)
    return described if given.window is None else dataclasses.replace(described, window=given.window, windowed_share=1)
