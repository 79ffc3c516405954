"""Recording while a diffusers pipeline samples, beside DAAM's own package; and of pictures that are there already."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from fmn_core.attention.capture import capture_attention_maps
from fmn_core.attention.from_image import FromImageConfig, record_pictures
from fmn_core.attention.heatmap import word_heat_maps
from fmn_core.attention.recorder import RecordingConfig
from fmn_core.attention.visualize import ViewConfig, visualize
from fmn_core.errors import ForgetError


def test_word_heat_maps_are_those_of_daam(comfyui):
    """In a process of its own: DAAM wants packages beside it that its heat maps do not use."""
    if importlib.util.find_spec("daam") is None:
        pytest.skip("the package daam is not installed: python install.py test installs it")
    command = [sys.executable, ROOT / "tests/comfy/daam_beside_ours.py"]
    done = subprocess.run(command, env={**os.environ, "FMN_COMFYUI": str(comfyui)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same picture"] and len(result["correlation"]) == 5
    assert min(result["correlation"].values()) > 0.999


@pytest.fixture(scope="module")
def cats(loaded, sample):
    """Two pictures that the demo model made of a cat."""
    with torch.inference_mode():
        images = loaded[2].decode(sample(loaded[0], "an emoji of a cat", size=(16, 16), steps=10))
    return images.clone()


def test_a_picture_is_looked_at_without_sampling(host, cats):
    """The maps of one pass are those of the layers' own projections at the same noise."""
    text = "an emoji of a cat"
    settings = FromImageConfig(noise=0.4, num_samples=1, seed=3)
    recording = record_pictures(host, cats, text, settings)
    latents = host.encode_images(cats)
    a = host.alphas_cumprod[round(0.4 * 999)]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    with host.training(latents.shape), torch.no_grad(), capture_attention_maps(host.cross_attentions()) as maps:
        prompts = host.encode([text]).expand(2)
        host.predict(a.sqrt() * latents + (1 - a).sqrt() * noise, torch.full((2,), round(0.4 * 999)), prompts)
    assert set(maps) == set(recording.layers)
    for name, map in maps.items():
        assert torch.allclose(recording.map(name).flatten(2, 3), map, atol=1e-5)
    pictures, masks, _ = visualize(recording, cats, ViewConfig(words="cat", view="side_by_side"))
    assert len(pictures) == len(masks) == 2


def test_looking_is_repeatable_and_the_mean_of_its_passes(host, cats):
    both = record_pictures(host, cats, "a cat", FromImageConfig(num_samples=3), RecordingConfig(granularity="steps"))
    again = record_pictures(host, cats, "a cat", FromImageConfig(num_samples=3), RecordingConfig(granularity="steps"))
    assert len(both.frames) == 3
    for name in both.layers:
        assert torch.equal(both.map(name), again.map(name))
        assert torch.allclose(torch.stack([both.map(name, i) for i in range(3)]).mean(0), both.map(name), atol=1e-6)


def test_more_attention_goes_to_what_is_in_the_picture(host, cats):
    """The word of the picture's thing lights the thing up more than its surroundings."""
    recording = record_pictures(host, cats, "an emoji of a cat", FromImageConfig(num_samples=4))
    heat = word_heat_maps(recording, ["cat"], *cats.shape[1:3])[0]
    thing = (cats - cats[:, :1, :1]).abs().amax(-1) > 0.1  # whatever differs from the corner's colour
    assert heat[thing].mean() > heat[~thing].mean()


def test_looking_leaves_the_model_as_it_was(host, loaded, cats, sample):
    before = sample(loaded[0], "a cat")
    with pytest.raises(ForgetError, match="connect the checkpoint's VAE"):
        from fmn_core.hosts.comfy.model import ComfyHost

        record_pictures(ComfyHost(*loaded[:2]), cats, "a cat")
    record_pictures(host, cats, "a cat", FromImageConfig(num_samples=1))
    assert torch.equal(sample(loaded[0], "a cat"), before)
