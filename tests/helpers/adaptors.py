"""An Adaptor with a fake context-parallel group, for tests of patches and batches that need no process group."""

from types import SimpleNamespace

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.scopes import Scope

RING = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")


class StandIn(Adaptor):
    """Uses one scope for any group."""

    def __init__(self, scope):
        super().__init__()
        self.settings.config, self.settings.undecided = scope.config, None
        self.fixed = scope

    @property
    def main(self):
        return self.fixed

    def scope_of_group(self, group):
        return self.fixed

    def scope_of(self, module):
        return self.fixed

    @property
    def alone(self):
        return self.fixed.alone


def adaptor_of(config=RING, cp_rank=0, groups=None):
    """An adaptor that acts as ``cp_rank`` of the group of ``config``, or one over real ``groups``."""
    stand_in = SimpleNamespace(
        cp_size=config.context_parallel_size,
        cp_rank=cp_rank,
        hierarchy=config.hierarchy,
        cp_group=None,
        global_ranks=tuple(range(config.context_parallel_size)),
    )
    return StandIn(Scope(config, groups or stand_in))
