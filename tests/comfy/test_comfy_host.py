"""The ComfyUI adapter against ComfyUI's own sampler and memory management."""

from __future__ import annotations

import pytest
import torch

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.text.tokens import words_of
from fmn_core.training.sampling import sample_ddim


def test_the_model_in_the_graph_is_made_of_inference_tensors(loaded):
    """The premise of the adapter's aliasing: autograd refuses such tensors."""
    assert all(p.is_inference() for p in loaded[0].model.diffusion_model.parameters())


def test_predict_equals_the_hosts_own_denoiser(comfy, loaded, host):
    model, _, _ = loaded
    prompts = host.encode(["an emoji of a cat"])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([400])
    with host.training(x_t.shape), torch.no_grad():
        epsilon = host.predict(x_t, t, prompts)
    sigma = model.model.model_sampling.sigmas[t]
    x = x_t * (1 + sigma**2).sqrt()
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        x0 = model.model.apply_model(x, sigma, c_crossattn=prompts.prompt_embeds)
    assert torch.allclose(epsilon, (x - x0) / sigma, atol=1e-4)


def test_own_sampler_makes_the_hosts_pictures(host, loaded, sample):
    """sample_ddim starts at the last timestep where the host's sampler starts at infinite noise: close, not equal."""
    prompts, empty = host.encode(["an emoji of a cat"]), host.encode([""])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with host.training(noise.shape):
        ours = sample_ddim(host, noise, prompts, empty, steps=20, guidance=3.0)
    from demo.classifier import Classifier

    assert Classifier.load().recognised(host.decode(ours)) == ["cat"]


def test_training_loads_the_model_through_the_host_on_a_clone(comfy, loaded, host):
    model = loaded[0]
    assert host.patcher is not model and host.patcher.is_clone(model)
    options = repr(model.model_options)
    with host.training((1, 4, 8, 8)):
        assert comfy.model_management.loaded_models()[0].is_clone(model)
    assert repr(model.model_options) == options and not model.patches


def test_aliases_share_memory(host):
    from fmn_core.hosts.comfy.model import ordinary_parameters

    unet = host.base.diffusion_model
    before = [p.data_ptr() for p in unet.parameters()]
    with torch.inference_mode(False), ordinary_parameters(unet):
        assert [p.data_ptr() for p in unet.parameters()] == before
        assert not any(p.is_inference() or p.requires_grad for p in unet.parameters())
    assert all(p.is_inference() for p in unet.parameters())


def test_a_vae_is_asked_for_where_pictures_need_one(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    with pytest.raises(ForgetError, match="connect the checkpoint's VAE"):
        ComfyHost(loaded[0], loaded[1]).encode_images(torch.rand(1, 64, 64, 3))


def test_training_asks_for_memory_by_the_batch(comfy, host, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda m, memory_required: asked.append(memory_required) or load(m)
    )
    for shape in ((1, 4, 8, 8), (4, 4, 8, 8), (1, 4, 16, 16)):
        with host.training(shape):
            pass
    assert asked[1] == asked[2] == 4 * asked[0] > 4 * host.patcher.memory_required([1, 4, 8, 8])


def test_latents_have_the_variance_the_model_was_trained_on(host):
    prompts, empty = host.encode(["an emoji of a cat"]), host.encode([""])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with host.training(noise.shape):
        latents = sample_ddim(host, noise, prompts, empty, steps=20, guidance=3.0)
    again = host.encode_images(host.decode(latents))
    assert 0.5 < again.std() < 2 and (again - latents).abs().mean() < 0.5


def test_patches_of_other_packs_act_in_training(host):
    calls = []

    def patch(n, context, value, extra):
        calls.append(extra["block"])
        return n, context, value

    host.patcher.set_model_attn2_patch(patch)
    with host.training((1, 4, 8, 8)):
        host.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), host.encode(["a cat"]))
    assert len(calls) == 10


def test_partners_that_do_not_belong_get_a_sentence(comfy, loaded, host):
    from fmn_core.hosts.comfy.model import ComfyHost

    model, clip, vae = loaded
    with pytest.raises(ForgetError, match="no CLIP"):
        forget(ComfyHost(model, None, vae), "cat", make_config())
    other = clip.clone()
    other.cond_stage_model = comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32)
    other.patcher = comfy.model_patcher.ModelPatcher(other.cond_stage_model, torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ForgetError, match="connect the CLIP that belongs to the model"):
        ComfyHost(model, other, vae).encode(["a cat"])


def test_embeddings_are_told_apart(comfy, loaded, tmp_path):
    from safetensors.torch import save_file

    from fmn_core.hosts.comfy.model import tokenize
    from fmn_core.hosts.comfy.text import missing_embeddings
    from fmn_core.text.tokens import find_tokens

    for name in ("bar", "baz"):
        save_file({"emb_params": torch.randn(2, 96)}, tmp_path / f"{name}.safetensors")
    clip = loaded[1].clone()
    clip.tokenizer = type(clip.tokenizer)(embedding_directory=[str(tmp_path)])
    clip.tokenizer.clip_l.embedding_size = 96
    tokens = tokenize(clip, "embedding:bar and embedding:baz and embedding:baz")
    assert find_tokens(tokens, tokenize(clip, "embedding:baz")) == [[4, 5], [7, 8]]
    assert not missing_embeddings(clip, "embedding:bar, a (embedding:baz:1.2) and (embedding:bar.safetensors)")
    missing = missing_embeddings(clip, "embedding:bar and (embedding:foo:1.2), embedding:")
    assert [*missing] == ["embedding:foo", "embedding:"] and "foo.safetensors" in missing["embedding:foo"]


@pytest.mark.parametrize("other", ["Flux", "SD3", "SVD_img2vid", "SDXLRefiner", "Stable_Cascade_C"])
def test_models_of_other_architectures_are_refused(comfy, loaded, other):
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.attention import record_attention
    from fmn_core.hosts.comfy.model import ComfyHost

    model = loaded[0].clone()
    model.model = torch.nn.Module()
    model.model.model_config = getattr(comfy.supported_models, other).__new__(getattr(comfy.supported_models, other))
    for use in (
        lambda: ComfyHost(model, loaded[1]),
        lambda: record_attention(model, loaded[1], "a cat"),
        lambda: apply_patch(model, None, 1.0),
    ):
        with pytest.raises(ForgetError, match=f"SD1.x, SD2.x and SDXL, and this model is {other}"):
            use()


@pytest.mark.parametrize("family, side", [("sd1", 64), ("sd2_v", 96), ("sdxl", 128)])
def test_a_size_is_known_where_the_host_answers_any_question_about_a_model_with_none(comfy, monkeypatch, family, side):
    """As ComfyUI does since its configurations have a `__getattr__` that warns and gives None."""
    from benchmarks.architectures import narrow_model
    from fmn_core.hosts.comfy.model import ComfyHost

    base = comfy.supported_models_base.BASE
    monkeypatch.setattr(base, "__getattr__", lambda config, name: None, raising=False)
    assert ComfyHost(*narrow_model(family)).native_shape() == (4, side, side)


def test_what_names_a_checkpoint_is_the_model_with_all_that_is_on_it(comfy, loaded):
    """The same before and after the model was loaded; another with another noise schedule, a patch of another pack, LoRAs,
    or without the VAE."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    from fmn_core.hosts.comfy.model import ComfyHost
    from fmn_core.training.checkpoint import digest

    model, clip, vae = loaded

    def name(model, vae=vae):
        return digest(ComfyHost(model, clip, vae).identity())

    with torch.inference_mode():
        other = ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]
    watched = model.clone()
    watched.set_model_attn2_patch(lambda n, context, value, extra: (n, context, value))
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    merged = model.clone()
    merged.add_patches({key: (torch.ones(1),)}, 1.0)
    names = {kind: name(one) for kind, one in {"plain": model, "v": other, "attn2": watched, "lora": merged}.items()}
    assert len({*names.values(), name(model, None)}) == 5
    comfy.model_management.load_models_gpu([other])
    assert name(other) == names["v"] and name(model) == names["plain"]
    comfy.model_management.load_models_gpu([model])


@pytest.mark.parametrize("text", ["ein süßer Löwe", "猫 と 家", "naïve café", "кот"])
def test_words_of_any_language_read_as_typed(loaded, text):
    from fmn_core.hosts.comfy.model import tokenize

    words = [word for word, _ in words_of(tokenize(loaded[1], text))]
    assert "".join(words) == text.lower().replace(" ", "")
