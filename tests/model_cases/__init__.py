"""Tiny models of every supported family, with inputs and what their tokens are."""

from model_cases.case import Call, Case, Token, change
from model_cases.image_alone import IMAGE_ALONE
from model_cases.image_joint import IMAGE_JOINT
from model_cases.position_ids import POSITION_IDS
from model_cases.video import VIDEO


CASES: dict[str, Case] = {**IMAGE_ALONE, **IMAGE_JOINT, **POSITION_IDS, **VIDEO}

__all__ = ["CASES", "Call", "Case", "Token", "change"]
