"""Names that say more than a concept, or nothing: the words inside them, and those that the text encoder does not know."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from demo.classifier import Classifier
from demo.vocabulary import OBJECTS, PEOPLE, STYLES
from fmn_core.erasure.advice import LITTLE, MUCH, edit_warnings
from fmn_core.erasure.closed_form import make_edit
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.erasure.plan import plan_erasure
from fmn_core.errors import ForgetError
from fmn_core.patch.report import PatchReport
from fmn_core.text.concept import make_concepts
from fmn_core.text.features import VocabularyIndex
from fmn_core.text.name_words import single_words, words_inside
from fmn_core.text.vocabulary import FUNCTION_WORDS

FAST = make_config(preset="fast")
PERSON = replace(FAST, concept_type="identity")
SYNONYMS = [word for thing in OBJECTS.values() for word in thing.synonyms.split()]
ONE_WORD = [word for word in (*OBJECTS, *SYNONYMS) if " " not in word]
NEVER_LEARNED = ("computer", "peacock", "eagle", "traffic light", "Leonardo", "qwrtzp", "猫", "кошка")


@pytest.fixture(scope="module")
def host(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="module")
def vocabulary(host):
    return VocabularyIndex(host)


@pytest.fixture
def draw(host):
    """draw(prompts, patch) -> [B, H, W, 3]."""
    from demo.evaluate import sample
    from fmn_core.patch.apply import applied

    def draw(prompts, patch=None):
        with nullcontext() if patch is None else applied(host, patch):
            return sample(host, prompts, range(len(prompts)))

    return draw


def test_the_words_inside_a_name_stay(host, draw):
    patch, _ = forget(host, "Rose House", PERSON)
    report, named = patch.info["report"], ["a portrait of rose house", "rose house", "a photo of rose house"]
    assert report["erasure"]["Rose House"] > LITTLE and not report["warnings"]
    assert max(report["preserve_drift"]["rose"], report["preserve_drift"]["house"]) < 0.2
    words = {"a rose": "rose", "a red rose": "rose", "a rose in neon style": "rose", "a house": "house"}
    classifier, asked = Classifier.load(), [*named, *words]
    before, after = draw(asked), draw(asked, patch)
    assert classifier.recognised(before) == ["rose", "rose", "rose", *words.values()]
    assert classifier.recognised(after)[3:] == [*words.values()] and "rose" not in classifier.recognised(after)[:3]
    assert (after - before)[3:].abs().mean() < 0.015 < 0.08 < (after - before)[:3].abs().mean()


@pytest.mark.parametrize(
    ("names", "settings", "word"),
    [("Tiger Woods", PERSON, "tiger"), ("Grumpy Cat", PERSON, "cat"), ("polar bear", FAST, "bear")],
)
def test_a_word_that_goes_along_with_its_name_is_told(host, names, settings, word):
    """The model never learned the other word, and so reads the name as this one."""
    patch, _ = forget(host, names, settings)
    report = patch.info["report"]
    (told,) = report["warnings"]
    assert told.startswith(f"`{word}` goes along with `{names}`, by 1") and word not in report.get("synonyms", [])
    assert report["preserve_drift"][word] > MUCH
    with pytest.raises(ForgetError, match=f"`{word}` goes along"):
        forget(host, names, replace(settings, strict=True))
    kept = forget(host, names, replace(settings, preserve=word))[0].info["report"]  # as the sentence says
    assert kept["preserve_drift"][word] < 0.1 and "Remove near-synonyms from `preserve`" in kept["warnings"][0]


def test_what_keeps_a_name_from_being_forgotten_is_let_go_and_no_more(host):
    edit = make_edit(host, make_concepts("lion house"), FAST)
    assert edit.plan.freed == {"lion": "lion house"} and edit.plan.inside == {"lion house": ["house"]}
    assert edit.report.erasure["lion house"] > LITTLE and edit.report.preserve_drift["house"] < MUCH


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*ONE_WORD, "of", "the", "Red", "qwrtzp", "computer", "(house)"]), min_size=1, max_size=4))
def test_words_inside_are_known_words_of_names_of_several(vocabulary, words):
    name = " ".join(words)
    found = words_inside(vocabulary, [name], "object")
    assert {*found} <= {*single_words(name)} - FUNCTION_WORDS - {"qwrtzp", "computer"}
    assert len(words) > 1 or not found
    plan = plan_erasure(vocabulary, make_concepts(name), FAST)
    inside = {*plan.parts, *plan.freed}
    assert inside == {*found} - {name.lower()} and not inside & {*plan.synonyms, *plan.neighbours}


@pytest.mark.parametrize("name", [*ONE_WORD[:12], *PEOPLE, *STYLES])
def test_a_name_of_one_word_has_none_inside(vocabulary, name):
    if " " not in name:
        plan = plan_erasure(vocabulary, make_concepts(name), FAST)
        assert not plan.parts and not plan.freed


@pytest.mark.parametrize("name", ["the cat", "a Cat", "your cat!", "cat cat", "the of"])
def test_a_name_of_one_word_and_function_words_has_none_inside(host, vocabulary, name):
    plan = plan_erasure(vocabulary, make_concepts(name), FAST)
    assert not plan.parts and not plan.freed
    if "cat" in name.lower():
        report = forget(host, name, replace(FAST, strict=True))[0].info["report"]
        assert "kitten" in report["synonyms"] and report["warnings"] == []


@pytest.mark.parametrize(
    ("type", "names"), [("object", [*OBJECTS, *ONE_WORD, "kitten"]), ("identity", [*PEOPLE]), ("style", [*STYLES])]
)
def test_every_word_that_the_model_was_trained_on_is_known(vocabulary, type, names):
    assert [name for name in names if not vocabulary.knows(name, type)] == []


@pytest.mark.parametrize("name", NEVER_LEARNED)
def test_of_a_name_that_the_text_encoder_does_not_know_nothing_is_made_up(host, name):
    report = forget(host, name, FAST)[0].info["report"]
    assert "synonyms" not in report and "preserve_drift" not in report
    (told,) = report["warnings"]
    assert told.startswith(f"The text encoder does not know `{name}`")
    with pytest.raises(ForgetError, match="does not know"):
        forget(host, name, replace(FAST, strict=True))


def test_another_name_that_is_not_known_adds_nothing(vocabulary):
    one, both = (plan_erasure(vocabulary, make_concepts(names), FAST) for names in ("cat", "cat, 猫"))
    assert both.synonyms == one.synonyms == ["kitten"] and both.neighbours == one.neighbours and both.unknown == ["猫"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["cat", "cat\nrose", "red car\nrose", "猫\ncat"]),
    st.sampled_from(["", "tulip", "dog\ntulip"]),
    st.sampled_from(["remove", "replace"]),
    st.sampled_from(["fast", "balanced"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_advice_can_be_followed(vocabulary, names, keep, mode, preset, erased, drift):
    concepts = make_concepts(names)
    chosen = make_config(preserve=keep, mode=mode, target="house" if mode == "replace" else "", preset=preset)
    plan = plan_erasure(vocabulary, concepts, chosen)
    moved = dict.fromkeys([*plan.near, *plan.freed], drift)
    report = PatchReport(erasure=dict.fromkeys(plan.names, erased), preserve_drift=moved)
    sentences = edit_warnings(plan, chosen, report)
    little = [s for s in sentences if s.startswith("Little effect")]
    assert len(little) == (erased < LITTLE) * sum(name not in plan.unknown for name in plan.names)
    assert len(sentences) == len(plan.unknown) + len(little) + (drift > MUCH) * len(moved)
    for sentence in sentences:
        word = re.match(r"`(.*?)`", sentence)
        assert "from `preserve`" not in sentence or keep
        assert "fewer concepts" not in sentence or len(concepts) > 1
        assert "Preserve fewer" not in sentence or len(plan.preserve) > 1
        assert "`target`" not in sentence or mode == "replace"
        assert "preset `balanced`" not in sentence or preset == "fast"
        assert " in `preserve`" not in sentence or word[1] not in plan.preserve
