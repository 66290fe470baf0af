"""The start of a job: all ranks compare their settings before Megatron makes a process group."""

import sys
from contextlib import contextmanager

from mindspeed_cp.arguments import compared_arguments, compared_config
from mindspeed_cp.megatron.decision import config_for
from mindspeed_cp.settings.agreement import SAID, RanksDiffer, agree, versions


def agreed_config(state, given):
    """The configuration with which all ranks start; collective over the world.

    Args:
        given: name -> argument of initialize_model_parallel.

    Raises:
        RanksDiffer: this rank's settings do not fit, or another rank has others; after a program's own flags it ends
            the program instead, with one line on rank 0.
    """
    config, refusal = None, None
    try:
        config = config_for(
            state, given.get("context_parallel_size", 1), given.get("hierarchical_context_parallel_sizes")
        )
    except ValueError as error:
        refusal = str(error)
    settings = versions(**{"the version of megatron-core": _megatron_version()})
    if config is not None:
        settings |= compared_config(config, state.setup)
    settings |= compared_arguments(given) | dict(state.compared)
    with _ending(state.program) as say:
        agree(settings, refusal=refusal, say=say)
    return config


@contextmanager
def _ending(program):
    """Yields what rank 0 says; a program ends with status 2, a script gets the exception."""

    def say(message):
        if program and message != SAID:
            print(f"{program}: error: {message}", file=sys.stderr, flush=True)

    try:
        yield say
    except RanksDiffer:
        if program:
            raise SystemExit(2) from None
        raise


def _megatron_version():
    from megatron.core import package_info

    return getattr(package_info, "__version__", "unknown")
