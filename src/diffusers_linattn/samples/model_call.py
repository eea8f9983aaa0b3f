"""How a transformer is called: which arguments take latents and timestep, and in what units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelCall:
    """How to call a transformer as its pipeline does.

    The transformer's timestep is `timestep_offset + timestep_scale * t`, where t is the scheduler's; what the
    scheduler takes for the model's output is `output_sign` times the transformer's.

    Args:
        latents: The argument that takes the latents.
        as_list: Whether it, and the output, is a list with one tensor per sample.
        timestep_scale: As above.
        timestep_offset: As above.
        timestep: The argument that takes the timestep.
        output_sign: 1 or -1.
    """

    latents: str
    as_list: bool
    timestep_scale: float
    timestep_offset: float
    timestep: str
    output_sign: float

    def predict(
        self, model: Any, latents: torch.Tensor, timestep: torch.Tensor, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        """Call the transformer on noisy latents.

        Args:
            model: The transformer.
            latents: `(batch, ...)` noisy latents, on the model's device and in its dtype.
            timestep: `(batch,)` in the scheduler's units.
            arguments: The other arguments, such as those of a [`Batch`].

        Returns:
            `(batch, ...)` what the scheduler would be given, with all channels: learned variance included.

        Example:
            >>> prediction = samples.call.predict(pipe.transformer, noisy, timestep, batch.arguments)  # doctest: +SKIP
        """
        if (self.timestep_scale, self.timestep_offset) != (1.0, 0.0):
            timestep = self.timestep_offset + self.timestep_scale * timestep
        given = {self.latents: list(latents.unbind()) if self.as_list else latents, self.timestep: timestep}
        output = output_of(model(**given, **arguments))
        return output if self.output_sign == 1.0 else self.output_sign * output


def output_of(output: Any) -> torch.Tensor:
    """The prediction in what a transformer returned: a tensor, or a list of them, alone or first in a tuple."""
    if isinstance(output, list):
        return torch.stack(output)
    return output if isinstance(output, torch.Tensor) else output_of(output[0])
