"""Patches in the forms of others, each in the program that reads it."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from spellings import FILE, close, ldm_name, module_name, module_name_of, products, written

from demo.host import CHECKPOINT
from fmn_core.convert.config import ImportConfig
from fmn_core.convert.exporter import merge, save_as, to_diff, to_peft
from fmn_core.convert.importer import import_patch
from fmn_core.errors import ForgetError
from fmn_core.lora.keys import blocks_per_level
from fmn_core.patch.apply import applied
from fmn_core.patch.file import read_patch
from fmn_core.patch.patch import ALPHA, DOWN, UP, model_shapes


@pytest.fixture(scope="module")
def patch():
    return read_patch(FILE)


@pytest.fixture(scope="module")
def deltas(patch):
    return products(patch)


@pytest.fixture(scope="module")
def diffusers_host(pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    return DiffusersHost(pipeline, progress_bar=False)


@pytest.fixture(scope="module")
def xl_host(xl_pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    return DiffusersHost(xl_pipeline, progress_bar=False)


def peft_deltas(unet):
    """Every layer's change as PEFT itself computes it."""
    return {
        name: module.get_delta_weight(module.active_adapters[0]).detach()
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }


class unloaded:
    """Context that takes a pipeline's LoRAs off again."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __enter__(self):
        pass

    def __exit__(self, *error):
        self.pipeline.unload_lora_weights()


def test_diffusers_computes_the_same_with_the_exported_file(pipeline, diffusers_host, patch, tmp_path, caplog):
    save_as(patch, "peft", tmp_path / "p.safetensors")
    prompts = diffusers_host.encode(["a cat"])
    x, t = torch.randn(1, *diffusers_host.latent_shape(), generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    with torch.no_grad():
        base = diffusers_host.predict(x, t, prompts)
        with applied(diffusers_host, patch):
            wanted = diffusers_host.predict(x, t, prompts)
        with unloaded(pipeline):
            pipeline.load_lora_weights(str(tmp_path / "p.safetensors"))
            found = diffusers_host.predict(x, t, prompts)
            assert close(peft_deltas(pipeline.unet), {module_name(name): delta for name, delta in products(patch).items()})
    assert (wanted - base).norm() > 0.01 * base.norm()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_comfyui_computes_the_same_with_full_differences(host, comfy, patch, deltas, sample, tmp_path, caplog):
    save_as(patch, "diff", tmp_path / "p.safetensors")
    tensors = comfy.utils.load_torch_file(str(tmp_path / "p.safetensors"), safe_load=True)
    assert close({key.removesuffix(".diff"): tensor.float() for key, tensor in tensors.items()}, deltas)
    model = comfy.sd.load_lora_for_models(host.patcher, None, tensors, 1.0, 0)[0]
    assert "not loaded" not in caplog.text.lower()
    other = comfy.sd.load_lora_for_models(host.patcher, None, dict(patch), 1.0, 0)[0]
    base, found, wanted = (sample(m, "a cat") for m in (host.patcher, model, other))
    assert (found - wanted).norm() < 0.02 * (wanted - base).norm()
    assert close(products(import_patch(host, tmp_path / "p.safetensors", ImportConfig(energy=1.0))), deltas)


def test_a_merged_checkpoint_is_the_patched_model_and_otherwise_the_same_to_the_bit(host, comfy, patch, tmp_path):
    from fmn_core.hosts.comfy.model import ComfyHost

    out = merge(CHECKPOINT, patch, 0.7, tmp_path / "m.safetensors")
    before, after = load_file(CHECKPOINT), load_file(out)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert sorted(changed) == sorted(f"model.diffusion_model.{ldm_name(name)}.weight" for name in patch.modules)
    assert all(before[key].dtype == after[key].dtype for key in before)
    with safe_open(CHECKPOINT, "pt") as one, safe_open(out, "pt") as other:
        assert one.metadata() == other.metadata() and list(one.keys()) == list(other.keys())

    merged = ComfyHost(*comfy.sd.load_checkpoint_guess_config(str(out))[:3])
    noise = torch.randn(1, *host.latent_shape(), generator=torch.Generator().manual_seed(1))
    prompts, x, t = host.encode(["a cat"]), noise, torch.tensor([500])
    with host.training(noise.shape), torch.no_grad():  # which puts the model without patches into memory
        base = host.predict(x, t, prompts)
        with applied(host, patch, 0.7):
            wanted = host.predict(x, t, prompts)
    with merged.training(noise.shape), torch.no_grad():
        found = merged.predict(x, t, prompts)
    assert (found - wanted).norm() < 2e-2 * (wanted - base).norm()  # the checkpoint is fp16
    back = import_patch(host, out, ImportConfig(energy=0.9999), base=CHECKPOINT)
    assert back.modules == patch.modules
    with pytest.raises(ForgetError, match="never overwritten"):
        merge(CHECKPOINT, patch, 1.0, out)
    with pytest.raises(ForgetError, match="lower the strength"):
        merge(CHECKPOINT, patch, 1e30, tmp_path / "n.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_diff_and_peft_hold_the_rest_too(host, patch, tmp_path):
    patch = read_patch(FILE)
    layers = host.other_layers()
    name = next(name for name in layers if "resnets_0_conv1" in name)
    out, inner, height, width = layers[name].weight.shape
    patch.unet_lora = {
        name + UP: torch.ones(out, 2, 1, 1).half(), name + DOWN: torch.ones(2, inner, height, width).half(),
        name + ALPHA: torch.tensor(2.0),
    }  # fmt: skip
    assert dict(to_diff(patch.unet_lora))[f"{name}.diff"].shape == (out, inner, height, width)
    assert dict(to_diff(patch.unet_lora))[f"{name}.diff"].unique().tolist() == [2.0]
    assert [*to_peft(patch.unet_lora)][0].startswith("unet.down_blocks.0.resnets.0.conv1.lora_A")
    assert [path.name for path in save_as(patch, "peft", tmp_path / "p.safetensors")] == [
        "p.safetensors",
        "p-unet.safetensors",
    ]


@pytest.fixture
def run(capsys):
    """run(word, ...) -> what `python -m fmn_core convert` answers, prints and complains of, in this process."""
    from fmn_core.cli.main import main

    def run(*words):
        capsys.readouterr()
        return main(["convert", *map(str, words)]), *capsys.readouterr()

    return run


def test_the_command_line_goes_there_and_back(run, model, deltas, tmp_path):
    peft, back, merged, own = (tmp_path / f"{name}.safetensors" for name in ("peft", "back", "merged", "own"))
    assert run(FILE, "--to", "peft", "--output", peft)[0] == 0
    code, out, _ = run(peft, "--model", model, "--device", "cpu", "--concept", "cat", "--output", back)
    assert code == 0 and "20 projections at rank 4" in out and str(back) in out
    assert close(products(read_patch(back)), deltas) and read_patch(back).info["concept"] == "cat"
    assert run(back, "--to", "checkpoint", "--base", CHECKPOINT, "--strength", "0.5", "--output", merged)[0] == 0
    full = [merged, "--model", model, "--device", "cpu", "--base", CHECKPOINT, "--rank", "4", "--output"]
    assert run(*full, own)[0] == 0 and read_patch(own).rank == 4
    found = products(read_patch(own))
    assert all((found[name] * 2 - deltas[name]).norm() < 0.05 * deltas[name].norm() for name in found)
    for words, message in (
        ([FILE, "--output", tmp_path / "x.safetensors"], "is a forget patch already"),
        ([peft, "--output", tmp_path / "x.safetensors"], "with --model"),
        ([FILE, "--to", "checkpoint", "--output", tmp_path / "x.safetensors"], "with --base"),
        ([FILE, "--to", "diff", "--output", peft], "never overwritten"),
    ):
        code, _, error = run(*words)
        assert code == 1 and message in error


def test_the_names_of_sdxl(xl_host, xl_pipeline, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    generator, shapes = torch.Generator().manual_seed(1), model_shapes(xl_host)
    tensors = {}
    for name, (out, inner) in shapes.items():
        tensors |= {
            name + UP: torch.randn(out, 2, generator=generator),
            name + DOWN: torch.randn(2, inner, generator=generator),
        }
    patch = import_patch(xl_host, written(tensors, tmp_path / "a.safetensors"), ImportConfig(), "cat")
    assert patch.modules == sorted(shapes) and all(
        "_blocks_" in name and "down" not in name for name in patch.modules if "mid" not in name
    )
    per_level = blocks_per_level([*shapes, *xl_host.other_layers()])
    save_as(patch, "peft", tmp_path / "b.safetensors", per_level)
    again = import_patch(xl_host, tmp_path / "b.safetensors", ImportConfig())
    assert close(products(again), products(patch))
    wanted = {module_name_of(xl_host, name): delta for name, delta in products(patch).items()}
    with unloaded(xl_pipeline):
        StableDiffusionXLPipeline.load_lora_weights(xl_pipeline, str(tmp_path / "b.safetensors"))
        assert close(peft_deltas(xl_pipeline.unet), wanted)
