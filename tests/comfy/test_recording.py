"""Recording in the real ComfyUI: the same picture, and the maps that the layers' own queries and keys give."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from einops import rearrange

from benchmarks.architectures import narrow_model, randomize
from benchmarks.live_tensors import LiveTensors
from fmn_core.attention.recorder import AttentionRecording
from fmn_core.attention.visualize import visualize
from fmn_core.errors import ForgetError

PROMPT = "a neon drawing of a cat"
LONG = "a house and a tree " * 20  # two chunks of 75 tokens
LONGER = "a house and a tree " * 36  # three
SAMPLERS = "euler euler_ancestral heun dpm_2 dpmpp_2m dpmpp_2m_sde dpmpp_sde lms ddim uni_pc lcm ipndm".split()


class Spy:
    """The stock attention in the layers' place, which keeps softmax(Q K^T / sqrt(d)) of one chunk of every forward, in
    double precision: what any recording must be the mean of."""

    def __init__(self, model, chunk):
        from comfy.ldm.modules.attention import optimized_attention

        self.model, self.chunk, self.maps = model.clone(), chunk, defaultdict(list)
        for name, _ in model.model.diffusion_model.named_modules():
            if name.endswith("attn2"):
                part, number, *_, index = name.removesuffix(".attn2").split(".")
                place = (part.split("_")[0], 0 if part == "middle_block" else int(number), int(index))

                def replace(q, k, v, extra, name=name):
                    self.keep(name, q, k, extra)
                    return optimized_attention(q, k, v, extra["n_heads"])

                self.model.set_model_attn2_replace(replace, *place)

    def keep(self, name, q, k, extra):
        for i in self.chunk(extra):
            rows = slice(i * len(q) // len(extra["cond_or_uncond"]), (i + 1) * len(q) // len(extra["cond_or_uncond"]))
            split = [rearrange(x[rows].double(), "b n (h d) -> b h n d", h=extra["n_heads"]) for x in (q, k)]
            scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
            self.maps[name].append((scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(1))

    def mean(self, name, columns):
        """The mean map [B, N, T], of a prompt that may have been repeated to a common length."""
        total = torch.stack(self.maps[name]).mean(0)
        return total.unflatten(-1, (-1, columns)).sum(-2)


def positive(extra):
    return [i for i, kind in enumerate(extra["cond_or_uncond"]) if kind == 0]


def assert_same(recording: AttentionRecording, spy: Spy, columns: int):
    """The recorded maps are the spy's to 1e-5, and their columns sum to 1."""
    assert set(recording.layers) == set(spy.maps) and recording.layers
    for name in recording.layers:
        map = rearrange(recording.map(name).mean(1), "b h w t -> b (h w) t")
        assert torch.allclose(map.sum(-1), torch.ones(map.shape[:-1]), atol=1e-5)
        assert (map.double() - spy.mean(name, columns)).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_picture_is_bit_identical_with_every_sampler(record, run, encode, loaded, sampler):
    watched, recording = record()
    positive = encode(PROMPT)
    assert torch.equal(run(watched, positive, sampler=sampler), run(loaded[0], positive, sampler=sampler))
    assert len(recording.layers) == 10


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_maps_are_the_layers_own(record, run, encode, loaded, cfg, size, batch):
    spy = Spy(loaded[0], positive)
    watched, recording = record(model=spy.model)
    run(watched, encode(PROMPT), cfg=cfg, size=size, batch=batch)
    assert_same(recording, spy, 77)
    assert recording.sizes["input_blocks.1.1.transformer_blocks.0.attn2"] == (batch, 4, *size)


@pytest.mark.parametrize("text", [PROMPT, LONG, LONGER, "", "(neon:1.4) [cat] ((dog))"])
@pytest.mark.parametrize("negative", ["", LONG, LONGER])
def test_prompts_of_unequal_length(record, run, encode, loaded, text, negative):
    spy = Spy(loaded[0], positive)
    watched, recording = record(text, model=spy.model)
    plain = run(loaded[0], encode(text), encode(negative), steps=2, batch=1)
    assert torch.equal(run(watched, encode(text), encode(negative), steps=2, batch=1), plain)
    columns = encode(text)[0][0].shape[1]
    assert columns == len(recording.tokens)
    assert_same(recording, spy, columns)


def test_conditions_that_run_one_by_one(comfy, record, run, encode, loaded, monkeypatch):
    """As where memory is short: the host then runs each condition in a forward of its own."""
    spy = Spy(loaded[0], positive)
    kinds = []
    look = spy.chunk
    spy.chunk = lambda extra: kinds.append(tuple(extra["cond_or_uncond"])) or look(extra)
    watched, recording = record(model=spy.model)

    def none_free(device=None, torch_free_too=False):
        return (0, 0) if torch_free_too else 0

    monkeypatch.setattr(comfy.model_management, "get_free_memory", none_free)
    run(watched, encode(PROMPT))
    assert set(kinds) == {(0,), (1,)}
    assert_same(recording, spy, 77)


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


def test_a_controlnet_beside_it(comfy, record, run, encode, loaded):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {
        k: v
        for k, v in loaded[0].model.model_config.unet_config.items()
        if k not in ("out_channels", "image_size", "use_spatial_transformer", "legacy")
    }
    net = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, image_size=8, use_spatial_transformer=True, legacy=False,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip

    randomize(net)
    control = comfy.controlnet.ControlNet(net.eval(), load_device=torch.device("cpu"))
    control.set_cond_hint(torch.rand(2, 3, 64, 64), 1.0)
    conditioning = encode(PROMPT, control=control, control_apply_to_uncond=True)
    spy = Spy(loaded[0], positive)
    watched, recording = record(model=spy.model)
    controlled = run(watched, conditioning)
    assert torch.equal(controlled, run(loaded[0], conditioning))
    assert not torch.equal(controlled, run(loaded[0], encode(PROMPT)))
    assert_same(recording, spy, 77)


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
    assert len(calls) == 2 * count and len(recording.layers) == 10
    later = watched.clone()
    later.set_model_attn2_replace(replacement, "output", 1)
    sample(later, PROMPT)
    assert len(recording.layers) == 10


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
    assert {size[2:] for size in recording.sizes.values()} >= {(8, 8), (3, 3)}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2_v", "sdxl"])
def test_every_architecture(comfy, family):
    """Narrow copies of SD1, SD2 and SDXL in the host's own classes, with their 16 or 70 layers."""
    from fmn_core.hosts.comfy.attention import record_attention

    model, clip = narrow_model(family)
    spy = Spy(model, positive)
    watched, recording = record_attention(spy.model, clip, PROMPT)
    with torch.inference_mode():
        asked, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))
        latent = torch.zeros(1, 4, 8, 12)
        arguments = (comfy.sample.prepare_noise(latent, 1), 1, 3.0, "euler", "normal", asked, empty, latent)
        expected = comfy.sample.sample(model, *arguments, seed=1, disable_pbar=True)
        assert torch.equal(comfy.sample.sample(watched, *arguments, seed=1, disable_pbar=True), expected)
    assert len(recording.layers) == (70 if family == "sdxl" else 16)
    assert_same(recording, spy, 77)


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


def test_a_new_sampling_starts_a_new_recording(record, sample):
    watched, recording = record()
    sample(watched, PROMPT, seed=5)
    first = recording.mass()
    sample(watched, PROMPT, seed=6)
    assert not torch.equal(recording.mass(), first)
    sample(watched, PROMPT, seed=5)
    assert torch.equal(recording.mass(), first)


def test_steps_apart_have_the_mean_of_all(record, sample):
    watched, mean = record(granularity="mean")
    sample(watched, PROMPT, steps=6)
    watched, apart = record(granularity="steps")
    sample(watched, PROMPT, steps=6)
    assert [(frame.first, frame.last) for frame in apart.frames] == [(i, i) for i in range(6)]
    for name in mean.layers:
        assert torch.allclose(apart.map(name), mean.map(name), atol=1e-6)
        assert torch.allclose(torch.stack([apart.map(name, i) for i in range(6)]).mean(0), mean.map(name), atol=1e-6)


def test_heads_apart_have_the_mean_of_all(record, sample):
    watched, mean = record(granularity="mean")
    sample(watched, PROMPT)
    watched, apart = record(granularity="heads")
    sample(watched, PROMPT)
    for name in mean.layers:
        assert apart.map(name).shape[1] == 4
        assert torch.allclose(apart.map(name).mean(1, keepdim=True), mean.map(name), atol=1e-6)


@pytest.mark.parametrize("span, steps", [((0.0, 1.0), {0, 1, 2, 3, 4, 5}), ((0.0, 0.3), {0, 1}), ((0.7, 1.0), {4, 5})])
def test_a_part_of_the_sampling(record, sample, loaded, span, steps):
    watched, recording = record(granularity="steps", start_percent=span[0], end_percent=span[1])
    assert torch.equal(sample(watched, PROMPT, steps=6), sample(loaded[0], PROMPT, steps=6))
    assert {frame.first for frame in recording.frames} == steps


@pytest.mark.parametrize("place, count", [("down", 3), ("mid", 1), ("up", 6)])
def test_some_of_the_layers(record, sample, place, count):
    watched, recording = record(layers=place)
    sample(watched, PROMPT)
    assert len(recording.layers) == count


@pytest.mark.parametrize("granularity", ["mean", "steps", "heads"])
def test_memory_is_kept_within_its_bound(record, run, encode, loaded, granularity):
    """By making maps coarser, whose columns still sum to 1 and which are the fine ones' means."""
    positive = encode(PROMPT)
    fine, full = record(granularity=granularity)
    run(fine, positive, size=(24, 28), steps=2)
    watched, recording = record(granularity=granularity, max_memory_mb=1)
    arguments = {"size": (24, 28), "steps": 2}
    with LiveTensors() as without:
        run(loaded[0], positive, **arguments)
    with LiveTensors() as live:
        run(watched, positive, **arguments)
    assert live.peak - without.peak <= 2**20
    assert torch.equal(run(watched, positive, **arguments), run(loaded[0], positive, **arguments))
    assert recording.bytes() <= 2**20 < full.bytes()
    assert len(recording.layers) == 10
    for name in recording.layers:
        map, wanted = (one.map(name).mean(1, keepdim=True) for one in (recording, full))
        assert torch.allclose(map.sum(-1), torch.ones(map.shape[:-1]), atol=1e-5)
        side = recording.halved.get(name, 1)
        coarse = torch.nn.functional.avg_pool2d(
            wanted.flatten(0, 1).movedim(-1, 1), side, ceil_mode=True, count_include_pad=False
        )
        assert torch.allclose(map.flatten(0, 1).movedim(-1, 1), coarse, atol=1e-5)


def test_training_on_a_watched_model_records_nothing(record, loaded):
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.hosts.comfy.model import ComfyHost

    watched, recording = record("a photo of cat")
    forget(ComfyHost(watched, *loaded[1:]), "cat", make_config(preset="paper", steps=2, num_images=1, num_inference_steps=2))
    assert not recording.layers


def test_the_watched_model_is_a_clone(record, loaded):
    watched, _ = record()
    assert watched is not loaded[0] and not loaded[0].model_options["transformer_options"].get("patches")
    assert not loaded[0].wrappers and not loaded[0].callbacks


def test_an_interrupted_sampling_leaves_no_watch(record, run, encode, loaded):
    """The next sampling of the plain model is the same, and of the watched one records as if nothing had been."""
    watched, recording = record()
    broken = watched.clone()

    def stop(h, transformer_options):
        raise RuntimeError("stopped")

    broken.set_model_input_block_patch(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run(broken, encode(PROMPT))
    before = run(loaded[0], encode(PROMPT))
    assert torch.equal(run(watched, encode(PROMPT)), before) and len(recording.layers) == 10
