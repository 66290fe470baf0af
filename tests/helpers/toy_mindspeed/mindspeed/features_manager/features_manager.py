"""The four methods through which MindSpeed patches."""

from mindspeed.features_manager import Features
from mindspeed.patch_utils import MindSpeedPatchesManager


class MindSpeedFeaturesManager:
    FEATURES_LIST = (Features(),)

    @classmethod
    def apply_features_pre_patches(cls, args):
        MindSpeedPatchesManager.apply_patches()

    @classmethod
    def apply_features_patches(cls, args):
        for feature in cls.FEATURES_LIST:
            feature.register_patches(MindSpeedPatchesManager, args)
        MindSpeedPatchesManager.apply_patches()

    @classmethod
    def register_features_args(cls, parser):
        for feature in cls.FEATURES_LIST:
            feature.register_args(parser)

    @classmethod
    def remove_patches(cls):
        MindSpeedPatchesManager.remove_patches()
