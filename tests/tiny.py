"""Tiny real diffusers models and pipelines, built from memory: no file, no network."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from diffusers_linattn import ClearProcessor, GLAProcessor, HybridProcessor, LinearProcessor
from diffusers_linattn.linearize import layers_of


WORDS = ["the", "letter", "a", "cat", "dog", "red"]


def flux(**changes: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": False,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**{**config, **changes}).eval()


def flux_ids(height: int, width: int, picture: int = 0) -> torch.Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = picture
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.reshape(-1, 3)


def flux_inputs(
    height: int = 6,
    width: int = 9,
    text: int = 7,
    batch: int = 2,
    reference: tuple[int, int] | None = None,
    channels: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = flux_ids(height, width)
    if reference is not None:
        ids = torch.cat([ids, flux_ids(*reference, picture=1)])
    return {
        "hidden_states": torch.randn(batch, len(ids), channels, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def pixart(**changes: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "sample_size": 8,
        "use_additional_conditions": False,
    }
    return PixArtTransformer2DModel(**{**config, **changes}).eval()


def pixart_inputs(height: int = 12, width: int = 20, text: int = 8, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, text)
    mask[-1, text // 2 :] = 0
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=generator),
        "timestep": torch.tensor([3] * batch),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def dit(**changes: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 16,
        "num_embeds_ada_norm": 10,
    }
    return DiTTransformer2DModel(**{**config, **changes}).eval()


def dit_inputs(size: int = 16, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor([3] * batch),
        "class_labels": torch.arange(batch),
        "return_dict": False,
    }


def sd3(**changes: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "caption_projection_dim": 32,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**{**config, **changes}).eval()


def sd3_inputs(height: int = 12, width: int = 20, text: int = 7, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
        "timestep": torch.tensor([3.0] * batch),
        "return_dict": False,
    }


def vae(latent_channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def t5(dim: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    torch.manual_seed(0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    config = T5Config(vocab_size=len(pieces), d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(dim: int) -> tuple[CLIPTextModel, CLIPTokenizer]:
    torch.manual_seed(0)
    words = [f"{word}</w>" for word in WORDS] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=dim,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    return CLIPTextModel(config).eval(), tokenizer


def flux_pipeline(**changes: Any) -> FluxPipeline:
    text_encoder, tokenizer = clip(20)
    text_encoder_2, tokenizer_2 = t5(24)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=flux(**changes),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


FLUX_CALL: dict[str, Any] = {"height": 24, "width": 32, "num_inference_steps": 2, "max_sequence_length": 8}


def pixart_pipeline() -> PixArtSigmaPipeline:
    text_encoder, tokenizer = t5(24)
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(4),
        transformer=pixart(),
        scheduler=DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline(cls: Any = StableDiffusion3Pipeline, **components: Any) -> Any:
    """Without text encoders: calls take the embeddings of `SD3_CALL`."""
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = cls(
        transformer=sd3(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        **dict.fromkeys(encoders),
        **components,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD3_CALL: dict[str, Any] = {
    "prompt_embeds": torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(1)),
    "negative_prompt_embeds": torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(2)),
    "pooled_prompt_embeds": torch.randn(1, 20, generator=torch.Generator().manual_seed(3)),
    "negative_pooled_prompt_embeds": torch.randn(1, 20, generator=torch.Generator().manual_seed(4)),
    "height": 24,
    "width": 40,
    "num_inference_steps": 2,
}


def generate(pipe: Any, **call: Any) -> torch.Tensor:
    """The latents that a pipeline makes from one seed."""
    torch.manual_seed(0)  # some pipelines encode pictures without the generator
    images = pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    return torch.as_tensor(images)


def train(model: Any) -> Any:
    """Random weights in the processors of a converted model or pipeline, as if they had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers_of(model):
            if layer.processor is not None:
                for parameter in layer.processor.own_parameters().values():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


# Processors with weights of every kind: bare ones in leaf modules, convolutions, linear layers.
TRAINABLE = {
    "clear": ClearProcessor(window=2, down_factor=2),
    "linear": LinearProcessor(feature_map="hedgehog"),
    "gla": GLAProcessor(),
    "hybrid": HybridProcessor(window=2),
}


def dit_pipeline() -> DiTPipeline:
    pipe = DiTPipeline(transformer=dit(num_embeds_ada_norm=1000), vae=vae(4), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
