"""Learning words that call for what pictures show, in the real hosts, and the file that holds them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from demo.classifier import Classifier
from fmn_core.errors import ForgetError
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.embedding import save_embedding
from fmn_core.inversion.textual_inversion import (
    Inversion,
    error_weight,
    first_vectors,
    invert,
    invert_pictures,
    linear_decoder,
)
from fmn_core.lora.layers import CrossAttentionLoRA
from fmn_core.training.loop import TrainingRun
from fmn_core.training.sampling import sample_ddim

QUICK = InversionConfig(steps=3, num_images=2, num_inference_steps=3, learning_rate=1e-2)


def learn(host, latents, config, mask=None, images=None):
    return invert(TrainingRun(host, config, images=images, mask=mask), latents)


@pytest.fixture
def latents(host):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def weights(host):
    modules = (host.base, host.clip.cond_stage_model)
    return [(p, bits(p), p.is_inference()) for module in modules for p in module.parameters()]


def bits(parameter):
    """Not its values: what a checkpoint leaves out of a text encoder may be NaN, which equals nothing."""
    return parameter.detach().cpu().numpy().tobytes()


def assert_untouched(host, before):
    modules = (host.base, host.clip.cond_stage_model)
    after = [p for module in modules for p in module.parameters()]
    for (parameter, values, inference), now in zip(before, after, strict=True):
        assert now is parameter and bits(now) == values and now.grad is None and now.is_inference() == inference
    assert not any(m._forward_hooks or m._forward_pre_hooks for module in modules for m in module.modules())


def test_learned_words_call_for_what_the_pictures_show(host, cats):
    """From the word for another thing, in the prompt they were learned in and in another."""
    settings = InversionConfig(init_tokens="house", steps=50, learning_rate=2e-2)
    inversion = invert_pictures(host, settings, images=cats)
    assert inversion.after < 0.6 * inversion.before and not inversion.warnings
    noise = torch.randn(4, *host.latent_shape(), generator=torch.Generator().manual_seed(9))
    with host.training(noise.shape, text=True), torch.no_grad():
        prompts = [host.encode_with_embeddings(template, inversion.vectors) for template in ("a photo of {}", "a {}")]
        parts = [
            sample_ddim(host, x, p[[0, 0]], host.encode(["", ""]), steps=10, guidance=3.0)
            for p, x in zip(prompts, noise.split(2), strict=True)
        ]
    assert Classifier.load().accuracy(host.decode(torch.cat(parts)), "cat") >= 0.75


def test_the_model_is_left_as_it_was(host, latents):
    before = weights(host)
    one, again = (learn(host, latents, QUICK) for _ in range(2))
    assert_untouched(host, before)
    assert len(one.losses) == 3 and one.vectors.keys() == {"clip_l"} and one.vectors["clip_l"].shape[0] == 2
    assert torch.equal(one.vectors["clip_l"], again.vectors["clip_l"]) and one.losses == again.losses
    other = learn(host, latents, replace(QUICK, seed=1))
    assert not torch.equal(one.vectors["clip_l"], other.vectors["clip_l"])


class Stop(BaseException):
    """As the host's interrupt is one since ComfyUI 0.20."""


def test_an_interrupt_leaves_the_model_as_it_was(host, latents, monkeypatch):
    before, seen = weights(host), []

    def show(step, total, preview):
        seen.append(step)
        if step == 2:
            raise Stop

    monkeypatch.setattr(host, "show_progress", show)
    with pytest.raises(Stop):
        learn(host, latents, QUICK)
    assert seen == [1, 2]
    assert_untouched(host, before)


def test_init_tokens_are_words_noise_or_zero(host):
    norms = {"clip_l": torch.tensor(3.0)}
    make = lambda words, **other: first_vectors(  # noqa: E731
        host, InversionConfig(init_tokens=words, **other), norms, torch.Generator().manual_seed(0)
    )["clip_l"]
    several = make("cat|<zero>| <rand-1>|<rand-0.5>")
    assert torch.equal(several[:1], host.token_embeddings("cat")["clip_l"]) and not several[1].any()
    assert torch.allclose(several[2:].norm(dim=1), torch.tensor(3.0)), "noise starts where the decay takes it"
    free = make("<rand-1>|<rand-0.5>", norm_decay=False)
    assert free.std(1) == pytest.approx([1, 0.5], rel=0.3)
    for bad in ("sunflower seeds", "", "cat|", "<rand-x>"):
        with pytest.raises(ForgetError, match="and must be one"):
            make(bad)
    with pytest.raises(ForgetError, match="65 init tokens do not fit"):
        make("|".join(["a"] * 65))


def test_norms_are_drawn_to_those_of_words(host, latents):
    """From vectors ten times as long, with a step size of about nothing."""
    far = InversionConfig(init_tokens="<rand-1>", learning_rate=1e-7, steps=10, norm_decay=False)
    length = learn(host, latents, far).vectors["clip_l"].norm().item()
    word = host.token_embeddings("cat dog tree house")["clip_l"].norm(dim=1)
    assert length > 5 * word.max()
    drawn = learn(host, latents, replace(far, norm_decay=True)).vectors["clip_l"].norm().item()
    assert word.min() < drawn < word.max()


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(host, latents, monkeypatch):
    good = learn(host, latents, replace(QUICK, steps=1)).vectors["clip_l"]
    predict, calls = host.predict, []

    def broken_from(first):
        calls.clear()

        def broken(x_t, t, prompts):
            if torch.is_grad_enabled():
                calls.append(1)
            return predict(x_t, t, prompts) * (float("nan") if len(calls) >= first else 1)

        return broken

    monkeypatch.setattr(host, "predict", broken_from(3))
    stopped = learn(host, latents, QUICK)
    assert len(stopped.losses) == 2 and "diverged after step 2 of 3" in stopped.warnings[0]
    assert torch.allclose(stopped.vectors["clip_l"], good, atol=0.05) and stopped.vectors["clip_l"].isfinite().all()
    monkeypatch.setattr(host, "predict", broken_from(1))
    with pytest.raises(ForgetError, match="not finite at step 1"):
        learn(host, latents, QUICK)


def test_it_runs_on_a_patched_model_and_leaves_the_patch_alone(host, latents):
    """As recovery by inversion does: with hooks on the projections, whose parameters would gather gradients."""
    before, plain = weights(host), learn(host, latents, QUICK)
    lora = CrossAttentionLoRA(host.cross_attentions(), ("to_k", "to_v"), 2, torch.Generator().manual_seed(0))
    for parameter in lora.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    state = copy.deepcopy(lora.state_dict())
    with lora.attached():
        patched = learn(host, latents, QUICK)
    assert not torch.allclose(patched.vectors["clip_l"], plain.vectors["clip_l"], atol=1e-4)
    assert all(parameter.grad is None for parameter in lora.parameters())
    assert all(torch.equal(value, state[name]) for name, value in lora.state_dict().items())
    assert_untouched(host, before)


def test_it_runs_on_a_model_with_a_lora_of_the_hosts(host, loaded, latents):
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.model import ComfyHost

    patch, _ = forget(host, "cat", make_config(preset="fast"))
    settings = replace(QUICK, init_tokens="cat")
    plain = learn(host, latents, settings)
    patched = learn(ComfyHost(apply_patch(loaded[0], patch, 1.0), *loaded[1:]), latents, settings)
    assert patched.before != pytest.approx(plain.before, rel=1e-4)
    again = learn(host, latents, settings)
    assert torch.allclose(again.vectors["clip_l"], plain.vectors["clip_l"], atol=1e-5)


def test_two_text_encoders_learn_together(xl_pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    host = DiffusersHost(xl_pipeline, progress_bar=False)
    inversion = invert_pictures(host, replace(QUICK, init_tokens="cat|dog|<zero>"), concept="a cat")
    assert {name: tuple(v.shape) for name, v in inversion.vectors.items()} == {"clip_l": (3, 16), "clip_g": (3, 24)}
    first = host.token_embeddings("cat dog")
    assert all(not torch.equal(v[:2], first[name]) for name, v in inversion.vectors.items())


def test_pictures_are_mirrored_with_their_masks(host, monkeypatch):
    images, mask = torch.rand(2, 128, 128, 3), torch.zeros(1, 128, 128)
    mask[:, :, :64] = 1
    seen = {}

    def look(run, latents):
        seen.update(mask=run.mask, pictures=run.images)
        return Inversion({}, [], 0.0, 0.0)

    monkeypatch.setattr("fmn_core.inversion.textual_inversion.invert", look)
    invert_pictures(host, QUICK, images=images, mask=mask)
    assert torch.equal(seen["pictures"], torch.cat([images, images.flip(2)]))
    assert seen["mask"].shape == (4, 128, 128)
    assert seen["mask"][:2, :, :64].all() and seen["mask"][2:, :, 64:].all() and seen["mask"].mean() == 0.5
    invert_pictures(host, replace(QUICK, horizontal_flip=False), images=images, mask=mask)
    assert torch.equal(seen["pictures"], images)
    with pytest.raises(ForgetError, match="resize the mask"):
        invert_pictures(host, QUICK, images=images, mask=mask[:, 1:])
    with pytest.raises(ForgetError, match="The concept is empty"):
        invert_pictures(host, QUICK)


def test_a_mask_weights_the_error(host, latents):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    weight = error_weight(mask, latents)
    assert weight.shape == (1, 1, 8, 8) and weight.mean().item() == pytest.approx(1)
    assert weight[..., 0, 0] == pytest.approx(21 * weight[..., 0, 7].item())
    masked, plain = learn(host, latents, QUICK, mask), learn(host, latents, QUICK)
    assert not torch.allclose(masked.vectors["clip_l"], plain.vectors["clip_l"], atol=1e-4)


def test_latents_that_are_no_numbers_get_a_sentence(host, cats):
    with pytest.raises(ForgetError, match="latents are not finite"):
        learn(host, host.encode_images(cats) * float("nan"), QUICK, images=cats)


def test_previews_show_the_pictures(host, cats, monkeypatch):
    latents = host.encode_images(cats)
    shown = linear_decoder(latents, cats)(latents[:1])
    assert shown.shape == cats[0].shape and (shown - cats[0]).abs().mean() < 0.5 * (cats[0] - cats[0].mean()).abs().mean()
    previews = []
    monkeypatch.setattr(host, "shows_previews", lambda: True)
    monkeypatch.setattr(host, "show_progress", lambda step, total, preview: previews.append(preview))
    invert_pictures(host, QUICK, images=cats)
    assert len(previews) == 3 and previews[0] is not None and previews[-1] is not None
    assert all(0 <= preview.min() and preview.max() <= 1 for preview in previews if preview is not None)


@pytest.fixture(scope="module")
def xl_clip(comfy):
    """ComfyUI's own CLIP of SDXL in small widths, together those of the demo model's context; random weights."""
    import comfy.sdxl_clip
    import comfy.supported_models_base

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    widths = {"clip_l_model_config": {"hidden_size": 48, **sizes}, "clip_g_model_config": {"hidden_size": 64, **sizes}}
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    clip = comfy.sd.CLIP(target, model_options=widths)
    generator = torch.Generator().manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        parameter.data.normal_(generator=generator).mul_(0.1)
    return clip


def test_comfyuis_two_text_encoders_learn_and_read_together(loaded, xl_clip, latents, tmp_path, monkeypatch):
    from fmn_core.hosts.comfy.model import ComfyHost

    host = ComfyHost(loaded[0], xl_clip)
    word = host.token_embeddings("cat")
    with host.training((1, 4, 8, 8), text=True), torch.no_grad():
        prompt, expected = host.encode_with_embeddings("a photo of a {}", word), host.encode(["a photo of a cat"])
    assert torch.equal(prompt.prompt_embeds, expected.prompt_embeds) and torch.equal(
        prompt.pooled_prompt_embeds, expected.pooled_prompt_embeds
    )
    inversion = learn(host, latents, replace(QUICK, init_tokens="cat|dog"))
    assert {name: tuple(v.shape) for name, v in inversion.vectors.items()} == {"clip_g": (2, 64), "clip_l": (2, 48)}
    assert all((v[0] != word[name][0]).any() for name, v in inversion.vectors.items())
    save_embedding(inversion.vectors, tmp_path / "xl.safetensors", {})
    for tokenizer in (xl_clip.tokenizer.clip_l, xl_clip.tokenizer.clip_g):
        monkeypatch.setattr(tokenizer, "embedding_directory", [str(tmp_path)])
    assert all(torch.equal(v, inversion.vectors[name]) for name, v in host.token_embeddings("embedding:xl").items())
