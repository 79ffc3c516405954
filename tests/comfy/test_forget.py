"""Forgetting in the real host: what it does, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from fmn_core.attention.capture import attention_probabilities, attention_set_to_zero, capture_attention_maps
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.lora.layers import CrossAttentionLoRA
from fmn_core.patch.patch import fingerprint
from fmn_core.text.tokens import concept_mask
from fmn_core.training.losses import attention_resteering_loss
from fmn_core.training.noise import add_noise

PAPER = make_config(preset="paper")
QUICK = replace(PAPER, steps=4, num_images=2, num_inference_steps=3)


@pytest.fixture
def ordinary_parameters(comfy):
    from fmn_core.hosts.comfy.model import ordinary_parameters

    return ordinary_parameters


@pytest.fixture(scope="module")
def quick_patch(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return forget(ComfyHost(*loaded), "cat", QUICK)[0]


def weights(host):
    return [(p, p.detach().clone()) for p in host.base.parameters()]


def assert_untouched(host, before):
    for (parameter, values), now in zip(before, host.base.parameters(), strict=True):
        assert now is parameter and torch.equal(now, values) and now.grad is None and now.is_inference()
    assert not any(m._forward_hooks for m in host.base.modules())


def test_the_loss_of_paper_is_the_formula_on_the_hosts_own_attention(host):
    """Sum over layers, heads, pixels and concept tokens of softmax(q k / sqrt(d))^2, computed a row at a time from
    what the host's projections returned."""
    columns = concept_mask(host, "cat", "a photo of a cat", "concept_and_end")
    prompts, layers = host.encode(["a photo of a cat"]), host.cross_attentions()
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    outputs, hooks = {}, []
    for name, layer in layers.items():
        for matrix in ("to_q", "to_k"):

            def keep(module, args, output, key=(name, matrix)):
                outputs[key] = output.double()

            hooks.append(layer.linear(matrix).register_forward_hook(keep))
    with host.training(x.shape), torch.no_grad(), capture_attention_maps(layers) as maps:
        host.predict(x, t, prompts)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for name, layer in layers.items():
        q, k = outputs[name, "to_q"][0], outputs[name, "to_k"][0]
        d = q.shape[1] // layer.heads
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            for pixel in range(len(q)):
                row = torch.exp(k[:, part] @ q[pixel, part] / d**0.5)
                for token in columns.nonzero().flatten().tolist():
                    total += (row[token] / row.sum()).item() ** 2
    assert attention_resteering_loss(maps.values(), columns[None]).item() == pytest.approx(total, rel=1e-4)


def test_the_gradient_of_paper_is_the_slope_of_its_loss(host):
    """Along a random direction of all adapters, through the host's whole UNet, against a central difference."""
    layers, generator = host.cross_attentions(), torch.Generator().manual_seed(0)
    columns = concept_mask(host, "cat", "a photo of a cat", "concept_and_end")[None]
    prompts = host.encode(["a photo of a cat"])
    x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
    lora = CrossAttentionLoRA(layers, ("to_q", "to_k", "to_v"), 2, generator)
    directions = [torch.randn(p.shape, generator=generator) for p in lora.parameters()]

    def loss():
        with capture_attention_maps(layers) as maps:
            host.predict(x, t, prompts)
            return attention_resteering_loss(maps.values(), columns)

    def moved(amount):
        with torch.no_grad():
            for p, direction in zip(lora.parameters(), directions, strict=True):
                p.add_(direction, alpha=amount)
            value = loss().item()
            for p, direction in zip(lora.parameters(), directions, strict=True):
                p.sub_(direction, alpha=amount)
        return value

    with host.training(x.shape), lora.attached():
        with torch.no_grad():
            for p, direction in zip(lora.parameters(), directions, strict=True):
                p.add_(direction, alpha=0.01)  # away from up = 0, where down has no gradient
        loss().backward()
        grads = [p.grad for p in lora.parameters()]  # none for the last layer's values, which no attention depends on
        slope = sum((g * direction).sum().item() for g, direction in zip(grads, directions, strict=True) if g is not None)
        difference = (moved(1e-3) - moved(-1e-3)) / 2e-3
    assert abs(slope) > 1e-2 and slope == pytest.approx(difference, rel=2e-2)


def test_the_loss_falls_and_so_does_the_attention(host):
    patch, losses = forget(host, "cat", replace(PAPER, num_images=2, num_inference_steps=5))
    assert len(losses) == 35 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    mass = patch.info["report"]["attention_mass"]
    assert mass["after"] < 0.8 * mass["before"]


def test_an_interrupt_stops_the_making_of_pictures_too(host, comfy, monkeypatch):
    seen = []
    interrupt = comfy.model_management.interrupt_current_processing
    monkeypatch.setattr(host, "show_progress", lambda step, total, preview: seen.append(step) or interrupt())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        forget(host, "cat", QUICK)
    assert seen == [1]


@pytest.mark.parametrize("failure", [None, "exception", "interrupt"])
def test_the_host_is_left_as_it_was(host, comfy, loaded, sample, failure, monkeypatch):
    picture, before = sample(loaded[0], "a cat"), weights(host)
    options = repr(loaded[0].model_options)
    if failure == "exception":
        monkeypatch.setattr(host, "show_progress", lambda step, total, preview: 1 / 0 if step == 2 else None)
        with pytest.raises(ZeroDivisionError):
            forget(host, "cat", QUICK)
    elif failure == "interrupt":
        interrupt = comfy.model_management.interrupt_current_processing
        monkeypatch.setattr(host, "show_progress", lambda step, total, preview: interrupt() if step == 2 else None)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            forget(host, "cat", QUICK)
    else:
        forget(host, "cat", QUICK)
    assert_untouched(host, before)
    assert repr(loaded[0].model_options) == options and not loaded[0].patches
    assert torch.equal(sample(loaded[0], "a cat"), picture)


def test_same_inputs_same_patch_and_other_seed_other_patch(loaded, quick_patch):
    from fmn_core.hosts.comfy.model import ComfyHost
    from fmn_core.patch.file import serialize

    again, _ = forget(ComfyHost(*loaded), "cat", QUICK)
    other, _ = forget(ComfyHost(*loaded), "cat", replace(QUICK, seed=1))
    assert serialize(again, "x") == serialize(quick_patch, "x") != serialize(other, "x")


def test_the_global_generator_is_left_alone(host):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    forget(host, "cat", QUICK)
    assert torch.equal(torch.get_rng_state(), state)


def test_zeroed_columns_are_probabilities_of_zero(host, ordinary_parameters):
    layers = host.cross_attentions()
    name, layer = next(iter(layers.items()))
    context, x = torch.randn(1, 77, 112), torch.randn(1, 4, layer.linear("to_q").weight.shape[1])
    columns = torch.zeros(1, 77, dtype=torch.bool)
    columns[:, [3, 9]] = True
    with torch.no_grad(), ordinary_parameters(host.base.diffusion_model):
        with attention_set_to_zero(layers, columns):
            zeroed = layer.module(x, context)
        q, k, v = layer.module.to_q(x), layer.module.to_k(context), layer.module.to_v(context)
        A = attention_probabilities(q, k, layer.heads) * ~columns[:, None, None]
        expected = layer.module.to_out(
            rearrange(A @ rearrange(v, "b t (h d) -> b h t d", h=layer.heads), "b h n d -> b n (h d)")
        )
    assert torch.allclose(zeroed, expected, atol=1e-5)


def test_noise_is_added_by_the_schedule(host):
    x0, generator = torch.full((2000, 1, 1, 1), 2.0), torch.Generator().manual_seed(0)
    x_t, t, noise = add_noise(host, x0, generator)
    a = host.alphas_cumprod[t]
    assert torch.allclose(noise.flatten(), (x_t.flatten() - a.sqrt() * 2) / (1 - a).sqrt(), atol=1e-2)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert t.min() < 20 and t.max() > 980 and abs(t.float().mean() - 499.5) < 30


def test_custom_templates_and_batches(host):
    patch, losses = forget(
        host, "cat", replace(QUICK, concept_type="custom", template="a {}\na noto emoji of a {}", batch_size=3, rank=2)
    )
    assert (
        patch.info["concepts"][0]["templates"] == ["a {}", "a noto emoji of a {}"] and patch.rank == 2 and len(losses) == 4
    )


def test_prompts_of_unequal_length_train_together(host):
    template = "a {}\n" + "a house and a tree " * 20 + "and a {}"
    patch, losses = forget(
        host, "cat", replace(QUICK, concept_type="custom", template=template, penalized_tokens="concept_and_end")
    )
    assert all(loss > 0 for loss in losses) and patch.info["statistics"]["keys"]["shape"][1] == 112


def test_the_base_hash_does_not_change_with_a_lora_on_the_model(quick_patch, loaded, monkeypatch):
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.model import ComfyHost

    patched = apply_patch(loaded[0], quick_patch, 1.0)
    on_top, _ = forget(ComfyHost(patched, *loaded[1:]), "cat", QUICK)
    assert on_top.info["base"] == quick_patch.info["base"]
    host = ComfyHost(*loaded)
    monkeypatch.setattr(host, "weight", lambda layer, matrix: torch.ones(2, 2))
    assert fingerprint(host) != quick_patch.info["base"]["hash"]
    assert not torch.equal(*(p[p.modules[0] + ".lora_up.weight"] for p in (on_top, quick_patch)))


@pytest.mark.parametrize("matrices", ["k", "k,v", "q,k,v,out"])
def test_only_the_chosen_projections_are_patched(host, matrices):
    patch, _ = forget(host, "cat", replace(QUICK, target_modules=matrices))
    ends = {module.rsplit("attn2_", 1)[1] for module in patch.modules}
    assert ends == {f"to_{m}".replace("to_out", "to_out_0") for m in matrices.split(",")}


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0, "preset": "paper"},
        {"learning_rate": 1.0, "preset": "paper"},
        {"penalized_tokens": "all", "preset": "paper"},
        {"magic": 1},
        {"steps": 5},
        {"preserve": "dog", "preset": "paper"},
        {"target": "dog"},
        {"template": "a {}"},
    ],
)
def test_bad_settings_get_a_sentence(bad):
    with pytest.raises(ForgetError, match=next(iter(bad))):
        make_config(**bad)


def test_an_unknown_preset_gets_a_sentence():
    with pytest.raises(ForgetError, match="`magic` is not a preset: choose one of fast, paper, balanced, robust"):
        make_config("magic")


def test_a_training_that_diverges_keeps_the_last_good_state_and_says_so(host, monkeypatch):
    from fmn_core.erasure import resteering as resteering

    formula, calls = resteering.attention_resteering_loss, []

    def diverging(*arguments):
        calls.append(1)
        return formula(*arguments) * (float("nan") if len(calls) == 4 else 1)

    three, losses = forget(host, "cat", replace(QUICK, steps=3))
    monkeypatch.setattr(resteering, "attention_resteering_loss", diverging)
    patch, stopped = forget(host, "cat", replace(QUICK, steps=9))
    assert stopped == losses and all(torch.isfinite(patch[key]).all() for key in patch)
    assert "diverged after step 3 of 9" in patch.info["report"]["warnings"][0]
    calls.clear()
    with pytest.raises(ForgetError, match="diverged after step 3 of 9"):
        forget(host, "cat", replace(QUICK, steps=9, strict=True))


def test_a_loss_that_is_not_finite_is_said(host):
    with pytest.raises(ForgetError, match="not finite at step 1"):
        forget(host, "cat", QUICK, images=torch.full((1, 64, 64, 3), float("nan")))
