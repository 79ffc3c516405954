"""Recording in the real ComfyUI: the same picture, and the maps that the layers' own queries and keys give."""

from __future__ import annotations

import pytest
import torch
from spy import PROMPT, Spy, assert_same, positive

from benchmarks.architectures import narrow_model, randomize
from benchmarks.live_tensors import LiveTensors

LONG = "a house and a tree " * 20  # two chunks of 75 tokens
LONGER = "a house and a tree " * 36  # three
SAMPLERS = "euler euler_ancestral heun dpm_2 dpmpp_2m dpmpp_2m_sde dpmpp_sde lms ddim uni_pc lcm ipndm".split()


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
