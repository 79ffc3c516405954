"""The settings of forgetting: one dataclass, from which nodes, webui and command line take defaults and help."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import check, setting
from ..text.concept import TEMPLATES

CONCEPT_HELP = (
    "The name of what to forget, as a prompt would call it; other names of the same after commas. One concept a line: "
    "several are forgotten together."
)
LEARNING_RATES = {"fast": 0.0, "paper": 5e-3, "balanced": 3e-3, "robust": 3e-3}  # of each preset
STREAM_RATE = (
    0.7  # of these, where `paper` differentiates the residual stream alone: at the same rate it forgets and harms more
)
WHOLE_RATE = 0.2  # of these, where `paper` trains the whole UNet: at the same rate nothing of the model is left


@dataclass(frozen=True)
class ForgetSettings:
    """How a concept is forgotten. Defaults of the preset `paper`: the original's configs/attn.yaml, but for
    `learning_rate`, which was 2e-6 for the whole UNet and moves a LoRA nowhere in 35 steps, and `tokens`, which took
    the end token in and harmed more than it forgot."""

    concept_type: str = setting(
        "object", "What the concept is; it picks the prompts that call for it. `custom` uses the template below.",
        choices=tuple(TEMPLATES),
    )  # fmt: skip
    preset: str = setting(
        "fast",
        "How to forget. `fast`: in closed form, in seconds, without pictures; keeps the rest best. `paper`: attention "
        "re-steering as published (Forget-Me-Not, Algorithm 1). `balanced`: `fast`, then refined on pictures by attention "
        "re-steering and noise estimates. `robust`: as that, and against words learned to bring the concept back.",
        choices=tuple(LEARNING_RATES),
    )  # fmt: skip
    mode: str = setting(
        "remove",
        "`remove`: something neutral stands in its place. `replace`: the replacement does. `correct`: the replacement "
        "is a word that the concept overshadows, and its other meaning comes through; the concept stays. `paper` only "
        "removes.",
        choices=("remove", "replace", "correct"),
    )  # fmt: skip
    replacement: str = setting("", "For the modes `replace` and `correct`: the other word.")
    keep: str = setting(
        "",
        "What must not suffer, separated by commas or lines; near words are found without it. `paper` keeps nothing.",
        multiline=True,
    )
    strict: bool = setting(
        False, "Stop with an error, instead of a warning, where the patch's own check finds little effect or much damage."
    )  # fmt: skip
    steps: int = setting(
        35, "Optimisation steps at most; the original takes 35. `paper` takes them all. `fast` takes none.", min=1, max=1000
    )
    learning_rate: float = setting(
        0.0,
        "AdamW's step size for the LoRA; 0: the preset's own (`paper` 0.005, the others "
        "0.003; 0.0035 through the residual stream, 0.001 for the whole UNet). Higher forgets more and harms more.",
        min=0.0, max=1e-1, step=1e-6, auto=True,
    )  # fmt: skip
    seed: int = setting(
        0,
        "Seed of everything random: the same inputs and seed give the same patch, to the bit on one machine with one "
        "version of torch and one number of threads. `fast` has nothing random.",
        min=0, max=0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip
    rank: int = setting(4, "Rank of the LoRA, for each concept; more room to forget, and a larger file.", min=1, max=128)
    tokens: str = setting(
        "concept",
        "`paper`: which columns of the attention are penalised: the concept's own tokens, these and the end token "
        "(once), or every column from the concept on, padding included: the text encoder leaks the concept into all "
        "later ones.",
        choices=("concept", "concept and end", "concept onward"),
    )  # fmt: skip
    matrices: str = setting(
        "q k v",
        "Which projections of each cross-attention layer get a LoRA; `fast` and `balanced` change no other than k and v, "
        "`robust` all four.",
        choices=("q k v", "k v", "k", "v", "q k v out"), advanced=True,
    )  # fmt: skip
    template: str = setting(
        "a photo of {}", "For the type `custom`: one prompt a line, {} where the concept's name belongs.", advanced=True,
        multiline=True,
    )  # fmt: skip
    batch_size: int = setting(1, "Pictures in each step; the original takes 1.", min=1, max=16, advanced=True)
    visual_weight: float = setting(
        0.0,
        "`paper`: weight of the visual denoising loss, which pulls pictures of the concept towards what the model makes "
        "of the same noise without attention to it. 0 leaves it out.",
        min=0.0, max=100.0, step=0.01, advanced=True,
    )  # fmt: skip
    num_pictures: int = setting(
        4, "How many pictures the model makes for itself where none are given.", min=1, max=64, advanced=True
    )  # fmt: skip
    resolution: int = setting(
        0,
        "Width and height of these pictures, and about the size that given pictures are brought to. 0: what the "
        "model was made for.", min=0, max=2048, step=64, auto=True, advanced=True
    )  # fmt: skip
    sampling_steps: int = setting(20, "Steps to make each of these pictures.", min=1, max=150, advanced=True)
    guidance: float = setting(5.0, "Guidance scale (CFG) of these pictures.", min=1.0, max=30.0, step=0.1, advanced=True)
    # New fields go last: a saved workflow lists its values in this order.
    flip: bool = setting(False, "Train on the mirrored pictures as well, where pictures are given.", advanced=True)
    rounds: int = setting(
        3, "`robust`: how often words are learned that bring the concept back, to be forgotten as well; the steps are taken "
        "before the first and after each.", min=1, max=64, advanced=True,
    )  # fmt: skip
    layers: str = setting(
        "cross-attention",
        "`paper`: what is trained. The original's default is the whole UNet; what is learned outside the cross-attention "
        "is then a LoRA of its own, `rest`, to be loaded beside the patch by the host's own loader.",
        choices=("cross-attention", "whole unet"), advanced=True,
    )  # fmt: skip
    gradient: str = setting(
        "whole",
        "`paper`: what the loss is differentiated through. `whole`: the UNet, as published. `residual stream`: the "
        "cross-attention and what blocks pass on, without what convolutions, self-attention and feed-forward layers add; a "
        "step takes little more than half the time and less memory; on the embedded model it forgets more and harms less.",
        choices=("whole", "residual stream"), advanced=True,
    )  # fmt: skip
    loss: str = setting(
        "squared norms",
        "`paper`: what is lowered. `squared norms`: the sum over all layers of the squared norms of the attention to the "
        "concept, as published. `joint norm`: one norm over all layers, not squared, as in the original's code; it keeps "
        "pressing when little attention is left.",
        choices=("squared norms", "joint norm"), advanced=True,
    )  # fmt: skip

    def __post_init__(self):
        check(self)

    def resolved(self) -> ForgetSettings:
        """The settings with the preset's own learning rate where none is given."""
        if self.learning_rate:
            return self
        less = STREAM_RATE if self.gradient == "residual stream" else WHOLE_RATE if self.layers == "whole unet" else 1.0
        return replace(self, learning_rate=less * LEARNING_RATES[self.preset])

    @property
    def projections(self) -> tuple[str, ...]:
        """The module names behind `matrices`."""
        return tuple(f"to_{matrix}" for matrix in self.matrices.split())
