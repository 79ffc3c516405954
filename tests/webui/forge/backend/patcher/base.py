"""Models with what clones of them are to have besides: LoRAs and patches."""

import copy

import torch
from standin import strict

CPU = torch.device("cpu")


class LoraLoader:
    """Merges the LoRAs of the patcher that is loaded, and puts the weights back when another one is."""

    def __init__(self, model):
        self.model, self.backup, self.online_backup, self.loaded_hash = model, {}, [], str([])

    @torch.inference_mode()
    def refresh(self, lora_patches, offload_device=None, force_refresh=False):
        wanted = str(list(lora_patches))
        if wanted == self.loaded_hash and not force_refresh:
            return
        for key, weight in self.backup.items():
            put(self.model, key, weight)
        self.backup = {}
        for patches in lora_patches.values():
            for key, (strength, (up, down, alpha)) in patches.items():
                weight = self.model.get_parameter(key)
                self.backup.setdefault(key, weight)
                merged = weight.clone()
                merged += up.to(merged) @ down.to(merged) * (float(alpha) / len(down) * strength)
                put(self.model, key, torch.nn.Parameter(merged, requires_grad=False))
        self.loaded_hash = wanted


def put(model, key, parameter):
    parent, _, child = key.rpartition(".")
    setattr(model.get_submodule(parent), child, parameter)


class ModelPatcher:
    def __init__(self, model, load_device=CPU, offload_device=CPU):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.lora_patches, self.model_options = {}, {"transformer_options": {}}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader = model.lora_loader

    def clone(self):
        other = type(self)(self.model, self.load_device, self.offload_device)
        other.lora_patches = self.lora_patches.copy()
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def add_patches(self, *, filename, patches, strength_patch=1.0):
        known = dict(self.model.named_parameters())
        self.lora_patches[filename, strength_patch, 1.0, False] = {
            key: (strength_patch, factors) for key, factors in patches.items() if key in known
        }

    def refresh_loras(self):
        self.lora_loader.refresh(self.lora_patches, self.offload_device)

    def memory_required(self, input_shape):
        return self.model.memory_required(input_shape)

    def set_model_attn2_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), patch]


strict(__name__)
