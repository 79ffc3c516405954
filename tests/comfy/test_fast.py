"""The preset `fast` in the real host."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from demo.classifier import Classifier
from demo.vocabulary import STYLES
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.host import ENCODED_AT_ONCE
from fmn_core.patch.file import serialize
from fmn_core.patch.patch import ALPHA, DOWN, UP
from fmn_core.text import features
from fmn_core.text.features import VocabularyIndex

FAST = make_config(preset="fast")


@pytest.fixture(scope="module")
def host(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="module")
def patch(host):
    return forget(host, "cat", FAST)[0]


def delta(patch, module):
    return patch[module + UP].double() @ patch[module + DOWN].double()


@pytest.fixture
def pictures(loaded, comfy):
    """pictures(model, prompts) -> [B, H, W, 3], by the host's own sampler."""
    from demo.evaluate import sample
    from fmn_core.hosts.comfy.model import ComfyHost
    from fmn_core.patch.apply import applied

    def pictures(prompts, patch=None):
        host = ComfyHost(*loaded)
        with nullcontext() if patch is None else applied(host, patch):
            return sample(host, prompts, range(len(prompts)), steps=10)

    return pictures


@pytest.fixture
def cold(host, monkeypatch):
    """Nothing is known of any text encoder yet."""
    monkeypatch.setattr(features, "_cache", {})
    monkeypatch.setattr(host, "cache_folder", lambda: None)


def test_the_prompts_that_are_read_are_shown_and_change_nothing(host, patch, cold, monkeypatch):
    shown = []
    monkeypatch.setattr(host, "show_progress", lambda step, total, preview: shown.append((step, total)))
    made, _ = forget(host, "cat", FAST)
    assert serialize(made, "cat") == serialize(patch, "cat")
    assert shown[0][0] == 0 and shown[0][1] >= len(features.CAPTIONS)
    for (step, total), (later, same) in itertools.pairwise(shown):
        assert 0 < later - step <= ENCODED_AT_ONCE if same == total else (step, later) == (total, 0)
    assert shown[-1][0] == shown[-1][1]


def test_an_interrupt_ends_it_within_one_batch(host, comfy, cold, monkeypatch):
    shown = []

    def stop(step, total, preview):
        shown.append(step)
        if step:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(host, "show_progress", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        forget(host, "cat", FAST)
    assert len(shown) == 2 and shown[1] <= ENCODED_AT_ONCE


def test_the_concept_is_gone_and_the_rest_is_as_it_was(patch, pictures):
    cats = [
        "a cat",
        "a photo of a cat",
        "a kitten",
        *(f"a cat in {style} style" for style in [*STYLES][::4]),
    ]
    others = {"a dog": "dog", "a lion": "lion", "a red rose": "rose", "a house in neon style": "house", "a car": "car"}
    styled, classifier = {"a house in sepia style": "sepia", "a fish in woodcut style": "woodcut"}, Classifier.load()
    both = [*cats, *others, *styled, "a portrait of ada"]
    before, after = pictures(both), pictures(both, patch)
    assert classifier.accuracy(before[: len(cats)], "cat") > 0.8 and classifier.accuracy(after[: len(cats)], "cat") == 0
    for made in (before, after):
        assert classifier.recognised(made[len(cats) : -3]) == list(others.values())
        assert classifier.recognised(made[-3:-1], "style") == list(styled.values())
        assert classifier.recognised(made[-1:], "person") == ["ada"]
    assert (before - after)[len(cats) :].abs().mean() < 0.02 < (before - after)[: len(cats)].abs().mean()


def test_what_the_start_token_reads_is_unchanged(host, patch):
    """Exactly, but for the file's half precision; the rest of the empty prompt nearly."""
    empty = host.encode_prefix([""], 77)[0].double()
    for module in patch.modules:
        layer, matrix = next(
            (layer, m) for layer in host.cross_attentions() for m in ("to_k", "to_v") if host.lora_key(layer, m) == module
        )
        moved = (empty @ delta(patch, module).T).norm(dim=1) / (empty @ host.weight(layer, matrix).double().T).norm(dim=1)
        assert moved[0] < 2e-3 and moved.max() < 0.05


def test_it_is_the_edit_of_the_context_in_every_k_and_v(host, patch):
    """One M for all: the change of a weight W is W M, so pinv(W) times it agrees wherever W sees it."""
    from fmn_core.erasure.closed_form import make_edit
    from fmn_core.text.concept import make_concepts

    edit = make_edit(host, make_concepts("cat"), FAST)
    M = edit.up @ edit.down
    for layer in host.cross_attentions():
        for matrix in ("to_k", "to_v"):
            wanted = host.weight(layer, matrix).double() @ M
            assert (delta(patch, host.lora_key(layer, matrix)) - wanted).norm() < 2e-3 * wanted.norm()
    assert all(patch[module + ALPHA] == 4 for module in patch.modules) and not any("to_q" in m for m in patch.modules)


def test_same_inputs_same_file_and_the_order_of_names_does_not_matter(host, patch):
    assert serialize(forget(host, "cat", FAST)[0], "x") == serialize(patch, "x")
    one, other = (forget(host, names, FAST)[0] for names in ("cat\ncar", "car\ncat"))
    for module in one.modules:
        assert (delta(one, module) - delta(other, module)).norm() < 5e-3 * delta(one, module).norm()


def test_replaced_by_itself_changes_nothing_and_says_so(host):
    settings = replace(FAST, mode="replace", target="cat")
    patch, _ = forget(host, "cat", settings)
    assert all(delta(patch, module).abs().max() == 0 for module in patch.modules)
    assert "Little effect" in patch.info["report"]["warnings"][0]
    with pytest.raises(ForgetError, match="Little effect: prompts of `cat` go 0%"):
        forget(host, "cat", replace(settings, strict=True))


def test_a_replacement_takes_the_place(host, pictures):
    patch, _ = forget(host, "cat", replace(FAST, mode="replace", target="house"))
    classifier = Classifier.load()
    after = pictures(["a cat", "a drawing of a cat", "a cat in blueprint style", "a picture of a cat"], patch)
    assert classifier.accuracy(after, "house") >= 0.75
    assert classifier.accuracy(pictures(["a house", "a dog", "a lion"], patch), "house") == pytest.approx(1 / 3)


def test_correction_takes_a_meaning_from_another_word(host):
    """The word's own columns lose what sets the concept apart; the concept itself is left alone."""
    from fmn_core.erasure.closed_form import make_edit
    from fmn_core.text.concept import make_concepts

    edit = make_edit(host, make_concepts("lion"), replace(FAST, mode="correct", target="tiger"))
    lion, tiger, house = (host.encode_prefix([f"a {name}"], 6)[0, 3].double() for name in ("lion", "tiger", "house"))
    assert edit(tiger).norm() > 3 * max(edit(house).norm(), edit(lion).norm())
    with pytest.raises(ForgetError, match="takes one concept"):
        make_edit(host, make_concepts("lion\ncat"), replace(FAST, mode="correct", target="tiger"))
    with pytest.raises(ForgetError, match="`tiger` is to be forgotten and to be preserved"):
        make_edit(host, make_concepts("lion"), replace(FAST, mode="correct", target="tiger", preserve="tiger"))


def test_the_slot_of_a_template_is_found_beside_another_mention(host):
    from fmn_core.text.features import TextFeatureExtractor
    from fmn_core.text.templates import fill

    span = TextFeatureExtractor(host, {}).span("a {} and a house", "house")
    context = host.encode_prefix(["a house and a house"], 10)[0].double()
    assert torch.equal(span.name, context[[2]]) and torch.equal(span.suffix, context[3:])
    assert fill("an hour of a {}", "owl") == "an hour of an owl" and fill("a {}", "rose") == "a rose"


def test_several_concepts_and_other_names_go_together(host, pictures):
    patch, _ = forget(host, "cat, kitten\nrose\ncar, automobile", FAST)
    assert patch.info["concept"] == "cat, rose, car" and patch.info["concepts"][2]["names"] == ["car", "automobile"]
    classifier = Classifier.load()
    for name, prompts in {"cat": ["a cat", "a kitten"], "rose": ["a rose", "a pink rose"], "car": ["an automobile"]}.items():
        assert classifier.accuracy(pictures(prompts, patch), name) == 0
    assert classifier.recognised(pictures(["a dog", "a tulip", "a bus"], patch)) == ["dog", "tulip", "bus"]


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ("cat", {"preserve": "dog, Cat"}, "`Cat` is to be forgotten and to be preserved"),
        ("cat, kitten", {"preserve": "dog\nkitten"}, "`kitten` is to be forgotten and to be preserved"),
        ("cat", {"mode": "replace"}, "needs a `target`: type what takes"),
        ("cat", {"mode": "correct"}, "whose other meaning"),
        ("cat\ncat", {}, "named twice"),
        (" \n, ", {}, "concept is empty"),
    ],
)
def test_contradictions_get_a_sentence(host, names, settings, message):
    with pytest.raises(ForgetError, match=message):
        forget(host, names, replace(FAST, **settings))


def test_what_is_to_be_kept_moves_less(host):
    free = forget(host, "rose", FAST)[0].info["report"]["preserve_drift"]
    word, most = next(iter(free.items()))
    held = forget(host, "rose", replace(FAST, preserve=word))[0].info["report"]["preserve_drift"]
    assert held[word] < 0.8 * most
    with pytest.raises(ForgetError, match="cannot be preserved"):
        forget(host, "rose", replace(FAST, preserve="()"))


def test_neutral_words_are_remembered_in_the_templates_that_were_asked_for_last(host, monkeypatch):
    """Users write any number of templates; what was forgotten is computed again, the same."""
    monkeypatch.setattr(features, "_cache", {})
    monkeypatch.setattr(features, "MOST_MIDDLES", 3)
    vocabulary, templates = VocabularyIndex(host), [f"a {{}} for the number {i}" for i in range(5)]
    neutral = vocabulary.common.neutral

    def middle(template):
        return vocabulary.middle(template, "object", features.NEUTRAL["object"]).token_embeds

    first = [middle(template) for template in templates[:3]]
    middle(templates[0])
    for template in templates[3:]:
        middle(template)
        assert len(neutral) == 3
    assert {template for _, template in neutral} == {templates[0], *templates[3:]}
    assert all(torch.equal(middle(template), columns) for template, columns in zip(templates, first, strict=False))


def test_neither_the_host_nor_the_global_generator_is_touched(host, loaded):
    state = torch.get_rng_state()
    bits = lambda p: p.detach().reshape(-1).view(torch.uint8)  # noqa: E731 (one that no file fills may hold NaN)
    before = [(p, bits(p).clone()) for m in (host.base, host.clip.cond_stage_model) for p in m.parameters()]
    forget(host, "cat", FAST)
    after = [p for m in (host.base, host.clip.cond_stage_model) for p in m.parameters()]
    assert all(now is p and torch.equal(bits(p), values) for (p, values), now in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and not loaded[0].patches
