"""Writes docs/models.md from the tables in `diffusers_linattn.models`: `python docs/make_models_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffusers_linattn.models import FAMILIES, REFUSED


PAGE = Path(__file__).with_name("models.md")

INTRODUCTION = """\
# Models

This page is generated: `python docs/make_models_page.py` writes it from the tables in
[`models/`](../src/diffusers_linattn/models/), where [adding a model](adding_a_model.md) is a function and a row. The
names here are also what `supported_models()` returns; subclasses of them count as well.

Resolution, prompt length and batch may change from call to call: the layout is worked out anew in each. That takes
`model(...)`: `model.forward(...)` skips the hook that does it, and may be answered by the layout of the call before.

A processor alone goes to every layer that converts. The patterns of the table choose among them, here those of FLUX.1
(`pipe` as in the [quickstart](quickstart.md)):

```python
from diffusers_linattn import ClearProcessor, linearize, status

windows = {
    "transformer_blocks.*.attn": ClearProcessor(window=16),
    "single_transformer_blocks.*.attn": ClearProcessor(window=8),
}
linearize(pipe.transformer, windows)
print(status(pipe.transformer))
```

| transformer | known as | layers that convert | tokens at the attention call |
|---|---|---|---|"""


def page() -> str:
    """The whole page."""
    models = [
        f"| `{name}` | {family.about} | {listed(family.layers)} | {family.order} |"
        for name, family in sorted(FAMILIES.items())
    ]
    dense: dict[str, dict[str, list[str]]] = {}
    for name, family in sorted(FAMILIES.items()):
        for pattern, reason in family.left.items():
            dense.setdefault(reason, {}).setdefault(name, []).append(pattern)
    left = ["## Layers that stay dense"]
    for reason, layers in dense.items():
        named = [f"- `{name}`: {listed(patterns)}" for name, patterns in layers.items()]
        left += ["", f"{reason[0].upper()}{reason[1:]}:", "", *named]
    refused = ["## Not converted", "", *(f"- `{name}`: {REFUSED[name]}" for name in sorted(REFUSED))]
    return "\n".join([INTRODUCTION, *models, "", *left, "", *refused]) + "\n"


def listed(patterns: Iterable[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
