"""Recording beside other packs' patches of the model, in any order: what is recorded is what the layers read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from einops import rearrange
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fmn_core.attention.capture import prompt_columns
from fmn_core.attention.heatmap import OTHER, shares

PROMPT = "a neon drawing of a cat"
COLUMNS, WIDTH = 77, 112
NONE = -1  # the number of a column that is none of the prompt's


def seeded(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def added_columns(before: int, after: int):
    """An attn2_patch that puts columns of its own around the prompt's, as packs that prompt with pictures do."""

    def pack(model):
        def patch(n, context, value, extra):
            own = [seeded(1, count, WIDTH, seed=count).expand(len(context), -1, -1) for count in (before, after)]
            context = torch.cat([own[0], context, own[1]], 1)
            return n, context, context

        model.set_model_attn2_patch(patch)

    return pack, lambda names: [NONE] * before + names + [NONE] * after


def replaced_context(count: int):
    """An attn2_patch that puts another context in the prompt's place, as packs that inject a prompt into a layer do."""

    def pack(model):
        def patch(n, context, value, extra):
            context = 3 * seeded(1, count, WIDTH, seed=count).expand(len(context), -1, -1)
            return n, context, context

        model.set_model_attn2_patch(patch)

    return pack, lambda names: [NONE] * count


def changed_copy(model):
    """An attn2_patch that gives a little changed copy."""
    model.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 1.1, value))


def replaced_attention(model):
    """An attn2_replace with an attention of its own beside the stock one, as IP-Adapter has."""
    import comfy.ldm.modules.attention as attention

    stock = attention.optimized_attention  # not the one that a test watches

    def replace(q, k, v, extra):
        own = seeded(1, 5, k.shape[-1], seed=5).to(k).expand(len(k), -1, -1)
        return attention.optimized_attention(q, k, v, extra["n_heads"]) + 0.1 * stock(q, own, own, extra["n_heads"])

    for block in (("input", 1), ("middle", 0), ("output", 3)):
        model.set_model_attn2_replace(replace, *block)


def changed_output(model):
    model.set_model_attn2_output_patch(lambda n, extra: n * 0.9)


def perturbed_attention(model):
    """The host's own node; it gives a clone, whose patches go to ours."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model.model_options = PerturbedAttentionGuidance.execute(model, 2.0)[0].model_options


@pytest.fixture(scope="module")
def hypernetwork(comfy, tmp_path_factory):
    """The host's own hypernetwork, of small random layers for every width."""
    from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch

    path = tmp_path_factory.mktemp("hypernetworks") / "small.pt"
    widths = (WIDTH, 64, 128, 256)
    layers = {
        width: [
            {f"linear.{i}.{name}": 0.2 * seeded(*shape, seed=width + i) / width**0.5 for i, shapes in enumerate(
                [((width, width), (width,))] * 2) for name, shape in zip(("weight", "bias"), shapes, strict=True)}
            for _ in range(2)
        ]
        for width in widths
    }  # fmt: skip
    torch.save(layers, path)

    def pack(model):
        patch = load_hypernetwork_patch(str(path), 1.0)
        model.set_model_attn1_patch(patch)
        model.set_model_attn2_patch(patch)

    return pack


@dataclass
class Spy:
    """Takes the place of the host's attention function, calls it, and keeps, in double precision, softmax(Q K^T / sqrt(d))
    of the positive rows of every cross-attention [B, N, L], in the order of the calls."""

    stock: Callable
    kinds: list[int] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, q, k, v, heads, *args, **kwargs):
        if k.shape[1] != q.shape[1]:
            for q_rows, k_rows, kind in zip(q.chunk(len(self.kinds)), k.chunk(len(self.kinds)), self.kinds, strict=True):
                if kind == 0:
                    split = [rearrange(x.double(), "b n (h d) -> b h n d", h=heads) for x in (q_rows, k_rows)]
                    scores = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
                    self.maps.append((scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(1))
        return self.stock(q, k, v, heads, *args, **kwargs)

    def run(self, executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        self.kinds = transformer_options["cond_or_uncond"]
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


PACKS = ["append", "both ends", "replace", "shorter", "longer", "copy", "hypernetwork", "attention", "output", "perturbed"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PACKS), max_size=4), st.integers(0, 4))
@example(["hypernetwork"], 1)
@example(["append"], 0)
@example(["append"], 1)
@example(["replace"], 0)
@example(["both ends", "hypernetwork", "attention", "perturbed"], 2)
def test_maps_are_of_what_the_layers_read(comfy, loaded, record, run, encode, hypernetwork, packs, place):
    """With patches before and after the recorder, and the picture is the one without it."""
    import comfy.ldm.modules.attention as attention
    from comfy.patcher_extension import WrappersMP

    of_context = {
        "append": added_columns(0, 5), "both ends": added_columns(3, 6), "replace": replaced_context(COLUMNS),
        "shorter": replaced_context(30), "longer": replaced_context(90),
    }  # fmt: skip
    others = {
        "copy": changed_copy, "hypernetwork": hypernetwork, "attention": replaced_attention, "output": changed_output,
        "perturbed": perturbed_attention,
    }  # fmt: skip
    names, plain, model, recording = [*range(COLUMNS)], loaded[0].clone(), loaded[0].clone(), None
    for i, pack in enumerate([*packs, None]):
        if i == min(place, len(packs)):
            model, recording = record(model=model)
        if pack:
            add, renamed = of_context.get(pack) or (others[pack], lambda names: names)
            names = renamed(names)
            for one in (plain, model):
                add(one)
    spy = Spy(attention.optimized_attention)
    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", spy.run)
    expected = run(plain, encode(PROMPT), steps=2)
    attention.optimized_attention = spy
    try:
        assert torch.equal(run(watched, encode(PROMPT), steps=2), expected)
    finally:
        attention.optimized_attention = spy.stock
    own = [i for i, name in enumerate(names) if name != NONE]
    assert len(recording.layers) == 10 and len(spy.maps) % 10 == 0
    for number, layer in enumerate(recording.layers):
        true = torch.stack(spy.maps[number::10]).mean(0)
        map = rearrange(recording.map(layer).mean(1), "b h w t -> b (h w) t").double()
        wanted = torch.zeros_like(map)
        wanted[..., [names[i] for i in own]] = true[..., own]
        assert (map - wanted).abs().max() < 1e-5
    if own:
        left = 1 - recording.mass().sum(-1).mean().item()
        assert shares(recording).get(OTHER, 0) == pytest.approx(left, abs=2e-4)
        assert (OTHER in shares(recording)) == (len(own) < len(names))


def test_rows_of_their_own_for_several_prompts(loaded, record, run, encode):
    """As Attention Couple has them: each positive row once with the prompt and once with another one."""
    other = encode("a house")[0][0]

    def couple(n, context, value, extra):
        kinds = extra["cond_or_uncond"]
        ns, contexts = [], []
        for kind, q, k in zip(kinds, n.chunk(len(kinds)), context.chunk(len(kinds)), strict=True):
            ns += [q] if kind else [q, q]
            contexts += [k] if kind else [k, other.to(k).expand(len(k), -1, -1)]
        context = torch.cat(contexts)
        return torch.cat(ns), context, context

    def together(n, extra):
        kinds = extra["cond_or_uncond"]
        chunks = [*n.split(len(n) // (len(kinds) + kinds.count(0)))]
        return torch.cat([chunks.pop(0) if kind else (chunks.pop(0) + chunks.pop(0)) / 2 for kind in kinds])

    coupled = loaded[0].clone()
    coupled.set_model_attn2_patch(couple)
    coupled.set_model_attn2_output_patch(together)
    for model in (record(model=coupled), record("a house", model=coupled)):
        watched, recording = model
        assert torch.equal(run(watched, encode(PROMPT)), run(coupled, encode(PROMPT)))
        assert len(recording.layers) == 10
        assert {size[0] for size in recording.sizes.values()} == {2}
        assert torch.allclose(recording.mass().sum(-1), torch.ones(2), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_columns_are_found_wherever_they_are(batch, count, repeats, before, after, seed):
    prompt = seeded(1, count, 32, seed=seed).expand(batch, -1, -1).repeat(1, repeats, 1)
    own = seeded(batch, before + after, 32, seed=seed + 100)
    changed = prompt + 0.05 * seeded(*prompt.shape, seed=seed + 200)
    context = torch.cat([own[:, :before], changed, own[:, before:]], 1)
    names = prompt_columns(context, prompt, count)
    wanted = torch.zeros(batch, context.shape[1], count)
    wanted[:, before : before + repeats * count] = torch.eye(count).repeat(repeats, 1)
    assert torch.equal(names, wanted)
    part = prompt_columns(changed[:, :count], prompt, count)  # a pack that leaves some out
    assert torch.equal(part, torch.eye(count).expand(batch, -1, -1))
