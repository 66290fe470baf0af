"""This project's patches together with MindSpeed's: in which order they are applied, and what they exchange."""

import importlib
import sys
from dataclasses import replace
from typing import Any

from mindspeed_cp.arguments import FrameworkSettings, add_context_parallel_arguments
from mindspeed_cp.megatron import following, neighbour
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.neighbour import DEFAULT_ALGORITHM, VARIABLE, Neighbour
from mindspeed_cp.patches import features_manager
from mindspeed_cp.patches.manager import PatchManager
from mindspeed_cp.patches.rows import patches_of
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.notices import is_rank0, warn_rank0


class Beside:
    """The adaptor's view of MindSpeed.

    Args:
        adaptor: the adaptor's state.
        manager: this project's patches of Megatron.
    """

    def __init__(self, adaptor: Adaptor, manager: PatchManager) -> None:
        self._adaptor, self._manager = adaptor, manager
        self._neighbour = Neighbour(
            give_way=self._give_way,
            come_back=self.come_back,
            configure=self._configure,
            add_flags=add_context_parallel_arguments,
            say=self.say,
            hand=lambda ends: self._adaptor.handed.set_ends(ends),
        )
        self._around = PatchManager(patches_of([features_manager], self._neighbour), subject=lambda: "MindSpeed")

    @property
    def kept(self) -> str:
        """Why context parallelism is left to MindSpeed; "" if it is done here."""
        return self._neighbour.kept

    def meet(self, choice: str, device: str) -> None:
        """Let MindSpeed patch first, without its context parallelism; if it is imported later, adapt to it then.

        Args:
            choice: the value of MINDSPEED_CP, "" if it is not set.
            device: the device that this process uses; MindSpeed is for NPUs.

        Raises:
            ValueError: the value is not known.
        """
        if choice not in ("", "off"):
            raise ValueError(
                f"{VARIABLE}={choice} is not known; use {VARIABLE}=off to leave context parallelism to MindSpeed, or "
                "unset it."
            )
        self._neighbour.kept = f"{VARIABLE}=off" if choice else ""
        if choice:
            self.say()
        elif neighbour.is_here():
            self._around.apply()
            neighbour.take_over()
        elif neighbour.is_importable():
            neighbour.AfterImport.install(self._around.apply)
            if device == "npu":
                neighbour.activate(sys.argv[0])

    def come_back(self) -> None:
        """Apply this project's patches again, on top of MindSpeed's."""
        if neighbour.is_here():
            self._around.apply()
        self._manager.apply()

    def _give_way(self) -> None:
        if self._manager.num_applied:
            self._adaptor.forget_batches()
            self._manager.undo()

    def leave(self) -> None:
        """Undo the patches of MindSpeed itself and forget it."""
        neighbour.AfterImport.uninstall()
        self._around.undo()

    def _configure(self, settings: dict[str, Any]) -> None:
        following.expect(self._adaptor, by_mindspeed(settings))

    def say(self) -> None:
        """If MindSpeed is present, rank 0 prints which package does what."""
        line = self._neighbour.line()
        if line and is_rank0():
            print(line, flush=True)
        if line and not self.kept:
            said = neighbour.untried(importlib.import_module("megatron.core.package_info").__version__)
            if said:
                warn_rank0(said)

    def default_said(self, config: ContextParallelConfig) -> str:
        """A text that the algorithm is MindSpeed's default, if the settings came from MindSpeed."""
        default = self._adaptor.settings.by_mindspeed and config.algorithm == DEFAULT_ALGORITHM
        return f", {DEFAULT_ALGORITHM} is MindSpeed's default" if default else ""


def by_mindspeed(settings: Any) -> FrameworkSettings:
    """Settings with MindSpeed's default algorithm."""
    return replace(FrameworkSettings.read(settings), default_algorithm=DEFAULT_ALGORITHM)
