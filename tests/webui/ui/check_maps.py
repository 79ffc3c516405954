"""The script's heat maps in the gallery: run by tests/webui/test_webui_script.py, once in each flavour with its Gradio."""

from __future__ import annotations

import math

import numpy as np
import pytest
from modules import images, processing
from webui.ui.drawing import image_grid, values

from fmn_core.hosts.webui.model import current_host


def hooks():
    unet = current_host().unet
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def test_words_that_are_not_there_are_told_under_the_picture(draw):
    p, processed, _ = draw("a photo of a cat", values(heat_maps=True, words="whale"))
    assert "`whale` is not in the recorded prompt" in p.comments[0] and len(processed.images) == 1


def test_heat_maps_go_to_the_gallery_and_leave_the_picture_as_it_is(draw):
    hooked = hooks()
    _, _, plain = draw(["a photo of a cat", "a photo of a red hat"], batch_size=2)
    images.saved.clear()
    wanted = values(heat_maps=True, words="a photo", save=True)
    p, processed, made = draw(["a photo of a cat", "a photo of a red hat"], wanted, batch_size=2)
    assert len(made) == 4 and all(np.array_equal(a, b) for a, b in zip(plain, made[:2], strict=True))
    assert made[2].shape == (64, 64, 3) and not np.array_equal(made[2], made[3]) and p.comments == []
    assert len(processed.infotexts) == 4 and 'FMN heat map of: "a photo"' in processed.infotexts[3]
    assert [(each[2], each[-1]) for each in images.saved] == [(1, "-heat-a-photo"), (2, "-heat-a-photo")]
    assert p.extra_generation_params["FMN heat map words"] == "a photo" and hooks() == hooked


def prompt_matrix(p, size):
    """What scripts of the list do with the pictures of a generation: a grid of all, whose columns have to be as many as
    their labels, in front of them."""
    first, *rest = p.prompt.split("|")
    p.prompt = [", ".join([first, *(text for n, text in enumerate(rest) if at & 1 << n)]) for at in range(2 ** len(rest))]
    p.n_iter, p.batch_size = math.ceil(len(p.prompt) / 2), 2
    processed = processing.process_images(p)
    rows = 1 << len(rest) // 2
    grid = image_grid(processed.images, rows)
    assert grid.width // size == 2 ** len(rest) // rows, "bad number of horizontal texts"
    processed.images.insert(0, grid)
    processed.infotexts.insert(0, processed.infotexts[0])
    return processed


MATRIX = ["", ", hat", ", red", ", hat, red"]


def test_a_script_that_counts_pictures_gets_those_of_its_prompts_alone(draw):
    images.saved.clear()
    wanted = values(heat_maps=True, words="cat")
    p, processed, made = draw("a photo of a cat|hat|red", wanted, script=(3, lambda p: prompt_matrix(p, 64)))
    assert len(made) == len(processed.infotexts) == 1 + 4 and made[0].shape == (128, 128, 3)
    assert all(f"cat{more}\n" in text for more, text in zip(MATRIX, processed.infotexts[1:], strict=True))
    assert [(seed, suffix) for _, _, seed, *_, suffix in images.saved] == [(n, "-heat-cat") for n in (1, 2, 3, 4)]
    assert {*p.comments} == {"The heat maps are files in outputs: a script counts the pictures of its gallery."}


@pytest.mark.parametrize("prompt, words, texts", [
    ("a photo of a [cat:hat:0.5]", "cat, hat, photo", {"a photo of a cat": "cat photo", "a photo of a hat": "hat photo"}),
    ("a photo of a [cat|hat]", "", {"a photo of a cat": "a photo of cat", "a photo of a hat": "a photo of hat"}),
    ("a cat AND a red hat :0.5", "cat, hat", {"a cat": "cat", "a red hat": "hat"}),
    ("a [cat:red cat:1] AND a hat", "red, hat", {"a red cat": "red", "a hat": "hat"}),
    ("a cat[: in a hat:0.9]", "cat, hat", {"a cat": "cat", "a cat in a hat": "cat hat"}),
    ("a cat[: in a hat:1.0]", "cat", {"": "cat"}),
    ("a cat :0.5", "cat", {"": "cat"}),
])  # fmt: skip
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_that_comes_to_several_texts_has_heat_maps_of_each(draw, prompt, words, texts, batch):
    _, _, plain = draw([prompt] * batch, batch_size=batch, steps=4)
    p, processed, made = draw([prompt] * batch, values(heat_maps=True, words=words), batch_size=batch, steps=4)
    assert p.comments == [] and all(np.array_equal(a, b) for a, b in zip(plain, made[:batch], strict=True))
    told = [text.partition("FMN heat map of: ")[2] for text in processed.infotexts[batch:]]
    expected = [
        f'"{word}"' + (f', FMN heat map in: "{text}"' if text else "")
        for text, several in texts.items()
        for word in several.split(" ")
    ]
    assert told == expected * batch and len(made) == len(processed.infotexts)
    assert "FMN heat maps" in p.extra_generation_params


def test_the_map_of_a_part_is_what_that_text_alone_attends_to(draw):
    alone = draw("a photo of a hat", values(heat_maps=True, words="hat"))[2]
    for prompt in ("a photo of a [cat:hat:0]", "a photo of a [hat:cat:1.0]"):
        made = draw(prompt, values(heat_maps=True, words="hat"))[2]
        assert len(made) == 2 and all(np.array_equal(a, b) for a, b in zip(alone, made, strict=True))


@pytest.mark.parametrize("prompts, words, said", [
    (["a [cat|hat]", "a [hat|cat]"], "", "cannot be told apart"),
    (["a cat AND a cat"], "", "cannot be told apart"),
    (["a [cat|hat]"], "whale", "not in the recorded prompt"),
])  # fmt: skip
def test_where_there_are_no_maps_the_reason_is_told_and_the_infotext_says_nothing(draw, prompts, words, said):
    p, processed, made = draw(prompts, values(heat_maps=True, words=words), batch_size=len(prompts))
    assert len(made) == len(prompts) and said in p.comments[0] and len(p.comments) == 1
    assert p.extra_generation_params == {} and not any("FMN" in text for text in processed.infotexts)


def test_batches_without_maps_do_not_shift_those_of_the_others(draw):
    prompts = ["a [cat|hat]", "a [hat|cat]", "a cat", "a hat"]
    p, processed, made = draw(prompts, values(heat_maps=True, words="a"), batch_size=2, n_iter=2)
    assert len(made) == 6 and len(p.comments) == 1
    assert ["a cat\n" in processed.infotexts[4], "a hat\n" in processed.infotexts[5]] == [True, True]


def test_a_grid_has_every_word_and_hires_fix_its_own_size(draw):
    p, _, made = draw("a photo of a cat", values(heat_maps=True, layout="contact_sheet"), batch_size=1)
    assert len(made) == 2 and made[1].shape[0] > 2 * 64 and p.comments == []
    p, _, made = draw("a photo of a cat", values(heat_maps=True, words="cat"), enable_hr=True)
    assert [each.shape for each in made] == [(128, 128, 3)] * 2 and p.comments == []
