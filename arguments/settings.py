"""Settings as a framework holds them, a namespace or a dict without a command line, -> configuration.

The names are those of the flags (Megatron's and MindSpeed's argparse ``dest``). What is missing gets the flag's
default, what nobody here knows is ignored, and values may be text, as files of settings have it.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mindspeed_cp.arguments.convert import validate
from mindspeed_cp.arguments.flags import add_context_parallel_arguments
from mindspeed_cp.arguments.yaml_file import KEYS, apply_config_file

from mindspeed_cp.settings.config import ContextParallelConfig, TrainingSetup
from mindspeed_cp.settings.notices import warn_rank0

# What the configuration is checked against; None: not known, and not checked.
MODEL_DEFAULTS = {
    "num_attention_heads": None,
    "num_query_groups": None,
    "num_layers": None,
    "seq_length": None,
    "world_size": None,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "group_query_attention": False,
    "sequence_parallel": False,
    "use_legacy_models": False,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "position_embedding_type": None,
    "cp_comm_type": None,
    "hierarchical_context_parallel_sizes": None,
}
# MindSpeed's name -> ours, where they differ.
OTHER_NAMES = {"attention_mask_type": "cp_attention_mask_type"}
SIZE = "context_parallel_size"
# Field of a ContextParallelConfig -> the name of its flag.
FIELDS = {
    "algorithm": "context_parallel_algo",
    "ulysses_degree": "ulysses_degree_in_cp",
    "window_size": "cp_window_size",
    "attention_mask_type": "cp_attention_mask_type",
    "kv_cache_policy": "context_parallel_kv_cache_policy",
    "kv_cache_interval": "context_parallel_cache_interval",
    "allgather_kv": "use_ulysses_allgather_kv",
    "send_recv_overlap": "use_cp_send_recv_overlap",
    "kv_exchange": "cp_kv_exchange",
    "in_flight": "cp_in_flight",
    "topology": "cp_topology",
    "ulysses_chunks": "cp_ulysses_chunks",
    "p2p": "cp_p2p",
    "batch_layout": "cp_batch_layout",
    "keep_attention": "cp_keep_attention",
    "log": "cp_log",
}
_ALGORITHM = ("context_parallel_algo", "cp_comm_type")


@dataclass(frozen=True)
class Resolved:
    """What ``configure`` of the adaptor takes."""

    config: ContextParallelConfig
    setup: TrainingSetup | None
    kernel: str | None
    documents_from_position_ids: bool


@dataclass(frozen=True)
class FrameworkSettings:
    """The settings of one call, converted and checked one by one; ``resolve`` checks them together.

    Args:
        values: dest -> value of everything known here that was given.
    """

    values: Mapping[str, Any]

    @classmethod
    def read(cls, source: Any) -> "FrameworkSettings":
        """Read a mapping, a namespace or a dataclass; None counts as not given.

        Raises:
            ValueError: a value is of the wrong kind; the message names the flag.
        """
        given = {name: value for name, value in _as_mapping(source).items() if value is not None}
        for theirs, ours in OTHER_NAMES.items():
            if theirs in given:
                given.setdefault(ours, given[theirs])
        actions = _actions()
        values = {name: _converted(actions[name], given[name]) for name in actions if name in given}
        values |= {name: _plain(name, given[name]) for name in MODEL_DEFAULTS if name in given}
        noted = given.get("cp_given")  # a parser of ours noted it: the rest are defaults
        if noted is not None:
            values = {name: value for name, value in values.items() if name not in _ALGORITHM or name in noted}
        elif not isinstance(source, Mapping) and values.get("cp_comm_type") in ("p2p", ("p2p",)):
            del values["cp_comm_type"]  # Megatron's default of a flag that was not given
        return cls(values)

    @property
    def cp_size(self) -> int | None:
        """The context-parallel size, None when the settings do not name it."""
        return self.values.get(SIZE)

    @property
    def names_algorithm(self) -> bool:
        return any(name in self.values for name in _ALGORITHM)

    def keeping(self, config: ContextParallelConfig) -> "FrameworkSettings":
        """These settings, with everything else as ``config`` has it."""
        theirs = {ours: getattr(config, name) for name, ours in FIELDS.items() if getattr(config, name) is not None}
        return FrameworkSettings(theirs | dict(self.values))

    def resolve(self, **further: Any) -> Resolved:
        """Check everything together, say each notice once.

        Args:
            further: settings from elsewhere that stand in for missing ones, such as the size that
                initialize_model_parallel got; None counts as missing.

        Raises:
            ValueError: a rule is broken; the message names flag, value, rule and a way out.
        """
        values = {name: value for name, value in further.items() if value is not None} | dict(self.values)
        known = SimpleNamespace(**(_defaults() | MODEL_DEFAULTS | values), cp_given=list(values))
        if known.cp_config:
            named = {key for key, row in KEYS.items() if row.dest in values}
            known.cp_given += apply_config_file(known, known.cp_config, named)
        config, setup = validate(known)
        documents = known.reset_position_ids and known.reset_attention_mask
        if known.reset_attention_mask and not known.reset_position_ids:
            warn_rank0(
                "reset_attention_mask without reset_position_ids: documents end behind end-of-document tokens, and a "
                "framework's settings name none; for batches without a mask or cu_seqlens set "
                "megatron_adaptor.state().end_of_document = TOKEN."
            )
        return Resolved(config, setup, known.cp_kernel, bool(documents))


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


class _Raising(argparse.ArgumentParser):
    """A parser whose converters raise ValueError instead of ending the program."""

    def exit(self, status=0, message=None):
        raise ValueError(str(message).partition("error: ")[2].strip())


def _actions() -> dict[str, argparse.Action]:
    parser = add_context_parallel_arguments(_Raising(prog="settings", add_help=False))
    return {action.dest: action for action in parser._actions}


def _defaults() -> dict[str, Any]:
    return {name: action.default for name, action in _actions().items()}


def _converted(action: argparse.Action, value: Any) -> Any:
    """``value`` as the flag's own converter makes it."""
    if action.nargs == 0:
        return _switch(action.option_strings[0], value)
    if action.type is None:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{action.option_strings[0]} {value!r} must be text or a whole number.")
    assert callable(action.type), "the parser registers no types by name"
    return action.type(str(value))


def _plain(name: str, value: Any) -> Any:
    default = MODEL_DEFAULTS[name]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        return _switch(flag, value)
    if name == "cp_comm_type":
        return value if isinstance(value, str) else tuple(value)
    if name == "hierarchical_context_parallel_sizes":
        return tuple(_whole(flag, size) for size in value) or None
    return value if name == "position_embedding_type" else _whole(flag, value)


def _switch(flag: str, value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError(f"{flag} {value!r} must be True or False.")
    return text in ("true", "1")


def _whole(flag: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{flag} {value!r} must be a whole number.") from None
