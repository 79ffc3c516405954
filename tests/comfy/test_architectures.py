"""Every preset on a narrow copy of every architecture, in the real ComfyUI: SD1, SD2 with both parameterisations, SDXL."""

from __future__ import annotations

import pytest
import torch
from presets import config_for

from benchmarks.architectures import narrow_model
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget

pytestmark = pytest.mark.usefixtures("little_probed")
MODULES = {"sd1": 64, "sd2": 64, "sd2_v": 64, "sdxl": 280}  # four projections of 16 or 70 layers
NAMES = {
    "sd1": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
    "sd2": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
    "sd2_v": "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_q",
    "sdxl": "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_v",
}
QUICK = {"steps": 2, "num_images": 1, "num_inference_steps": 2, "resolution": 64, "attack_rounds": 1, "rank": 2}


@pytest.fixture(scope="module", params=MODULES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def narrow(comfy, family):
    return narrow_model(family)


@pytest.fixture
def narrow_host(narrow):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*narrow)


def weights(model):
    return {name: weight.clone() for name, weight in model.model.diffusion_model.state_dict().items()}


def test_layers_have_the_names_that_lora_files_give_them(narrow_host, family):
    keys = [
        narrow_host.lora_key(layer, matrix)
        for layer in narrow_host.cross_attentions()
        for matrix in ("to_q", "to_k", "to_v", "to_out")
    ]
    assert narrow_host.family == family and len(set(keys)) == MODULES[family] and NAMES[family] in keys


@pytest.mark.parametrize("preset", ["fast", "paper", "balanced"])
def test_every_preset_makes_a_patch_that_the_host_loads_whole(comfy, narrow, narrow_host, family, preset, caplog):
    import comfy.lora

    from fmn_core.hosts.comfy.apply import apply_patch

    model = narrow[0]
    before = weights(model)
    target_modules = "q,k,v,out" if preset == "paper" else "k,v"
    patch, losses = forget(narrow_host, "cat", config_for(preset, target_modules=target_modules, **QUICK))
    assert all(torch.isfinite(torch.tensor(losses))) and patch.info["base"]["family"] == family
    after = weights(model)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(dict(patch), known)
    assert len(loaded) == len({name.split(".")[0] for name in patch}) and "lora key not loaded" not in caplog.text
    changed = apply_patch(model, patch, 1.0)
    assert len(changed.patches) == len(loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_forgotten_on(comfy, dtype):
    """fp16 and bf16 checkpoints: the edit is that of the same weights in fp32, and nothing overflows."""
    from fmn_core.hosts.comfy.model import ComfyHost

    patches = []
    for half in (False, True):
        model, clip = narrow_model("sd1")
        unet = model.model.diffusion_model
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(dtype) if half else parameter.data.to(dtype).float()
        model.model.diffusion_model.dtype = dtype if half else torch.float32
        patches.append(forget(ComfyHost(model, clip), "cat", make_config(preset="fast"))[0])
    one, other = patches
    for name in one:
        if name.endswith("lora_up.weight"):
            down = name.replace(".lora_up", ".lora_down")
            deltas = [patch[name].float() @ patch[down].float() for patch in patches]
            assert (deltas[0] - deltas[1]).norm() <= 0.01 * deltas[0].norm(), name
