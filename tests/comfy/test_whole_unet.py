"""`train_layers: whole_unet`: what is learned outside the cross-attention loads in the hosts' own LoRA loaders."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fmn_core.erasure.config import ResteeringConfig, make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.lora.layers import LoRAs
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import ALPHA, DOWN, UP
from fmn_core.patch.summary import summary

HOW = make_config(
    preset="paper",
    train_layers="whole_unet",
    steps=4,
    learning_rate=5e-3,
    num_images=1,
    num_inference_steps=2,
    target_modules="q,k,v,out",
)


@pytest.fixture(scope="module", params=["comfy", "diffusers"])
def host(request, loaded):
    if request.param == "comfy":
        from fmn_core.hosts.comfy.model import ComfyHost

        return ComfyHost(*loaded)
    from fmn_core.hosts.diffusers.model import DiffusersHost

    return DiffusersHost(request.getfixturevalue("pipeline"), progress_bar=False)


@pytest.fixture(scope="module")
def trained(host):
    """A patch with its UNet LoRA, and the host's estimate before it was trained."""
    untouched = estimate(host)
    patch, losses = forget(host, "cat", HOW)
    assert len(losses) == HOW.steps
    return patch, untouched


def estimate(host):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *host.latent_shape(), generator=generator)
    with host.training(x.shape), torch.no_grad():
        return host.predict(x, torch.tensor([500]), host.encode(["a cat"]))


def with_adapters(host, patch):
    """The estimate with the tensors of a patch and its UNet LoRA put on the modules that they are named after."""
    layers = host.cross_attentions()
    named = {
        host.lora_key(layer, m): cross.linear(m)
        for layer, cross in layers.items()
        for m in ("to_q", "to_k", "to_v", "to_out")
    }
    loras = LoRAs({**named, **host.other_layers()}, HOW.rank, torch.Generator())
    tensors = {**patch, **patch.unet_lora}
    with torch.no_grad():
        for name in loras.patched:
            loras[name].up.copy_(tensors[name + UP])
            loras[name].down.copy_(tensors[name + DOWN])
    assert 3 * len(loras) == len(tensors)
    with loras.attached():
        return estimate(host)


def test_the_unet_lora_is_learned_saved_beside_the_patch_and_loads_in_the_hosts_own_loader(
    host, trained, loaded, tmp_path, caplog
):
    patch, untouched = trained
    assert torch.equal(estimate(host), untouched)
    assert not any(module._forward_hooks for module in host.other_layers().values())
    assert all(
        patch.unet_lora[name + UP].any()
        for name in ("lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_mid_block_attentions_0_proj_in")
    )

    files = save_patch(patch, tmp_path / "forget-cat.safetensors")
    assert [file.name for file in files] == ["forget-cat.safetensors", "forget-cat-unet.safetensors"]
    assert dict(read_patch(files[0])).keys() == dict(patch).keys()
    with pytest.raises(ForgetError, match="is not a forget patch"):
        read_patch(files[1])
    with safe_open(files[1], "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1" and "unet" in file.metadata()["ss_output_name"]
    tensors = load_file(files[1])
    assert all(torch.equal(tensors[key], value) for key, value in patch.unet_lora.items()) and len(tensors) == len(
        patch.unet_lora
    )
    assert all(value == HOW.rank for key, value in tensors.items() if key.endswith(ALPHA))

    wanted = with_adapters(host, patch)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = load_by_the_host(host, loaded, files)
    assert not any("not loaded" in record.message.lower() for record in caplog.records)
    assert torch.allclose(found, wanted, atol=2e-3) and (wanted - untouched).abs().max() > 0.05


def load_by_the_host(host, loaded, files):
    """The estimate of the model with both files on it, by the host's own loader."""
    if hasattr(host, "pipeline"):
        for file in files:
            host.pipeline.load_lora_weights(str(file), adapter_name=file.stem.replace("-", "_"))
        host.pipeline.set_adapters([file.stem.replace("-", "_") for file in files])
        try:
            return estimate(host)
        finally:
            host.pipeline.unload_lora_weights()
    import comfy.sd

    model, clip, vae = loaded
    for file in files:
        model, _ = comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0)
    return estimate(type(host)(model, clip, vae))


def test_both_figures_are_told(trained):
    patch, _ = trained
    mass = patch.info["report"]["attention_mass"]
    assert mass["with_unet_lora"] != mass["after"] and f"{mass['with_unet_lora']:.4f} with the UNet's LoRA" in summary(patch)


def test_a_unet_lora_whose_name_is_taken_stops_both(trained, tmp_path):
    (tmp_path / "p-unet.safetensors").write_bytes(b"mine")
    with pytest.raises(ForgetError, match="never overwritten"):
        save_patch(trained[0], tmp_path / "p.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["p-unet.safetensors"]


def test_names_are_of_modules_that_the_other_host_has(loaded, pipeline):
    from fmn_core.hosts.comfy.model import ComfyHost
    from fmn_core.hosts.diffusers.model import DiffusersHost

    one, other = ComfyHost(*loaded).other_layers(), DiffusersHost(pipeline, progress_bar=False).other_layers()
    assert {name: tuple(m.weight.shape) for name, m in one.items()} == {n: tuple(m.weight.shape) for n, m in other.items()}


@pytest.mark.parametrize("preset", ["fast", "balanced", "robust"])
def test_other_presets_refuse_it(preset):
    with pytest.raises(ForgetError, match=f"The preset `{preset}` has no setting `train_layers`: it is one of paper"):
        make_config(preset, train_layers="whole_unet")


def test_its_own_learning_rate_is_lower_than_that_of_the_cross_attention():
    own, whole = (
        make_config(preset="paper", train_layers=layers).resolved() for layers in ("cross_attention", "whole_unet")
    )
    assert (
        whole.learning_rate == ResteeringConfig.WHOLE_UNET_RATE * own.learning_rate and ResteeringConfig.WHOLE_UNET_RATE < 1
    )
    assert replace(whole, learning_rate=5e-3).resolved().learning_rate == 5e-3
