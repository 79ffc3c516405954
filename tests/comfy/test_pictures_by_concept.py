"""Pictures of several concepts: each goes with prompts that call for what it shows, in every preset and by every door."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from presets import config_for

from fmn_core.cli.main import main
from fmn_core.erasure import hybrid, resteering
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.text.concept import round_robin
from fmn_core.training import noise
from fmn_core.training.images import concept_pictures, read_folders

pytestmark = pytest.mark.usefixtures("little_probed")
SHORT = {"steps": 12, "num_images": 2, "num_inference_steps": 2, "resolution": 64, "attack_rounds": 1}
QUICK = config_for("paper", **SHORT)
NAMES = ("cat", "dog")
SHADES = (0.1, 0.2, 0.8, 0.9)  # of the pictures: dark ones are the cat's


@pytest.fixture
def images():
    return torch.tensor(SHADES)[:, None, None, None].expand(-1, 64, 64, 3).clone()


@pytest.fixture
def pairs(host, monkeypatch):
    """(latent, name in the prompt) of every estimate that is asked for a concept's picture, which no noise hides."""
    seen, predict = [], host.predict

    def watched(x_t, t, prompts):
        for x, text in zip(x_t, prompts.texts, strict=True):
            seen.extend((x, name) for name in NAMES if name in text)
        return predict(x_t, t, prompts)

    def unhidden(host, x0, generator):
        _, _, epsilon = noise.add_noise(host, x0, generator)
        return x0, torch.full((len(x0),), 500), epsilon

    monkeypatch.setattr(host, "predict", watched)
    for module in (resteering, hybrid):
        monkeypatch.setattr(module, "add_noise", unhidden)
    return seen


@pytest.mark.parametrize("preset", ["paper", "balanced", "robust"])
@pytest.mark.parametrize("order", [None, [0, 1, 0, 1]])
def test_every_picture_is_asked_for_by_the_name_of_what_it_shows(host, images, pairs, preset, order):
    latents = host.encode_images(images)
    shows = order or [0, 0, 1, 1]
    steps = {"paper": 12, "balanced": 3, "robust": 2}[preset]
    forget(host, "cat\ndog", config_for(preset, **SHORT | {"steps": steps}), images=images, concept_of=order)
    matched = []
    for x, name in pairs:
        distances = (latents - x).square().sum((1, 2, 3))
        if distances.min() < 1e-4:  # else a near word's own picture
            matched.append(NAMES[shows[distances.argmin()]] == name)
    assert len(matched) > steps and all(matched)


def test_pictures_for_the_visual_loss_are_asked_for_by_what_they_were_made_for(host, pairs):
    forget(host, "cat, kitten\ndog", replace(QUICK, visual_loss_weight=1.0, num_images=3, num_inference_steps=1, steps=20))
    asked: dict[tuple, set[str]] = {}
    for x, name in pairs[3:]:  # the first three are noise
        asked.setdefault(tuple(x.flatten()[:8].tolist()), set()).add(name)
    assert len(asked) >= 3 and all(len(names) == 1 for names in asked.values())


def test_the_model_makes_pictures_of_every_concept(host, monkeypatch):
    """However many names the first has."""
    sample, made = resteering.sample_pairs, []

    def watched(host, prompts, *rest, **settings):
        made.extend(prompts.texts)
        return sample(host, prompts, *rest, **settings)

    monkeypatch.setattr(resteering, "sample_pairs", watched)
    forget(host, "cat, kitten, tabby\ndog", replace(QUICK, steps=1))
    assert made == ["a photo of cat", "a photo of dog"]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 30))
def test_turns_are_fair(lists, count):
    tagged = [[(which, place) for place in range(len(own))] for which, own in enumerate(lists)]
    turns = round_robin(tagged, count)
    for which, own in enumerate(tagged):
        mine = [one for one in turns if one[0] == which]
        assert mine == (own * count)[: len(mine)] and len(mine) - count // len(lists) in (0, 1)
    assert len(turns) == count


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_a_batch_is_shared_out_in_order(concepts, each, flip):
    class Host:
        def latent_shape(self):
            return 4, 1, 1

    images = torch.rand(concepts * each, 8, 8, 3)
    mask = torch.rand(concepts * each, 8, 8) + 0.1
    fitted, masks, shows = concept_pictures(Host(), images, mask, flip=flip, concepts=concepts, concept_of=None)
    assert shows == [concept for concept in range(concepts) for _ in range(each)] * (2 if flip else 1)
    assert len(fitted) == len(masks) == len(shows)
    assert torch.equal(masks[: len(images)], mask)


@pytest.mark.parametrize(
    ("count", "concept_of", "message"),
    [
        (3, None, "3 pictures cannot be shared out among 2 concepts"),
        (1, None, "1 picture cannot be shared out among 2 concepts"),
        (2, [0], "Each of 2 pictures has to show one of 2 concepts"),
        (2, [0, 0], "Each of 2 pictures has to show one of 2 concepts"),
        (2, [0, 2], "Each of 2 pictures has to show one of 2 concepts"),
    ],
)
def test_pictures_that_cannot_be_shared_out_get_a_sentence(host, count, concept_of, message):
    for preset in ("paper", "balanced"):
        with pytest.raises(ForgetError, match=message):
            images = torch.rand(count, 64, 64, 3)
            forget(host, "cat\ndog", config_for(preset, **SHORT), images=images, concept_of=concept_of)


def test_a_folder_for_each_concept(tmp_path, model, capsys):
    for name, sizes in (("cats", [(64, 48), (80, 80)]), ("dogs", [(20, 30)])):
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / name / f"{number}.png")
    images, concept_of = read_folders([tmp_path / "cats", tmp_path / "dogs"])
    assert images.shape == (3, 48, 64, 3) and concept_of == [0, 0, 1]
    command = ["forget", "--model", model, "--concept", "cat", "--concept", "dog", "--preset", "paper", "--steps", "1",
               "--resolution", "64", "--device", "cpu", "--output", tmp_path / "both.safetensors"]  # fmt: skip
    for folders, code in ((["cats"], 1), (["cats", "dogs"], 0)):
        given = [word for folder in folders for word in ("--images", tmp_path / folder)]
        assert main([*map(str, [*command, *given])]) == code
        assert code == 0 or "2 concepts and 1 folders of pictures: give --images once for each" in capsys.readouterr().err
    assert (tmp_path / "both.safetensors").is_file()
