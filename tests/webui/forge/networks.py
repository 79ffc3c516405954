"""sd_forge_lora: LoRAs go onto clones of the patchers, and are merged when these are loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from modules import sd_models
from standin import layer_of, lora_modules, strict

loaded_networks = []


def load_networks(files, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    """Takes files in place of names."""
    model = sd_models.model_data.get_sd_model()
    loaded_networks[:] = [
        SimpleNamespace(name=Path(file).stem, network_on_disk=SimpleNamespace(filename=str(file))) for file in files
    ]
    wanted = [
        [file, unet_multipliers[i] if unet_multipliers else 1.0, te_multipliers[i] if te_multipliers else 1.0]
        for i, file in enumerate(files)
    ]
    if model.current_lora_hash == str(wanted):
        return
    model.current_lora_hash = str(wanted)
    original, objects = model.forge_objects_original, model.forge_objects
    objects.unet, objects.clip = original.unet, original.clip
    for file, strength, strength_text in wanted:
        objects.unet, objects.clip = objects.unet.clone(), objects.clip.clone()
        for patcher, strength_here in ((objects.unet, strength), (objects.clip.patcher, strength_text)):
            keys = [key.removesuffix(".weight") for key, _ in patcher.model.named_parameters() if key.endswith(".weight")]
            unet_names = [key.removeprefix("diffusion_model.") for key in keys]
            factors, found = lora_modules(file, unet_names), {}
            for key in keys:
                if layer_of(key.replace(".", "_")) in factors:
                    found[f"{key}.weight"] = factors[layer_of(key.replace(".", "_"))]
            patcher.add_patches(filename=file, patches=found, strength_patch=strength_here)
    model.forge_objects_after_applying_lora = objects.shallow_copy()


strict(__name__)
