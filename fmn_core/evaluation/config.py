"""The settings of evaluating."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check, setting


@dataclass(frozen=True)
class EvaluationConfig:
    """How a patch is measured, against the model without it and at equal seeds."""

    preserve: str = setting(
        "",
        "Words to look at one by one, separated by commas or lines, beside those that the patch was made to preserve; near "
        "words and unrelated prompts are found without it.",
        multiline=True,
    )
    prompts: int = setting(4, "How many prompts of the concept, near words and unrelated prompts to measure.", min=1, max=32)
    images_per_prompt: int = setting(
        1, "Pictures of each prompt, before and after; more make the figures surer.", min=1, max=16
    )
    seed: int = setting(
        0, "Seed of the first picture; the others follow it. The same inputs and seed give the same report.",
        min=0, max=0xFFFFFFFF,
    )  # fmt: skip
    strength: float = setting(1.0, "Strength at which the patch is measured.", min=-10.0, max=10.0, step=0.01)
    inversion: bool = setting(
        False,
        "Also try to get the concept back through the patch, by learning words for it from the model's own pictures; "
        "takes longer than all the rest.",
    )
    num_inference_steps: int = setting(20, "Steps to sample each picture.", min=1, max=150, advanced=True)
    guidance_scale: float = setting(5.0, "Guidance scale (CFG) of the pictures.", min=1.0, max=30.0, step=0.1, advanced=True)
    resolution: int = setting(
        0, "Width and height of the pictures. 0: what the model was made for.", min=0, max=2048, step=64,
        auto=True, advanced=True,
    )  # fmt: skip
    inversion_steps: int = setting(
        300, "Steps of each of the two inversions, on the model as it was and on the patched one.",
        min=1, max=10000, advanced=True,
    )  # fmt: skip
    inversion_vectors: int = setting(2, "How many words each inversion learns.", min=1, max=32, advanced=True)

    def __post_init__(self):
        check(self)
