"""The second demo model's captions, the words that none of them has, and its training."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import pytest
import torch

from demo import unseen, vocabulary
from demo.recipe.pictures import caption, caption_by_name, scenes
from demo.vocabulary import OBJECTS, plural


def words_of(make, count=3):
    dice = random.Random(0)
    return {word for scene in scenes(1) for _ in range(count) for word in re.findall(r"\w+", make(scene, dice)[0])}


def test_captions_by_name_have_no_other_word_for_an_object():
    found, others = words_of(caption_by_name), {*vocabulary.KINDS.values()}
    others |= {word for thing in OBJECTS.values() for word in thing.synonyms.split()} - unseen.caption_words()
    assert others <= words_of(caption) and not others & found


def test_captions_by_name_say_what_is_shown():
    dice = random.Random(0)
    for scene in scenes(1):
        text, said = caption_by_name(scene, dice)
        for field, value in said._asdict().items():
            assert (plural(value) if field == "object" and said.count else value) in text, (text, said)


def test_no_caption_has_a_word_of_the_list():
    lists, captions = unseen.read_unseen(), words_of(caption_by_name)
    assert captions <= unseen.caption_words()
    assert set(lists) == {"synonyms", "rare synonyms", "kinds", "descriptions"}
    words = [word for group in ("synonyms", "rare synonyms", "kinds") for word in lists[group]]
    assert len(words) == len(set(words)) and not set(words) & unseen.caption_words()
    for group in lists.values():
        assert set(group.values()) <= set(OBJECTS)
    for text, name in lists["descriptions"].items():
        assert not re.search(rf"\b({name}|{plural(name)})\b", text.lower())
    assert "Princeton University" in unseen.FILE.read_text()


WORDNET = {
    "data.noun": [
        "  1 A licence.  ",
        "  2 And its end.  ",
        "00000001 18 n 02 cat 0 gossip 0 000 | a spiteful person",
        '00000002 05 n 03 cat 1 true_cat 0 mog 0 002 ~ 00000003 n 0000 ~ 00000004 n 0000 | a mammal that purrs; "it sat"',
        "00000003 05 n 04 tabby 0 Felix 0 alley_cat 0 drawing 1 001 ~ 00000005 n 0000 | a cat with stripes",
        "00000004 05 n 02 unused 0 tom 1 000 | no text uses it",
        "00000005 05 n 01 mouser 0 000 | a cat that catches mice",
        "00000006 05 n 01 tom 0 000 | a male turkey",
    ],
    "index.noun": [
        "  1 A licence.  ",
        "cat n 2 1 ~ 2 1 00000001 00000002",
        "mog n 1 1 @ 1 0 00000002",
        "tabby n 1 1 @ 1 1 00000003",
        "drawing n 1 1 @ 1 1 00000003",
        "tom n 2 1 @ 2 2 00000006 00000004",
        "mouser n 1 1 @ 1 1 00000005",
        "unused n 1 1 @ 1 0 00000004",
    ],
    "cntlist.rev": ["tabby%1:05:00:: 1 2", "mouser%1:05:00:: 1 7", "drawing%1:05:01:: 1 9", "tom%1:05:01:: 2 5"],
}


def test_the_rule_on_a_small_wordnet(tmp_path):
    """The animal and not the person; the most used first; no caption's word, no name, none that means another thing."""
    for name, lines in WORDNET.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    wordnet = unseen.WordNet(tmp_path)
    assert wordnet.licence == "A licence.\nAnd its end."
    words = unseen.find_words(wordnet)
    assert words == {"synonyms": {}, "rare synonyms": {"mog": "cat"}, "kinds": {"mouser": "cat", "tabby": "cat"}}
    assert list(words["kinds"]) == ["mouser", "tabby"]
    assert unseen.find_descriptions(wordnet) == {"a mammal that purrs": "cat"}


@pytest.fixture(scope="module")
def lessons(comfy):
    """Latents, texts and captions of eight pictures of noise; the module that trains on them."""
    from demo.recipe import flux

    try:
        texts = flux.Texts(["", "a cat", "a drawing of a dog, neon style"], "cpu")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    latents = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(flux=flux, texts=texts, latents=latents, captions=torch.tensor([[1, 2]] * 8))


class Interrupted(Exception):
    pass


def train(lessons, folder, steps, stop=None, losses=None):
    from demo.recipe.run import Run

    class Watched(Run):
        def steps(self, *arguments):
            for step in super().steps(*arguments):
                if step == stop:
                    self.save(step)
                    raise Interrupted
                yield step

        def update(self, step, loss):
            super().update(step, loss=loss)
            if losses is not None:
                losses.append(loss)

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    run = Watched("transformer", folder, 1000, most_steps=steps)
    average = lessons.flux.train_transformer(
        lessons.flux.make_transformer(), lessons.latents, lessons.texts, lessons.captions, run, batch=8
    )
    return average.state_dict()


def test_training_resumed_is_training_uninterrupted(lessons, tmp_path):
    whole = train(lessons, tmp_path / "whole", 6)
    with pytest.raises(Interrupted):
        train(lessons, tmp_path / "cut", 6, stop=3)
    resumed = train(lessons, tmp_path / "cut", 6)
    assert all(torch.equal(weight, resumed[key]) for key, weight in whole.items())


def test_the_loss_falls(lessons, tmp_path):
    losses = []
    train(lessons, tmp_path / "run", 30, losses=losses)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_noise_on_the_text_is_on_its_tokens_and_not_on_the_empty_prompt(lessons, tmp_path):
    from demo.recipe.run import Run

    texts, rows = lessons.texts, torch.tensor([0, 1, 2])
    contexts, pooled = texts.noisy(rows, Run("noise", tmp_path, 1))
    assert torch.equal(contexts[0], texts.contexts[0].float()) and torch.equal(pooled[0], texts.pooled[0])
    assert not contexts[~texts.tokens].any()
    change = (contexts - texts.contexts.float())[1:][texts.tokens[1:]]
    assert 0 < change.square().mean().sqrt() < 1.1 * lessons.flux.TEXT_NOISE * texts.sizes[0]
