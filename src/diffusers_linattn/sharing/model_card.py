"""The README.md that is written into a repository of linear attention."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffusers_linattn.sharing.origin import is_repo_id
from diffusers_linattn.sharing.saved_config import SavedConfig, SavedLayer, kind_of


# Ours is what `find_linear_attention` asks for. Never `lora` or `controlnet`: the Hub would print snippets for those.
OUR_TAG = "diffusers-linattn"
TAGS = ["diffusers", "linear-attention", OUR_TAG]
FLUX_LICENSE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}
PAPERS = {
    "clear": (
        "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
        "Liu, Songhua and Tan, Zhenxiong and Wang, Xinchao",
        "2412.16112",
    ),
    "linear": (
        "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation",
        "Wang, Jiahao and others",
        "2501.12976",
    ),
    "gla": (
        "DiG: Scalable and Efficient Diffusion Models with Gated Linear Attention",
        "Zhu, Lianghui and others",
        "2405.18428",
    ),
}
PAPERS["hybrid"] = PAPERS["clear"]  # whose window it is; the linear part is in no paper
_SEAL = re.compile(r"\n<!-- written by diffusers-linattn, edit it and it will be kept: ([0-9a-f]{16}) -->\s*$")


def write_card(
    config: SavedConfig,
    repo_id: str,
    *,
    license: Mapping[str, str] | None = None,
    pipeline_tag: str = "text-to-image",
    widget: list[dict[str, Any]] | None = None,
) -> str:
    """The card of a repository.

    Args:
        config: What the repository holds.
        repo_id: Its id.
        license: `license`, `license_name` and `license_link` of the base model, as far as known.
        pipeline_tag: What the model does, in the Hub's words.
        widget: Sample pictures as the Hub's gallery takes them: `{"text": ..., "output": {"url": ...}}`.
    """
    # From a configuration of anyone's, which may have been passed on.
    base = config.base_model if config.base_model and is_repo_id(config.base_model) else None
    known = license_of(base, license)
    data: dict[str, Any] = {**known, "library_name": "diffusers", "pipeline_tag": pipeline_tag}
    kinds = sorted({kind_of(layer.processor) for layer in config.layers.values()})
    family = config.transformer.partition("Transformer")[0].lower()
    data["tags"] = [*TAGS, *([family] if family.isidentifier() else []), *kinds]
    if base:
        data |= {"base_model": base, "base_model_relation": "adapter"}
    if widget:
        data["widget"] = widget
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        _introduction(config, base, repo_id),
        f"## Layers\n\n{_layer_table(config)}",
        f"## Training\n\n{_recipe(config)}",
        _section("Results", _table(("metric", "value"), [(k, _number(v)) for k, v in config.metrics.items()])),
        _section("Pictures", "<Gallery />" if widget else ""),
        f"## License\n\n{_license_text(base, known)}",
        f"## Citation\n\n```bibtex\n{chr(10).join(_bibtex(kind) for kind in kinds)}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    text = f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}\n"
    return f"{text}\n<!-- written by diffusers-linattn, edit it and it will be kept: {_digest(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a README is one of [`write_card`] that nobody has changed."""
    seal = _SEAL.search(card)
    return seal is not None and _digest(card[: seal.start()]) == seal[1]


def gallery_of(card: str) -> list[dict[str, Any]]:
    """The sample pictures of a README."""
    return list(ModelCard(card).data.get("widget") or [])


def license_of(base_model: str | None, found: Mapping[str, str] | None) -> dict[str, str]:
    """The license that weights derived from `base_model` have: what its card says, else what is known of it."""
    known = {key: value for key, value in (found or {}).items() if key in FLUX_LICENSE and isinstance(value, str)}
    if not known and base_model and re.fullmatch(r"black-forest-labs/FLUX\.1-(\w+-)?dev", base_model):
        known = dict(FLUX_LICENSE)
    link = known.get("license_link", "")
    if link and "://" not in link:  # beside the card of the base model
        known["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link.lstrip('./')}"
    return known


def summarize_layers(config: SavedConfig) -> Counter[str]:
    """How many layers are converted in which way, in words."""
    return Counter(_describe(layer) for layer in config.layers.values())


def _introduction(config: SavedConfig, base: str | None, repo_id: str) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a {_cell(config.transformer)}"
    source = f'"{base}"' if base else "..."
    return f"""Linear-cost attention for {of}: {len(config.layers)} attention layers, made with diffusers-linattn.

```python
# pip install diffusers-linattn
import torch
from diffusers import DiffusionPipeline
from diffusers_linattn import load_linear_attention

pipe = DiffusionPipeline.from_pretrained({source}, dtype=torch.bfloat16).to("cuda")
load_linear_attention(pipe, "{repo_id}")
```

This is not a pipeline of its own: it is loaded into the base model as above. `diffusers_linattn.restore(pipe)` gives
the original attention back."""


def _layer_table(config: SavedConfig) -> str:
    rows = [(count, layers) for layers, count in summarize_layers(config).items()]
    return _table(("layers", "attention"), rows)


def _describe(layer: SavedLayer) -> str:
    trained = [f"{len(layer.weights)} of the layer's weights"] if layer.weights else []
    trained += [f"LoRA on {', '.join(layer.lora)}"] if layer.lora else []
    arguments = {name: value for name, value in layer.processor.to_config().items() if name != "impl"}
    processor = f"{type(layer.processor).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
    return f"{processor}, with {' and '.join(trained)}" if trained else processor


def _recipe(config: SavedConfig) -> str:
    if not config.recipe:
        return "No recipe is recorded."
    rows = [(name, json.dumps(value)) for name, value in config.recipe.items()]
    return _table(("setting", "value"), rows)


def _license_text(base: str | None, known: Mapping[str, str]) -> str:
    name = known.get("license_name") or known.get("license")
    if name is None:
        return f"These weights derive from {base or 'the base model'}: its license applies."
    named = f"[{name}]({known['license_link']})" if "license_link" in known else name
    text = f"These weights derive from {base}, whose license applies: {named}."
    if "non-commercial" in name or "-nc" in name:
        text += " **It allows non-commercial use only.**"
    return text


def _bibtex(kind: str) -> str:
    title, authors, number = PAPERS[kind]
    return (
        f"@article{{{kind}, title={{{title}}}, author={{{authors}}}, journal={{arXiv preprint arXiv:{number}}}, "
        f"year={{20{number[:2]}}}}}"
    )


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}" if content else ""


def _table(head: tuple[str, str], rows: list[tuple[Any, Any]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {_cell(a)} | {_cell(b)} |" for a, b in lines) if rows else ""


def _cell(value: Any) -> str:
    # Names in a configuration are anyone's: no line break, table border or HTML of theirs in the card.
    return str(value).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")


def _number(value: float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
