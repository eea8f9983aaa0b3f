"""Writes docs/models.md from the tables in `diffusers_linattn.models`: `python docs/make_models_page.py`."""

from __future__ import annotations

from pathlib import Path

from diffusers_linattn.models import FAMILIES, REFUSED, Family


PAGE = Path(__file__).with_name("models.md")

INTRODUCTION = """\
# Models

This page is generated: `python docs/make_models_page.py` writes it from the tables in
[`models/`](../src/diffusers_linattn/models/), where [adding a model](adding_a_model.md) is a function and a row. The
names here are also what `supported_models()` returns; subclasses of them count as well.

Resolution, prompt length and batch may change from call to call: the layout is worked out anew in each. Each snippet
below runs in the tests, on a tiny random model of its class.
"""


def page() -> str:
    """The whole page."""
    names = sorted(FAMILIES)
    table = ["| transformer | known as | layers that convert | tokens at the attention call |", "|---|---|---|---|"]
    for name in names:
        family = FAMILIES[name]
        table.append(f"| [`{name}`](#{name.lower()}) | {family.about} | {patterns(family)} | {family.order} |")
    refused = ["## Not converted", ""] + [f"- `{name}`: {REFUSED[name]}" for name in sorted(REFUSED)]
    return "\n".join([INTRODUCTION, *table, "", *(section(name, FAMILIES[name]) for name in names), *refused]) + "\n"


def patterns(family: Family) -> str:
    return ", ".join(f"`{pattern}`" for pattern in family.layers)


def section(name: str, family: Family) -> str:
    """Layers, token order and a snippet of one model."""
    lines = [f"## {name}", "", f"{family.about}. Tokens: {family.order}.", ""]
    lines += [f"- `{pattern}` converts" for pattern in family.layers]
    lines += [f"- `{pattern}` stays dense: {reason}" for pattern, reason in family.left.items()]
    arguments = [f'    "{pattern}": ClearProcessor(window=16),' for pattern in family.layers]
    lines += [
        "",
        "```python",
        "windows = {",
        *arguments,
        "}",
        "linearize(pipe.transformer, windows)",
        "print(status(pipe.transformer))",
        "```",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
