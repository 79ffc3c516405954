"""One step of both stages against what the paper and the released code (SHI-Labs/Forget-Me-Not) say, written down anew.

The model is a small diffusers pipeline with random weights. What a step draws is caught where it enters the UNet; from there
on everything is computed a second time, in float64, with an attention that is a loop over pictures and heads.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fmn_core.cli.config_keys import LIVE
from fmn_core.cli.run_config import forgetting_settings, inversion_settings, pads_with_end
from fmn_core.erasure import resteering
from fmn_core.erasure.forget import forget
from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.inversion.textual_inversion import invert
from fmn_core.text.concept import make_concepts
from fmn_core.text.tokens import concept_mask
from fmn_core.text.vocabulary import NOUNS
from fmn_core.training.loop import TrainingRun

LOSS, GRADIENT, STEP = 2e-6, 2e-6, 1e-3  # relative, relative, and of AdamW's step
PADDINGS = {"SD1": "<|endoftext|>", "SD2": "!"}  # what tokenizers fill prompts up with
END = 49407
TEMPLATES = {"object": "a photo of {}", "style": "a photo in the style of {}"}
WORDS = ("elon", "musk", "cat", "vangogh", "sunflowers", "anglerfish", "red", "7", "don't")


@pytest.fixture(scope="module", params=PADDINGS)
def host(request, comfy):
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from demo.recipe.text_encoder import make_tokenizer
    from demo.recipe.unet import make_schedule

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
        vocab_size=49408, eos_token_id=END,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                weight.mul_(4)  # so that attention prefers some columns
    tokenizer = make_tokenizer()
    tokenizer.pad_token = PADDINGS[request.param]
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval(),
        text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=make_schedule(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return DiffusersHost(pipeline, progress_bar=False)


def attn_config(**keys):
    return {**LIVE["Attn"], "multi_concept": [["elon-musk", "object"]], "resolution": 64, **keys}


def positions(tokenizer, prompt: str, name: str, use_pooler: bool) -> list[int]:
    """The columns that count: where the name's tokens stand in the prompt and, with the pooler, every end token."""
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    sought = tokenizer(name, add_special_tokens=False).input_ids
    starts = [i for i in range(77) if ids[i : i + len(sought)] == sought]
    own = {start + i for start in starts for i in range(len(sought))}
    return sorted(own | {i for i, id in enumerate(ids) if use_pooler and id == END})


@examples(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
    st.sampled_from(("object", "style")),
    st.booleans(),
    st.booleans(),
)
def test_prompts_and_columns(host, words, kind, use_pooler, only):
    name, config = " ".join(words), attn_config(use_pooler=use_pooler, only_optimize_ca=only)
    (concept,) = make_concepts(name, kind)
    assert concept.prompts == ((TEMPLATES[kind].format(name), name),)
    tokens = forgetting_settings(config, pads_with_end=pads_with_end(host)).penalized_tokens
    found = concept_mask(host, name, concept.prompts[0][0], tokens).nonzero()[:, 0].tolist()
    assert found == positions(host.pipeline.tokenizer, concept.prompts[0][0], name, use_pooler)


class Loop:
    """An attention processor that goes through pictures and heads one by one, and keeps the maps of the cross-attention."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context, pictures = hidden_states if encoder_hidden_states is None else encoder_hidden_states, []
        for x, c in zip(hidden_states, context, strict=True):
            q, k, v = (y @ linear.weight.T for y, linear in ((x, attn.to_q), (c, attn.to_k), (c, attn.to_v)))
            width, heads = q.shape[1] // attn.heads, []
            for h in range(attn.heads):
                own = slice(h * width, (h + 1) * width)
                weights = torch.exp(q[:, own] @ k[:, own].T / width**0.5)
                probabilities = weights / weights.sum(1, keepdim=True)
                heads.append(probabilities @ v[:, own])
                if encoder_hidden_states is not None:
                    self.maps.append(probabilities)
            pictures.append(torch.cat(heads, 1) @ attn.to_out[0].weight.T + attn.to_out[0].bias)
        return torch.stack(pictures)


def second_unet(host):
    """A copy of the UNet in float64 that keeps its maps [pixels, 77] in the list beside it."""
    maps = []
    unet = copy.deepcopy(host.unet).double().requires_grad_(True)
    unet.set_attn_processor(Loop(maps))
    return unet, maps


def caught(host, monkeypatch):
    """What is asked of the UNet with a gradient: x_t, t and embeddings."""
    asked, predict = [], host.predict

    def spy(x_t, t, prompts):
        if torch.is_grad_enabled():
            asked.append((x_t.detach().double(), t, prompts.prompt_embeds.detach().double()))
        return predict(x_t, t, prompts)

    monkeypatch.setattr(host, "predict", spy)
    return asked


@pytest.mark.parametrize("loss", ["squared_norms", "joint_norm"])
@pytest.mark.parametrize("use_pooler", [False, True])
def test_a_step_of_resteering(host, monkeypatch, loss, use_pooler):
    settings = forgetting_settings(attn_config(max_train_steps=1, use_pooler=use_pooler), pads_with_end=pads_with_end(host))
    settings = replace(settings, loss=loss)
    asked, trained, stepped = caught(host, monkeypatch), [], []
    train, step = resteering.Resteering.train, torch.optim.AdamW.step
    monkeypatch.setattr(
        resteering.Resteering, "train", lambda training, *how: trained.append(training.lora) or train(training, *how)
    )

    def spy(self, closure=None):
        stepped.append(
            {id(p): p.grad.double() for group in self.param_groups for p in group["params"] if p.grad is not None}
        )
        trained.append({target: down.detach().double() for target, (_, down) in trained[0].factors().items()})
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    _, (ours,) = forget(host, make_concepts("elon musk", "object"), settings, images=images)
    (x_t, t, embeddings), lora, downs = asked[-1], trained[0], trained[1]

    unet, maps = second_unet(host)
    unet(x_t, t, embeddings)
    columns = positions(host.pipeline.tokenizer, "a photo of elon musk", "elon musk", use_pooler)
    total = sum(A[pixel, column] ** 2 for A in maps for pixel in range(len(A)) for column in columns)
    expected = total if loss == "squared_norms" else total**0.5
    assert ours == pytest.approx(expected.item(), rel=LOSS)

    expected.backward()
    names = [(layer, matrix) for layer in host.cross_attentions() for matrix in ("to_q", "to_k", "to_v", "to_out")]
    assert [*downs] == names
    wanted = {}  # of the ups, which are zero: the weight's gradient, through the downs
    for layer, matrix in names:
        weight = unet.get_submodule(f"{layer}.{'to_out.0' if matrix == 'to_out' else matrix}").weight
        wanted[layer, matrix] = torch.zeros(len(weight), 4) if weight.grad is None else weight.grad @ downs[layer, matrix].T
    got = {target: stepped[0].get(id(lora.adapter(*target).up), torch.zeros(())) for target in names}
    clipped = torch.stack([g.norm() for g in stepped[0].values()]).norm()
    assert clipped <= 1 + 1e-6
    size = torch.stack([g.norm() for g in wanted.values()]).norm()
    scale = torch.stack([g.norm() for g in got.values()]).norm() / size if clipped > 1 - 1e-4 else 1.0
    for target in names:
        assert (got[target] - scale * wanted[target]).norm() <= GRADIENT * scale * size, target


def test_a_step_of_textual_inversion(host, monkeypatch):
    config = {**LIVE["Ti"], "placeholder_tokens": "<s1>|<s2>", "initializer_tokens": "cat|320", "max_train_steps_ti": 1}
    settings = inversion_settings({**config, "resolution": 64})
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    asked = caught(host, monkeypatch)
    learned = invert(TrainingRun(host, settings), latents)
    (x_t, t, _) = asked[-1]

    tokenizer, encoder = copy.deepcopy(host.pipeline.tokenizer), copy.deepcopy(host.pipeline.text_encoder)
    tokenizer.add_tokens(["<s1>", "<s2>"])
    encoder.resize_token_embeddings(len(tokenizer))
    encoder = encoder.double()
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-2:] = table[[tokenizer("cat").input_ids[1], 320]]
    ids = tokenizer("a photo of <s1><s2>", padding="max_length", max_length=77, return_tensors="pt").input_ids
    alpha = host.pipeline.scheduler.alphas_cumprod[t].double()
    noise = (x_t - alpha**0.5 * latents.double()) / (1 - alpha) ** 0.5
    unet, _ = second_unet(host)
    loss = ((unet(x_t, t, encoder(ids)[0]).sample - noise) ** 2).mean()
    assert learned.losses == [pytest.approx(loss.item(), rel=LOSS)]

    (gradient,) = torch.autograd.grad(loss, table)
    rate, decay, pull = 1e-3, 0.1, 0.1  # learning_rate_ti, weight_decay_ti, and 100 times the rate
    g, words = gradient[-2:], table[-2:].detach()
    words = words * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)  # AdamW's first step
    nouns = tokenizer(" ".join(NOUNS), add_special_tokens=False).input_ids
    usual, norm = table.detach()[nouns].norm(dim=1).mean(), words.norm(dim=1, keepdim=True)
    words = words / norm * (norm + pull * (usual - norm))
    (ours,) = learned.vectors.values()
    assert (ours - words).abs().max() <= STEP * rate
