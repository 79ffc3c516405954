"""What is drawn of recorded attention: heat maps, views, comparisons, colours."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from recordings import recorded, tokens

from fmn_core.attention.compare import CompareConfig, compare, draw_comparison
from fmn_core.attention.heatmap import shares
from fmn_core.attention.recorder import AttentionRecording
from fmn_core.attention.visualize import VIEWS, ViewConfig, layer_title, visualize
from fmn_core.errors import ForgetError
from fmn_core.plots.canvas import PAPER
from fmn_core.plots.colormaps import COLOR_MAPS, colorize, colorize_difference, overlay, percent
from fmn_core.plots.sheet import draw_bar


@pytest.mark.parametrize("tall", [30, 64, 240])
@pytest.mark.parametrize("ticks", [(0.5, 0.25, 0.0), (0.000012, 0.0, -0.000012)])
@pytest.mark.parametrize("old", [False, True])
def test_the_numbers_beside_a_colour_bar_do_not_touch_one_another(monkeypatch, tall, ticks, old):
    if old:  # Pillow's font before 10.1, which hangs from where others are centred
        monkeypatch.setattr("fmn_core.plots.sheet.font", lambda size: ImageFont.load_default_imagefont())
    canvas, boxes = Image.new("RGB", (200, 400), PAPER), []

    class Pen(ImageDraw.ImageDraw):
        def text(self, at, text, fill, font, anchor=None):
            boxes.append(self.textbbox(at, text, font, anchor))
            super().text(at, text, fill, font, anchor)

    draw_bar(canvas, Pen(canvas), (10, 10), tall, torch.zeros(tall, 3), ticks=ticks)
    boxes.sort(key=lambda box: box[1])
    assert len(boxes) == 4 and all(upper[3] <= lower[1] for upper, lower in itertools.pairwise(boxes))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_some_pictures_at_a_time_are_all_at_once(pictures, together, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(pictures, n, 6, generator=generator) for n in (6, 4))
    maps = []
    for count in (pictures, together):
        recording = AttentionRecording("a", tokens("a</w>"))
        for first in range(0, pictures, count):
            some = slice(first, first + count)
            recording.add("x", q[some], k[some], 2, (2, 3), pictures=pictures, first=first)
        maps.append(recording.map("x"))
    assert torch.allclose(*maps, atol=1e-6)


def test_too_many_sheets_are_refused(monkeypatch):
    monkeypatch.setattr("fmn_core.attention.visualize.MOST_NUMBERS", 500_000)
    with pytest.raises(ForgetError, match="2 pictures or masks of .* name fewer words"):
        visualize(recorded("a", "cat"), torch.rand(1, 8, 8, 3), ViewConfig(view="layers"))


def test_letters_of_other_languages_are_drawn():
    """Words that the drawing's own font has no letters for, and titles that an old Pillow could not write."""
    recording = recorded("süß", "кот", "猫")
    assert visualize(recording, torch.rand(1, 8, 8, 3), ViewConfig(view="contact_sheet"))[0].shape[0] == 1


def test_overlays_and_masks():
    recording = recorded("a", "neon", "cat", pictures=2)
    image = torch.rand(2, 24, 16, 3)
    overlays, masks, maximum = visualize(recording, image, ViewConfig(words="cat\n neon, "))
    assert overlays.shape == (4, 24, 16, 3) and masks.shape == (4, 24, 16)
    assert masks.max() == pytest.approx(1) and 0 < maximum < 1
    doubled = visualize(recording, image, ViewConfig(words="cat, neon", vmax=min(maximum * 2, 1)))[1]
    assert torch.allclose(doubled, masks * maximum / min(maximum * 2, 1), atol=1e-6)
    binary = visualize(recording, image, ViewConfig(words="cat, neon", threshold=0.5))[1]
    assert torch.equal(binary, (masks > 0.5).float()) and 0 < binary.mean() < 1
    assert len(visualize(recording, image, ViewConfig())[1]) == 2 * 3
    assert torch.allclose(visualize(recording, image, ViewConfig(words="cat", opacity=0.0))[0], image, atol=1e-6)
    with pytest.raises(ForgetError, match="is of 2 pictures"):
        visualize(recording, image[:1], ViewConfig(words="cat"))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(24, 16), (8, 40)])
def test_every_view_is_one_batch_of_pictures(view, size):
    granularity = {"over_steps": "steps", "heads": "heads"}.get(view, "mean")
    recording = recorded("a", "cat", granularity=granularity, pictures=2, steps=3)
    pictures, masks, maximum = visualize(recording, torch.rand(2, *size, 3), ViewConfig(view=view))
    count = {"overlay": 4, "contact_sheet": 2, "over_steps": 6}.get(view, 4)
    assert len(pictures) == count and pictures.shape[-1] == 3 and 0 <= pictures.min() and pictures.max() <= 1
    assert masks.shape == (4, *size) and 0 < maximum <= 1
    other = visualize(
        recorded("a", "cat", granularity=granularity, pictures=2, steps=3, seed=9),
        torch.rand(2, *size, 3),
        ViewConfig(view=view),
    )
    assert other[0].shape == pictures.shape


@pytest.mark.parametrize("view, granularity", [("over_steps", "steps"), ("heads", "heads")])
def test_a_view_of_what_was_not_kept_is_said(view, granularity):
    with pytest.raises(ForgetError, match=f"set `granularity` of Record Token Attention to `{granularity}`"):
        visualize(recorded("a", "cat"), torch.zeros(1, 8, 8, 3), ViewConfig(view=view))
    recording = recorded("a", "cat", granularity="heads")
    recording.apart = False
    with pytest.raises(ForgetError, match="256 MB were too few"):
        visualize(recording, torch.zeros(1, 8, 8, 3), ViewConfig(view="heads"))


def test_an_empty_recording_is_said():
    with pytest.raises(ForgetError, match="Nothing was recorded"):
        visualize(AttentionRecording("a cat", tokens("a</w>", "cat</w>")), torch.zeros(1, 8, 8, 3))


def test_a_recording_compared_with_itself_has_no_difference():
    one = recorded("a", "cat")
    comparison = compare(one, one, "", (8, 8))
    assert [pair.name for pair in comparison.pairs] == ["a", "cat"]
    assert all(pair.shares[0] == pair.shares[1] and torch.equal(*pair.maps) for pair in comparison.pairs)
    image = torch.rand(1, 8, 8, 3)
    assert draw_comparison(comparison, (image, image), CompareConfig()).shape[0] == 1


def test_two_prompts_are_compared_word_by_word():
    one, other = recorded("a", "cat", pictures=2), recorded("a", "red", "dog", pictures=2, seed=4)
    comparison = compare(one, other, "cat -> dog, a, red", (8, 12))
    names = [pair.names for pair in comparison.pairs]
    assert names == [("cat", "dog"), ("a", "a"), (None, "red")]
    assert comparison.pairs[0].shares == pytest.approx((shares(one)["cat"], shares(other)["dog"]))
    assert comparison.pairs[2].shares[0] == 0 and not comparison.pairs[2].maps[0].any()
    report = comparison.report(("with", "without"))
    assert "cat -> dog" in report and "red: not there" in report
    rows = json.loads(comparison.as_json())["words"]
    assert [row["change"] for row in rows] == pytest.approx([pair.shares[1] - pair.shares[0] for pair in comparison.pairs])
    images = (torch.rand(2, 8, 12, 3), torch.rand(2, 16, 24, 3))  # of another size: brought to the first one's
    assert draw_comparison(comparison, images, CompareConfig()).shape[0] == 2


@pytest.mark.parametrize("words, match", [("bird", "`bird` is not in"), ("cat -> bird", "`bird` is not in")])
def test_a_word_of_neither_prompt_is_said(words, match):
    with pytest.raises(ForgetError, match=match):
        compare(recorded("a", "cat"), recorded("a", "dog"), words, (8, 8))


def test_recordings_of_unlike_numbers_of_pictures_are_said():
    with pytest.raises(ForgetError, match="One recording is of 1 pictures and the other of 2"):
        compare(recorded("a", "cat"), recorded("a", "cat", pictures=2), "", (8, 8))


@pytest.mark.parametrize("name", COLOR_MAPS)
def test_color_maps_grow_brighter(name):
    colors = colorize(torch.linspace(0, 1, 50), name)
    luminance = colors @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (luminance.diff() > 0).all()
    picture = torch.rand(4, 4, 3)
    assert torch.equal(overlay(picture, torch.rand(4, 4), 0.0, name), picture)


def test_differences_are_blue_below_and_red_above():
    less, same, more = colorize_difference(torch.tensor([-1.0, 0.0, 1.0]))
    assert less[2] > less[0] and more[0] > more[2] and (same > 0.95).all()


@pytest.mark.parametrize(
    "share, text", [(0.0, "0 %"), (0.5, "50 %"), (0.0123, "1.2 %"), (0.000456, "0.046 %"), (1.0, "100 %")]
)
def test_percents_have_two_figures(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    "name, title",
    [
        ("input_blocks.4.1.transformer_blocks.0.attn2", "input 4.1"),
        ("middle_block.1.transformer_blocks.9.attn2", "middle 1 / 9"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.attn2", "up 1.2"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2", "mid 0"),
    ],
)
def test_layers_have_short_names(name, title):
    assert layer_title(name) == title
