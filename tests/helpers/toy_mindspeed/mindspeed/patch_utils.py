"""Patches by name; all are removed before others are applied."""

import importlib
import pkgutil


class MindSpeedPatchesManager:
    registered = {}
    applied = []

    @staticmethod
    def register_patch(target, function=None, force_patch=False, create_dummy=False):
        MindSpeedPatchesManager.registered[target] = function

    @staticmethod
    def apply_patches():
        for target, function in MindSpeedPatchesManager.registered.items():
            path, _, name = target.rpartition(".")
            try:
                owner = importlib.import_module(path)
            except ModuleNotFoundError:
                owner = pkgutil.resolve_name(path)
            MindSpeedPatchesManager.applied.append((owner, name, getattr(owner, name)))
            setattr(owner, name, function)
        MindSpeedPatchesManager.registered.clear()

    @staticmethod
    def remove_patches():
        while MindSpeedPatchesManager.applied:
            setattr(*MindSpeedPatchesManager.applied.pop())
