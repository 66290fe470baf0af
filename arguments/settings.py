"""Convert a framework's settings (a namespace or a dict, without a command line) to a configuration.

The names are those of the flags (Megatron's and MindSpeed's argparse ``dest``). Missing settings get the flag's
default, unknown names are ignored, and values may be text, as in configuration files.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mindspeed_cp.arguments import declared
from mindspeed_cp.arguments.border import PartitionMode
from mindspeed_cp.arguments.convert import validate
from mindspeed_cp.arguments.yaml_file import apply_config_file
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import warn_rank0
from mindspeed_cp.settings.setting import Setting, declarations
from mindspeed_cp.settings.training_setup import TrainingSetup

SIZE = "context_parallel_size"
_ALGORITHM = ("context_parallel_algo", "cp_comm_type")


@dataclass(frozen=True)
class Resolved:
    """Arguments of the adaptor's ``configure``; ``declared_layout``: how the framework says that it splits batches."""

    config: ContextParallelConfig
    setup: TrainingSetup | None
    kernel: str | None
    documents_from_position_ids: bool
    declared_layout: PartitionMode | None = None


@dataclass(frozen=True)
class FrameworkSettings:
    """The settings of one call, converted and checked one by one; ``resolve`` checks them together.

    Args:
        values: dest -> value of all known settings that were given.
        default_algorithm: the algorithm if none is named; None for the flag's default.
    """

    values: Mapping[str, Any]
    default_algorithm: str | None = None

    @classmethod
    def read(cls, source: Any) -> "FrameworkSettings":
        """Read a mapping, a namespace or a dataclass; None counts as not given.

        Raises:
            ValueError: a value has the wrong type; the message names the flag.
        """
        given = {name: value for name, value in _as_mapping(source).items() if value is not None}
        values = {}
        for each in declared.declared():
            found = next((name for name in _names(each) if name in given), None)
            if found is not None:
                values[each.dest] = _converted(each, given[found])
        noted = given.get("cp_given")  # recorded by our parser: the other values are defaults
        if noted is not None:
            values = {name: value for name, value in values.items() if name not in _ALGORITHM or name in noted}
        elif not isinstance(source, Mapping) and values.get("cp_comm_type") in ("p2p", ("p2p",)):
            del values["cp_comm_type"]  # Megatron's default for a flag that was not given
        return cls(values)

    @property
    def cp_size(self) -> int | None:
        """The context-parallel size, None if it is not among the settings."""
        return self.values.get(SIZE)

    @property
    def names_algorithm(self) -> bool:
        return any(name in self.values for name in _ALGORITHM)

    def keeping(self, config: ContextParallelConfig) -> "FrameworkSettings":
        """These settings, with all others taken from ``config``."""
        theirs = {each.dest: getattr(config, each.name) for each in declarations(type(config)) if each.name != SIZE}
        return FrameworkSettings(
            {name: value for name, value in theirs.items() if value is not None} | dict(self.values),
            self.default_algorithm,
        )

    def resolve(self, **further: Any) -> Resolved:
        """Check all settings together and print each notice once.

        Args:
            further: settings from elsewhere that replace missing ones, such as the size that
                initialize_model_parallel got; None counts as missing.

        Raises:
            ValueError: a rule is violated; the message names flag, value, rule and a way out.
        """
        values = {name: value for name, value in further.items() if value is not None} | dict(self.values)
        unset = {each.dest: each.unset for each in declared.declared()}
        if self.default_algorithm is not None:
            unset["context_parallel_algo"] = self.default_algorithm
        known = SimpleNamespace(**(unset | values))
        known.cp_given = list(values)
        if known.cp_config:
            known.cp_given += apply_config_file(known, known.cp_config, values)
        config, setup = validate(known)
        documents = known.reset_position_ids and known.reset_attention_mask
        if known.reset_attention_mask and not known.reset_position_ids:
            warn_rank0(
                "reset_attention_mask without reset_position_ids: documents end after end-of-document tokens, and a "
                "framework's settings name none; for batches without a mask or cu_seqlens set "
                "megatron_adaptor.state().end_of_document = TOKEN."
            )
        layout = (
            known.cp_partition_mode or known.attention_cp_layout
        )  # the first is for the batch, the second for the layers
        return Resolved(config, setup, known.cp_kernel, bool(documents), layout)


def declared_names() -> set[str]:
    """Every name under which a setting is read."""
    return {name for each in declared.declared() for name in _names(each)}


def _names(each: Setting) -> tuple[str, ...]:
    return (each.dest, *(flag.removeprefix("--").replace("-", "_") for flag in each.also), *each.names)


def _as_mapping(source: Any) -> dict[str, Any]:
    if hasattr(source, "items"):  # dict, OmegaConf's DictConfig
        return dict(source.items())
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        return {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    if hasattr(source, "__dict__"):
        return dict(vars(source))
    raise ValueError(
        f"settings must be a namespace, a dict or a dataclass, not {type(source).__name__}; pass "
        "{'context_parallel_size': 2}, for example."
    )


def _converted(each: Setting, value: Any) -> Any:
    """``value`` converted by the flag's own converter."""
    if each.read is not None:
        return each.read(value)
    if each.switch:
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{each.label} {value!r} must be True or False.")
        return str(value).lower() in ("true", "1")
    if not (each.whole or each.choices or each.parse):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{each.label} {value!r} must be text or a whole number.")
    return each.value_of(str(value))
