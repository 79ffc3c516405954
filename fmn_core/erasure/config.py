"""The settings of forgetting: what every preset reads, and one class for each preset, which reads all of its fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, Protocol

from ..config import check, setting
from ..errors import ForgetError, brief
from ..text.concept import PROMPT_TEMPLATES

CONCEPT_HELP = (
    "The name of what to forget, as a prompt would call it; other names of the same after commas. One concept a line: "
    "several are forgotten together."
)
MATRICES_HELP = "Which projections of each cross-attention layer get a LoRA."


def steps_setting(default: int, help: str):
    return setting(default, help, min=1, max=1000)


def learning_rate_setting(help: str):
    return setting(0.0, help, min=0.0, max=1e-1, step=1e-6, auto=True)


@dataclass(frozen=True)
class ForgetConfig:
    """What is forgotten, and what must stay: the fields that all presets share."""

    preset: ClassVar[str] = ""

    concept_type: str = setting(
        "object", "What the concept is; it picks the prompts that call for it. `custom` uses a template of your own.",
        choices=tuple(PROMPT_TEMPLATES),
    )  # fmt: skip
    mode: str = setting(
        "remove",
        "`remove`: something neutral takes the concept's place. `replace`: the target does. `correct`: the target is a word "
        "that the concept overshadows, and its other meaning comes through; the concept stays. `paper` only removes, "
        "`robust` cannot correct.",
        choices=("remove", "replace", "correct"),
    )  # fmt: skip
    preserve: str = setting(
        "",
        "What must not change, separated by commas or lines. Near words are found without it. `paper` preserves nothing.",
        multiline=True,
    )  # fmt: skip
    target: str = setting(
        "", "For the modes `replace` and `correct`: the word that takes the concept's place, or that it overshadows."
    )
    template: str = setting(
        "", "For the type `custom`: one prompt a line, {} where the concept's name belongs.", advanced=True, multiline=True
    )  # fmt: skip
    strict: bool = setting(
        False, "Stop with an error, instead of a warning, where the patch's own check finds little effect or much damage."
    )  # fmt: skip
    rank: int = setting(4, "Rank of the LoRA, for each concept; more room to forget, and a larger file.", min=1, max=128)

    def __post_init__(self):
        check(self)
        if self.template.strip() and self.concept_type != "custom":
            raise ForgetError(f"`template` is for the type `custom`, and the type is `{self.concept_type}`: change one.")
        if self.target.strip() and self.mode == "remove":
            raise ForgetError("The mode `remove` has no `target`: choose `replace` or `correct`, or leave `target` empty.")

    def resolved(self) -> ForgetConfig:
        """The same with the preset's own value wherever 0 stands for it."""
        return self

    def plain(self) -> dict:
        """Every setting, the preset first: for JSON."""
        return {"preset": self.preset, **asdict(self)}


@dataclass(frozen=True)
class ClosedFormConfig(ForgetConfig):
    """The preset `fast`: it has no steps, no pictures, and nothing random."""

    preset: ClassVar[str] = "fast"

    target_modules: str = setting("k,v", MATRICES_HELP, choices=("k,v", "k", "v"), advanced=True)
    resolution: int = setting(
        0,
        "Width and height at which the model's answer to unrelated prompts is checked. 0: what the model was made for.",
        min=0, max=2048, step=64, auto=True, advanced=True
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig(ForgetConfig):
    """What the presets share that train on pictures. Defaults: the original's configs/attn.yaml, but for its 4 pictures."""

    RATE: ClassVar[float] = 3e-3

    steps: int = steps_setting(35, "Optimisation steps at most; the original takes 35.")
    learning_rate: float = learning_rate_setting(
        "AdamW's step size for the LoRA; 0: the preset's own, 0.003. Higher forgets more and harms more."
    )
    seed: int = setting(
        0,
        "Seed of everything random: the same inputs and seed give the same patch, to the bit on one machine with one "
        "version of torch and one number of threads.",
        min=0, max=0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip
    batch_size: int = setting(1, "Pictures in each step; the original takes 1.", min=1, max=16, advanced=True)
    num_images: int = setting(
        4, "How many pictures the model makes for itself where none are given.", min=1, max=64, advanced=True
    )  # fmt: skip
    resolution: int = setting(
        0,
        "Width and height of these pictures, and about the size that given pictures are brought to. 0: what the "
        "model was made for.", min=0, max=2048, step=64, auto=True, advanced=True
    )  # fmt: skip
    num_inference_steps: int = setting(20, "Steps to make each of these pictures.", min=1, max=150, advanced=True)
    guidance_scale: float = setting(
        5.0, "Guidance scale (CFG) of these pictures.", min=1.0, max=30.0, step=0.1, advanced=True
    )  # fmt: skip
    horizontal_flip: bool = setting(False, "Train on mirrored pictures as well, where pictures are given.", advanced=True)

    @property
    def own_rate(self) -> float:
        """The preset's learning rate."""
        return self.RATE

    def resolved(self) -> TrainingConfig:
        return self if self.learning_rate else replace(self, learning_rate=self.own_rate)


@dataclass(frozen=True)
class RefinedConfig(TrainingConfig):
    """The preset `balanced`."""

    preset: ClassVar[str] = "balanced"

    target_modules: str = setting("k,v", MATRICES_HELP, choices=("k,v", "k", "v"), advanced=True)


@dataclass(frozen=True)
class AdversarialConfig(TrainingConfig):
    """The preset `robust`, which trains all four projections of a layer."""

    preset: ClassVar[str] = "robust"

    steps: int = steps_setting(35, "Optimisation steps before the first attack, and again after each.")
    attack_rounds: int = setting(
        3, "How often words are learned that bring the concept back, to be forgotten as well.", min=1, max=64
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "correct":
            raise ForgetError("The preset `robust` removes or replaces, it cannot correct: choose `fast` or `balanced`.")


@dataclass(frozen=True)
class ResteeringConfig(TrainingConfig):
    """The preset `paper`: attention re-steering (Forget-Me-Not, arXiv 2303.17591, Algorithm 1)."""

    preset: ClassVar[str] = "paper"
    RATE: ClassVar[float] = 5e-3
    # Of that rate, at which these forget no more and harm more.
    SKIP_CONNECTIONS_RATE: ClassVar[float] = 0.7
    WHOLE_UNET_RATE: ClassVar[float] = 0.2

    steps: int = steps_setting(35, "Optimisation steps; the original takes 35.")
    learning_rate: float = learning_rate_setting(
        "AdamW's step size for the LoRA; 0: the preset's own, 0.005 (0.0035 with `backprop: skip_connections`, 0.001 with "
        "`train_layers: whole_unet`). Higher forgets more and harms more."
    )
    penalized_tokens: str = setting(
        "concept",
        "Attention to which tokens is penalized: the concept's own, these and the end token (once), or every token from the "
        "concept on, padding included: the text encoder leaks the concept into all later ones.",
        choices=("concept", "concept_and_end", "concept_onward"),
    )  # fmt: skip
    target_modules: str = setting(
        "q,k,v", MATRICES_HELP, choices=("q,k,v", "k,v", "k", "v", "q,k,v,out"), advanced=True
    )  # fmt: skip
    visual_loss_weight: float = setting(
        0.0,
        "Weight of the visual denoising loss, which pulls pictures of the concept towards what the model makes of the same "
        "noise without attention to it. 0 leaves it out.",
        min=0.0, max=100.0, step=0.01, advanced=True,
    )  # fmt: skip
    train_layers: str = setting(
        "cross_attention",
        "What is trained. `whole_unet`, the original's default, also trains an ordinary LoRA outside the cross-attention: "
        "load `unet_lora` beside the patch by the host's own loader.",
        choices=("cross_attention", "whole_unet"), advanced=True,
    )  # fmt: skip
    backprop: str = setting(
        "full",
        "What the loss is differentiated through. `full`: the UNet, as published. `skip_connections`: the cross-attention "
        "and what blocks pass on, without what convolutions, self-attention and feed-forward layers add; a step takes "
        "little more than half the time and less memory, and on the demo model it forgets more and harms less.",
        choices=("full", "skip_connections"), advanced=True,
    )  # fmt: skip
    loss: str = setting(
        "squared_norms",
        "What is lowered. `squared_norms`: the sum over all layers of the squared norms of the attention to the concept, as "
        "published. `joint_norm`: one norm over all layers, not squared, as in the original's code; it keeps pressing when "
        "little attention is left.",
        choices=("squared_norms", "joint_norm"), advanced=True,
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.mode != "remove":
            raise ForgetError(f"The preset `paper` removes, it cannot {self.mode}: choose another preset.")
        if self.preserve.strip():
            raise ForgetError("The preset `paper` preserves nothing: leave `preserve` empty, or choose another preset.")
        if self.backprop != "full" and self.train_layers != "cross_attention":
            raise ForgetError(
                f"`backprop: {self.backprop}` leaves out what `train_layers: {self.train_layers}` trains: choose one."
            )

    @property
    def own_rate(self) -> float:
        if self.backprop == "skip_connections":
            return self.SKIP_CONNECTIONS_RATE * self.RATE
        return self.WHOLE_UNET_RATE * self.RATE if self.train_layers == "whole_unet" else self.RATE


PRESETS: dict[str, type[ForgetConfig]] = {
    config.preset: config for config in (ClosedFormConfig, ResteeringConfig, RefinedConfig, AdversarialConfig)
}
PRESET_HELP = (
    "How to forget. `fast`: in closed form, in seconds, without pictures; keeps the rest best. `paper`: attention "
    "re-steering as published (Forget-Me-Not, Algorithm 1). `balanced`: `fast`, then refined on pictures by attention "
    "re-steering and noise estimates. `robust`: as that, and against words learned to bring the concept back."
)
MAIN_FIELDS = ("concept_type", "mode", "preserve", "target")  # what a user is asked first, beside the concept and the preset


def make_config(preset: str = "fast", **values: object) -> ForgetConfig:
    """The settings of a preset; raises ForgetError for an unknown preset, and for a setting that the preset does not
    read."""
    if preset not in PRESETS:
        raise ForgetError(f"`{brief(preset)}` is not a preset: choose one of {', '.join(PRESETS)}.")
    config = PRESETS[preset]
    known = [f.name for f in fields(config)]
    for name in values:
        if name not in known:
            owners = [own for own, kind in PRESETS.items() if name in {f.name for f in fields(kind)}]
            reads = f"it is one of {' and '.join(owners)}" if owners else f"it has {', '.join(known)}"
            raise ForgetError(f"The preset `{preset}` has no setting `{brief(name)}`: {reads}.")
    return config(**values)  # type: ignore[arg-type]  # what each is, the preset's class checks itself


class Targeted(Protocol):
    """Settings that say which projections get a LoRA."""

    @property
    def target_modules(self) -> str: ...


def projection_names(config: Targeted) -> tuple[str, ...]:
    """The projections behind `target_modules`, as MATRICES names them."""
    return tuple(f"to_{matrix}" for matrix in config.target_modules.split(","))
