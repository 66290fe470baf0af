"""The number of a layer, by which it gets its settings: its place in the model, from 1.

Megatron numbers layers over all pipeline stages, including virtual ones; 0.12 numbers their attention modules within a
stage. Depending on its version, layers of multi-token prediction start again at 1, continue after the decoder's layers,
or count from their stage; here they always continue.
"""

from typing import Any

NUMBER = "context_parallel_layer_number"


def number_of(module: Any) -> int:
    """The number of the layer of an attention module."""
    number: int = getattr(module, NUMBER, module.layer_number)
    return number


def number_attention(model: Any) -> None:
    """Give the modules of every transformer layer of a model the number of their layer, if they have none yet."""
    for layer in model.modules():
        if hasattr(layer, "self_attention") and hasattr(layer, "layer_number"):
            for each in layer.modules():
                if hasattr(each, "layer_number") and not hasattr(each, NUMBER):
                    setattr(each, NUMBER, layer.layer_number)


def number_behind(module: Any) -> None:
    """Number the modules of a MultiTokenPredictionLayer (its own number is its depth) after the last layer."""
    number = module.config.num_layers + module.layer_number
    for each in module.modules():
        if hasattr(each, "layer_number"):
            setattr(each, NUMBER, number)
