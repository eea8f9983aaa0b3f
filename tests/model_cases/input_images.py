"""Image models that take input images beside the latents, and make tokens of both themselves."""

from __future__ import annotations

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens


Size = tuple[int, int]


def fibo2() -> torch.nn.Module:
    return seeded(
        diffusers.BriaFibo2Transformer2DModel,
        in_channels=4,
        patch_size=2,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=12,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(8, 8, 8),
        axes_lens=(32, 32, 32),
    )


def fibo2_call(size: Size, text: int, lengths: list[int], context: tuple[Size, ...] = ()) -> Call:
    """Between 2 and 8 text tokens make as many gist tokens, rounded up to even numbers."""
    batch, grid = len(lengths), (1, size[0] // 2, size[1] // 2)
    counts = [min(8, max(2, length + length % 2)) for length in lengths]
    pictures: list = [("image", grid), *(("reference", (1, height // 2, width // 2)) for height, width in context)]
    ragged = min(counts) < max(counts)
    gist = [("text", max(counts))]
    row = 2 * grid[2] + 1
    call = Call(
        {
            "hidden_states": randn(batch, 4, *size),
            "timestep": torch.tensor([0.3] * batch),
            "encoder_hidden_states": randn(batch, 2, text, 12, seed=1),
            "context_latents": [randn(batch, 4, *picture, seed=3 + i) for i, picture in enumerate(context)] or None,
            "return_dict": False,
        },
        {
            "joint": tokens(*pictures, *gist) if ragged else tokens(*gist, *pictures),
            "pictures": tokens(*pictures),
        },
        touched=((slice(None), slice(None), 5, 3), row),
    )
    if min(lengths) < text:
        call.inputs["encoder_attention_mask"] = torch.arange(text) < torch.tensor(lengths)[:, None]
        call.hidden = ("encoder_hidden_states", (0, slice(None), slice(lengths[0], None)))
    return call


def omnigen() -> torch.nn.Module:
    return seeded(
        diffusers.OmniGenTransformer2DModel,
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=2,
        pad_token_id=0,
        vocab_size=40,
        rope_scaling={"long_factor": [1, 1, 1, 1], "short_factor": [1, 1, 1, 1]},
        pos_embed_max_size=16,
        time_step_dim=8,
    )


def omnigen_call(size: Size, text: int, lengths: list[int], images: dict[int, tuple[int, Size]] | None = None) -> Call:
    """Prompts are padded on the left and causal; `images` says where in a sample which input image begins."""
    batch, grid = len(lengths), (1, size[0] // 2, size[1] // 2)
    length = text + 1 + grid[1] * grid[2]
    mask = torch.ones(batch, length, length).tril()
    mask[:, text + 1 :] = 1
    positions = torch.zeros(batch, length, dtype=torch.long)
    for sample, number in enumerate(lengths):
        padding = text - number
        mask[sample, :, :padding] = 0
        mask[sample, :padding] = 1
        positions[sample, padding:] = torch.arange(length - padding)
    sizes, latents = {}, []
    for sample, (start, (height, width)) in (images or {}).items():
        stop = start + height * width // 4
        mask[sample, start:stop, start:stop] = 1
        sizes[sample] = [[start, stop]]
        latents.append(randn(1, 4, height, width, seed=6 + sample))
    call = Call(
        {
            "hidden_states": randn(batch, 4, *size),
            "timestep": torch.tensor([0.3] * batch),
            "input_ids": torch.randint(1, 30, (batch, text), generator=torch.Generator().manual_seed(1)),
            "input_img_latents": latents,
            "input_image_sizes": sizes,
            "attention_mask": mask,
            "position_ids": positions,
            "return_dict": False,
        },
        {"joint": tokens(("text", text + 1), ("image", grid))},
        touched=((slice(None), slice(None), 5, 3), text + 1 + 2 * grid[2] + 1),
    )
    if lengths[0] < text:
        call.hidden = ("input_ids", (0, slice(0, text - lengths[0])))
    return call


INPUT_IMAGES: dict[str, Case] = {
    "BriaFibo2Transformer2DModel": Case(
        fibo2,
        {"layers.*.attention": "joint", "noise_refiner.*.attention": "pictures"},
        [fibo2_call((8, 12), 6, [6, 6]), fibo2_call((12, 8), 7, [3, 7]), fibo2_call((10, 6), 4, [4])],
    ),
    "BriaFibo2Transformer2DModel context": Case(
        fibo2,
        {"layers.*.attention": "joint", "noise_refiner.*.attention": "pictures"},
        [
            fibo2_call((8, 12), 6, [6, 6], ((6, 10), (4, 4))),
            fibo2_call((12, 8), 7, [3, 7], ((6, 10),)),
            fibo2_call((12, 8), 6, [6]),
        ],
    ),
    "OmniGenTransformer2DModel": Case(
        omnigen,
        {"layers.*.self_attn": "joint"},
        [omnigen_call((8, 12), 6, [4, 6]), omnigen_call((12, 8), 5, [5]), omnigen_call((10, 6), 7, [1, 7, 2])],
    ),
    "OmniGenTransformer2DModel input images": Case(
        omnigen,
        {"layers.*.self_attn": "joint"},
        [
            omnigen_call((8, 12), 20, [18, 20], {0: (4, (4, 8)), 1: (6, (6, 6))}),
            omnigen_call((12, 8), 20, [20, 9, 20], {2: (3, (8, 4))}),
            omnigen_call((12, 8), 5, [5]),
        ],
    ),
}
