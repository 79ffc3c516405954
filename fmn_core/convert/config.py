"""The settings of importing."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check, setting
from ..text.concept import PROMPT_TEMPLATES


@dataclass(frozen=True)
class ImportConfig:
    """How a LoRA, or a change of full weights, becomes a patch."""

    concept_type: str = setting(
        "object",
        "What the concept is, for measuring the patch.",
        choices=tuple(name for name in PROMPT_TEMPLATES if name != "custom"),
    )
    rank: int = setting(
        0, "Rank of the patch at most. 0: a LoRA's own, and for all other files the least that keeps `energy`.",
        min=0, max=1280, auto=True,
    )  # fmt: skip
    energy: float = setting(
        0.99,
        "For all but plain LoRAs: the share of the change's energy (squared singular values) to keep where `rank` is 0. "
        "0.99 leaves an error of 10 %.",
        min=0.01, max=1.0, step=0.001,
    )  # fmt: skip

    def __post_init__(self):
        check(self)
