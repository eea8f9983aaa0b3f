"""Image transformers whose token grid is the shape of their latents."""

from __future__ import annotations

from typing import Any

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import CROSS, DOUBLE_AND_SINGLE, TEXT, Family, ForwardArguments
from diffusers_linattn.models.grids import lengths_of_mask, patch_grid, text_length


def _image(model: Any, arguments: ForwardArguments) -> TokenLayout:
    return TokenLayout.image(patch_grid(arguments["hidden_states"], model.config.patch_size))


def _dit(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    if grid[1] != grid[2]:
        raise ValueError(
            f"DiTTransformer2DModel makes square pictures only, got latents of {grid[1]}x{grid[2]} tokens: diffusers "
            "takes the square root of the number of tokens when it unpatchifies."
        )
    return TokenLayout.image(grid)


def _image_then_text(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    return TokenLayout.joint(text=text_length(arguments["encoder_hidden_states"]), grid=grid, text_first=False)


def _text_then_image(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    return TokenLayout.joint(text=text_length(arguments["encoder_hidden_states"]), grid=grid)


def _auraflow(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    registers = model.register_tokens.shape[1]
    return TokenLayout.joint(text=registers + text_length(arguments["encoder_hidden_states"]), grid=grid)


def _cogview4(model: Any, arguments: ForwardArguments) -> TokenLayout:
    attention = arguments.get("attention_kwargs") or {}
    packed = [name for name in ("batch_flag", "latent_attn_mask") if attention.get(name) is not None]
    if packed:
        raise ValueError(
            f"CogView4Transformer2DModel got {packed[0]} in attention_kwargs: it packs samples of several sizes into "
            "one sequence, where the token grids are unknown. Expected a batch of one size: leave batch_flag and "
            "latent_attn_mask out (text_attn_mask may stay)."
        )
    return _text_then_image(model, arguments)


def _ernie(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    return TokenLayout.joint(text=text_length(arguments["text_bth"]), grid=grid, text_first=False)


def _hunyuan_image(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    text = text_length(arguments["encoder_hidden_states"])
    glyphs = arguments.get("encoder_hidden_states_2")
    if glyphs is not None and model.context_embedder_2 is not None:
        text += text_length(glyphs)
    return TokenLayout.joint(text=text, grid=grid, text_first=False)


def _kandinsky5(model: Any, arguments: ForwardArguments) -> TokenLayout:
    if arguments.get("sparse_params") is not None:
        raise ValueError(
            "Kandinsky5Transformer3DModel got sparse_params: its NABLA attention is sparse already and permutes the "
            "tokens in 8x8 blocks. Expected None, as with a checkpoint without NABLA or after "
            'pipe.transformer.register_to_config(attention_type="regular").'
        )
    return TokenLayout.image(patch_grid(arguments["hidden_states"].movedim(-1, 1), model.config.patch_size))


def _lumina2(model: Any, arguments: ForwardArguments) -> list[TokenLayout]:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    lengths = arguments.read_once("encoder_attention_mask", lengths_of_mask)
    return [TokenLayout.joint(text=length, grid=grid) for length in lengths]


IMAGE_MODELS: dict[str, Family] = {
    "DiTTransformer2DModel": Family(
        _dit,
        {"transformer_blocks.*.attn1": "image"},
        order="image",
        about="DiT; square pictures only, as in diffusers",
    ),
    "PixArtTransformer2DModel": Family(
        _image,
        {"transformer_blocks.*.attn1": "image"},
        order="image",
        about="PixArt-α, PixArt-Σ",
        left={"transformer_blocks.*.attn2": CROSS},
    ),
    "HunyuanDiT2DModel": Family(
        _image,
        {"blocks.*.attn1": "image"},
        order="image",
        about="Hunyuan-DiT",
        left={"blocks.*.attn2": CROSS},
    ),
    "LuminaNextDiT2DModel": Family(
        _image,
        {"layers.*.attn1": "image"},
        order="image",
        about="Lumina-Next",
        left={"layers.*.attn2": CROSS},
    ),
    "Kandinsky5Transformer3DModel": Family(
        _kandinsky5,
        {"visual_transformer_blocks.*.self_attention": "image"},
        order="image or video",
        about="Kandinsky 5.0 Image and Video, without NABLA",
        left={
            "visual_transformer_blocks.*.cross_attention": CROSS,
            "text_transformer_blocks.*.self_attention": TEXT,
        },
    ),
    "SD3Transformer2DModel": Family(
        _image_then_text,
        {"transformer_blocks.*.attn": "joint", "transformer_blocks.*.attn2": "image"},
        order="image, text",
        about="Stable Diffusion 3 and 3.5",
    ),
    "AuraFlowTransformer2DModel": Family(
        _auraflow,
        {"joint_transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"},
        order="registers, text, image",
        about="AuraFlow",
    ),
    "CogView3PlusTransformer2DModel": Family(
        _text_then_image, {"transformer_blocks.*.attn1": "joint"}, order="text, image", about="CogView3-Plus"
    ),
    "CogView4Transformer2DModel": Family(
        _cogview4, {"transformer_blocks.*.attn1": "joint"}, order="text, image", about="CogView4"
    ),
    "ErnieImageTransformer2DModel": Family(
        _ernie, {"layers.*.self_attention": "joint"}, order="image, text", about="ERNIE-Image"
    ),
    "HunyuanImageTransformer2DModel": Family(
        _hunyuan_image,
        DOUBLE_AND_SINGLE,
        order="image, text (ByT5 and MLLM)",
        about="HunyuanImage 2.1",
        left={"context_embedder.token_refiner.refiner_blocks.*.attn": TEXT},
    ),
    "PRXTransformer2DModel": Family(
        _text_then_image,
        {"blocks.*.attention": "queries"},
        order="text, image; the text has keys but no queries",
        about="PRX",
    ),
    "Lumina2Transformer2DModel": Family(
        _lumina2,
        {"layers.*.attn": "joint", "noise_refiner.*.attn": "image"},
        order="text, image, padding; each sample has its own text length",
        about="Lumina Image 2.0",
        left={"context_refiner.*.attn": TEXT},
    ),
}
