"""Recordings of prompts that a graph puts together: areas, masks, several texts, hooks, conditionings."""

from __future__ import annotations

import pytest
import torch
from spy import PROMPT, Spy, assert_same, positive

from fmn_core.attention.visualize import visualize
from fmn_core.errors import ForgetError

LONG = "a house and a tree " * 20  # two chunks of 75 tokens


def test_an_embedding_in_the_prompt(record, run, encode, loaded, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"emb_params": torch.randn(3, 112)}, tmp_path / "mine.safetensors")
    clip = loaded[1]
    monkeypatch.setattr(clip.tokenizer.clip_l, "embedding_directory", [str(tmp_path)])
    spy = Spy(loaded[0], positive)
    watched, recording = record("a photo of embedding:mine", model=spy.model)
    run(watched, encode("a photo of embedding:mine"))
    assert_same(recording, spy, 77)
    assert [token.kind for token in recording.tokens[:8]] == ["start", *["word"] * 6, "end"]


def test_areas_lie_where_they_are_in_the_picture(record, run, encode, loaded):
    """Two positive prompts on parts of the picture, as regional prompting makes them."""
    parts = [("a house", (8, 4, 0, 0)), (PROMPT, (4, 8, 4, 4))]
    conditioning = [entry for text, area in parts for entry in encode(text, area=area, strength=1.0)]
    spy = Spy(loaded[0], lambda extra: [i for i in positive(extra) if extra["original_shape"][-2:] == [4, 8]])
    watched, recording = record(model=spy.model)
    assert torch.equal(run(watched, conditioning, size=(8, 12)), run(loaded[0], conditioning, size=(8, 12)))
    map = recording.map("input_blocks.1.1.transformer_blocks.0.attn2").mean(1)
    expected = spy.mean("input_blocks.1.1.transformer_blocks.0.attn2", 77)
    assert map.shape[1:3] == (8, 12)
    assert torch.allclose(map[:, 4:, 4:].flatten(1, 2).double(), expected, atol=1e-5)
    assert not map[:, :4].any() and not map[:, :, :4].any()
    mass = recording.mass()
    assert torch.allclose(mass.sum(-1), torch.ones(len(mass)), atol=1e-5)


def test_one_prompt_in_two_areas_has_a_map_of_both(record, run, encode):
    conditioning = [*encode(PROMPT, area=(8, 4, 0, 0), strength=1.0), *encode(PROMPT, area=(8, 4, 0, 8), strength=1.0)]
    watched, recording = record()
    run(watched, [*conditioning, *encode("a house")], size=(8, 12))
    sums = recording.map("input_blocks.1.1.transformer_blocks.0.attn2").mean(1).sum(-1)
    assert len(sums) == 2
    assert torch.allclose(sums[:, :, :4], torch.ones(2, 8, 4), atol=1e-5)
    assert torch.allclose(sums[:, :, 8:], torch.ones(2, 8, 4), atol=1e-5) and not sums[:, :, 4:8].any()


def test_masks_and_several_prompts(record, run, encode, loaded):
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    conditioning = [*encode(PROMPT, mask=mask, mask_strength=1.0), *encode("a house", mask=1 - mask, mask_strength=1.0)]
    first, one = record()
    both, other = record("a house", model=first)  # a recording of each prompt, chained
    assert torch.equal(run(both, conditioning), run(loaded[0], conditioning))
    for recording in (one, other):
        assert len(recording.layers) == 10
        for name in recording.layers:
            map = recording.map(name)
            assert len(map) == 2 and torch.allclose(map.sum(-1), torch.ones(map.shape[:-1]), atol=1e-5)
    assert not torch.allclose(one.mass(), other.mass(), atol=1e-3)


def test_hooks_on_the_conditioning(comfy, record, run, encode, loaded):
    """A LoRA on the positive prompt alone: the maps are those of the model with it."""
    import comfy.hooks

    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    width = loaded[0].model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_k.weight.shape
    lora = {f"{key}.lora_up.weight": torch.randn(width[0], 2), f"{key}.lora_down.weight": torch.randn(2, width[1])}
    with torch.inference_mode():
        hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
        hooked = comfy.hooks.set_hooks_for_conditioning(encode(PROMPT), hooks)
    spy = Spy(loaded[0], positive)
    watched, recording = record(model=spy.model)
    assert torch.equal(run(watched, hooked), run(loaded[0], hooked))
    assert_same(recording, spy, 77)
    plain, without = record()
    run(plain, encode(PROMPT))
    name = "input_blocks.1.1.transformer_blocks.0.attn2"
    assert (recording.map(name) - without.map(name)).abs().max() > 0.01


def test_a_conditioning_instead_of_the_text(comfy, record, run, encode, loaded):
    """What ConditioningConcat makes: the words of the text come first."""
    joined = [[torch.cat([encode(PROMPT)[0][0], encode("a house")[0][0]], 1), encode(PROMPT)[0][1]]]
    spy = Spy(loaded[0], positive)
    watched, recording = record(conditioning=joined, model=spy.model)
    run(watched, joined)
    assert_same(recording, spy, 154)
    assert visualize(recording, torch.zeros(2, 64, 64, 3))[1].shape[0] == 2 * len({"a", "neon", "drawing", "of", "cat"})
    with pytest.raises(ForgetError, match="has 77 columns and the text 154"):
        record(LONG, conditioning=encode(PROMPT))


def test_of_combined_prompts_the_texts_own_is_recorded(record, run, encode, loaded):
    combined = [*encode("a house"), *encode(PROMPT), *encode(LONG)]
    watched, recording = record(conditioning=combined)
    assert torch.equal(run(watched, combined), run(loaded[0], combined))
    alone, only = record()
    run(alone, combined)
    assert all(torch.equal(recording.map(name), only.map(name)) for name in only.layers)


def test_a_guider_of_three_prompts(comfy, record, encode, loaded):
    """DualCFGGuider asks in another order: negative, middle, positive."""
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    spy = Spy(loaded[0], lambda extra: [i for i, kind in enumerate(extra["cond_or_uncond"]) if kind == 2])
    watched, recording = record(model=spy.model)

    def draw(model):
        guider = Guider_DualCFG(model)
        guider.set_conds(encode(PROMPT), encode("a house"), encode(""))
        guider.set_cfg(3.0, 2.0)
        latent = torch.zeros(1, 4, 8, 8)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        return guider.sample(
            torch.ones_like(latent), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True
        )

    with torch.inference_mode():
        assert torch.equal(draw(watched), draw(loaded[0]))
    assert_same(recording, spy, 77)


def test_tiles_of_which_nobody_says_where_they_are_are_left_out(record, run, encode, loaded):
    """As tiled diffusion runs them, in a wrapper of the model's function."""

    def tiles(apply, given):
        x, t, c = given["input"], given["timestep"], given["c"]
        return torch.cat([apply(part, t, **c) for part in x.split(4, dim=2)], 2)

    tiled = loaded[0].clone()
    tiled.set_model_unet_function_wrapper(tiles)
    watched, recording = record(model=tiled)
    assert torch.equal(run(watched, encode(PROMPT)), run(tiled, encode(PROMPT)))
    assert not recording.layers


@pytest.mark.parametrize("size", [(13, 17), (9, 30), (16, 22)])
def test_areas_of_any_size_keep_every_layer(record, run, encode, size):
    """Two areas of one prompt that no halving divides: every layer has its place for both."""
    half = size[1] // 2
    parts = [(size[0], half, 0, 0), (size[0], size[1] - half, 0, half)]
    conditioning = [entry for area in parts for entry in encode(PROMPT, area=area, strength=1.0)]
    watched, recording = record()
    run(watched, conditioning, size=size, steps=2)
    for name in recording.layers:
        frame, (_, _, height, width) = recording.frames[0], recording.sizes[name]
        assert frame.counts[name].shape == (height, width) and (frame.counts[name] >= 2).float().mean() > 0.6


@pytest.mark.parametrize("other", [LONG, "a neon drawing of a dog"])
def test_another_text_than_the_samplers_is_said_and_spoils_no_picture(record, sample, loaded, other):
    watched, recording = record()
    assert torch.equal(sample(watched, other), sample(loaded[0], other))
    with pytest.raises(ForgetError, match="give it the same text and CLIP"):
        visualize(recording, torch.zeros(2, 64, 64, 3))
