"""An optimizer whose state is divided among processes."""

from __future__ import annotations

from typing import Any

from torch.distributed.optim import ZeroRedundancyOptimizer


class DividedOptimizer(ZeroRedundancyOptimizer):
    """Each process has the state of its part of the parameters, updates that part and sends it to the others (stage 1
    of ZeRO, arXiv 1910.02054). In a checkpoint the state is whole, as that of an undivided optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state in the first process, which writes it; the others have to call this as well."""
        self.consolidate_state_dict(to=0)
        return super().state_dict() if self.rank == 0 else {}
