"""Recording attention in the real host: the same picture, and the maps that the formula gives."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from fmn_core.attention import AttentionRecording, attention_probabilities, layer_size
from fmn_core.errors import ForgetError
from fmn_core.heatmap import COLOR_MAPS, colorize, find_phrase, overlay, visualize, words_of
from fmn_core.hosts.base import Token

PROMPT = "a neon drawing of a cat"


@pytest.fixture(scope="module")
def record(loaded):
    from fmn_core.hosts.comfy_attention import record_attention

    return lambda text=PROMPT, model=None: record_attention(model or loaded[0], loaded[1], text)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_probabilities_are_the_softmax(batch, heads, pixels, tokens, d, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, n, heads * d, generator=generator) for n in (pixels, tokens))
    A = attention_probabilities(q, k, heads)
    assert torch.allclose(A.sum(-1), torch.ones(batch, heads, pixels), atol=1e-5)
    for b in range(batch):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = (q[b, :, part].double() @ k[b, :, part].double().T) / d**0.5
            assert torch.allclose(A[b, h].double(), scores.exp() / scores.exp().sum(-1, keepdim=True), atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_layer_sizes_are_found_from_pixels(height, width, halvings):
    h, w = height, width
    for _ in range(halvings):
        h, w = -(-h // 2), -(-w // 2)
    assert layer_size(height, width, h * w) == (h, w)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_the_picture_is_bit_identical_and_columns_sum_to_one(record, loaded, sample, cfg, size):
    watched, recording = record()
    picture = sample(watched, PROMPT, cfg=cfg, size=size)
    assert torch.equal(picture, sample(loaded[0], PROMPT, cfg=cfg, size=size))
    assert set(recording.steps.values()) == {4} and len(recording.maps) == 10
    for map in recording.maps.values():
        assert map.shape[0] == 2 and map.shape[-1] == 77
        assert torch.allclose(map.sum(-1), torch.ones(map.shape[:-1]), atol=1e-5)
    heights = {tuple(map.shape[1:3]) for map in recording.maps.values()}
    assert heights == {layer_size(*size, n) for n in (size[0] * size[1], *(h * w for h, w in heights))}


def test_the_maps_are_those_of_the_conditional_rows(record, loaded, sample):
    """Against hooks on the host's own projections, with the positive prompt's rows taken by the sampler's list."""
    watched, recording = record()
    layers = {n: m for n, m in loaded[0].model.diffusion_model.named_modules() if n.endswith("attn2")}
    name, layer = next(iter(layers.items()))
    seen = {"q": [], "k": []}
    hooks = [
        getattr(layer, f"to_{m}").register_forward_hook(lambda mod, args, out, m=m: seen[m].append(out.detach().clone()))
        for m in seen
    ]
    sample(watched, PROMPT, negative="a rose", steps=3)
    for hook in hooks:
        hook.remove()
    # The recorder projects too, before the layer itself: every call comes as [recorder, host].
    maps = []
    for q, k in zip(seen["q"][1::2], seen["k"][1::2], strict=True):
        positive = slice(len(q) // 2, None)  # cond_or_uncond is [1, 0] when both run at once
        maps.append(attention_probabilities(q[positive], k[positive], layer.heads).mean(1))
    expected = rearrange(torch.stack(maps).mean(0), "b (h w) t -> b h w t", h=8)
    assert torch.allclose(recording.maps[name], expected, atol=1e-5)


def test_a_new_sampling_starts_a_new_recording(record, sample):
    watched, recording = record()
    sample(watched, PROMPT, seed=5)
    first = {name: map.clone() for name, map in recording.maps.items()}
    sample(watched, PROMPT, seed=6)
    assert set(recording.steps.values()) == {4}
    sample(watched, PROMPT, seed=5)
    assert all(torch.equal(recording.maps[name], first[name]) for name in first)


def test_prompts_tiled_to_a_common_length_come_back_to_their_own(record, sample):
    long = "a house and a tree " * 20
    watched, recording = record()
    alone, separate = record()
    sample(watched, PROMPT, negative=long, steps=1)
    sample(alone, PROMPT, steps=1)
    assert len(recording.maps) == 10
    for name, map in recording.maps.items():
        assert map.shape[-1] == 77 and torch.allclose(map, separate.maps[name], atol=1e-5)


@pytest.mark.parametrize("other", ["a house and a tree " * 20, "a neon drawing of a dog"])
def test_another_text_than_the_samplers_is_said_and_spoils_no_picture(record, sample, loaded, other):
    watched, recording = record()
    assert torch.equal(sample(watched, other), sample(loaded[0], other))
    with pytest.raises(ForgetError, match="give it the same text and CLIP"):
        visualize(recording, torch.zeros(2, 64, 64, 3), "cat", 0.0, 0.5, "inferno")


def test_only_the_recorded_text_is_recorded_among_several(comfy, record, loaded, sample):
    """Two positive prompts on parts of the picture, as regional prompting makes them, in any order."""
    _, clip, _ = loaded
    watched, recording = record()
    with torch.inference_mode():
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a house", PROMPT, "")]
        area = {"area": (8, 4, 0, 0), "strength": 1.0}
        both = [[prompts[0][0][0], {**prompts[0][0][1], **area}], *prompts[1]]
        noise = comfy.sample.prepare_noise(torch.zeros(2, 4, 8, 8), 1)

        def run(model):
            return comfy.sample.sample(
                model, noise, 3, 3.0, "euler", "normal", both, prompts[2], torch.zeros(2, 4, 8, 8), seed=1, disable_pbar=True
            )

        assert torch.equal(run(watched), run(loaded[0]))
    assert {map.shape[0] for map in recording.maps.values()} == {2}
    assert set(recording.steps.values()) == {3}


def test_layers_shrunk_by_another_pack_are_recorded(record, sample):
    """As Deep Shrink does: by factors that are no halvings."""
    watched, recording = record()

    def shrink(h, transformer_options):
        number = transformer_options["block"][1]
        return torch.nn.functional.interpolate(h, size=(6, 6)) if number == 1 else h

    def grow(h, skip, transformer_options):
        return torch.nn.functional.interpolate(h, size=skip.shape[2:]), skip

    watched.set_model_input_block_patch(shrink)
    watched.set_model_output_block_patch(grow)
    sample(watched, PROMPT)
    assert {tuple(map.shape[1:3]) for map in recording.maps.values()} >= {(8, 8), (3, 3)}


def test_a_recording_of_two_samplers_is_refused():
    recording = AttentionRecording("a cat", tokens("a</w>", "cat</w>"))
    for sampler in ("5", "6"):
        recording.begin("job", sampler)
        recording.add("x", torch.rand(1, 2, 4, 5), 2, 2)
    with pytest.raises(ForgetError, match="of its own for each sampler"):
        visualize(recording, torch.zeros(1, 8, 8, 3), "cat", 0.0, 0.5, "inferno")
    recording.begin("next job", "6")
    recording.add("x", torch.rand(1, 2, 4, 5), 2, 2)
    assert visualize(recording, torch.zeros(1, 8, 8, 3), "cat", 0.0, 0.5, "inferno")


def test_training_on_a_watched_model_records_nothing(record, loaded):
    from fmn_core.forget import forget
    from fmn_core.hosts.comfy import ComfyHost
    from fmn_core.settings import ForgetSettings

    watched, recording = record("a photo of cat")
    forget(ComfyHost(watched, *loaded[1:]), "cat", ForgetSettings(preset="paper", steps=2, num_pictures=1, sampling_steps=2))
    assert not recording.maps


def test_heat_maps_are_means_over_layers():
    recording = AttentionRecording("a cat", tokens("a</w>", "cat</w>"))
    for layer, side in (("x", 2), ("y", 4)):
        recording.add(layer, torch.rand(1, 2, side * side, 5), side, side)
    expected = sum(
        torch.nn.functional.interpolate(m.permute(0, 3, 1, 2), (8, 8), mode="bicubic").clamp(min=0)
        for m in recording.maps.values()
    )
    assert torch.allclose(recording.heat_maps([2, 1], 8, 8), expected[:, [2, 1]] / 2)


def test_patches_that_are_there_go_on_working(record, loaded, sample):
    """A replacement of the attention, as IPAdapter makes one, and another attn2 patch, on the same blocks."""
    from comfy.ldm.modules.attention import optimized_attention

    calls = []

    def replacement(q, k, v, extra):
        calls.append("replace")
        return optimized_attention(q, k, v * 0.5, extra["n_heads"])

    def patch(n, context, value, extra):
        calls.append("patch")
        return n, context, value

    model = loaded[0].clone()
    model.set_model_attn2_replace(replacement, "input", 1)
    model.set_model_attn2_patch(patch)
    expected = sample(model, PROMPT)
    count = len(calls)
    watched, recording = record(model=model)
    assert torch.equal(sample(watched, PROMPT), expected)
    assert len(calls) == 2 * count and len(recording.maps) == 10
    later = watched.clone()
    later.set_model_attn2_replace(replacement, "output", 1)
    recording.maps.clear()
    sample(later, PROMPT)
    assert len(recording.maps) == 10


def test_the_watched_model_is_a_clone(record, loaded):
    watched, _ = record()
    assert watched is not loaded[0] and not loaded[0].model_options["transformer_options"].get("patches")


def tokens(*pieces):
    words = (Token(5, piece, "word") for piece in pieces)
    return (Token(0, "<start>", "start"), *words, Token(1, "<end>", "end"), Token(1, "<end>", "padding"))


def test_pieces_of_words_are_merged_and_phrases_found():
    prompt = tokens("a</w>", "twe", "moji</w>", "of</w>", "a</w>", "red</w>", "cat</w>", ",</w>", "red</w>", "cat</w>")
    assert [word for word, _ in words_of(prompt)] == ["a", "twemoji", "of", "a", "red", "cat", ",", "red", "cat"]
    assert find_phrase(prompt, "Twemoji") == [2, 3]
    assert find_phrase(prompt, "red cat") == [6, 7, 9, 10]
    assert find_phrase(prompt, "cat, red") == [7, 8, 9]
    with pytest.raises(ForgetError, match="`dog` is not in the recorded prompt: its words are a, twemoji, of, red, cat"):
        find_phrase(prompt, "dog")


@pytest.mark.parametrize("text", ["ein süßer Löwe", "猫 と 家", "naïve café", "кот"])
def test_words_of_any_language_read_as_typed(loaded, text):
    from fmn_core.hosts.comfy import tokenize

    words = [word for word, _ in words_of(tokenize(loaded[1], text))]
    assert "".join(words) == text.lower().replace(" ", "")


def test_visualize(record, sample, loaded):
    watched, recording = record()
    latents = sample(watched, PROMPT)
    with torch.inference_mode():
        image = loaded[2].decode(latents)
    overlays, masks, maximum = visualize(recording, image, "cat\n neon, ", 0.0, 0.6, "inferno")
    assert overlays.shape == (4, 64, 64, 3) and masks.shape == (4, 64, 64)
    assert masks.max() == pytest.approx(1) and 0 < maximum < 1
    doubled = visualize(recording, image, "cat\n neon", maximum * 2, 0.6, "inferno")[1]
    assert torch.allclose(doubled, masks / 2, atol=1e-6)
    everything = visualize(recording, image, "", 0.0, 0.6, "viridis")[1]
    assert len(everything) == 2 * len({"a", "neon", "drawing", "of", "cat"})
    assert torch.allclose(visualize(recording, image, "cat", 0.0, 0.0, "magma")[0], image, atol=1e-6)
    with pytest.raises(ForgetError, match="is of 2 pictures"):
        visualize(recording, image[:1], "cat", 0.0, 0.6, "inferno")


def test_an_empty_recording_is_said():
    with pytest.raises(ForgetError, match="Nothing was recorded"):
        recording = AttentionRecording("a cat", tokens("a</w>", "cat</w>"))
        visualize(recording, torch.zeros(1, 8, 8, 3), "cat", 0.0, 0.5, "inferno")


@pytest.mark.parametrize("name", COLOR_MAPS)
def test_color_maps_grow_brighter(name):
    colors = colorize(torch.linspace(0, 1, 50), name)
    luminance = colors @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (luminance.diff() > 0).all()
    picture = torch.rand(4, 4, 3)
    assert torch.equal(overlay(picture, torch.rand(4, 4), 0.0, name), picture)
