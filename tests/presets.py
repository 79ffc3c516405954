"""Settings for tests that go over the presets, and short trainings of them."""

from __future__ import annotations

import dataclasses

from fmn_core.erasure import adversarial, hybrid, refined, resteering
from fmn_core.erasure.config import PRESETS, ForgetConfig, make_config
from fmn_core.evaluation import recovery
from fmn_core.inversion import textual_inversion
from fmn_core.inversion.config import InversionConfig

SMALL = {"num_images": 1, "num_inference_steps": 2, "resolution": 64}
JOBS = {
    "paper": make_config("paper", steps=4, rank=2, **SMALL),
    "paper, whole UNet": make_config("paper", train_layers="whole_unet", rank=1, steps=3, **SMALL),
    "balanced": make_config("balanced", steps=5, rank=2, **SMALL),
    "robust": make_config("robust", steps=2, rank=2, attack_rounds=1, **SMALL),
    "inversion": InversionConfig(steps=6, num_images=1, num_inference_steps=2, resolution=64, learning_rate=1e-2),
}


def config_for(preset: str, **values: object) -> ForgetConfig:
    """The preset's settings of these values, less those that it does not read."""
    known = {f.name for f in dataclasses.fields(PRESETS[preset])}
    return make_config(preset, **{name: value for name, value in values.items() if name in known})


def probe_little(set) -> None:
    """`set(module, name, value)` for what work does beyond its settings' steps, which takes longer than a few of these: a
    training is measured on one noisy latent and at one strength, and words are learned in one step."""
    for module, name, value in (
        (hybrid, "PROBES", 1), (resteering, "PROBES", 1), (textual_inversion, "PROBES", 1), (refined, "STRENGTHS", (1.0,)),
        (adversarial, "LEARNED_STEPS", 1), (adversarial, "NEAR", 1), (recovery, "ANCHORS", 2),
        (recovery, "SHOWN_PICTURES", 1),
    ):  # fmt: skip
        set(module, name, value)
