"""Video models that take packed tokens, with the grid in numbers or coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens
from model_cases.video import LONG, TALL, WIDE, Grid
from model_cases.video_joint import ragged


def coordinates(grid: Grid, start: float = 0.0, scale: float = 32.0, end: bool = False) -> torch.Tensor:
    """(3, tokens): when each token begins or ends, in frames, and the same of its y and x in pixels."""
    frames, height, width = grid
    times = start + torch.tensor([0.0, *(1.0 + 8 * torch.arange(frames))])[end:][:frames]
    y, x = ((torch.arange(side) + end) * scale for side in (height, width))
    return torch.stack(torch.meshgrid(times, y, x, indexing="ij")).flatten(1)


def ltx() -> torch.nn.Module:
    return seeded(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def packed_call(parts: Sequence[tuple[str, Grid]], lengths: list[int], **extra: Any) -> Call:
    """A call with a video and references, and prompts of these lengths."""
    sequence = tokens(*parts)
    video = [kind for kind, _ in parts].index("image")
    row = len(tokens(*parts[:video])) + 17
    inputs = {
        "hidden_states": randn(len(lengths), len(sequence), 4),
        "encoder_hidden_states": randn(len(lengths), 8, 16, seed=1),
        "timestep": torch.tensor([3.0] * len(lengths)),
        "encoder_attention_mask": ragged(lengths, 8),
        "return_dict": False,
        **extra,
    }
    hidden = ("encoder_hidden_states", (0, slice(lengths[0], None)))
    return Call(inputs, {"joint": sequence}, touched=((slice(None), row), row), hidden=hidden)


def sizes(grid: Grid) -> dict[str, int]:
    return dict(zip(("num_frames", "height", "width"), grid, strict=True))


def ltx_call(grid: Grid, lengths: list[int]) -> Call:
    return packed_call([("image", grid)], lengths, **sizes(grid))


def condition_call(grid: Grid, lengths: list[int], pictures: int) -> Call:
    """As LTXConditionPipeline does: key frames first, and nothing but coordinates."""
    _, height, width = grid
    starts = [40.0, 20.0][:pictures]
    parts = [*(("reference", (1, height, width)) for _ in starts), ("image", grid)]
    coords = torch.cat([*(coordinates((1, height, width), start) for start in starts), coordinates(grid)], 1)
    return packed_call(parts, lengths, video_coords=coords.expand(len(lengths), -1, -1))


def ltx2() -> torch.nn.Module:
    return seeded(
        diffusers.LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )


def ltx2_call(grid: Grid, lengths: list[int], reference: Grid | None = None, size: bool = True) -> Call:
    batch, parts = len(lengths), [("image", grid)]
    extra: dict[str, Any] = sizes(grid) if size else {}
    if reference is not None:  # IC-LoRA: the same place in fewer tokens; and the last picture of the video
        key, last, scale = (1, *grid[1:]), 8.0 * (grid[0] - 1), 32.0 * grid[1] / reference[1]
        parts += [("reference", key), ("reference", reference)]
        found = [(grid, 0.0, 32.0), (key, last, 32.0), (reference, 0.0, scale)]
        edges = [torch.cat([coordinates(*some, end=end) for some in found], 1) for end in (False, True)]
        extra["video_coords"] = torch.stack(edges, -1).expand(batch, -1, -1, -1)
    return packed_call(
        parts,
        lengths,
        **extra,
        audio_hidden_states=randn(batch, 5, 4, seed=2),
        audio_encoder_hidden_states=randn(batch, 8, 16, seed=3),
        audio_encoder_attention_mask=ragged(lengths, 8),
        audio_num_frames=5,
    )


def minimax_h3() -> torch.nn.Module:
    return seeded(
        diffusers.MiniMaxH3Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=1,
        audio_in_channels=6,
        text_dim=16,
        freq_dim=8,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def minimax_call(grid: Grid, batch: int, text: int, sound: int, reference: Grid | None = None) -> Call:
    """Text, perhaps a reference, sound and the video, in one sequence that all samples share."""
    parts: list[tuple[str, Any]] = [("text", text), ("text", sound), ("image", grid)]
    ids = [torch.zeros(3, text), torch.zeros(3, sound), coordinates(grid, start=text, scale=2.0)]
    ids[0][0], ids[1][0] = torch.arange(text), text + torch.arange(sound) / 7
    tags = [1, 2, 0]
    if reference is not None:
        parts.insert(1, ("reference", reference))
        ids.insert(1, coordinates(reference, start=text - 3.5, scale=3.0))
        tags.insert(1, 0)
    sequence = tokens(*parts)
    lengths = [len(tokens(part)) for part in parts]
    token_tags = torch.tensor(tags).repeat_interleave(torch.tensor(lengths))
    call = packed_call([("image", grid)], [8] * batch)
    del call.inputs["encoder_attention_mask"]
    num_video = int((token_tags == 0).sum())
    call.inputs |= {
        "hidden_states": randn(batch, num_video, 4),
        "encoder_hidden_states": randn(batch, text, 16, seed=1),
        "audio_hidden_states": randn(batch, sound, 6, seed=2),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (token_tags == 2).long(),
        "token_tags": token_tags,
        "position_ids": torch.cat(ids, 1).T.contiguous(),
    }
    for tag, name in enumerate(("video", "text", "audio")):
        call.inputs[f"{name}_indices"] = (token_tags == tag).nonzero()[:, 0]
    call.tokens = {"joint": sequence}
    before = num_video - len(tokens(parts[-1]))
    call.touched = ((slice(None), before + 17), sum(lengths[:-1]) + 17)
    call.hidden = None
    return call


ATTN1 = {"transformer_blocks.*.attn1": "joint"}

VIDEO_PACKED: dict[str, Case] = {
    "LTXVideoTransformer3DModel": Case(
        ltx, ATTN1, [ltx_call(WIDE, [7, 4]), ltx_call(TALL, [8, 8]), ltx_call(LONG, [5])]
    ),
    "LTXVideoTransformer3DModel conditions": Case(
        ltx,
        ATTN1,
        [condition_call(WIDE, [7, 4], 2), condition_call(TALL, [8, 8], 1), condition_call(LONG, [5], 0)],
    ),
    "LTX2VideoTransformer3DModel": Case(
        ltx2,
        ATTN1,
        [
            ltx2_call(WIDE, [7, 4]),
            ltx2_call(TALL, [8, 8], reference=(2, 5, 3)),
            ltx2_call(LONG, [5], reference=(4, 2, 3), size=False),  # as the DFR pipelines do
        ],
    ),
    "MiniMaxH3Transformer3DModel": Case(
        minimax_h3,
        {"transformer_blocks.*.attn": "joint"},
        [
            minimax_call(WIDE, 2, text=7, sound=5),
            minimax_call(TALL, 2, text=4, sound=6, reference=(2, 5, 3)),
            minimax_call(LONG, 1, text=7, sound=5),
        ],
    ),
}
