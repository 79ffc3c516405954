"""The patch file: written whole, read strictly, taken by the host's own loader."""

from __future__ import annotations

import copy
import json
import math
import resource
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.files.names import slug
from fmn_core.patch.file import read_patch, save_patch, serialize
from fmn_core.patch.patch import ALPHA, DOWN, UP, Patch
from fmn_core.patch.statistics import TextStatistics, leading


@pytest.fixture(scope="module")
def patch(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return forget(ComfyHost(*loaded), "cat", make_config(preset="paper", steps=4, num_images=2, num_inference_steps=3))[0]


def test_save_and_read_is_identity(patch, tmp_path):
    path = tmp_path / "a" / "p.safetensors"
    save_patch(patch, path)
    again = read_patch(path)
    assert again.info == patch.info and list(again) == list(patch)
    assert all(torch.equal(again[key], patch[key]) and again[key].dtype == patch[key].dtype for key in patch)
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]
    assert path.read_bytes() == serialize(patch, "p")


def test_the_file_holds_what_loaders_ask_for(patch, tmp_path):
    path = tmp_path / "p.safetensors"
    save_patch(patch, path)
    tensors = load_file(path)
    for module in patch.modules:
        assert tensors[module + DOWN].dtype == tensors[module + UP].dtype == tensors[module + ALPHA].dtype == torch.float16
        assert tensors[module + ALPHA].shape == () and tensors[module + ALPHA] == patch.rank == len(tensors[module + DOWN])
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["ss_network_dim"] == str(patch.rank) and "ss_v2" in metadata


def test_what_stacking_needs_comes_back(patch, tmp_path):
    path = tmp_path / "p.safetensors"
    save_patch(patch, path)
    moments = TextStatistics.decoded(read_patch(path).info["statistics"])
    assert moments.keys.shape == (16, 112) and moments.kept.shape[1] == 112 and moments.tail > 0
    for change in (
        {"tail": "x"},
        {"keys": {}},
        {"keys": {"shape": [10**9, 10**9], "scale": 1, "fp16": ""}},
        {"tail": math.inf},
        {"tail": 0},
    ):
        with pytest.raises(ForgetError, match="damaged"):
            TextStatistics.decoded(patch.info["statistics"] | change)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_leading_directions_are_most_of_a_moment_and_all_of_it_where_they_are_enough(count, size, seed):
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(seed)).double()
    moment = x.T @ x
    rows, tail = leading(moment, count)
    again = rows.T @ rows + tail * torch.eye(size, dtype=torch.double)
    assert torch.allclose(again.trace(), moment.trace()) and rows.shape == (min(count, size), size)
    assert torch.linalg.eigvalsh(again).max() <= torch.linalg.eigvalsh(moment).max() * (1 + 1e-9)
    if count >= size:
        assert torch.allclose(again, moment)


def test_a_name_in_use_is_never_taken_over(patch, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(ForgetError, match="never overwritten"):
        save_patch(patch, path)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file size limit")
def test_a_write_that_fails_leaves_nothing(patch, tmp_path):
    """The operating system refuses the write in the middle, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ForgetError, match="Nothing was left there"):
            save_patch(patch, tmp_path / "p.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def edited(patch, path, change):
    """A copy of the file with its info changed."""
    info = json.loads(json.dumps(patch.info))
    change(info)
    save_file(dict(patch), path, {"fmn.patch": json.dumps(info)})


def test_files_that_are_no_good_get_a_sentence(patch, tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(ForgetError, match="not there any more"):
        read_patch(path)

    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ForgetError, match="is not a forget patch"):
        read_patch(path)

    path.write_bytes(serialize(patch, "p")[:-100])
    with pytest.raises(ForgetError, match="p.safetensors cannot be read"):
        read_patch(path)

    path.write_bytes(b"not a file of tensors at all")
    with pytest.raises(ForgetError, match="cannot be read"):
        read_patch(path)

    save_file(dict(patch), path, {"fmn.patch": "{"})
    with pytest.raises(ForgetError, match="cannot be read"):
        read_patch(path)

    save_file(dict(patch), path, {"fmn.patch": "[]"})
    with pytest.raises(ForgetError, match="schema None"):
        read_patch(path)

    for deep in ("[" * 100_000, "1" * 5000):
        save_file(dict(patch), path, {"fmn.patch": deep})
        with pytest.raises(ForgetError, match="cannot be read|schema None"):
            read_patch(path)

    for change in ({"base": "x"}, {"base": {}}, {"concept": None}, {"settings": []}):
        edited(patch, path, lambda info, change=change: info.update(change))
        with pytest.raises(ForgetError, match="does not say what it forgets"):
            read_patch(path)

    edited(patch, path, lambda info: info.update(schema=99))
    with pytest.raises(ForgetError, match="schema 99.*update"):
        read_patch(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.update(extra=torch.ones(1)), "other tensors"),
        (lambda t, m: t.pop(m + UP), "other tensors"),
        (lambda t, m: t.update({m + DOWN: t[m + DOWN][:1].clone()}), "wrong shape"),
        (lambda t, m: t.update({m + UP: torch.full_like(t[m + UP], float("nan"))}), "not finite"),
        (lambda t, m: t.clear(), "other tensors"),
        (lambda t, m: t.update({m + ALPHA: torch.tensor(0, dtype=torch.float16)}), "alpha = rank"),
        (lambda t, m: t.update({m + UP: t[m + UP].float()}), "not fp16"),
    ],
)
def test_tensors_that_are_no_good_get_a_sentence(patch, tmp_path, change, message):
    tensors = dict(patch)
    change(tensors, patch.modules[-1])
    save_file(tensors, tmp_path / "p.safetensors", {"fmn.patch": json.dumps(patch.info)})
    with pytest.raises(ForgetError, match=message):
        read_patch(tmp_path / "p.safetensors")


def test_a_patch_for_another_architecture_is_refused(patch, loaded):
    from fmn_core.hosts.comfy.apply import apply_patch

    wider = {k: torch.zeros(len(v), 768, dtype=v.dtype) if k.endswith(DOWN) and "to_k" in k else v for k, v in patch.items()}
    with pytest.raises(ForgetError, match="load the checkpoint it was made for"):
        apply_patch(loaded[0], Patch(wider, patch.info), 1.0)
    elsewhere = {k.replace("mid_block", "mid_block_9"): v for k, v in patch.items()}
    with pytest.raises(ForgetError, match="no layer"):
        apply_patch(loaded[0], Patch(elsewhere, patch.info), 1.0)


def test_applying_is_what_the_hosts_own_loader_does(patch, comfy, loaded, sample, tmp_path, caplog):
    from fmn_core.hosts.comfy.apply import apply_patch

    save_patch(patch, tmp_path / "p.safetensors")
    stock = comfy.utils.load_torch_file(str(tmp_path / "p.safetensors"), safe_load=True)
    theirs, _ = comfy.sd.load_lora_for_models(loaded[0], None, stock, 0.7, 0)
    assert "not loaded" not in caplog.text.lower()
    ours = apply_patch(loaded[0], patch, 0.7)
    assert torch.equal(sample(ours, "a cat"), sample(theirs, "a cat"))
    assert not torch.equal(sample(ours, "a cat"), sample(loaded[0], "a cat"))


def test_strength_zero_is_the_base_and_the_base_is_untouched(patch, loaded, sample):
    from fmn_core.hosts.comfy.apply import apply_patch

    base = sample(loaded[0], "a cat")
    assert torch.equal(sample(apply_patch(loaded[0], patch, 0.0), "a cat"), base)
    sample(apply_patch(loaded[0], patch, 1.0), "a cat")
    assert torch.equal(sample(loaded[0], "a cat"), base)


def test_chained_patches_add_up_in_any_order(patch, loaded, sample):
    from fmn_core.hosts.comfy.apply import apply_patch

    other = Patch({k: (v * -0.5 if k.endswith(UP) else v) for k, v in patch.items()}, patch.info)
    one = apply_patch(apply_patch(loaded[0], patch, 1.0), other, 1.0)
    two = apply_patch(apply_patch(loaded[0], other, 1.0), patch, 1.0)
    half = apply_patch(loaded[0], patch, 0.5)
    first, other = sample(one, "a cat"), sample(two, "a cat")
    assert (first - other).abs().max() < 1e-4 * first.abs().max()
    assert torch.allclose(first, sample(half, "a cat"), atol=1e-3)


def test_slugs_are_safe_file_names():
    assert slug("Van Gogh!") == "van-gogh" and slug("../..") == "concept" and slug("名前") == "名前"
    assert len(slug("cat " * 100)) <= 60


def test_a_name_too_long_gets_its_own_remedy(patch, tmp_path):
    with pytest.raises(ForgetError, match="choose a shorter name"):
        save_patch(patch, tmp_path / ("x" * 300 + ".safetensors"))


@pytest.fixture(scope="module")
def sd15():
    """SD1.5's UNet, without memory for its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sd15_patch(unet, patch, rank):
    """A patch on q, k, v and out of all layers, as large as they come, with what `patch` remembers at that width."""
    info, tensors = copy.deepcopy(patch.info), {}
    for name, module in unet.named_modules():
        if ".attn2.to_" in name and isinstance(module, torch.nn.Linear):
            out, inner = module.weight.shape
            key = f"lora_unet_{name}".replace(".", "_")
            tensors[key + UP], tensors[key + DOWN] = torch.randn(out, rank).half(), torch.randn(rank, inner).half()
            tensors[key + ALPHA] = torch.tensor(rank, dtype=torch.float16)
    moments = TextStatistics.decoded(info["statistics"])
    wide = (torch.randn(len(rows), 768).double() for rows in (moments.keys, moments.kept))
    info["statistics"] = TextStatistics(*wide, moments.tail).encoded()
    return Patch(tensors, info)


def test_a_patch_for_sd15_takes_at_most_two_megabytes(patch, sd15):
    large = sd15_patch(sd15, patch, 8)
    assert len(large.modules) == 64
    assert 1_500_000 < len(serialize(large, "forget-cat")) <= 2_000_000


def test_every_key_is_one_that_sd_scripts_looks_for(patch, sd15):
    """Its published algorithm (networks/lora.py): `lora_unet_` and the path with underscores of every Linear and convolution
    below a Transformer2DModel; dim from lora_down, scale alpha / dim."""
    looked_for = {}
    for name, module in sd15.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            for below, linear in module.named_modules():
                if isinstance(linear, torch.nn.Linear | torch.nn.Conv2d):
                    looked_for[f"lora_unet_{name}.{below}".replace(".", "_")] = linear.weight.shape
    large = sd15_patch(sd15, patch, 4)
    for key, value in large.items():
        module, kind = key.split(".", 1)
        out, inner = looked_for[module]
        assert value.shape == {"lora_up.weight": (out, 4), "lora_down.weight": (4, inner), "alpha": ()}[kind]
    assert all(value / 4 == 1 for key, value in large.items() if key.endswith(ALPHA))
