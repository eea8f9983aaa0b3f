"""Tiny text encoders for the glyph teacher, frozen at random weights, with tokenizers built from memory.

Nothing about them is trained: the transformer needs only that the 26 prompts are well apart, and `separation` measures
that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from boards import LETTERS, prompt
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer


TOKENS = 8
WIDTH = 64
WORDS = ("the", "letter")


class TextEncoders(NamedTuple):
    """The four text components of a FluxPipeline, in its order."""

    clip: CLIPTextModel
    clip_tokenizer: CLIPTokenizer
    t5: T5EncoderModel
    t5_tokenizer: T5Tokenizer


def build_clip_tokenizer() -> CLIPTokenizer:
    """The words of the prompts, and single letters for anything else; special tokens last, as CLIP expects."""
    letters = [letter.lower() for letter in LETTERS]
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        joined = pieces[0]
        for piece in pieces[1:]:
            merges.append((joined, piece))
            joined += piece
            vocabulary.append(joined)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    indices = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=indices, merges=merges, model_max_length=TOKENS)


def build_t5_tokenizer(lower: bool = False) -> T5Tokenizer:
    """The words of the prompts; `lower` for pipelines that put prompts in lower case, as PixArt's do."""
    letters = [letter.lower() for letter in LETTERS] if lower else LETTERS
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in (*WORDS, *letters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)


@torch.no_grad()
def _spread(clip: CLIPTextModel) -> None:
    """Make the pooled embedding, that of the end token, depend mostly on what it attends to: the words before it."""
    for name, parameter in clip.named_parameters():
        if name.endswith("token_embedding.weight"):
            parameter.normal_()
            parameter[clip.config.eos_token_id] = 0
        elif name.endswith(("v_proj.weight", "out_proj.weight")):
            parameter.normal_(std=WIDTH**-0.5)


@torch.no_grad()
def _standardise(clip: CLIPTextModel, tokens: torch.Tensor) -> None:
    """Set the last norm so that the pooled embeddings of the prompts have mean 0 and deviation 1 in every channel."""
    norm = [module for name, module in clip.named_modules() if name.endswith("final_layer_norm")][0]
    pooled = clip(tokens).pooler_output
    deviation = pooled.std(0)
    norm.bias.copy_((norm.bias - pooled.mean(0)) / deviation)
    norm.weight.div_(deviation)


def build_text_encoders(seed: int) -> TextEncoders:
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer), d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    clip, t5 = CLIPTextModel(clip_config), T5EncoderModel(t5_config)
    prompts = [prompt(letter) for letter in LETTERS]
    tokens = clip_tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    _spread(clip)
    _standardise(clip, tokens)
    return TextEncoders(clip.eval(), clip_tokenizer, t5.eval(), t5_tokenizer)


def separation(embeddings: torch.Tensor) -> float:
    """The smallest distance between two prompts, relative to the mean length of an embedding."""
    flat = embeddings.flatten(1).float()
    distances = torch.cdist(flat, flat) + torch.eye(len(flat)) * 1e9
    return (distances.min() / flat.norm(dim=1).mean()).item()
