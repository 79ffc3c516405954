"""What a patch's file says of it: the JSON of `fmn.patch`, its version, and how an older version is read."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ForgetError, brief
from .bounds import require_brief

# Family of a model -> (ss_base_model_version, modelspec.architecture): what LoRA loaders sort files by.
FAMILIES = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sd2_v": ("sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}

SCHEMA = 2
PATCH_FIELDS = {"concept": str, "settings": dict, "report": dict, "version": str}  # of every patch

# Version 1 -> version 2.
KEYS = {"moments": "statistics", "members": "patches"}
SETTINGS = {
    "keep": "preserve", "matrices": "target_modules", "tokens": "penalized_tokens", "layers": "train_layers",
    "rounds": "attack_rounds", "flip": "horizontal_flip", "guidance": "guidance_scale",
    "sampling_steps": "num_inference_steps", "num_pictures": "num_images", "visual_weight": "visual_loss_weight",
    "replacement": "target", "gradient": "backprop",
}  # fmt: skip
VALUES = {
    "target_modules": {"q k v": "q,k,v", "k v": "k,v", "q k v out": "q,k,v,out"},
    "penalized_tokens": {"concept and end": "concept_and_end", "concept onward": "concept_onward"},
    "train_layers": {"cross-attention": "cross_attention", "whole unet": "whole_unet"},
    "backprop": {"whole": "full", "residual stream": "skip_connections"},
    "loss": {"squared norms": "squared_norms", "joint norm": "joint_norm"},
}
REPORT = {
    "erased": "erasure", "also": "synonyms", "drift": "preserve_drift", "empty prompt": "empty_prompt_drift",
    "distance": "target_error", "noise drift": "noise_drift", "unrelated drift": "unrelated_drift",
    "error with learned words": "learned_word_errors", "conflicts": "interference", "responses": "response_errors",
    "spill": "collateral_change",
}  # fmt: skip
EVALUATION = {  # of a report: part -> names in it
    "settings": {
        "keep": "preserve", "pictures": "images_per_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale",
    },
    "attention": {"own tokens": "own_tokens", "from there on": "from_there_on"},
}  # fmt: skip


def upgraded(info: object) -> object:
    """The same in the present version, where it is of version 1; anything else as it is."""
    if not isinstance(info, dict) or info.get("schema") != 1:
        return info
    info = renamed(info, KEYS) | {"schema": SCHEMA}
    if isinstance(info.get("settings"), dict):
        info["settings"] = upgraded_settings(renamed(info["settings"], SETTINGS))
    if isinstance(info.get("report"), dict):
        info["report"] = upgraded_report(renamed(info["report"], REPORT))
    if isinstance(info.get("patches"), list):
        info["patches"] = [upgraded_part(part) for part in info["patches"]]
    return info


def renamed(values: dict, names: dict[str, str]) -> dict:
    return {names.get(key, key): value for key, value in values.items()}


def new_value(key: str, value: object) -> object:
    return VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def upgraded_settings(settings: dict) -> dict:
    """The settings with their new values, and with what was in effect where a preset did not read what it was given."""
    settings = {key: new_value(key, value) for key, value in settings.items()}
    if settings.get("preset") in ("fast", "balanced") and settings.get("target_modules") in ("q,k,v", "q,k,v,out"):
        settings["target_modules"] = "k,v"
    if "template" in settings and settings.get("concept_type") != "custom":
        settings["template"] = ""
    return settings


def upgraded_report(report: dict) -> dict:
    mass, pairs, imported, evaluation = (
        report.get(key) for key in ("attention_mass", "interference", "imported", "evaluation")
    )
    if isinstance(mass, dict):
        report["attention_mass"] = renamed(mass, {"with rest": "with_unet_lora"})
    if isinstance(pairs, list):
        report["interference"] = [
            renamed(pair, {"share": "interference"}) if isinstance(pair, dict) else pair for pair in pairs
        ]
    if isinstance(imported, dict):
        imported = renamed(imported, {"rest": "unet_layers", "rest_error": "unet_error"})
        worst = imported.pop("worst", None)
        if isinstance(worst, dict):
            imported |= {"worst_projection": worst.get("projection"), "worst_error": worst.get("error")}
        report["imported"] = imported
    if isinstance(evaluation, dict):
        parts = {key: renamed(part, EVALUATION.get(key, {})) for key, part in evaluation.items() if isinstance(part, dict)}
        report["evaluation"] = evaluation | parts
    return report


def upgraded_part(part: object) -> object:
    if not isinstance(part, dict):
        return part
    part = renamed(part, {"has": "modules"})
    return part | {"info": upgraded(part["info"])} if "info" in part else part


def check_info(info: object, name: str) -> None:
    """Raises ForgetError unless this is what a patch of the present schema says of itself, its parts left out."""
    info = info if isinstance(info, dict) else {}
    if info.get("schema") != SCHEMA:
        raise ForgetError(
            f"{name} is a patch of schema {brief(info.get('schema'))}, and this version reads up to {SCHEMA}: update "
            "Forget-Me-Not."
        )
    bounded(name, require_brief, info)
    base = info.get("base")
    model = isinstance(base, dict) and str(base.get("family")) in FAMILIES and isinstance(base.get("name"), str)
    if not model or not all(isinstance(info.get(key), kind) for key, kind in PATCH_FIELDS.items()):
        raise ForgetError(f"{name} does not say what it forgets or for which model: it is damaged; copy it again.")
    concepts = info.get("concepts")
    if concepts is not None and not (isinstance(concepts, list) and all(map(is_concept, concepts))):
        raise ForgetError(f"What {name} says of its concepts cannot be read: it is damaged; copy it again.")


def is_concept(value: object) -> bool:
    """Whether this is a concept as `make_patch` writes it down."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return False
    lists = (value.get("names"), value.get("templates"))
    return all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in lists)


def bounded(name: str, check: Callable[..., None], *values: object) -> None:
    """Raises ForgetError with the patch's name where a check of its bounds raises ValueError."""
    try:
        check(*values)
    except ValueError as error:
        raise ForgetError(f"{name} cannot be used, {error}: it is damaged or was edited; copy the original again.") from None
