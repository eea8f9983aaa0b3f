"""A user's own captioned pictures as samples."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_linattn.generation import caught_steps
from diffusers_linattn.linearize import original_attention
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.samples.conditioning import Size, size_arguments, size_name
from diffusers_linattn.samples.filling import Source, fill_directory
from diffusers_linattn.samples.pictures import Pictures, find_pictures, nearest_sizes, read_picture
from diffusers_linattn.samples.probe import sizes_above_one
from diffusers_linattn.samples.reading import Samples
from diffusers_linattn.samples.recorder import Recorder
from diffusers_linattn.samples.settings import (
    DEFAULT_SIZE,
    Assignment,
    check_label,
    check_prompt,
    make_settings,
    read_sizes,
)


def encode_images(
    pipe: Any,
    images: Any,
    directory: str | Path,
    *,
    captions: str | None = None,
    resolutions: Sequence[tuple[int, int]] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    call_arguments: dict[str, Any] | None = None,
) -> Samples:
    """Make samples of captioned pictures instead of letting the pipeline make its own.

    Each picture goes to the resolution whose aspect ratio is nearest, is resized and cut at its centre, and encoded by
    the pipeline's VAE. The directory is like one of [`make_samples`], and is made in the same way: interrupted runs go
    on, several processes share the work.

    Args:
        pipe: A pipeline as in [`make_samples`] with a VAE.
        images: A folder with `name.txt` beside each `name.png` (or jpg, webp …), a folder with a `metadata.jsonl` of
            objects with `file_name` and `text`, or a dataset of the `datasets` library with an image and a text
            column.
        directory: Where to; made if it does not exist.
        captions: The column, or the field of `metadata.jsonl`, with the captions; `None` looks for `text`, `caption`
            or `prompt`, and for `label` where the pipeline takes classes.
        resolutions: `(height, width)` in pixels; `None` is the pipeline's default.
        batch_size: Pictures encoded at a time.
        seed: Kept with the settings; encoding draws nothing at random.
        call_arguments: Arguments for the pipeline's call that decide on the conditioning, such as
            `{"max_sequence_length": 256}`.

    Returns:
        The samples, opened.

    Raises:
        ValueError: As [`make_samples`]; pictures without captions or that cannot be read; a pipeline whose latents are
            not what its VAE encodes, scaled and packed.

    Example:
        >>> samples = encode_images(pipe, "pictures/", "samples/", resolutions=[(1024, 1024)])  # doctest: +SKIP
    """
    check_positive_int("batch_size", batch_size)
    call = dict(call_arguments or {})
    recorder = Recorder(pipe, call)
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no VAE to encode pictures with.")
    pictures = find_pictures(images, captions, recorder.of_classes)
    prompts: dict[Any, int] = {}
    classes = recorder.model.config.num_embeds_ada_norm if recorder.of_classes else None
    numbers = []
    for index in range(len(pictures)):
        where = f"The caption of picture {pictures.name(index)}"
        found = pictures.caption(index)
        prompt = check_label(found, where, classes) if recorder.of_classes else check_prompt(found, where)
        numbers.append(prompts.setdefault(prompt, len(prompts)))
    sizes = nearest_sizes(pictures, read_sizes(resolutions)) if resolutions else [list(DEFAULT_SIZE)] * len(pictures)
    entries = [
        {"file": pictures.name(index), "prompt": number, "resolution": size}
        for index, (number, size) in enumerate(zip(numbers, sizes, strict=True))
    ]
    settings = make_settings(pipe, len(pictures), list(prompts), resolutions, seed, call, pictures=entries)
    source = _Encoded(pipe, Assignment(settings), batch_size, pictures, recorder)
    return fill_directory(Path(directory), recorder, source)


class _Encoded(Source):
    """Latents of pictures."""

    def __init__(self, pipe: Any, assignment: Assignment, batch_size: int, pictures: Pictures, recorder: Recorder):
        super().__init__(pipe, assignment, batch_size)
        self.pictures, self.recorder = pictures, recorder

    def check(self, plan: dict[str, Any]) -> None:
        """What the pipeline decodes must come out as the latents it decoded when it is taken for encoded pictures."""
        size = self.assignment.sizes()[0]
        latents, decoded = self._decoded(size, plan["without_guidance"])
        again = self._in_form(self._normalized(decoded), plan["latent_shapes"][size_name(size)])
        if not torch.allclose(again.double(), latents.reshape(again.shape).double(), rtol=0.02, atol=0.02):
            raise ValueError(
                f"{type(self.pipe).__name__} decodes its latents in another way than by scale and shift, or mean and "
                "standard deviation, of its VAE's configuration: its own pictures can be samples (make_samples), "
                "others cannot be encoded."
            )
        for size in self.assignment.sizes():
            shape = plan["latent_shapes"][size_name(size)]
            self._in_form(self._encode(torch.zeros(1, 3, *self._pixels(size))), shape)

    def latents(self, indices: Sequence[int], size: Size, shape: Sequence[int]) -> torch.Tensor:
        pixels = torch.stack([read_picture(self.pictures, index, self._pixels(size)) for index in indices])
        return self._in_form(self._encode(pixels), shape)

    def record(self, index: int) -> dict[str, Any]:
        return {"picture": self.assignment.settings["pictures"][index]["file"]}

    def _pixels(self, size: Size) -> Size:
        return size if size != DEFAULT_SIZE else _default_size(self.pipe)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        pixels = pixels.to(self.pipe._execution_device, vae.dtype)
        if any(isinstance(module, nn.Conv3d) for module in vae.modules()):
            pixels = pixels[:, :, None]  # a video of one frame
        encoded = vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        self.pipe.maybe_free_model_hooks()
        return self._normalized(latents)

    def _normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        scale = config.get("scaling_factor") or 1.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return (latents - (config.get("shift_factor") or 0.0)) * scale
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.as_tensor(part).to(latents).view(shape) for part in (mean, std))
        return (latents - mean) * scale / std

    def _in_form(self, latents: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Latents of the VAE as the transformer takes them: as they are, or packed by the pipeline."""
        batch, found = len(latents), list(latents.shape[1:])
        if sizes_above_one(found) == sizes_above_one(shape):
            return latents.reshape(batch, *shape)
        pack = getattr(self.pipe, "_pack_latents", None)
        wanted = ["latents", "batch_size", "num_channels_latents", "height", "width"]
        if pack is not None and list(inspect.signature(pack).parameters) == wanted:
            packed = pack(latents, batch, latents.shape[1], *latents.shape[-2:])
            if list(packed.shape[1:]) == list(shape):
                return packed
            found = list(packed.shape[1:])
        raise ValueError(
            f"{type(self.pipe).__name__} gives its transformer latents of {tuple(shape)}, the VAE's become "
            f"{tuple(found)}: encode_images covers latents as they are, and those that the pipeline's _pack_latents "
            "packs in the way of FLUX, at resolutions that the pipeline does not round."
        )

    def _decoded(self, size: Size, without_guidance: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Final latents of a short run, and what the VAE was given to decode."""
        recorder, vae = self.recorder, self.pipe.vae
        arguments = size_arguments(size) | without_guidance | {"num_inference_steps": 2}
        last: list[torch.Tensor] = []
        with caught_steps(self.pipe, lambda step: last.__setitem__(slice(None), [step.result])):
            with original_attention(self.pipe):
                decoded = recorder.until_decoding(vae, self.assignment.prompts[0], arguments)
        return last[0], decoded


def _default_size(pipe: Any) -> Size:
    size = getattr(pipe, "default_sample_size", None) or pipe.transformer.config.get("sample_size")
    factor = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(pipe.vae.config.get("block_out_channels", ())) - 1)
    if not isinstance(size, int) or not isinstance(factor, int):
        raise ValueError(f"{type(pipe).__name__} does not say its default size: give resolutions.")
    return size * factor, size * factor
