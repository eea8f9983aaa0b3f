"""Machine code for Hopper in which a matrix product under way would read registers that were written again.

Products of a warp group (HGMMA) run on while the next instructions do, and may read an operand from registers. Some
assemblers, among them that of Triton 3.6, are known to have put such registers to other use too early.
"""

from __future__ import annotations

import re


_PRODUCT = re.compile(r"HGMMA\.64x\d+x\d+\S* R\d+, R(\d+), gdesc")
_WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
_REGISTERS_OF_OPERAND = 4


def register_products(code: list[tuple[int, str]]) -> int:
    """How many products read an operand from registers; `code` is addresses and instructions."""
    return sum(_PRODUCT.search(text) is not None for _, text in code)


def overwritten_operands(code: list[tuple[int, str]]) -> list[str]:
    """The writes to registers of an operand before the wait for its product, along every path from it."""
    places = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for start, (address, text) in enumerate(code):
        product = _PRODUCT.search(text)
        if product is None:
            continue
        operand = range(int(product[1]), int(product[1]) + _REGISTERS_OF_OPERAND)
        seen, ahead = set(), [start + 1]
        while ahead:
            place = ahead.pop()
            if place in seen or place >= len(code):
                continue
            seen.add(place)
            later = code[place][1]
            if _WAIT in later:
                continue
            if set(operand) & set(_written(later)):
                found.append(f"{address:#x} {text}: {code[place][0]:#x} {later}")
                continue
            target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", later)
            if target:
                ahead.append(places[int(target[1], 16)])
            if not re.match(r"(BRA|EXIT)\b", later):  # with a condition, the code goes on behind it as well
                ahead.append(place + 1)
    return found


def _written(text: str) -> range:
    """The registers that an instruction writes, the most that it may."""
    text = re.sub(r"^@!?U?P\w+ +", "", text)
    name, _, operands = text.partition(" ")
    if re.match(r"\w*SETP|FCHK|BAR|VOTE", name):
        return range(0)
    for operand in operands.split(","):
        if re.fullmatch(r" *!?U?P\w+ *", operand):  # conditions are written as well
            continue
        register = re.fullmatch(r" *R(\d+)(\.64)? *", operand)
        if register is None:
            break
        first = int(register[1])
        wide = re.match(r"HGMMA\.64x(\d+)x", name)
        if wide:
            return range(first, first + int(wide[1]) // 2)
        four = ".128" in name or re.match(r"LDSM.*\.4", name)
        two = ".64" in name or "WIDE" in name or re.match(r"CS2R|LDSM.*\.2", name)
        return range(first, first + (4 if four else 2 if two else 1))
    return range(0)
