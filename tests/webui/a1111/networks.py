"""The built-in Lora extension: weights merged in place when a layer runs, by a forward patched onto torch's classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from standin import layer_of, lora_modules, strict


class Network:
    def __init__(self, name, modules, file):
        self.name, self.modules, self.network_on_disk = name, modules, SimpleNamespace(filename=str(file))
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim = None


loaded_networks: list[Network] = []
unet_names: list[str] = []


def assign_network_names_to_compvis_modules(model):
    for name, module in [*model.cond_stage_model.wrapped.named_modules(), *model.model.named_modules()]:
        module.network_layer_name = name.replace(".", "_")
        if name.startswith("diffusion_model."):
            unet_names.append(name.removeprefix("diffusion_model."))


def load_networks(files, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    """Takes files in place of names; nothing is merged until a layer runs."""
    loaded_networks.clear()
    for i, file in enumerate(files):
        network = Network(Path(file).stem, lora_modules(file, unet_names), file)
        network.te_multiplier = te_multipliers[i] if te_multipliers else 1.0
        network.unet_multiplier = unet_multipliers[i] if unet_multipliers else 1.0
        loaded_networks.append(network)


def network_restore_weights_from_backup(self):
    weights, bias = getattr(self, "network_weights_backup", None), getattr(self, "network_bias_backup", None)
    if weights is not None:
        self.weight.copy_(weights)
    if bias is not None:
        self.bias.copy_(bias)


def network_apply_weights(self):
    name = getattr(self, "network_layer_name", None)
    if name is None:
        return
    current = getattr(self, "network_current_names", ())
    wanted = tuple((n.name, n.te_multiplier, n.unet_multiplier, n.dyn_dim) for n in loaded_networks)
    if getattr(self, "network_weights_backup", None) is None and wanted:
        assert not current, "no backup weights found and current weights are not unchanged"
        self.network_weights_backup = self.weight.to("cpu", copy=True)
        self.network_bias_backup = None if self.bias is None else self.bias.to("cpu", copy=True)
    if current == wanted:
        return
    network_restore_weights_from_backup(self)
    for network in loaded_networks:
        if layer_of(name) in network.modules:
            up, down, alpha = network.modules[layer_of(name)]
            strength = network.unet_multiplier if name.startswith("diffusion_model") else network.te_multiplier
            with torch.no_grad():
                delta = up.float() @ down.float() * (float(alpha) / len(down) * strength)
                self.weight.copy_(self.weight + delta.to(self.weight))
    self.network_current_names = wanted


def network_Linear_forward(self, input):
    network_apply_weights(self)
    return Linear_forward(self, input)


Linear_forward = torch.nn.Linear.forward
torch.nn.Linear.forward = network_Linear_forward
strict(__name__)
