"""Patches of how Megatron creates and destroys its process groups."""

import dataclasses
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mindspeed_cp import compat
from mindspeed_cp.arguments.settings import declared_names
from mindspeed_cp.comm.hccl import group_options
from mindspeed_cp.compat.group_getters import GETTERS, GroupGetters
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.following import take_comm_type, take_settings
from mindspeed_cp.megatron.scopes import own_group
from mindspeed_cp.megatron.sizes import adopt_sizes, check_launch
from mindspeed_cp.megatron.start import agreed_config, megatron_buffers
from mindspeed_cp.patches.rows import Row, arguments_of, patch, signature_of

PARALLEL_STATE = "megatron.core.parallel_state"


_RENAMED = (
    "--dynamic-context-parallel lets Megatron give every micro batch groups of its own, of which nothing is known here "
    "(--hybrid-context-parallel, its name until 0.19, works); leave it out, and let one row of documents lie over all "
    "ranks with --cp-batch-layout balanced (mindspeed_cp.pack_documents)."
)


@patch(
    f"{PARALLEL_STATE}.initialize_model_parallel",
    reason="all ranks agree on their settings, and the groups of context parallelism are made beside Megatron's",
)
def initialize_model_parallel(adaptor: Adaptor, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    from megatron.core import parallel_state

    given = arguments_of(original, args, kwargs)
    if given.get("dynamic_context_parallel"):
        raise ValueError(_RENAMED)
    config, dynamic = agreed_config(adaptor.settings, given), given.get("hybrid_context_parallel")
    if dynamic:
        check_launch(given)
    adaptor.buffers = {} if dynamic else megatron_buffers(config, adaptor.setup)
    original(*args, **kwargs)
    minutes = given.get("distributed_timeout_minutes")
    adaptor.timeout = timedelta(minutes=minutes) if minutes else None
    adaptor.virtual_pipeline = (given.get("virtual_pipeline_model_parallel_size") or 1) > 1
    adaptor.is_pipeline = (given.get("pipeline_model_parallel_size") or 1) > 1
    if dynamic:
        adaptor.sizes = adopt_sizes(adaptor)
        adaptor.announce(adaptor.sizes[max(adaptor.sizes)].config)
        # All of these ranks distribute the sub-batches among them, in groups of any size.
        adaptor.measure(config, parallel_state.get_data_parallel_group(with_context_parallel=True))
    if config.context_parallel_size == 1:
        return
    group = own_group()
    assert group is not None
    adaptor.make_groups(group, config)
    if not dynamic:
        if adaptor.settings.is_decided:
            adaptor.announce(config)
        adaptor.measure(config, group)


@patch(
    f"{PARALLEL_STATE}.get_nccl_options",
    reason="on HCCL Megatron's context-parallel group gets the buffer of its largest message",
    essential=False,
)
def get_nccl_options(adaptor: Adaptor, original: Callable[..., Any], pg_name: str, *args: Any, **kwargs: Any) -> Any:
    options = original(pg_name, *args, **kwargs)
    return group_options(adaptor.buffers, pg_name) if options is None else options


@patch(
    f"{PARALLEL_STATE}.destroy_model_parallel",
    reason="the groups of context parallelism go with Megatron's",
)
def destroy_model_parallel(adaptor: Adaptor, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    adaptor.destroy_groups()
    original(*args, **kwargs)


# Megatron rejects them with context parallelism, or requires heads and a cp_comm_type for its own implementation; here
# the layer itself (the census, --cp-linear-exchange) says what it cannot do.
VARIANTS = ("gated_delta_net", "dsa")


@patch(
    "megatron.core.transformer.transformer_config.TransformerConfig.__post_init__",
    reason="a model's configuration names the algorithm, by cp_comm_type or by MindSpeed's names, where no flag does; "
    "layers with a state may have context parallelism",
)
def transformer_config(adaptor: Adaptor, original: Callable[..., None], self: Any) -> None:
    cp_size = self.context_parallel_size
    if cp_size > 1:
        _check_layouts(self)
    if cp_size > 1 and getattr(self, "experimental_attention_variant", None) in VARIANTS:
        _check_as_megatron(self)
        self.context_parallel_size = 1
    try:
        original(self)
    finally:
        self.context_parallel_size = cp_size
    if compat.is_installed():  # a real MindSpeed gives every configuration all of its arguments, defaults included
        names = (declared_names() & vars(self).keys()) - {field.name for field in dataclasses.fields(self)}
        take_settings(adaptor, {name: getattr(self, name) for name in names})
    take_comm_type(adaptor, self.cp_comm_type, self.context_parallel_size)
    if cp_size > 1 and isinstance(self.cp_comm_type, list):
        # The settings have it. 0.12 to 0.16 look up one entry too far, and multi-token prediction has none.
        self.cp_comm_type = None


def _check_layouts(config: Any) -> None:
    """Raise ValueError where Megatron would bring hidden states from one layout to another between layers itself."""
    names = [
        field.name for field in dataclasses.fields(config) if field.name in ("linear_cp_layout", "attention_cp_layout")
    ]
    if len({getattr(config, name) for name in names}) > 1:
        said = " and ".join(f"{name} {getattr(config, name)}" for name in names)
        raise ValueError(
            f"{said} of a TransformerConfig let Megatron exchange hidden states between layers, as if it had split the "
            "batch. Here one layout serves all layers, and --cp-linear-exchange state gives layers with a state one "
            "part of the sequence on each rank; leave both out, or give both one value."
        )


def _check_as_megatron(config: Any) -> None:
    """The other rules of Megatron's own check for a configuration with context parallelism."""
    named = config.cp_comm_type
    if isinstance(named, list) and len(named) != config.num_layers:
        raise ValueError(
            f"--cp-comm-type names {len(named)} ways and --num-layers is {config.num_layers}; name one for each layer, "
            "or one for all."
        )
    if getattr(config, "batch_invariant_mode", False):
        raise ValueError(
            f"--batch-invariant-mode with --context-parallel-size {config.context_parallel_size}: Megatron has no "
            "batch invariant attention for parts of a sequence; use --context-parallel-size 1."
        )


@patch(
    "megatron.core.transformer.transformer_config.TransformerConfig.__init__",
    "megatron.core.transformer.transformer_config.MLATransformerConfig.__init__",
    reason="frameworks give a model's configuration what they give MindSpeed's repatch, whose own accepts it",
    essential=False,
)
def accept_settings(adaptor: Adaptor, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    if not original.__code__.co_flags & inspect.CO_VARKEYWORDS:  # MindSpeed's own takes all of them
        fields = signature_of(original).parameters
        for name in declared_names() & kwargs.keys() - fields.keys():
            setattr(self, name, kwargs.pop(name))  # so that __post_init__ finds it
    original(self, *args, **kwargs)


def _getter(name: str) -> Row:
    return Row(
        (f"{PARALLEL_STATE}.{name}",),
        lambda adaptor, original: original or getattr(GroupGetters(lambda: adaptor), name),
        "code written for MindSpeed asks Megatron's parallel state for its groups",
        create=True,
        is_value=True,
        essential=False,
    )


GETTER_ROWS = [_getter(name) for name in GETTERS]
