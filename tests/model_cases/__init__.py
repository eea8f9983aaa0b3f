"""Tiny models of every supported family, with inputs and what their tokens are."""

from model_cases.case import Call, Case, Token, assert_near, change, output_of
from model_cases.image_alone import IMAGE_ALONE
from model_cases.image_joint import IMAGE_JOINT
from model_cases.image_shapes import IMAGE_SHAPES
from model_cases.image_streams import IMAGE_STREAMS
from model_cases.input_images import INPUT_IMAGES
from model_cases.position_ids import POSITION_IDS
from model_cases.video import VIDEO
from model_cases.video_joint import VIDEO_JOINT
from model_cases.video_packed import VIDEO_PACKED


CASES: dict[str, Case] = {
    **IMAGE_ALONE,
    **IMAGE_JOINT,
    **IMAGE_STREAMS,
    **POSITION_IDS,
    **IMAGE_SHAPES,
    **INPUT_IMAGES,
    **VIDEO,
    **VIDEO_JOINT,
    **VIDEO_PACKED,
}

__all__ = ["CASES", "Call", "Case", "Token", "assert_near", "change", "output_of"]
