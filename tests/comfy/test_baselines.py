"""Baselines and bases of the benchmarks on the demo model: they change what they say, and leave the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT

from benchmarks import baselines, bases
from benchmarks.ablation import PARTS
from benchmarks.baselines import applied, esd, forget_me_not, uce


@pytest.fixture(scope="module")
def demo_host(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.mark.parametrize(
    "method",
    [
        partial(forget_me_not, rate=1e-4, steps=2, pooler=pooler, whole=whole)
        for pooler, whole in ((True, False), (False, True))
    ]
    + [partial(esd, rate=1e-3, steps=2, full=full) for full in (False, True)]
    + [partial(uce, generic=generic, expand=generic) for generic in (False, True)],
)
def test_a_baseline_changes_what_its_keys_say_and_leaves_the_host(demo_host, method, monkeypatch):
    monkeypatch.setattr(baselines, "PICTURES", 1)
    before = parameters(demo_host)
    weights, size = method(demo_host, "object", ("cat",))
    assert all(torch.equal(before[name], one) for name, one in parameters(demo_host).items())
    everywhere = method.keywords.get("whole") or method.keywords.get("full")
    assert {".attn2." in name for name in weights} == ({True, False} if everywhere else {True})
    assert all(w.isfinite().all() for w in weights.values()) and any(w.any() for w in weights.values())
    assert size == 2 * sum(map(torch.numel, weights.values())) or method.func is esd
    with applied(demo_host, weights):
        assert all(torch.equal(parameters(demo_host)[name], before[name] + w) for name, w in weights.items())
    assert all(torch.equal(before[name], one) for name, one in parameters(demo_host).items())


def parameters(host):
    """Copies of the UNet's weights, by name, without what an earlier user had merged into them."""
    with host.training((1, *host.latent_shape())):
        return {name: one.detach().clone() for name, one in host.unet.named_parameters()}


def test_what_bases_are_made_of_leaves_the_model_and_what_looks_at_nothing_adds_nothing(demo_host, monkeypatch):
    monkeypatch.setattr(bases, "LORA_STEPS", 1)
    monkeypatch.setattr(bases, "TUNING_STEPS", 1)
    before, latents = parameters(demo_host), torch.randn(2, *demo_host.latent_shape())
    for train in (bases.user_lora, bases.tuned):
        assert any(change.any() for change in train(demo_host, latents, ["a cat", "a dog"]).values())
        assert all(torch.equal(before[name], one) for name, one in parameters(demo_host).items())
    adapter, features = bases.PictureAdapter(demo_host, 6), torch.randn(2, 6)
    looking = bases.WithPicture(demo_host, adapter, adapter.tokens(features))
    prompts, empty = demo_host.encode(["a cat"] * 2), demo_host.encode([""] * 2)
    with demo_host.training(latents.shape), torch.no_grad():
        t = torch.tensor([500, 500])
        assert torch.equal(looking.predict(latents, t, empty), demo_host.predict(latents, t, empty))
        assert not torch.allclose(looking.predict(latents, t, prompts), demo_host.predict(latents, t, prompts), atol=1e-3)


def test_the_quick_command_prints_a_table_in_which_fast_forgets_and_keeps(comfyui, tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.quality", "--quick", "--targets", "cat", "--methods", "fast", "UCE"]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "FMN_COMFYUI": str(comfyui)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    base, fast, uce = json.loads(file.read_text())
    assert (base["method"], fast["method"], uce["method"]) == ("base", "fast", "UCE")
    assert fast["ua"] >= 0.95 and fast["ira"] >= base["ira"] - 0.1 and fast["drift"] <= 0.01
    assert base["ua"] < 0.4 and base["drift"] == 0 and fast["base"]["ua"] == base["ua"]
    assert fast["h"] > uce["h"]


def test_a_part_taken_away_makes_another_patch(demo_host):
    whole, without = (PARTS[part](demo_host, "object", ("cat",))[0] for part in ("fast", "- later tokens"))
    assert whole.keys() == without.keys() and not any(torch.equal(whole[key], without[key]) for key in whole)
    again = PARTS["fast"](demo_host, "object", ("cat",))[0]
    assert all(torch.equal(whole[key], again[key]) for key in whole)
