"""Tiny real pipelines of every kind that samples are made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

import tiny
from model_cases import CASES


@dataclass
class PipelineCase:
    """One pipeline: how a tiny one is made, what it is called with, and what there is to read off it.

    Args:
        make: Makes the pipeline.
        call: Arguments for its call, one resolution.
        scale: The transformer's timestep is `offset + scale * t`.
        offset: As above.
        sign: The scheduler gets `sign` times the transformer's output.
        prompts: Two prompts that the text encoder makes the same number of tokens of, and a third.
        sizes: Resolutions, where it takes any.
    """

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    scale: float = 0.001
    offset: float = 0.0
    sign: float = 1.0
    prompts: tuple[Any, ...] = ("a cat", "a dog", "the red cat")
    sizes: tuple[tuple[int, int], ...] = ((32, 48), (48, 32))


def pipeline(cls: Any, **parts: Any) -> Any:
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words() -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<unk>", *tiny.WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "</s>"}
    template = "{% for message in messages %}letter {{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def decoder(model: Any, config: Any, dim: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": dim, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model(config(vocab_size=9, num_key_value_heads=1, head_dim=8, **sizes)).eval()


def umt5(dim: int) -> UMT5EncoderModel:
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(vocab_size=9, d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def sd3() -> Any:
    _, tokenizer = tiny.clip(12)
    tokenizer_ids = {"bos_token_id": 6, "eos_token_id": 7, "pad_token_id": 7}
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

    def clip(dim: int) -> CLIPTextModelWithProjection:
        torch.manual_seed(0)
        shape = {"hidden_size": dim, "projection_dim": dim, "max_position_embeddings": 16}
        return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=8, **shape, **sizes, **tokenizer_ids)).eval()

    t5, t5_tokenizer = tiny.t5(24)
    return pipeline(
        diffusers.StableDiffusion3Pipeline,
        transformer=tiny.sd3(),
        scheduler=flow(),
        vae=tiny.vae(4),
        text_encoder=clip(8),
        tokenizer=tokenizer,
        text_encoder_2=clip(12),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def qwen_image() -> Any:
    transformer = CASES["QwenImageTransformer2DModel"].make()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=2,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.2, -0.1],
        latents_std=[1.5, 0.8],
    )
    pipe = pipeline(
        diffusers.QwenImagePipeline,
        scheduler=flow(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    # Its text encoder reads pictures as well and has no tiny form; what comes of a prompt is a row per word.
    encode = _embeddings(12)

    def encode_prompt(prompt: Any, max_sequence_length: int = 8, **_: Any) -> Any:
        rows, mask = encode(prompt)
        return rows, None if mask.all() else mask

    pipe.encode_prompt = encode_prompt
    return pipe


def hidream() -> Any:
    parts = [f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3", "_4")]
    transformer = CASES["HiDreamImageTransformer2DModel"].make()
    pipe = pipeline(
        diffusers.HiDreamImagePipeline,
        scheduler=flow(),
        vae=tiny.vae(4),
        transformer=transformer,
        **dict.fromkeys(parts),
    )
    pipe.default_sample_size = 16  # every picture is scaled to this area
    t5, llama = _embeddings(12, 4), _embeddings(24, 4)

    def encode_prompt(prompt: Any, **_: Any) -> Any:
        states, other = (torch.stack([llama(text)[0], llama(text)[0] + 1]) for text in (prompt, [""] * len(prompt)))
        rows, others = t5(prompt)[0], t5([""] * len(prompt))[0]
        return rows, others, states, other, rows[:, 0, :8], others[:, 0, :8]

    pipe.encode_prompt = encode_prompt
    return pipe


def _embeddings(dim: int, length: int | None = None) -> Callable[[Any], tuple[torch.Tensor, torch.Tensor]]:
    table = torch.randn(10, dim, generator=torch.Generator().manual_seed(3))

    def encode(prompt: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        found = [[tiny.WORDS.index(word) + 1 for word in text.split()] or [9] for text in prompts]
        longest = length or max(map(len, found))
        ids = torch.tensor([(row + [0] * longest)[:longest] for row in found])
        return table[ids] * (ids > 0)[..., None], (ids > 0).long()

    return encode


def z_image() -> Any:
    return pipeline(
        diffusers.ZImagePipeline,
        scheduler=flow(),
        vae=tiny.vae(4),
        text_encoder=decoder(Qwen3Model, Qwen3Config, 24),
        tokenizer=words(),
        transformer=CASES["ZImageTransformer2DModel"].make(),
    )


def lumina2() -> Any:
    transformer: Any = CASES["Lumina2Transformer2DModel"].make()
    return pipeline(
        diffusers.Lumina2Pipeline,
        scheduler=flow(),
        vae=tiny.vae(4),
        text_encoder=decoder(Gemma2Model, Gemma2Config, transformer.config.cap_feat_dim),
        tokenizer=words(),
        transformer=transformer,
    )


def wan(**parts: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return pipeline(
        diffusers.WanPipeline,
        tokenizer=words(),
        text_encoder=umt5(16),
        vae=vae.eval(),
        scheduler=flow(),
        transformer=wan_transformer(),
        **parts,
    )


def wan_transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def cogvideox() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=6,
        text_embed_dim=16,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    text_encoder, tokenizer = tiny.t5(16)
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return pipeline(
        diffusers.CogVideoXPipeline,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


SHORT: dict[str, Any] = {"max_sequence_length": 8}

PIPELINES: dict[str, PipelineCase] = {
    "FLUX": PipelineCase(tiny.flux_pipeline, SHORT),
    "FLUX guidance-distilled": PipelineCase(lambda: tiny.flux_pipeline(guidance_embeds=True), SHORT),
    "SD3": PipelineCase(sd3, SHORT, scale=1.0),
    "PixArt": PipelineCase(
        tiny.pixart_pipeline,
        {**SHORT, "use_resolution_binning": False, "clean_caption": False},
        scale=1.0,
    ),
    "DiT": PipelineCase(tiny.dit_pipeline, scale=1.0, prompts=(3, 7, 999), sizes=()),
    "Qwen-Image": PipelineCase(qwen_image, SHORT),
    "HiDream": PipelineCase(hidream, scale=1.0, sign=-1.0),
    "Z-Image": PipelineCase(z_image, SHORT, scale=-0.001, offset=1.0, sign=-1.0),
    "Lumina2": PipelineCase(lumina2, {**SHORT, "system_prompt": "the"}, scale=-0.001, offset=1.0, sign=-1.0),
    "Wan": PipelineCase(wan, {**SHORT, "num_frames": 5}, scale=1.0, sizes=((16, 32), (32, 16))),
    "CogVideoX": PipelineCase(cogvideox, {**SHORT, "num_frames": 5}, scale=1.0, sizes=((16, 32), (32, 16))),
}
