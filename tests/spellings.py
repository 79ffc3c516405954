"""A demo patch under the names that other tools have for its layers."""

from __future__ import annotations

import itertools

from conftest import ROOT
from safetensors.torch import save_file

from fmn_core.lora.keys import dotted, one_name
from fmn_core.patch.patch import ALPHA, DOWN, UP

FILE = ROOT / "demo/loras/forget-cat.safetensors"


def products(tensors):
    names = [key.removesuffix(ALPHA) for key in tensors if key.endswith(ALPHA)]
    return {name: tensors[name + UP].float() @ tensors[name + DOWN].float() for name in names}


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= 1e-3 * other[name].norm() + 1e-6, name
    return True


def written(tensors, path, metadata=None):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def module_name(kohya):
    return dotted(one_name(kohya, 2))


def ldm_name(kohya):
    """As demo.recipe.checkpoint names it, which knows nothing of the importer."""
    from demo.recipe.checkpoint import unet_names

    blocks = {diffusers: ldm for ldm, diffusers in unet_names().items()}
    name = module_name(kohya)
    block = next(start for start in blocks if f"{name}.".startswith(f"{start}."))
    return blocks[block] + name[len(block) :]


def module_name_of(host, kohya):
    return next(
        f"{layer}.{'to_out.0' if matrix == 'to_out' else matrix}"
        for layer, matrix in itertools.product(host.cross_attentions(), ("to_q", "to_k", "to_v", "to_out"))
        if host.lora_key(layer, matrix) == kohya
    )


SPELLINGS = {
    "kohya": lambda name: (name + DOWN, name + UP),
    "kohya, ldm": lambda name: tuple(f"lora_unet_{ldm_name(name).replace('.', '_')}{part}" for part in (DOWN, UP)),
    "PEFT": lambda name: tuple(f"base_model.model.{module_name(name)}.lora_{x}.weight" for x in "AB"),
    "PEFT, named": lambda name: tuple(f"{module_name(name)}.lora_{x}.default.weight" for x in "AB"),
    "PEFT, another name": lambda name: tuple(f"unet.{module_name(name)}.lora_{x}.my_adapter.weight" for x in "AB"),
    "PEFT, numbered": lambda name: tuple(f"base_model.model.{module_name(name)}.lora_{x}.default_0.weight" for x in "AB"),
    "PEFT, bare": lambda name: tuple(f"{module_name(name)}.lora_{x}" for x in "AB"),
    "diffusers": lambda name: tuple(f"unet.{module_name(name)}.lora_{x}.weight" for x in "AB"),
    "diffusers 0.2x": lambda name: tuple(f"unet.{module_name(name)}.lora.{x}.weight" for x in ("down", "up")),
    "old diffusers": lambda name: tuple(
        f"{module_name(name).replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{x}.weight" for x in ("down", "up")
    ),
    "ComfyUI": lambda name: tuple(f"diffusion_model.{ldm_name(name)}{part}" for part in (DOWN, UP)),
    "lycoris": lambda name: (name.replace("lora_unet", "lycoris") + DOWN, name.replace("lora_unet", "lycoris") + UP),
}
