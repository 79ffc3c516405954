"""What every host makes of the demo model with the same inputs and seed: computed in one process, compared in others."""

from __future__ import annotations

import pytest
import torch
from presets import probe_little

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.host import MATRICES

TEXTS = ["a cat", "a red (rose:1.3) in neon style", "two dogs BREAK a house"]
SETTINGS = {
    "fast": make_config(preset="fast"),
    "paper": make_config(preset="paper", steps=3, batch_size=2, num_images=2, num_inference_steps=3, resolution=128),
}


def reference(host) -> dict[str, torch.Tensor]:
    """Name -> tensor: a noise estimate, and the deltas of a patch of each preset by kohya names."""
    x = torch.randn(2, *host.latent_shape(), generator=torch.Generator().manual_seed(0))
    prompts = host.encode(["a cat", "a rose in neon style"])
    with host.training(x.shape), torch.no_grad():
        found = {"alphas": host.alphas_cumprod, "context": prompts.prompt_embeds}
        found["epsilon"] = host.predict(x, torch.tensor([700, 30]), prompts)
    for name, settings in SETTINGS.items():
        with pytest.MonkeyPatch.context() as patched:
            probe_little(patched.setattr)
            patch, _ = forget(host, "cat", settings)
        for module in patch.modules:
            up, down = (patch[f"{module}.lora_{part}.weight"].float() for part in ("up", "down"))
            found[f"{name} {module}"] = up @ down
    return {key: tensor.detach().float().contiguous() for key, tensor in found.items()}


def keys(host) -> list[str]:
    return [host.lora_key(layer, matrix) for layer in host.cross_attentions() for matrix in MATRICES]
