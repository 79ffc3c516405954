"""Recording attention in a webui's process: run by tests/webui/test_webui_hosts.py, once in each flavour."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange
from modules import shared
from webui_fixtures import FORGE

from fmn_core.attention.capture import attention_probabilities
from fmn_core.hosts.webui import attention as webui_attention
from fmn_core.hosts.webui.attention import record_attention

LONG = "a cat and " + "a rose, " * 30


class Recorded:
    """What the recorder gave to its recording, forward by forward."""

    def __init__(self, text, tokens):
        self.text, self.tokens, self.maps = text, tokens, []

    def begin(self, *who):
        self.maps.clear()

    def add(self, layer, q, k, heads, size, *, step, columns):
        maps = attention_probabilities(q, k, heads)[..., :columns]
        assert maps.shape[2] == math.prod(size) and step >= 0
        self.maps.append((layer, maps.clone(), size))


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(webui_attention, "AttentionRecording", Recorded)


@pytest.fixture
def record(draw):
    """record(text, prompt, ...) -> pictures drawn while recording, and the recording of each sampling."""

    def record(text, prompt, **options):
        recordings = []

        def begin(p):
            for _, end in recordings:
                end()
            recordings.append(record_attention(p, text))

        pictures = draw(prompt, each=begin, **options)
        for _, end in recordings:
            end()
        return pictures, [recording for recording, _ in recordings]

    return record


@pytest.fixture
def seen(webui):
    """Layer -> (x, context) of each of its forwards, as the attention gets them."""
    forwards = {name: [] for name in webui.cross_attentions()}
    hooks = []

    def watch(name):
        def hook(module, args, kwargs):
            forwards[name].append((args[0].clone(), kwargs["context"].clone()))

        return hook

    for name, layer in webui.cross_attentions().items():
        hooks.append(layer.module.register_forward_pre_hook(watch(name), with_kwargs=True))
    yield forwards
    for hook in hooks:
        hook.remove()


def probabilities(layer, x, context):
    q, k = (rearrange(t, "b n (h d) -> b h n d", h=layer.heads) for t in (layer.module.to_q(x), layer.module.to_k(context)))
    return torch.einsum("bhnd,bhtd->bhnt", q / q.shape[-1] ** 0.5, k).softmax(-1)


@pytest.mark.parametrize("options", [
    {}, {"cfg_scale": 1.0}, {"batch_size": 2}, {"negative_prompt": LONG}, {"width": 128, "height": 64},
    {"enable_hr": True}, {"negative_prompt": "a cat"},
])  # fmt: skip
@pytest.mark.parametrize("prompt", ["a cat", LONG])
def test_the_picture_is_the_same_and_the_maps_are_the_layers_own(webui, draw, record, recorded, seen, prompt, options):
    plain = draw(prompt, **options)
    for forwards in seen.values():
        forwards.clear()
    pictures, recordings = record(prompt, prompt, **options)
    assert torch.equal(pictures, plain)
    batch, steps = options.get("batch_size", 1), 2
    assert len(recordings) == 1 + options.get("enable_hr", False)
    expected = {name: [] for name in seen}
    wanted = webui.conditioning(prompt)[0]
    for name, forwards in seen.items():
        for x, context in (one for one in forwards if one[1].shape[1] >= len(wanted)):
            # The host's own order: conditional rows first in the webui, last in Forge, or in a forward of their own.
            rows = [r for r in range(len(context)) if torch.allclose(context[r, : len(wanted)], wanted, atol=1e-4)]
            rows = (rows[-batch:] if FORGE else rows[:batch]) if rows else []
            if rows:
                maps = probabilities(webui.cross_attentions()[name], x[rows], context[rows])
                expected[name].append(maps if context.shape[1] % len(wanted) == 0 and FORGE else maps[..., : len(wanted)])
    for name in seen:
        maps = [m for recording in recordings for m in recording.maps if m[0] == name]
        assert len(maps) == len(expected[name]) >= steps
        for (_, got, (height, width)), want in zip(maps, expected[name], strict=True):
            assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
            assert width / height == options.get("width", 64) / options.get("height", 64)


@pytest.mark.skipif(FORGE, reason="Forge always does both at once")
def test_conditional_and_unconditional_in_a_forward_each(record, recorded, monkeypatch):
    _, (together,) = record("a cat", "a cat", negative_prompt="a dog")
    monkeypatch.setattr(shared.opts, "batch_cond_uncond", False)
    _, (apart,) = record("a cat", "a cat", negative_prompt="a dog")
    assert len(together.maps) == len(apart.maps) > 0
    for (layer, one, size), (again, two, same) in zip(together.maps, apart.maps, strict=True):
        assert (layer, size) == (again, same) and torch.allclose(one, two, atol=1e-3)


def test_of_a_batch_the_pictures_with_the_prompt_are_recorded(record, recorded):
    _, (recording,) = record("a cat", ["a dog", "a cat", LONG], batch_size=3, cfg_scale=1.0)
    assert {maps.shape[0] for _, maps, _ in recording.maps} == {1}
    _, (alone,) = record("a cat", "a cat", seed=2, cfg_scale=1.0)
    for (_, one, _), (_, two, _) in zip(recording.maps, alone.maps, strict=True):
        assert one.shape[2:3] == two.shape[2:3] and one.shape[3] == two.shape[3] == 77


def test_another_prompt_is_not_recorded(record, recorded):
    _, (recording,) = record("a cat", "a dog")
    assert recording.maps == []


def test_a_text_encoders_lora_does_not_hide_the_prompt(webui, record, recorded, monkeypatch):
    """The prompt is compared as this picture's text encoder encodes it."""
    table = webui.encoders[0][1].get_input_embeddings().wrapped
    hook = table.register_forward_hook(lambda module, args, output: output + 0.3)
    try:
        _, (recording,) = record("a cat", "a cat")
    finally:
        hook.remove()
    assert recording.maps


def test_the_recording_ends(webui, draw, recorded):
    """When it is told to, and by itself when the next job begins."""
    kept = []
    draw("a cat", each=lambda p: kept.append(record_attention(p, "a cat")))
    (recording, end), = kept  # fmt: skip
    count = len(recording.maps)
    assert count
    shared.state.begin("another")
    draw("a cat")
    assert len(recording.maps) == count
    hooks = [m for m in webui.unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    end()


def test_the_real_recording_holds_a_map_of_each_layer(webui, record):
    _, (recording,) = record("a cat", "a cat")
    assert set(recording.layers) == set(webui.cross_attentions())
    assert [token.text for token in recording.tokens if token.kind == "word"] == ["a</w>", "cat</w>"]
