"""The settings of forgetting: one dataclass, from which nodes, webui and command line take defaults and help."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from ..errors import ForgetError
from ..patch.bounds import MOST_TEXT
from ..text.concept import TEMPLATES, require_text

CONCEPT_HELP = (
    "The name of what to forget, as a prompt would call it; other names of the same after commas. One concept a line: "
    "several are forgotten together."
)
LEARNING_RATES = {"fast": 0.0, "paper": 5e-3, "balanced": 3e-3, "robust": 3e-3}  # of each preset
STREAM_RATE = (
    0.7  # of these, where `paper` differentiates the residual stream alone: at the same rate it forgets and harms more
)


def setting(default, help: str, *, choices=None, min=None, max=None, step=None, auto=False, advanced=False, multiline=False):
    """A dataclass field that carries its own help, bounds, whether 0 means automatic, and whether it is for everyday use."""
    metadata = {
        "help": help,
        "choices": choices,
        "min": min,
        "max": max,
        "step": step,
        "auto": auto,
        "advanced": advanced,
        "multiline": multiline,
    }
    return field(default=default, metadata=metadata)


def check(settings) -> None:
    """Raises ForgetError for a value that is not among its field's choices or is out of its bounds."""
    for f in fields(settings):
        value, limits = getattr(settings, f.name), f.metadata
        if isinstance(value, str):
            require_text(value)
            if len(value) > MOST_TEXT:
                raise ForgetError(f"{f.name} has {len(value):,} letters: use {MOST_TEXT:,} at most.")
        if limits["choices"] and value not in limits["choices"]:
            raise ForgetError(f"`{value}` is no {f.name}: choose one of {', '.join(limits['choices'])}.")
        if limits["min"] is not None and not limits["min"] <= value <= limits["max"]:
            raise ForgetError(f"{f.name} is {value}: use a value from {limits['min']} to {limits['max']}.")
    if 0 < getattr(settings, "resolution", 0) < 64:
        raise ForgetError(f"resolution is {settings.resolution}: use 0 for the model's own, or 64 and more.")


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
        "0.003; 0.0035 through the residual stream). Higher forgets more and harms more.", min=0.0, max=1e-1, step=1e-6,
        auto=True,
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

    def __post_init__(self):
        check(self)

    def resolved(self) -> ForgetSettings:
        """The settings with the preset's own learning rate where none is given."""
        if self.learning_rate:
            return self
        less = STREAM_RATE if self.gradient == "residual stream" else 1.0
        return replace(self, learning_rate=less * LEARNING_RATES[self.preset])

    @property
    def projections(self) -> tuple[str, ...]:
        """The module names behind `matrices`."""
        return tuple(f"to_{matrix}" for matrix in self.matrices.split())


@dataclass(frozen=True)
class InvertSettings:
    """How words are learned that call for what pictures show. Defaults: the original's configs/ti.yaml."""

    concept_type: str = setting(
        "object", "What the pictures show; it picks the prompt that the words are learned in. `custom` uses the template.",
        choices=tuple(TEMPLATES),
    )  # fmt: skip
    initializers: str = setting(
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
        "a photo of {}", "For the type `custom`: one prompt a line, {} where the learned words belong.", advanced=True,
        multiline=True,
    )  # fmt: skip
    batch_size: int = setting(1, "Pictures in each step; the original takes 1.", min=1, max=16, advanced=True)
    flip: bool = setting(True, "Learn from the mirrored pictures as well, where pictures are given.", advanced=True)
    norm_decay: bool = setting(
        True, "Draw the vectors' norms to that of the text encoder's own words, so that they mix with them.", advanced=True
    )
    num_pictures: int = setting(
        4, "How many pictures the model makes for itself where none are given.", min=1, max=64, advanced=True
    )
    resolution: int = setting(
        0, "Width and height of these pictures, and about the size that given pictures are brought to. 0: what the model "
        "was made for.", min=0, max=2048, step=64, auto=True, advanced=True,
    )  # fmt: skip
    sampling_steps: int = setting(20, "Steps to make each of these pictures.", min=1, max=150, advanced=True)
    guidance: float = setting(
        5.0, "Guidance scale (CFG) of these pictures.", min=1.0, max=30.0, step=0.1, advanced=True
    )  # fmt: skip

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class EvaluateSettings:
    """How a patch is measured, against the model without it and at equal seeds."""

    keep: str = setting(
        "",
        "Words to look at one by one, separated by commas or lines, beside those that the patch was made to keep; near "
        "words and unrelated prompts are found without it.",
        multiline=True,
    )
    prompts: int = setting(4, "How many prompts of the concept, near words and unrelated prompts to measure.", min=1, max=32)
    pictures: int = setting(1, "Pictures of each prompt, before and after; more make the figures surer.", min=1, max=16)
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
    steps: int = setting(20, "Steps to sample each picture.", min=1, max=150, advanced=True)
    guidance: float = setting(5.0, "Guidance scale (CFG) of the pictures.", min=1.0, max=30.0, step=0.1, advanced=True)
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


@dataclass(frozen=True)
class ImportSettings:
    """How a LoRA, or a change of full weights, becomes a patch."""

    concept_type: str = setting(
        "object",
        "What the concept is, for measuring the patch.",
        choices=tuple(name for name in TEMPLATES if name != "custom"),
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
