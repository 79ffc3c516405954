"""Maps by the formula, a prompt's words, and heat maps as pictures and data."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import LAYER, recorded, tokens

from fmn_core.attention.capture import attention_probabilities, is_prompt, layer_size
from fmn_core.attention.compare import compare
from fmn_core.attention.export import as_json, as_npz
from fmn_core.attention.frames import Box, Origin
from fmn_core.attention.heatmap import OTHER, shares
from fmn_core.attention.recorder import AttentionRecording, RecordingConfig
from fmn_core.attention.visualize import ViewConfig, visualize
from fmn_core.errors import ForgetError
from fmn_core.plots.colormaps import percent
from fmn_core.text.tokens import distinct_words, find_phrase, words_of


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_probabilities_are_the_softmax(batch, heads, pixels, tokens, d, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, n, heads * d, generator=generator) for n in (pixels, tokens))
    A = attention_probabilities(q, k, heads)
    assert torch.allclose(A.sum(-1), torch.ones(batch, heads, pixels), atol=1e-5)
    for b in range(batch):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = (q[b, :, part].double() @ k[b, :, part].double().T) / d**0.5
            assert torch.allclose(A[b, h].double(), scores.exp() / scores.exp().sum(-1, keepdim=True), atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_layer_sizes_are_found_from_pixels(height, width, halvings):
    h, w = height, width
    for _ in range(halvings):
        h, w = -(-h // 2), -(-w // 2)
    assert layer_size(height, width, h * w) == (h, w)


def test_a_context_is_told_from_others():
    embedding = torch.randn(3, 4)
    assert is_prompt(embedding.half(), embedding) and is_prompt(embedding.repeat(3, 1), embedding)
    assert not is_prompt(embedding * 1.01, embedding) and not is_prompt(embedding[:2], embedding)
    assert not is_prompt(torch.cat([embedding, embedding.flip(0)]), embedding)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.sampled_from(["mean", "steps", "heads"]),
    st.integers(1, 5), st.integers(300, 20_000), st.integers(0, 99),
)  # fmt: skip
def test_whatever_the_room_the_columns_sum_to_one(height, width, pictures, granularity, steps, room, seed):
    """Down to less than one map's room: maps get coarser, or steps are joined, and what is kept stays a mean."""
    recording = AttentionRecording("a", tokens("a</w>"), RecordingConfig(granularity=granularity, max_memory_mb=1))
    generator = torch.Generator().manual_seed(seed)
    recording.begin()
    everything = []
    make_room = recording.make_room
    recording.make_room = lambda layer, step, _, device: make_room(layer, step, room, device)
    for step in range(steps):
        q, k = (torch.randn(pictures, n, 6, generator=generator) for n in (height * width, 4))
        recording.add("x", q, k, 2, (height, width), step=step)
        everything.append(attention_probabilities(q, k, 2).mean(1))
    map = recording.map("x")
    assert torch.allclose(map.sum(-1), torch.ones(map.shape[:-1]), atol=1e-5)
    least = 4 * (pictures * (2 if granularity == "heads" else 1) * 4 + 1)
    assert recording.bytes() <= max(room, least)
    assert (map.shape[1] == 2) == recording.apart
    if not recording.halved:
        assert torch.allclose(map.mean(1).flatten(1, 2), torch.stack(everything).mean(0), atol=1e-5)


def test_rows_at_a_time_are_all_at_once(monkeypatch):
    q, k = torch.randn(2, 7 * 5, 6), torch.randn(2, 4, 6)
    maps = []
    for memory in (2**20, 1e-9):
        recording = AttentionRecording("a", tokens("a</w>"))
        monkeypatch.setattr("fmn_core.attention.recorder.AT_ONCE", 8 if memory > 1 else 2**30)
        recording.add("x", q, k, 2, (7, 5))
        maps.append(recording.map("x"))
    assert torch.allclose(*maps, atol=1e-6)


def test_parts_are_put_in_their_places():
    recording = AttentionRecording("a", tokens("a</w>"))
    for top in (0, 2):
        recording.add("x", torch.randn(1, 8, 6), torch.randn(1, 4, 6), 2, (2, 4), box=Box(5, 6, top, 2))
    sums = recording.map("x")[0, 0].sum(-1)
    assert torch.allclose(sums[:4, 2:], torch.ones(4, 4), atol=1e-5)
    assert not sums[4].any() and not sums[:, :2].any()


def test_a_recording_of_several_batches_is_refused():
    """As where the host gives a sampler a list of latents: it runs several times for one node."""
    origin = Origin("job", "5", "digest")
    recording = recorded("a", "cat")
    recording.begin(origin)
    assert not recording.several
    recording.begin(origin)
    recording.add(LAYER.format(1), torch.rand(1, 4, 6), torch.rand(1, 5, 6), 2, (2, 2))
    with pytest.raises(ForgetError, match="sampled several times"):
        visualize(recording, torch.zeros(1, 8, 8, 3))
    recording.begin(Origin("next job", "5", "digest"))
    recording.add(LAYER.format(1), torch.rand(1, 4, 6), torch.rand(1, 5, 6), 2, (2, 2))
    assert visualize(recording, torch.zeros(1, 8, 8, 3), ViewConfig(words="cat"))


def test_forwards_of_another_size_are_brought_to_the_first():
    """As where a pack shrinks the layers in some of the steps."""
    recording = AttentionRecording("a", tokens("a</w>"), RecordingConfig(granularity="steps"))
    recording.begin()
    for step, (height, width) in enumerate([(4, 6), (8, 12), (3, 5)]):
        recording.add("x", torch.randn(2, height * width, 6), torch.randn(2, 4, 6), 2, (height, width), step=step)
    assert len(recording.frames) == 3 and recording.map("x").shape == (2, 1, 4, 6, 4)
    for frame in (None, 0, 1, 2):
        assert torch.allclose(recording.map("x", frame).sum(-1), torch.ones(2, 1, 4, 6), atol=1e-5)


def test_a_layer_that_is_left_out_of_some_steps():
    recording = AttentionRecording("a", tokens("a</w>"), RecordingConfig(granularity="steps"))
    recording.begin()
    for step, layer in enumerate([LAYER.format(1), LAYER.format(2)]):
        recording.add(layer, torch.randn(1, 4, 6), torch.randn(1, 4, 6), 2, (2, 2), step=step)
    assert not recording.map(LAYER.format(2), 0).any()
    assert len(visualize(recording, torch.rand(1, 8, 8, 3), ViewConfig(view="over_steps"))[0]) == 2


def test_attention_that_is_no_number_is_nothing():
    recording = AttentionRecording("a", tokens("a</w>"))
    recording.add("x", torch.full((1, 4, 6), float("nan")), torch.randn(1, 4, 6), 2, (2, 2))
    assert sum(shares(recording).values()) == 0
    assert not visualize(recording, torch.rand(1, 8, 8, 3))[1].any()


@pytest.mark.parametrize("granularity", ["mean", "heads"])
def test_heat_maps_are_means_over_layers_and_heads(granularity):
    recording = recorded("a", "cat", granularity=granularity)
    total = 0
    for name in recording.layers:
        for head in recording.map(name).unbind(1):
            map = head.permute(0, 3, 1, 2)
            total = total + torch.nn.functional.interpolate(map, (4, 4), mode="bicubic").clamp(min=0)
    count = sum(recording.map(name).shape[1] for name in recording.layers)
    assert torch.allclose(recording.heat_maps([2, 1]), total[:, [2, 1]] / count)


def test_layers_of_many_heads_count_as_often():
    recording = AttentionRecording("a", tokens("a</w>"))
    recording.begin()
    maps = {}
    for layer, heads in (("x", 1), ("y", 3)):
        q, k = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
        recording.add(layer, q, k, heads, (2, 2))
        maps[layer] = attention_probabilities(q, k, heads).unflatten(2, (2, 2))
    expected = torch.cat([maps["x"], maps["y"]], 1).mean(1).permute(0, 3, 1, 2)
    assert torch.allclose(recording.heat_maps([0, 1, 2, 3]), expected, atol=1e-6)


def test_pieces_of_words_are_merged_and_phrases_found():
    prompt = tokens("a</w>", "twe", "moji</w>", "of</w>", "a</w>", "red</w>", "cat</w>", ",</w>", "red</w>", "cat</w>")
    assert [word for word, _ in words_of(prompt)] == ["a", "twemoji", "of", "a", "red", "cat", ",", "red", "cat"]
    assert distinct_words(prompt) == ["a", "twemoji", "of", "red", "cat"]
    assert find_phrase(prompt, "Twemoji") == [2, 3]
    assert find_phrase(prompt, "red cat") == [6, 7, 9, 10]
    assert find_phrase(prompt, "cat, red") == [7, 8, 9]
    with pytest.raises(ForgetError, match="`dog` is not in the recorded prompt: its words are a, twemoji, of, red, cat"):
        find_phrase(prompt, "dog")


def test_shares_sum_to_one():
    both = shares(recorded("a", "cat", "a"))
    assert set(both) == {"a", "cat", "<start>", "<end and padding>"} and sum(both.values()) == pytest.approx(1, abs=1e-5)


def test_columns_of_another_pack_have_a_share_of_their_own():
    """Three columns beside the prompt's own; what they get is no word's, and is said."""
    recording = AttentionRecording("a", tokens("a</w>"))
    q, k = torch.randn(1, 4, 6), torch.randn(1, 7, 6)
    recording.add("x", q, k, 2, (2, 2), names=torch.eye(7)[None, :, 2:6])
    probabilities = attention_probabilities(q, k, 2).mean((0, 1, 2))
    both = shares(recording)
    assert both[OTHER] == pytest.approx(probabilities[[0, 1, 6]].sum().item(), abs=1e-6)
    assert both["a"] == pytest.approx(probabilities[3].item(), abs=1e-6) and sum(both.values()) == pytest.approx(1, abs=1e-6)
    assert OTHER in json.loads(as_json(recording))["shares"]
    (line,) = (
        line for line in compare(recording, recorded("a"), "", (8, 8)).report(("one", "two")).splitlines() if OTHER in line
    )
    assert line.endswith(f"{percent(both[OTHER])}, 0 %")


@pytest.mark.parametrize("granularity", ["mean", "steps", "heads"])
def test_data_are_the_maps(granularity):
    recording = recorded("a", "cat", granularity=granularity, pictures=2, steps=3)
    data = np.load(io.BytesIO(as_npz(recording)))
    facts = json.loads(data["facts"].item())
    assert facts == json.loads(as_json(recording))
    assert facts["words"]["cat"] == [2] and facts["tokens"][2]["text"] == "cat</w>"
    for name in recording.layers:
        saved = torch.from_numpy(data[name])
        expected = torch.stack([recording.map(name, i) for i in range(3)]) if granularity == "steps" else recording.map(name)
        assert torch.equal(saved, expected)
