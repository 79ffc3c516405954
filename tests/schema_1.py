"""What files of schema 1 said: every setting and figure of it, and files that say so."""

from __future__ import annotations

import json

from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fmn_core.patch.file import read_patch
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch

CAR, CAT = (ROOT / f"demo/loras/forget-{name}.safetensors" for name in ("car", "cat"))
WIDTH = 112  # of the demo model's text encoder
# Every setting of schema 1: its name in schema 2, and the new word for each value that is chosen from a list.
SETTINGS = {
    "concept_type": ("concept_type", {kind: kind for kind in ("object", "style", "identity", "custom")}),
    "preset": ("preset", {preset: preset for preset in ("fast", "paper", "balanced", "robust")}),
    "mode": ("mode", {mode: mode for mode in ("remove", "replace", "correct")}),
    "replacement": ("target", {}),
    "keep": ("preserve", {}),
    "strict": ("strict", {}),
    "steps": ("steps", {}),
    "learning_rate": ("learning_rate", {}),
    "seed": ("seed", {}),
    "rank": ("rank", {}),
    "tokens": (
        "penalized_tokens",
        {"concept": "concept", "concept and end": "concept_and_end", "concept onward": "concept_onward"},
    ),
    "matrices": ("target_modules", {"q k v": "q,k,v", "k v": "k,v", "k": "k", "v": "v", "q k v out": "q,k,v,out"}),
    "template": ("template", {}),
    "batch_size": ("batch_size", {}),
    "visual_weight": ("visual_loss_weight", {}),
    "num_pictures": ("num_images", {}),
    "resolution": ("resolution", {}),
    "sampling_steps": ("num_inference_steps", {}),
    "guidance": ("guidance_scale", {}),
    "flip": ("horizontal_flip", {}),
    "rounds": ("attack_rounds", {}),
    "layers": ("train_layers", {"cross-attention": "cross_attention", "whole unet": "whole_unet"}),
    "gradient": ("backprop", {"whole": "full", "residual stream": "skip_connections"}),
    "loss": ("loss", {"squared norms": "squared_norms", "joint norm": "joint_norm"}),
}
# Every key that a report of schema 1 can have, and the same report in schema 2.
REPORT = {
    "erased": {"cat": 0.9}, "also": ["kitten"], "drift": {"dog": 0.1}, "empty prompt": 0.01,
    "attention_mass": {"before": 0.3, "after": 0.1, "with rest": 0.05},
    "distance": {"before": 1.0, "fast": 0.5, "after": 0.2}, "noise drift": 0.02, "unrelated drift": 0.003,
    "error with learned words": [0.4, 0.5], "steps": 35, "strength": 1.1, "loss": [2.0, 1.0],
    "conflicts": [{"concept": "cat", "other": "dog", "share": 0.2}],
    "responses": [{"concept": "cat", "added": 0.2, "jointly": 0.1}], "spill": 0.4,
    "imported": {
        "file": "x.safetensors", "kind": "LoRA", "rest": 3, "rest_error": 0.2, "rank": 4, "projections": 20, "error": 0.1,
        "worst": {"projection": "lora_unet_x", "error": 0.3},
    },
    "evaluation": {
        "summary": "Fine.", "warnings": [], "prompt_drift": {"near": {"mean": 0.1, "each": {"dog": 0.1}}},
        "settings": {
            "keep": "dog", "prompts": 4, "pictures": 1, "seed": 0, "strength": 1.0, "inversion": False, "steps": 20,
            "guidance": 5.0, "resolution": 0, "inversion_steps": 300, "inversion_vectors": 2,
        },
        "attention": {"own tokens": {"before": 0.3, "after": 0.1}, "from there on": {"before": 0.5, "after": 0.4}},
        "noise_drift": {"empty": {"mean": 0.0}}, "picture_change": None,
    },
    "warnings": ["Little effect."],
}  # fmt: skip
NEW_REPORT = {
    "erasure": {"cat": 0.9}, "synonyms": ["kitten"], "preserve_drift": {"dog": 0.1}, "empty_prompt_drift": 0.01,
    "attention_mass": {"before": 0.3, "after": 0.1, "with_unet_lora": 0.05},
    "target_error": {"before": 1.0, "fast": 0.5, "after": 0.2}, "noise_drift": 0.02, "unrelated_drift": 0.003,
    "learned_word_errors": [0.4, 0.5], "steps": 35, "strength": 1.1, "loss": [2.0, 1.0],
    "interference": [{"concept": "cat", "other": "dog", "interference": 0.2}],
    "response_errors": [{"concept": "cat", "added": 0.2, "jointly": 0.1}], "collateral_change": 0.4,
    "imported": {
        "file": "x.safetensors", "kind": "LoRA", "unet_layers": 3, "unet_error": 0.2, "rank": 4, "projections": 20,
        "error": 0.1, "worst_projection": "lora_unet_x", "worst_error": 0.3,
    },
    "evaluation": {
        "summary": "Fine.", "warnings": [], "prompt_drift": {"near": {"mean": 0.1, "each": {"dog": 0.1}}},
        "settings": {
            "preserve": "dog", "prompts": 4, "images_per_prompt": 1, "seed": 0, "strength": 1.0, "inversion": False,
            "num_inference_steps": 20, "guidance_scale": 5.0, "resolution": 0, "inversion_steps": 300,
            "inversion_vectors": 2,
        },
        "attention": {"own_tokens": {"before": 0.3, "after": 0.1}, "from_there_on": {"before": 0.5, "after": 0.4}},
        "noise_drift": {"empty": {"mean": 0.0}}, "picture_change": None,
    },
    "warnings": ["Little effect."],
}  # fmt: skip


def stored(path):
    """What a patch's file says of it, as it stands there."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fmn.patch"])


def written(folder, info, tensors=None, name="old.safetensors"):
    """The file of a patch that says this of itself, with the car's tensors or others."""
    path = folder / name
    save_file(dict(tensors or load_file(CAR)), path, {"fmn.patch": json.dumps(info)})
    return path


def new_stack():
    """The demo's patches, stacked today."""
    return stack([WeightedPatch(read_patch(CAR)), WeightedPatch(read_patch(CAT), 0.5)])


def old_stack(fresh, files):
    """What a stack of patches of schema 1 said of itself, as the version wrote it that stacked them: `fresh` is of the same
    files today."""
    report = fresh.info["report"]
    parts = dict(zip(sorted(file.stem for file in files), fresh.info["patches"], strict=True))
    return {
        "schema": 1,
        "version": fresh.info["version"],
        "concept": "car, cat",
        "concepts": fresh.info["concepts"],
        "settings": {"preset": "stack", "seed": 0, "keep": ""},
        "base": fresh.info["base"],
        "members": [
            {"info": stored(file), "rank": part["rank"], "strength": part["strength"], "has": part["modules"]}
            for file in files
            for part in [parts[file.stem]]
        ],
        "report": {
            "conflicts": [
                {"concept": pair["concept"], "other": pair["other"], "share": pair["interference"]}
                for pair in report["interference"]
            ],
            "responses": report["response_errors"],
            "spill": report["collateral_change"],
            "warnings": report["warnings"],
        },
    }
