"""Patches of a model's entry points: through each of them, the layers see the record of the batch that they compute."""

from collections.abc import Callable
from typing import Any

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.alone import name_plain_attention
from mindspeed_cp.megatron.batches import block_record, entering, packed_params_in, refuse_inference, tensors_in
from mindspeed_cp.megatron.later_stages import pipeline_of
from mindspeed_cp.megatron.layer_numbers import number_attention
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.sizes import check_model, sub_batch_record
from mindspeed_cp.megatron.slices import check_layers
from mindspeed_cp.megatron.targets import left_where_they_are
from mindspeed_cp.patches.building import census_of
from mindspeed_cp.patches.rows import Row, absent, patch, present

MODELS = "megatron.core.models"
LANGUAGE_MODULE = "megatron.core.models.common.language_module.language_module.LanguageModule"
GPT_MODEL = "megatron.core.models.gpt.gpt_model.GPTModel"
SCHEDULE_NODE = "megatron.core.pipeline_parallel.utils.ScheduleNode"


@patch(
    f"{LANGUAGE_MODULE}.__init__",
    reason="models are numbered as they are made, so that the stages of a pipeline know of which one a record is",
)
def language_module_init(adaptor: Adaptor, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    adaptor.hand_over.number(self)
    adaptor.is_pipeline |= len(pipeline_of(self)) > 1  # also for groups that initialize_model_parallel did not make


@patch(
    f"{LANGUAGE_MODULE}.__call__",
    reason="a forward pass uses the layout and the documents of its own batch, found by the tensors it is given",
    inherited=True,
)
def language_module_call(adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if adaptor.entered is self or _is_untouched(adaptor, self):
        return original(self, *args, **kwargs)
    record = _entered(adaptor, self, args, kwargs)
    is_split = record is not None and record.layout.cp_size > 1
    moving = adaptor.settings.moving_targets if is_split else None
    with adaptor.inside(self, record), left_where_they_are(moving):
        output = original(self, *args, **kwargs)
    if record is not None:
        adaptor.records.remember(tensors_in(output), record)  # logits: state().gather_sequence finds them
    return output


def _forward_of(model: str, *when: Callable[[], str]) -> Row:
    target = f"{MODELS}.{model}.forward"
    reason = "a script may call forward directly, without the __call__ of every model"
    unneeded = (absent(target, "this version has no such model"), *when)
    # Not essential: frameworks set their own functions there, which __call__ calls.
    return Row((target,), language_module_call.function, reason, unneeded, essential=False)


HYBRID = "hybrid.hybrid_model.HybridModel"
FORWARDS = [
    _forward_of("gpt.gpt_model.GPTModel"),
    _forward_of("bert.bert_model.BertModel"),
    _forward_of("T5.t5_model.T5Model"),
    _forward_of(HYBRID),
    _forward_of("mamba.mamba_model.MambaModel", present(f"{MODELS}.{HYBRID}", "its forward is HybridModel's")),
]


@patch(
    f"{GPT_MODEL}.build_schedule_plan",
    reason="the plan of a forward pass that overlaps with a backward pass is another entry point of the model",
    when=absent(f"{GPT_MODEL}.build_schedule_plan", "this version makes no such plan"),
)
def build_schedule_plan(adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_untouched(adaptor, self):
        return original(self, *args, **kwargs)
    with adaptor.inside(self, _entered(adaptor, self, args, kwargs)):
        return original(self, *args, **kwargs)


@patch(
    f"{SCHEDULE_NODE}.__init__",
    reason="the nodes of a plan run later than it is made, between those of other micro-batches",
    when=absent(SCHEDULE_NODE, "this version makes no such plan"),
)
def schedule_node_init(
    adaptor: Adaptor,
    original: Callable[..., None],
    self: Any,
    forward_func: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    original(self, forward_func if adaptor.alone else adaptor.bound(forward_func), *args, **kwargs)


def _is_untouched(adaptor: Adaptor, model: Any) -> bool:
    """Whether nothing in this process is split over context-parallel ranks or requested to be."""
    return adaptor.alone and model.config.context_parallel_size == 1


def _entered(adaptor: Adaptor, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MicroBatch | None:
    adaptor.forward_pass_begins()
    if adaptor.sizes:
        check_model(model)
        values = (*args, *kwargs.values())
        refuse_inference(values)
        return sub_batch_record(adaptor, values)
    record = entering(adaptor, model, args, kwargs)
    if record is not None:
        check_layers(model, record)
    if record is not None and record.layout.cp_size > 1 and model not in adaptor.counted:
        adaptor.counted.add(model)
        number_attention(model)
        census_of(adaptor).take(model)  # includes modules that were added after it was built
        name_plain_attention(model, asked=adaptor.settings.asked_for_flash)
    return record


@patch(
    "megatron.core.transformer.transformer_block.TransformerBlock.forward",
    reason="pipeline stages without a batch, and layers, learn the true length of the micro-batch",
)
def transformer_block(
    adaptor: Adaptor, original: Callable[..., Any], self: Any, hidden_states: Any, *args: Any, **kwargs: Any
) -> Any:
    if adaptor.sizes:
        return original(self, hidden_states, *args, **kwargs)
    scope = adaptor.scope_of(self)
    if scope.alone:
        if not adaptor.alone and self not in adaptor.counted:
            adaptor.counted.add(self)
            name_plain_attention(self, asked=adaptor.settings.asked_for_flash)
        own = adaptor.running_in(scope)  # of a batch with slices; an encoder inside a model or next to it has none
        with adaptor.running(own), adaptor.computing_alone():
            return original(self, hidden_states, *args, **kwargs)
    values = (hidden_states, *args, *kwargs.values())
    refuse_inference(values)
    local = hidden_states if self.pre_process else self.input_tensor
    with adaptor.running(block_record(adaptor, scope, self.config, local.size(0), packed_params_in(values))):
        return original(self, hidden_states, *args, **kwargs)
