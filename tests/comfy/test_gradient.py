"""What a step differentiates through and recomputes, on narrow copies of the real architectures in the real ComfyUI."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from presets import config_for, probe_little

from benchmarks.architectures import narrow_model
from fmn_core.attention import capture as attention
from fmn_core.attention.capture import StopForward, capture_attention_maps
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.host import DiffusionHost
from fmn_core.inversion.config import InversionConfig
from fmn_core.inversion.textual_inversion import invert_pictures
from fmn_core.lora.layers import CrossAttentionLoRA
from fmn_core.training.gradient import BRANCH, gradient_path, recomputable, recomputed
from fmn_core.training.losses import attention_resteering_loss
from fmn_core.training.memory import RECOMPUTED, estimate_memory

QUICK = {"steps": 2, "num_images": 1, "num_inference_steps": 2, "resolution": 64, "attack_rounds": 1, "rank": 2}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def narrow(comfy, request):
    return narrow_model(request.param, depth=2)  # SDXL has ten in a row


@pytest.fixture
def host(narrow):
    return small_host(*narrow)


@pytest.fixture
def one_thread():
    """With several, a gradient's last bits differ from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_host(model, clip):
    """A host for pictures of 64 pixels."""
    from fmn_core.hosts.comfy.model import ComfyHost

    host = ComfyHost(model, clip)
    host.resolution = 64
    return host


def given(host):
    """Noisy latents, a timestep and a prompt."""
    x_t = torch.randn(1, *host.latent_shape(), generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([500]), host.encode(["a photo of a cat"])


def gradients(host, through="full", again=False):
    """The re-steering loss of a LoRA's first step, and its gradient."""
    x_t, t, prompts = given(host)
    layers = host.cross_attentions()
    torch.manual_seed(4)  # for patches that draw random numbers
    with host.training(x_t.shape):
        lora = CrossAttentionLoRA(layers, ("to_q", "to_k", "to_v"), 2, torch.Generator().manual_seed(2))
        for adapter in lora.values():
            torch.nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(3))
        with lora.attached(), gradient_path(host.unet, through), capture_attention_maps(layers) as maps:
            if again:
                with recomputed(host.unet):
                    host.predict(x_t, t, prompts)
            else:
                host.predict(x_t, t, prompts)
            columns = torch.zeros(1, prompts.prompt_embeds.shape[1], dtype=torch.bool)
            columns[:, 5] = True
            loss = attention_resteering_loss(maps.values(), columns)
            loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    """The largest difference of two tensors of a name, relative to the first."""
    assert one.keys() == other.keys()
    return max(((one[n].double() - other[n].double()).norm() / one[n].double().norm()).item() for n in one if one[n].any())


def untouched(unet):
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in unet.modules())


def test_a_recomputed_gradient_is_the_same_but_for_the_order_of_its_sums(host):
    assert len(recomputable(host.unet)) > 20
    (loss, plain), (other, again) = gradients(host), gradients(host, again=True)
    assert loss == other and distance(plain, again) < 1e-4 and untouched(host.unet)


@pytest.mark.parametrize("again", [False, True])
def test_maps_are_made_once_and_once_more_for_the_backward_whatever_else_is_computed(host, one_thread, monkeypatch, again):
    """In no other forward, and in that of a recomputed block not for each of two backwards; the gradient stays the same."""
    x_t, t, prompts = given(host)
    other, layers, made = host.encode(["a rose"]), host.cross_attentions(), []
    whole = attention.attention_probabilities
    monkeypatch.setattr(attention, "attention_probabilities", lambda q, k, heads: made.append(k) or whole(q, k, heads))
    with host.training(x_t.shape):
        lora = CrossAttentionLoRA(layers, ("to_q", "to_k", "to_v"), 2, torch.Generator().manual_seed(2))
        for adapter in lora.values():
            torch.nn.init.normal_(adapter.up, generator=torch.Generator().manual_seed(3))

        def found(beside):
            """The gradient with another forward in the same context, or in none."""
            with lora.attached(), recomputed(host.unet) if again else nullcontext():
                with capture_attention_maps(layers, torch.tensor([4, 5])) as maps:
                    estimate = host.predict(x_t, t, prompts)
                    change = host.predict(x_t, t, other) if beside else 0 * estimate
                    asked = torch.ones(1, 2, dtype=torch.bool)
                    loss = attention_resteering_loss(maps.values(), asked) + estimate.square().mean()
                    first = torch.autograd.grad(loss, [*lora.parameters()], retain_graph=True)
                    made_for_maps = len(made)
                    both = torch.autograd.grad(change.sum(), [*lora.parameters()], allow_unused=True)
            return first, made_for_maps, both

        one, count, _ = found(beside=False)
        assert len(layers) < count <= 2 * len(layers)
        made.clear()
        two, count, both = found(beside=True)
        assert count <= 2 * len(layers) and len(made) == count and any(own is not None for own in both)
        assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_what_a_patch_draws_is_drawn_again(narrow):
    """HyperTile and token merging draw random numbers in every self-attention."""

    def shaken(q, k, v, options):
        return q * (0.5 + torch.rand(q.shape)), k, v

    model = narrow[0].clone()
    model.set_model_attn1_patch(shaken)
    host = small_host(model, narrow[1])
    (loss, plain), (other, again) = gradients(host), gradients(host, again=True)
    assert loss == other and loss != gradients(small_host(*narrow))[0] and distance(plain, again) < 1e-4


def test_free_memory_is_asked_of_a_device_without_a_number(monkeypatch):
    """The webui's device is `cuda`, which older torch's `mem_get_info` refuses."""
    for name, value in {"current_device": 0, "memory_reserved": 5, "memory_allocated": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *index, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + 0 * index, 20))
    assert DiffusionHost.free_memory(SimpleNamespace(device=torch.device("cuda"))) == 13
    assert DiffusionHost.free_memory(SimpleNamespace(device=torch.device("cpu"))) == float("inf")


def test_skip_connections_give_the_same_loss_and_a_gradient_of_its_own_to_every_layer(host):
    assert any(BRANCH.search(name) for name, _ in host.unet.named_modules())
    (loss, whole), (other, stream) = gradients(host), gradients(host, "skip_connections")
    assert loss == other and whole.keys() == stream.keys() and not same(whole, stream) and untouched(host.unet)
    cosines = {name: torch.cosine_similarity(whole[name].flatten(), stream[name].flatten(), 0) for name in whole}
    assert all(stream[name].norm() > 0 for name in stream)
    last = [*host.cross_attentions()][-1].replace(".", "/")  # its own projections are reached by nothing else
    assert all(cosine > 0.9999 for name, cosine in cosines.items() if last in name and ("to_q" in name or "to_k" in name))


def test_a_forward_ends_where_the_last_map_is_made(host):
    x_t, t, prompts = given(host)
    layers, ended = host.cross_attentions(), []
    hook = host.unet.out.register_forward_hook(lambda *_: ended.append(True))
    with host.training(x_t.shape), torch.no_grad():
        with capture_attention_maps(layers) as whole:
            host.predict(x_t, t, prompts)
        with capture_attention_maps(layers, stop=True) as maps, pytest.raises(StopForward):
            host.predict(x_t, t, prompts)
    hook.remove()
    assert len(ended) == 1 and same(whole, maps) and untouched(host.unet)


@pytest.mark.parametrize("preset", ["paper", "balanced"])
def test_short_memory_changes_nothing_but_the_way(host, preset, monkeypatch, caplog):
    if preset == "balanced":  # most of its time
        probe_little(monkeypatch.setattr)
    settings = config_for(preset, visual_loss_weight=0.1, **QUICK)
    plain, _ = forget(host, "cat", settings)
    monkeypatch.setattr(type(host), "free_memory", lambda self: 0.0)
    with caplog.at_level(logging.INFO, "forget_me_not"):
        short, _ = forget(host, "cat", settings)
    assert f'backprop="{RECOMPUTED}"' in caplog.text and untouched(host.unet)
    assert distance(dict(plain), dict(short)) < 0.01  # a step of AdamW makes much of little gradients


@pytest.mark.parametrize("work", ["paper", "balanced", "invert"])
def test_a_step_that_runs_out_of_memory_is_taken_again_with_less(host, work, monkeypatch, caplog):
    if work == "balanced":
        probe_little(monkeypatch.setattr)

    def run():
        if work == "invert":
            return invert_pictures(
                host, InversionConfig(steps=2, num_images=1, num_inference_steps=2, resolution=64), concept="cat"
            )
        return dict(forget(host, "cat", config_for(work, **QUICK))[0])

    plain = run()
    real, failed = type(host).predict, []

    def predict(self, x_t, t, prompts):
        estimate = real(self, x_t, t, prompts)
        if torch.is_grad_enabled() and not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError("Allocation failed.")
        return estimate

    def ends(self, *args):  # `paper` never gets to the estimate
        if torch.is_grad_enabled() and not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError("Allocation failed.")
        return real(self, *args)

    monkeypatch.setattr(type(host), "predict", ends if work == "paper" else predict)
    again = run()
    assert failed and "continuing with gradient checkpointing" in caplog.text.lower() and untouched(host.unet)
    if work == "invert":
        assert again.losses == pytest.approx(plain.losses, rel=1e-5) and distance(plain.vectors, again.vectors) < 0.01
    else:
        assert distance(plain, again) < 0.01


def test_out_of_memory_with_checkpointing_is_told(host, monkeypatch):
    real = type(host).predict

    def predict(self, *args):
        if torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("Allocation failed.")
        return real(self, *args)

    monkeypatch.setattr(type(host), "predict", predict)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="lower `batch_size` or `resolution`"):
        forget(host, "cat", config_for("paper", **QUICK))
    assert untouched(host.unet)


def test_a_rehearsal_counts_less_where_less_is_held(host):
    x_t, t, prompts = given(host)
    with host.training(x_t.shape):
        held = estimate_memory(host, x_t, t, prompts).held
    assert 0 < held["skip_connections"] < held["full"] and held[RECOMPUTED] < held["full"] and untouched(host.unet)


def test_skip_connections_cannot_train_what_they_leave_out():
    with pytest.raises(ForgetError, match="choose one"):
        make_config("paper", backprop="skip_connections", train_layers="whole_unet")
