"""Importing this module patches according to the command line; ``repatch`` according to its arguments."""

import argparse

from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

_ARGS = None


def get_full_args():
    global _ARGS
    if _ARGS is None:
        parser = argparse.ArgumentParser()
        MindSpeedFeaturesManager.register_features_args(parser)
        _ARGS, rest = parser.parse_known_args()
        if "--context-parallel-size" in rest:
            _ARGS.context_parallel_size = rest[rest.index("--context-parallel-size") + 1]
    return _ARGS


def repatch(settings):
    MindSpeedFeaturesManager.remove_patches()
    vars(get_full_args()).update(settings)
    MindSpeedFeaturesManager.apply_features_pre_patches(get_full_args())
    MindSpeedFeaturesManager.apply_features_patches(get_full_args())


MindSpeedFeaturesManager.apply_features_pre_patches(get_full_args())
MindSpeedFeaturesManager.apply_features_patches(get_full_args())
