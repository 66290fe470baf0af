"""The table for megatron.training, which comes with a Megatron-LM checkout and not with the megatron-core package."""

import importlib.util


def training_patches(state):
    return []
