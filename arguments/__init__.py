"""Command-line flags and YAML files -> ``ContextParallelConfig``.

``add_context_parallel_arguments`` adds every flag to any argparse parser, Megatron's included; ``validate`` turns the
parsed namespace into a checked configuration and says once, on rank 0, what was changed or is ignored.
"""

from mindspeed_cp.arguments.compared import compared_arguments, compared_config
from mindspeed_cp.arguments.convert import config_from_args, readable_errors, setup_from_args, validate
from mindspeed_cp.arguments.flags import add_context_parallel_arguments
from mindspeed_cp.arguments.settings import FrameworkSettings
from mindspeed_cp.arguments.yaml_file import read_cp_yaml

__all__ = [
    "FrameworkSettings",
    "add_context_parallel_arguments",
    "compared_arguments",
    "compared_config",
    "config_from_args",
    "read_cp_yaml",
    "readable_errors",
    "setup_from_args",
    "validate",
]
