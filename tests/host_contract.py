"""What every host adapter owes the core: tests for a file whose fixtures `host` and `wordy_host` give one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fmn_core.host import MATRICES
from fmn_core.patch.schema import FAMILIES


@contextlib.contextmanager
def unchanged(host):
    """Fails unless the host's cross-attention is the very same tensors, bits, flags and hooks after the block as before."""
    modules = [m for layer in host.cross_attentions().values() for m in layer.module.modules()]
    tensors = [p for layer in host.cross_attentions().values() for p in layer.module.parameters()]
    before = [(p, p.detach().clone(), p.requires_grad, p.is_inference()) for p in tensors]
    yield
    after = [p for layer in host.cross_attentions().values() for p in layer.module.parameters()]
    for (parameter, values, requires_grad, inference), now in zip(before, after, strict=True):
        assert now is parameter and torch.equal(now, values)
        assert (now.requires_grad, now.is_inference(), now.grad) == (requires_grad, inference, None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_layers_are_complete_and_in_order(host):
    layers = host.cross_attentions()
    places = [layer.unet_block for layer in layers.values()]
    assert places == sorted(places, key=["down", "mid", "up"].index) and set(places) == {"down", "mid", "up"}
    for layer in layers.values():
        assert layer.linear("to_q").weight.shape[0] % layer.heads == 0
        assert layer.linear("to_k").weight.shape == layer.linear("to_v").weight.shape


def test_family_and_schedule(host):
    assert host.family in FAMILIES
    alphas = host.alphas_cumprod
    assert alphas.ndim == 1 and (alphas.diff() < 0).all() and 0 < alphas[-1] < alphas[0] < 1


def test_tokens_are_columns_of_the_embedding(host):
    texts = ["a cat", "", "a (red:1.2) rose " * 40]
    prompts = host.encode(texts)
    assert prompts.prompt_embeds.shape[:2] == (3, len(prompts.tokens[0]))
    for text, tokens in zip(texts, prompts.tokens, strict=True):
        own = host.tokenize(text)
        assert tokens == own * (len(tokens) // len(own))
        assert own[0].kind == "start" and own[-1].kind in ("end", "padding")
    assert [t.text for t in prompts.tokens[0] if t.kind == "word"][:2] == ["a</w>", "cat</w>"]
    assert not prompts.prompt_embeds.is_inference()
    assert torch.equal(host.encode(["a cat"]).prompt_embeds, host.encode(["a cat"]).prompt_embeds)


def test_contexts_are_the_first_columns_of_the_embedding(host):
    texts = ["a cat", "", "a photo of a dog in the garden"]
    assert torch.allclose(host.encode_prefix(texts, 77), host.encode(texts).prompt_embeds, atol=1e-5)
    short = host.encode_prefix(texts, 9)
    assert short.shape[:2] == (3, 9) and torch.allclose(short, host.encode(texts).prompt_embeds[:, :9], atol=1e-5)
    assert not short.is_inference() and host.encode_prefix(["a cat"] * 130, 5).shape[0] == 130


def test_the_reading_of_many_prompts_is_shown_batch_by_batch(host, monkeypatch):
    shown, many = [], [f"a cat and {n} dogs" for n in range(130)]
    monkeypatch.setattr(host, "show_progress", lambda step, total, preview: shown.append((step, total)))
    with host.reading(150):
        host.encode_prefix(many, 5)
        host.encode_prefix(many[:20], 6)
    assert shown == [(0, 150), (64, 150), (128, 150), (130, 150), (150, 150)]
    shown.clear()
    with host.reading(12):
        host.encode_prefix(many[:12], 5)
    host.encode_prefix(many, 5)
    with host.progress(3) as bar, host.reading(130):  # whose steps are others
        host.encode_prefix(many, 5)
        bar.update()
    assert shown == [(1, 3)]


def test_predict_is_a_noise_estimate(host):
    """At the noisiest timestep nearly all is noise, so the estimate must be near it."""
    noise = torch.randn(2, *host.latent_shape(), generator=torch.Generator().manual_seed(0)).to(host.device)
    t = torch.full((2,), len(host.alphas_cumprod) - 1, device=host.device)
    with host.training(noise.shape), torch.no_grad():
        epsilon = host.predict(noise, t, host.encode(["a cat", "a rose"]))
    assert epsilon.shape == noise.shape
    assert torch.nn.functional.cosine_similarity(epsilon.flatten(), noise.flatten(), 0) > 0.9


def test_pictures_survive_encoding_and_decoding(host):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = (x**2 + y**2 < 0.5).float()[..., None]
    image = (1 - disc + disc * torch.tensor([0.9, 0.2, 0.1]))[None]
    latents = host.encode_images(image)
    assert latents.shape[0] == 1 and not latents.is_inference()
    assert (host.decode(latents) - image).abs().mean() < 0.1


@pytest.mark.parametrize("call", ["embedding:missing", "embedding:"])
def test_an_embedding_that_is_not_there_is_told(host, call):
    from fmn_core.erasure.config import make_config
    from fmn_core.erasure.forget import forget
    from fmn_core.errors import ForgetError

    assert host.missing_embeddings("a photo of a (red:1.2) cat, embeddings: none") == {}
    for text in (call, f"a photo of {call}", f"a ({call}) cat"):
        assert [*host.missing_embeddings(text)] == [call]
    for names, preserve in ((call, ""), ("cat", f"dog, {call}")):
        with pytest.raises(ForgetError, match=f"There is no embedding behind `{call}`"):
            forget(host, names, make_config(preserve=preserve))


def test_lora_keys_are_the_kohya_names(host):
    keys = [host.lora_key(layer, matrix) for layer in host.cross_attentions() for matrix in MATRICES]
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("lora_unet_") and "_attn2_to_" in key for key in keys)
    blocks = ("down_blocks", "mid_block", "up_blocks")
    if host.family == "sdxl":
        blocks = ("input_blocks", "middle_block", "output_blocks")
    assert all(key.removeprefix("lora_unet_").startswith(blocks) for key in keys)


class Stop(BaseException):
    """As the host's interrupt is one since ComfyUI 0.20."""


@pytest.mark.parametrize("failure", [None, RuntimeError, Stop])
def test_training_differentiates_and_leaves_the_host_as_it_was(host, failure):
    layer = next(iter(host.cross_attentions().values()))
    prompts = host.encode(["a cat"])
    x, t = torch.randn(1, *host.latent_shape()).to(host.device), torch.tensor([500], device=host.device)
    with unchanged(host), contextlib.suppress(RuntimeError, Stop), host.training(x.shape):
        delta = torch.zeros_like(layer.linear("to_k").weight, dtype=torch.float32, requires_grad=True)
        hook = layer.linear("to_k").register_forward_hook(lambda m, a, out: out + (a[0].float() @ delta.T).to(out.dtype))
        try:
            host.predict(x, t, prompts).square().sum().backward()
        finally:
            hook.remove()
        assert delta.grad.abs().sum() > 0
        if failure is not None:
            raise failure


def test_predictions_are_the_same_with_and_without_a_graph(host):
    prompts = host.encode(["a cat"])
    x, t = torch.randn(1, *host.latent_shape()).to(host.device), torch.tensor([300], device=host.device)
    with host.training(x.shape):
        one = host.predict(x, t, prompts).detach()
        with torch.no_grad():
            two = host.predict(x, t, prompts)
    assert torch.allclose(one, two, atol=1e-6)


def test_weights_are_those_of_the_projections(host):
    for name, layer in host.cross_attentions().items():
        for matrix in MATRICES:
            assert torch.equal(host.weight(name, matrix), layer.linear(matrix).weight)


@pytest.mark.parametrize("template", ["a photo of a {}", "{}", "two {}, and a {}!"])
def test_the_vectors_of_a_word_say_what_the_word_says(wordy_host, template):
    host = wordy_host
    vectors = host.token_embeddings("cat")
    assert all(v.shape[0] == 1 and not v.is_inference() for v in vectors.values())
    with host.training((1, *host.latent_shape()), text=True), torch.no_grad():
        prompt, word = host.encode_with_embeddings(template, vectors), host.encode([template.replace("{}", "cat")])
    assert torch.allclose(prompt.prompt_embeds, word.prompt_embeds, atol=1e-5)
    assert (prompt.pooled_prompt_embeds is None) == (word.pooled_prompt_embeds is None)
    assert word.pooled_prompt_embeds is None or torch.allclose(
        prompt.pooled_prompt_embeds, word.pooled_prompt_embeds, atol=1e-5
    )


def test_gradients_reach_the_vectors_and_nothing_else(wordy_host):
    host = wordy_host
    x, t = torch.randn(1, *host.latent_shape()).to(host.device), torch.tensor([500], device=host.device)
    parts = text_encoders(host)
    host.encode([""])  # transformers puts hooks of its own onto an encoder when it is first used
    hooks = hooks_on(parts)
    bits = lambda p: p.detach().cpu().numpy().tobytes()  # noqa: E731 (what a checkpoint leaves out may be NaN)
    before = [(p, bits(p), p.requires_grad) for part in parts for p in part.parameters()]
    vectors = {name: v.requires_grad_() for name, v in host.token_embeddings("cat dog rose").items()}
    with unchanged(host), host.training(x.shape, text=True):
        host.predict(x, t, host.encode_with_embeddings("a photo of {}", vectors)).square().sum().backward()
    for vector in vectors.values():
        assert vector.grad.shape == (3, vector.shape[1]) and (vector.grad.abs().sum(1) > 0).all()
    after = [p for part in parts for p in part.parameters()]
    for (parameter, values, flag), now in zip(before, after, strict=True):
        assert now is parameter and bits(now) == values and now.requires_grad == flag and now.grad is None
    assert hooks_on(parts) == hooks


def hooks_on(parts):
    modules = [module for part in parts for module in part.modules()]
    return [hook for module in modules for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def text_encoders(host):
    clip = getattr(host, "clip", None)
    return [encoder for _, encoder in host.encoders] if clip is None else [clip.cond_stage_model]


def test_token_embeddings_leave_special_tokens_out(wordy_host):
    many = wordy_host.token_embeddings("cat " * 100)
    assert all(v.shape[0] == 100 and (v == v[0]).all() for v in many.values())
    assert all(v.shape[0] == 0 for v in wordy_host.token_embeddings("").values())
