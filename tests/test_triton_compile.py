"""The Triton kernels compiled for chips that need not be there: registers, shared memory, asynchronous copies.

pytest -m machine_code
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import compile_gated_kernels as gated
import compile_linear_kernels as linear
import compile_windowed_kernels as windowed
from compiled_kernels import CHIPS
from wgmma_operands import overwritten_operands


pytestmark = [
    pytest.mark.machine_code,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"),
]

CASES = [(chip, dim, torch.bfloat16) for chip in CHIPS for dim in (64, 128)]
CASES += [(90, 128, torch.float16), (90, 72, torch.bfloat16), (90, 256, torch.float32)]


@pytest.mark.parametrize(("chip", "head_dim", "dtype"), CASES, ids=str)
def test_no_spills_and_asynchronous_copies(chip: int, head_dim: int, dtype: torch.dtype) -> None:
    for name, tiles in windowed.launches(head_dim, dtype, chip).items():
        result = windowed.compile_kernel(name, tiles, head_dim, dtype, chip)
        assert result.loop_spills == 0, f"{name}: {result}"
        assert result.spills <= (8 if dtype == torch.float32 or head_dim == 72 else 0), f"{name}: {result}"
        assert result.shared <= CHIPS[chip], f"{name}: {result}"
        assert result.loops == result.asynchronous == 2, f"{name}: {result}"
        assert result.overwritten == 0, f"{name}: {result}"
        if result.products == "wgmma.mma_async" and name.startswith("forward") and dtype != torch.float32:
            assert result.register_products > 0, f"{name}: {result}"  # weights times values
        # Keys and values of a tile are a group each; tiles are found by a list, which must not be waited for instead.
        assert result.under_way >= 2 * (tiles.stages - 2), f"{name}: {result}"


@pytest.mark.parametrize(
    "flags",
    [{"HAS_BIAS": True}, {"HAS_POOLED": True}, {"HAS_BIAS": True, "HAS_POOLED": True}, {"TIMED": True}],
    ids=str,
)
def test_variants_fit(flags: dict[str, bool]) -> None:
    for name, tiles in windowed.launches(128, torch.bfloat16, 90).items():
        if name.endswith("wide"):  # never launched so
            continue
        result = windowed.compile_kernel(name, tiles, 128, torch.bfloat16, 90, **flags)
        assert result.loop_spills == 0, f"{name}: {result}"
        assert result.spills <= (16 if len(flags) == 2 else 0), f"{name}: {result}"  # by Triton 3.6
        assert result.shared <= CHIPS[90], f"{name}: {result}"
        assert result.loops == result.asynchronous >= 2, f"{name}: {result}"
        assert result.overwritten == 0, f"{name}: {result}"


@pytest.mark.parametrize(
    ("chip", "head_dim", "dtype"),
    [(chip, 128, torch.bfloat16) for chip in CHIPS]
    + [(90, 64, torch.bfloat16), (90, 72, torch.bfloat16), (90, 576, torch.bfloat16)],
    ids=str,
)
def test_linear_attention_fits(chip: int, head_dim: int, dtype: torch.dtype) -> None:
    # Between the loops, once per block of queries, some words of those beside text lie in local memory; the most of
    # them where Triton 3.6 compiles.
    outside = {"query gradient, text": 48, "product, text": 8, "blend gradients, text": 80} if head_dim == 128 else {}
    if head_dim == 72:  # computed with 128 channels, and a mask
        outside |= {"query gradient": 4, "product, text": 8, "query gradient, text": 160, "blend gradients, text": 80}
    for name in linear.launches(head_dim):
        result = linear.compile_launch(name, head_dim, dtype, chip)
        assert result.loop_spills <= 1, f"{name}: {result}"
        assert result.spills <= outside.get(name, 0), f"{name}: {result}"
        assert result.shared <= CHIPS[chip], f"{name}: {result}"
        assert result.loops == result.asynchronous, f"{name}: {result}"
        assert result.overwritten == 0, f"{name}: {result}"
        assert result.loops or name in ("blend", "blend gradients"), f"{name}: {result}"


@pytest.mark.parametrize(
    ("chip", "head_dim", "dtype", "per_head"),
    [(chip, 128, torch.bfloat16, False) for chip in CHIPS]
    + [(90, 64, torch.float16, False), (90, 72, torch.bfloat16, False), (90, 128, torch.bfloat16, True)]
    + [(100, 128, torch.float32, False)],
    ids=str,
)
def test_gated_kernels_fit(chip: int, head_dim: int, dtype: torch.dtype, per_head: bool) -> None:
    # The five levels of a half, unrolled, keep more than the registers hold: some words per thread in local memory.
    spills = {"weights": 96 if head_dim == 72 or dtype == torch.float16 else 72, "gradients": 208}
    if dtype == torch.float32:
        spills = {"weight gradients": 16, "gradients": 256}
    for name in gated.PER_HEAD if per_head else gated.LAUNCHES:
        result = gated.compile_launch(name, head_dim, dtype, chip)
        assert result.spills <= spills.get(name.removesuffix(", a gate per head"), 0), f"{name}: {result}"
        assert result.loop_spills <= 88, f"{name}: {result}"
        assert result.shared <= CHIPS[chip], f"{name}: {result}"
        assert result.products in ("mma.sync", "none"), f"{name}: {result}"


def test_operands_that_are_overwritten_are_found() -> None:
    product, wait = "HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR20], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"

    def found(*instructions: str) -> int:
        return len(overwritten_operands([(16 * i, text) for i, text in enumerate(instructions)]))

    assert found(product, "MOV R99, R1", wait) == 1
    assert found(product, wait, "MOV R99, R1") == 0
    assert found(product, "MOV R100, R1", "STS [R96], R97", "ISETP.NE.AND P0, PT, R96, RZ, PT", wait) == 0
    assert found(product, "LDS.128 R94, [R1]", "@P1 BRA 0x0", wait) == 1
    assert found("LDG.E R98, desc[UR4][R2.64]", product, "@P1 BRA 0x0", wait) == 1  # in the next round of a loop
    assert found(product, "BRA 0x30", "MOV R99, R1", wait) == 0  # jumped over
