"""Forgetting in a webui's process: run by tests/webui/test_webui_hosts.py, once in each flavour."""

from __future__ import annotations

import contextlib
import os

import networks
import pytest
import torch
from modules import sd_models, shared
from modules.sd_samplers_common import InterruptedException
from reference import SETTINGS, keys, reference
from safetensors.torch import load_file, save_file
from webui_fixtures import FORGE

from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.hosts.webui.model import adapt, current_host

FEW_STEPS = make_config(preset="paper", steps=1, batch_size=1, num_images=1, num_inference_steps=1, resolution=128)


def parts(webui):
    return [webui.unet, *(encoder for _, encoder in webui.encoders)]


def state(webui):
    """Everything of a model that may not change: tensors and whose they are, flags, hooks, what layers carry."""
    found = []
    for module in (module for part in parts(webui) for module in part.modules()):
        tensors = {**module._parameters, **module._buffers}
        found.append((module, [(name, t, bits(t)) for name, t in tensors.items() if t is not None]))
    return found


def bits(tensor):
    return tensor.detach().cpu().numpy().tobytes(), tensor.requires_grad, tensor.is_inference(), tensor.grad is None


def layers(webui):
    names = ("forward", "training", "checkpoint", "network_current_names")
    modules = [module for part in parts(webui) for module in part.modules()]
    return [[m.__dict__.get(n) for n in names] + [len(m._forward_hooks), len(m._forward_pre_hooks)] for m in modules]


@pytest.fixture
def unchanged(webui):
    """Fails unless all of the model is the very same tensors with the same bits after the test as before."""
    webui.encode([""])
    before, about, dice = state(webui), layers(webui), torch.random.get_rng_state()
    yield
    assert layers(webui) == about and torch.equal(torch.random.get_rng_state(), dice)
    for (module, tensors), (again, now) in zip(before, state(webui), strict=True):
        assert module is again and len(tensors) == len(now)
        for (name, tensor, content), (_, after, content_after) in zip(tensors, now, strict=True):
            assert tensor is after and content == content_after, name


@pytest.fixture(scope="module")
def lora(webui, tmp_path_factory):
    """A LoRA of the kind users put into prompts: on the UNet, other layers than ours among them, and the text encoder."""
    generator, tensors = torch.Generator().manual_seed(0), {}

    def add(name, weight):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.3
        tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.3
        tensors[f"{name}.alpha"] = torch.tensor(2.0)

    for layer, cross in webui.cross_attentions().items():
        for matrix in ("to_k", "to_v"):
            add(webui.lora_key(layer, matrix), cross.linear(matrix).weight)
    for name, module in webui.other_layers().items():
        if name.endswith("attn1_to_q"):
            add(name, module.weight)
    for i in range(2):
        add(f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj", torch.empty(112, 112))
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, file)
    return str(file)


def deltas(patch):
    return {m: patch[f"{m}.lora_up.weight"].float() @ patch[f"{m}.lora_down.weight"].float() for m in patch.modules}


def test_the_adapter_is_the_flavours(webui, sd_model):
    assert type(webui).__name__ == ("ForgeHost" if FORGE else "WebuiHost")
    assert type(sd_model).__module__ == ("backend.diffusion_engine.sd15" if FORGE else "ldm.models.diffusion.ddpm")


def test_patches_are_those_of_comfyui(webui, job, unchanged):
    """The same estimates and, from the same settings and seed, the same patches, to rounding."""
    theirs, ours = load_file(os.environ["FMN_REFERENCE"]), reference(webui)
    assert theirs.keys() == ours.keys() and {f"fast {key}" for key in keys(webui)} > {k for k in ours if k[:4] == "fast"}
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-2 * tensor.norm(), name


@pytest.mark.parametrize("failure", [None, RuntimeError, InterruptedException])
def test_the_model_is_left_as_it_was(webui, job, unchanged, monkeypatch, failure):
    def stop(step, total, preview):
        if failure is InterruptedException:
            shared.state.interrupt()
        elif failure is not None:
            raise failure

    monkeypatch.setattr(webui, "show_progress", stop)
    with contextlib.nullcontext() if failure is None else pytest.raises(failure):
        forget(webui, "cat", FEW_STEPS)


def without_loras(webui):
    """What a LoRA could leak into: a prompt, a noise estimate, the weights and a patch made from them."""
    x, prompts = torch.ones(1, *webui.latent_shape()), webui.encode(["a cat"])
    with webui.training(x.shape), torch.no_grad():
        found = [prompts.prompt_embeds, webui.predict(x, torch.tensor([500]), prompts)]
    found += [webui.encode_prefix(["a cat"], 5), webui.token_embeddings("cat")[webui.encoder_name]]
    found += [webui.weight(layer, "to_v").clone() for layer in webui.cross_attentions()]
    return [*found, *deltas(forget(webui, "cat", SETTINGS["fast"])[0]).values()]


def test_loras_of_the_last_prompt_stay_out_and_come_back(webui, lora, draw):
    plain, bare = without_loras(webui), draw("a cat")
    networks.load_networks([lora])
    try:
        with_lora = draw("a cat")
        assert not torch.equal(with_lora, bare)
        before = [bits(tensor) for part in parts(webui) for tensor in part.parameters()]
        with webui.training((1, *webui.latent_shape())):
            webui.encode(["a cat"])  # one context in another
        assert [bits(tensor) for part in parts(webui) for tensor in part.parameters()] == before
        same = [torch.equal(*two) for two in zip(without_loras(webui), plain, strict=True)]
        assert all(same), same
        assert [bits(tensor) for part in parts(webui) for tensor in part.parameters()] == before
        assert [network.name for network in networks.loaded_networks] == ["style"]
        assert torch.equal(draw("a cat"), with_lora)
    finally:
        networks.load_networks([])
    assert torch.equal(draw("a cat"), bare)


def test_loras_come_back_after_an_error(webui, lora, draw):
    networks.load_networks([lora])
    try:
        with_lora = draw("a cat")
        with pytest.raises(ZeroDivisionError), webui.training((1, *webui.latent_shape()), text=True):
            raise ZeroDivisionError
        assert torch.equal(draw("a cat"), with_lora)
    finally:
        networks.load_networks([])
        draw("a cat")


def test_prompts_are_the_hosts_own(webui, sd_model):
    for text in ("a cat", "a (red:1.3) rose", "a cat BREAK a dog", "rose " * 100):
        theirs = sd_model.get_learned_conditioning([text])
        assert torch.equal(webui.encode([text]).prompt_embeds, theirs.clone())
        assert not webui.encode([text]).prompt_embeds.is_inference()
    assert torch.allclose(
        webui.encode_prefix(["a (red:1.3) rose"], 7), webui.encode(["a (red:1.3) rose"]).prompt_embeds[:, :7]
    )


def test_chunks_begin_and_end(webui):
    kinds = [token.kind for token in webui.tokenize("a cat BREAK " + "rose " * 75 + "end")]
    assert len(kinds) == 3 * 77 and [i for i, kind in enumerate(kinds) if kind == "start"] == [0, 77, 154]
    assert kinds[1:5] == ["word", "word", "end", "padding"] and kinds[76] == "padding"
    assert kinds[78:154] == ["word"] * 75 + ["end"]
    assert kinds[155:158] == ["word", "end", "padding"]
    assert webui.tokenize("")[1].kind == "end"


def test_learned_words_are_columns_of_their_own(webui, sd_model):
    from standin import Embedding

    engine = webui.engines[0]
    vectors = webui.token_embeddings("cat dog")[webui.encoder_name]
    engine.database.register(Embedding("blorp", vectors), engine.tokenize(["blorp"])[0])
    try:
        tokens, meant = webui.tokenize("a blorp!"), webui.tokenize("a cat dog!")
        assert [t.kind for t in tokens] == [t.kind for t in meant] and all(t.id < 0 for t in tokens[2:4])
        assert tokens[2] != tokens[3] and webui.tokenize("blorp")[1:3] == tokens[2:4]
        assert torch.allclose(
            webui.encode(["a blorp!"]).prompt_embeds, webui.encode(["a cat dog!"]).prompt_embeds, atol=1e-5
        )
        assert torch.allclose(webui.encode_prefix(["a blorp!"], 9), webui.encode_prefix(["a cat dog!"], 9), atol=1e-5)
        assert torch.allclose(webui.token_embeddings("a blorp")[webui.encoder_name][1:], vectors)
        assert not webui.missing_embeddings("a blorp!")
        missing = webui.missing_embeddings("embedding:blorp, embedding:glorp")
        assert "type `blorp`" in missing["embedding:blorp"] and "none of this name" in missing["embedding:glorp"]
    finally:
        del engine.database.word_embeddings["blorp"]
        del engine.database.ids_lookup[engine.tokenize(["blorp"])[0][0]]


def test_progress_and_preview_are_the_jobs(webui, job):
    with webui.progress(10) as bar:
        bar.skip(2)
        bar.update(lambda: torch.ones(8, 8, 3))
    assert (job.sampling_step, job.sampling_steps, job.job_count) == (3, 10, 1)
    assert job.id_live_preview == 1 and job.current_image.size == (8, 8) and job.current_image.getpixel((0, 0)) == (255,) * 3
    webui.check_interrupt()
    job.interrupt()
    with pytest.raises(InterruptedException):
        webui.check_interrupt()


def test_no_preview_is_made_where_live_previews_are_off(webui, job, monkeypatch):
    monkeypatch.setitem(vars(shared.opts), "live_previews_enable", False)
    with webui.progress(10) as bar:
        bar.skip(9)
        bar.update(lambda: 1 / 0)
    assert job.sampling_step == 10 and job.current_image is None


def test_encoding_pictures_leaves_the_dice_alone(webui):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    webui.encode_images(torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)


def test_a_model_of_another_kind_is_refused(sd_model, monkeypatch):
    monkeypatch.setattr(sd_model, "is_sd1", False)
    monkeypatch.setattr(sd_model, "is_sd3", True)
    with pytest.raises(ForgetError, match="no such layers.*choose a checkpoint"):
        current_host()


def test_a_model_that_wants_a_picture_too_is_refused(webui, monkeypatch):
    monkeypatch.setattr(webui.unet, "in_channels", 8)
    with pytest.raises(ForgetError, match="takes a picture beside the prompt"):
        current_host()


def test_no_model_is_said_plainly(monkeypatch):
    if FORGE:
        monkeypatch.setattr(sd_models.model_data, "forge_loading_parameters", {"checkpoint_info": None})
    else:
        monkeypatch.setattr(sd_models.model_data, "sd_model", None)
        monkeypatch.setattr(sd_models, "load_model", lambda: None)
    with pytest.raises(ForgetError, match="No model is loaded"):
        current_host()


def test_a_side_can_be_asked_for(sd_model):
    host = adapt(sd_model)
    own = host.latent_shape()
    with host.sized(64):
        assert host.latent_shape() == (4, 8, 8) != own
    assert host.latent_shape() == own
