"""The settings of concept inversion."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check, setting
from ..errors import ForgetError
from ..text.concept import PROMPT_TEMPLATES


@dataclass(frozen=True)
class InversionConfig:
    """How words are learned that call for what pictures show. Defaults: the original's configs/ti.yaml."""

    concept_type: str = setting(
        "object", "What the pictures show; it picks the prompt that the words are learned in. `custom` uses the template.",
        choices=tuple(PROMPT_TEMPLATES),
    )  # fmt: skip
    init_tokens: str = setting(
        "<rand-1>|<rand-1>",
        "What each vector starts as, between `|`: a word of one token, `<rand-1>` for noise (1 is its size where the norm "
        "is left alone) or `<zero>`. As many words are learned as stand here; a word near the concept is learned soonest.",
    )  # fmt: skip
    steps: int = setting(500, "Optimisation steps; the original takes 500.", min=1, max=10000)
    learning_rate: float = setting(
        1e-3, "AdamW's step size for the vectors. Higher learns faster, and leaves the likeness of words sooner.",
        min=1e-7, max=1.0, step=1e-6,
    )  # fmt: skip
    seed: int = setting(
        0,
        "Seed of everything random: the same inputs and seed give the same words, to the bit on one machine with one "
        "version of torch and one number of threads.",
        min=0, max=0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip
    template: str = setting(
        "", "For the type `custom`: one prompt a line, {} where the learned words belong.", advanced=True,
        multiline=True,
    )  # fmt: skip
    batch_size: int = setting(1, "Pictures in each step; the original takes 1.", min=1, max=16, advanced=True)
    horizontal_flip: bool = setting(
        True, "Learn from the mirrored pictures as well, where pictures are given.", advanced=True
    )
    norm_decay: bool = setting(
        True, "Draw the vectors' norms to that of the text encoder's own words, so that they mix with them.", advanced=True
    )
    num_images: int = setting(
        4, "How many pictures the model makes for itself where none are given.", min=1, max=64, advanced=True
    )
    resolution: int = setting(
        0, "Width and height of these pictures, and about the size that given pictures are brought to. 0: what the model "
        "was made for.", min=0, max=2048, step=64, auto=True, advanced=True,
    )  # fmt: skip
    num_inference_steps: int = setting(20, "Steps to make each of these pictures.", min=1, max=150, advanced=True)
    guidance_scale: float = setting(
        5.0, "Guidance scale (CFG) of these pictures.", min=1.0, max=30.0, step=0.1, advanced=True
    )  # fmt: skip

    def __post_init__(self):
        check(self)
        if self.template.strip() and self.concept_type != "custom":
            raise ForgetError(f"`template` is for the type `custom`, and the type is `{self.concept_type}`: change one.")
