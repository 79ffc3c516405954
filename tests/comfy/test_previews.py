"""What a training shows of itself: only where it is seen, now and then, at no cost to what it learns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from presets import JOBS

from fmn_core import log as module
from fmn_core.erasure import hybrid, resteering
from fmn_core.erasure.forget import forget
from fmn_core.host import IMAGES_AT_ONCE
from fmn_core.hosts.diffusers.model import DiffusersHost
from fmn_core.inversion import textual_inversion as inversion
from fmn_core.inversion.textual_inversion import invert_pictures
from fmn_core.log import PREVIEW_EVERY, Progress
from fmn_core.plots.colormaps import overlay
from fmn_core.training import preview as previews

pytestmark = pytest.mark.usefixtures("little_probed")
PICTURES = 2 * IMAGES_AT_ONCE + 1


class Bar(Progress):
    """A bar that remembers when it showed what, by a clock of its own."""

    def __init__(self, seen):
        self.seen, self.clock, self.shown = seen, 0.0, []

    def shows_previews(self):
        return self.seen

    def show_progress(self, step, total, preview):
        self.shown.append((step, total, preview))


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=40), st.booleans())
def test_previews_are_made_at_the_first_and_last_step_and_in_between_by_the_clock(steps, seen):
    """Each step takes its seconds, and so would its preview."""
    bar, made = Bar(seen), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module.time, "monotonic", lambda: bar.clock)
        with bar.progress(len(steps)) as shown:
            for step, (seconds, takes) in enumerate(steps):
                bar.clock += seconds

                def preview(step=step, takes=takes):
                    begun, bar.clock = bar.clock, bar.clock + takes
                    made.append((step, begun, bar.clock))
                    return step

                shown.update(preview)
    assert [(step, total) for step, total, _ in bar.shown] == [(i + 1, len(steps)) for i in range(len(steps))]
    assert [preview for *_, preview in bar.shown if preview is not None] == [step for step, *_ in made]
    if not seen:
        assert not made
        return
    assert made[0][0] == 0 and made[-1][0] == len(steps) - 1
    for (_, _, ended), (step, begun, _) in zip(made, made[1:], strict=False):
        assert begun - ended >= PREVIEW_EVERY or step == len(steps) - 1
    for (_, before, ended), (step, begun, _) in zip(made, made[1:], strict=False):
        assert begun - ended >= 8.99 * (ended - before) or step == len(steps) - 1, "a tenth of the time at most"


@pytest.fixture
def made(monkeypatch):
    """How often what makes a preview was asked, and how many latents were decoded at once."""
    count, at_once = Counter(), []

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            count[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((resteering, "preview"), (hybrid, "preview"), (inversion, "linear_decoder")):
        counted(owner, name)

    def watch(host):
        decode = host.decode_few
        monkeypatch.setattr(host, "decode_few", lambda latents: at_once.append(len(latents)) or decode(latents))
        return host

    return count, at_once, watch


def trained(host, name):
    """The tensors that a small job learns."""
    settings = replace(JOBS[name], num_images=PICTURES)
    if name == "inversion":
        return invert_pictures(host, settings, concept="cat").vectors
    return dict(forget(host, "cat", settings)[0])


@pytest.mark.parametrize("name", [*JOBS])
def test_a_preview_is_made_where_it_is_seen_and_what_is_learned_is_the_same_without(comfy, loaded, made, monkeypatch, name):
    from fmn_core.hosts.comfy.model import ComfyHost

    count, at_once, watch = made
    shown, results = [], []
    monkeypatch.setattr(module, "PREVIEW_EVERY", 0.0)
    monkeypatch.setattr(module, "PREVIEW_SHARE", 1.0)
    for seen in (True, False):
        hook = (lambda value, total, preview, node_id: shown.append(preview)) if seen else None
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
        results.append(trained(watch(ComfyHost(*loaded)), name))
        if seen:
            assert sum(count.values()) == (1 if name == "inversion" else len([*filter(None, shown)])) > 0
            assert sum(at_once) == PICTURES and max(at_once) <= IMAGES_AT_ONCE
        else:
            assert not count and not at_once and not any(shown)
        shown.clear(), count.clear(), at_once.clear()
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_the_command_line_makes_no_previews(pipeline, made):
    count, at_once, watch = made
    trained(watch(DiffusersHost(pipeline, progress_bar=False)), "paper")
    assert not count and not at_once


SEEN = """
import asyncio, sys
from pathlib import Path

sys.path.insert(0, "{comfyui}")
import utils.install_util  # before the host's nodes put a folder with another `utils` first
from demo.host import import_comfyui

comfy = import_comfyui(Path("{comfyui}"))
from main import hijack_progress
from server import PromptServer
from fmn_core.hosts.comfy.previews import previews_seen

page = PromptServer(asyncio.new_event_loop())
assert not previews_seen(), "nothing listens to the host's bars"
hijack_progress(page)
assert not previews_seen(), "no page is there"
page.sockets["one"] = object()
assert previews_seen()
page.client_id = "another"
assert not previews_seen(), "the page that asked is gone"
page.client_id = "one"
assert previews_seen()
"""


def test_previews_are_seen_by_the_page_that_asked_or_where_none_is_named_by_any(run_python, comfyui):
    """By the host's own server, in a process of its own: its modules are called as some of the pack's."""
    run_python("-c", SEEN.format(comfyui=comfyui))


def test_previews_are_slices_of_what_is_decoded_at_once(host):
    latents = torch.randn(PICTURES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    parts = [host.decode_few(part) for part in latents.split(IMAGES_AT_ONCE)]
    assert torch.equal(host.decode(latents), torch.cat(parts))


def test_a_preview_adds_layers_of_a_size_before_it_scales_them(host, monkeypatch):
    """SDXL has sixty layers of one size: to scale each takes as long as a step."""
    sizes, scale = [], previews.F.interpolate
    monkeypatch.setattr(
        previews.F, "interpolate", lambda x, *args, **kwargs: sizes.append(x.shape) or scale(x, *args, **kwargs)
    )
    maps = {str(i): torch.rand(2, 3, pixels, 2) for i, pixels in enumerate([64, 16, 16, 64, 64])}
    columns = torch.tensor([[True, True], [False, True]])
    shown = previews.preview(maps, columns, None, [0, 1], torch.zeros(2, 4, 8, 8))
    assert len(sizes) == 2 and shown.shape == (64, 64, 3)
    heat = torch.zeros(64, 64)
    for A in maps.values():
        mass = A[0].sum(-1).mean(0).reshape(1, 1, *[int(A.shape[2] ** 0.5)] * 2)
        heat += scale(mass, (64, 64), mode="bilinear")[0, 0] / len(maps)
    assert torch.allclose(shown, overlay(torch.zeros(64, 64, 3), heat, opacity=0.6), atol=0.02)
