"""The script in a webui's process: run by tests/webui/test_webui_script.py, once in each flavour with its Gradio."""

from __future__ import annotations

import os
import time

import networks
import numpy as np
import pytest
import torch
from modules import processing, shared
from modules.sd_samplers_common import InterruptedException
from PIL import Image
from webui.ui.drawing import image_grid, values

from fmn_core.erasure.config import make_config
from fmn_core.host import ENCODED_AT_ONCE
from fmn_core.hosts.webui.base import WebuiBase
from fmn_core.hosts.webui.model import current_host
from fmn_core.text import features
from fmn_webui import stacks
from fmn_webui.lora_cards import STEPS, upright
from fmn_webui.names import STACKS
from fmn_webui.stacks import place_of
from fmn_webui.tasks import JOBS, ForgetRequest, submit_forget, submit_stack


def hooks():
    unet = current_host().unet
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def test_a_patch_outside_the_prompt_is_the_tag_in_it_and_gone_in_the_next_picture(draw):
    _, _, before = draw("a photo of a cat")
    p, _, patched = draw("a photo of a cat", values(("cat", 1.0)))
    _, _, tagged = draw("a photo of a cat <lora:cat:1>")
    _, _, after = draw("a photo of a cat")
    assert p.tags == [["cat", 1.0]] and p.extra_generation_params == {"FMN patches": "cat: 1"}
    assert np.array_equal(patched, tagged) and np.array_equal(before, after) and not np.array_equal(before, patched)


def test_a_patch_that_the_prompt_has_too_counts_once_at_the_sum(draw):
    p, _, both = draw("a photo of a cat <lora:cat:0.25>", values(("cat", 0.75)), hires_tags=[["cat", "0.5"], ["dog", "1"]])
    assert p.tags == [["cat", 1.0]]
    assert [each.items for each in p.hr_extra_network_data["lora"]] == [["dog", "1"], ["cat", "1.25"]]
    assert np.array_equal(both, draw("a photo of a cat <lora:cat:1>")[2])


def test_several_are_solved_jointly_into_one_file_or_added(draw, loras, monkeypatch):
    listed = []
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: listed.append(1))
    p, _, joint = draw("a photo of a cat", values(("cat", 1.0), ("dog", 0.5)))
    stacks = [*loras.glob("*/*.safetensors")]
    assert p.tags == [[stacks[0].stem, 1.0]] and len(stacks) == 1 and p.comments == [] and listed
    assert p.extra_generation_params == {"FMN patches": "cat: 1, dog: 0.5", "FMN patches jointly": "True"}
    again, _, same = draw("a photo of a cat", values(("dog", 0.5), ("cat", 1.0)))
    assert again.tags == p.tags and np.array_equal(joint, same) and [*loras.glob("*/*.safetensors")] == stacks
    p, _, added = draw("a photo of a cat", values(("cat", 1.0), ("dog", 0.5), jointly=False))
    assert p.tags == [["cat", 1.0], ["dog", 0.5]] and not np.array_equal(joint, added)


def test_a_stacked_file_is_hidden_where_the_host_loads_such_and_never_there_twice(script, loras, monkeypatch):
    hidden, shown = (loras / folder / "s.safetensors" for folder in STACKS)
    assert place_of("s.safetensors") == hidden and hidden.parent.name.startswith(".")
    with monkeypatch.context() as patched:
        patched.setitem(vars(shared.opts), "list_hidden_files", False)
        assert place_of("s.safetensors") == shown and not shown.parent.name.startswith(".")
    shown.parent.mkdir()
    shown.write_bytes(b"made earlier")
    try:
        assert place_of("s.safetensors") == shown
    finally:
        shown.unlink()
        shown.parent.rmdir()


def test_stacked_files_stay_that_were_used_last_and_no_others_but_those_in_use(script, loras, monkeypatch):
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: None)
    monkeypatch.setattr(stacks, "KEPT_FILES", 2)

    def rows(strength):
        return [("cat", 1.0), ("dog", strength)]

    made = [stacks.joint(rows(strength)) for strength in (0.1, 0.2, 0.3, 0.4)]
    assert all(path.exists() for path in made), "one that may be in use was taken away"
    by_hand = made[0].with_name("by-hand.safetensors")
    by_hand.touch()
    for age, path in zip((9, 8, 7, 6), made, strict=True):
        for file in (path, path.with_suffix(".json")):
            os.utime(file, (time.time() - age * stacks.IN_USE,) * 2)
    written = made[0].stat().st_mtime_ns
    assert stacks.joint(rows(0.1)) == made[0] and made[0].stat().st_mtime_ns == written, "the host would read it again"
    last = stacks.joint(rows(0.6))
    assert [path.exists() for path in (*made, last, by_hand)] == [True, False, False, False, True, True]
    assert [path.with_suffix(".json").exists() for path in (*made, last)] == [True, False, False, False, True]
    assert stacks.joint(rows(0.2)) == made[1] and made[1].exists(), "what is gone is made again"
    for path in (made[0], made[1], last, by_hand):
        path.unlink()


def test_a_checkpoint_put_into_the_same_model_is_another(script, monkeypatch):
    from fmn_webui.models import hash_of

    host = current_host()
    first, weight = hash_of(host), host.weight(next(iter(host.cross_attentions())), "to_k")
    kept = weight.detach().clone()
    with monkeypatch.context() as patched, torch.inference_mode():
        weight.add_(1)
        patched.setattr(host.sd_model.sd_checkpoint_info, "filename", "another.safetensors")
        assert hash_of(host) != first
    with torch.inference_mode():
        weight.copy_(kept)
    assert hash_of(host) == first


@pytest.mark.parametrize("width, height", [(256, 256), (512, 512), (512, 341), (341, 512), (1, 1)])
def test_a_card_shows_both_pictures_whole(width, height):
    before, after = (Image.new("RGB", (width, height), colour) for colour in ("red", "blue"))
    card = upright(image_grid([before, after], 1))
    assert card.height == 2 * height and (card.width, 3 * card.width / 2) >= (width, card.height - 3)
    left = (card.width - width) // 2
    for row, half in enumerate((before, after)):
        shown = card.crop((left, row * height, left + width, (row + 1) * height))
        assert np.array_equal(np.asarray(shown), np.asarray(half))


def over(job):
    """The job, once it is over."""
    with JOBS.changed:
        assert JOBS.changed.wait_for(lambda: job.over, 60)
    return job


def test_an_interrupt_of_fast_is_told_as_one(script, loras, monkeypatch):
    """In the first batch of prompts, and in the card's picture, when the patch is there."""
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: None)
    monkeypatch.setattr(features, "_cache", {})
    monkeypatch.setattr(WebuiBase, "cache_folder", lambda host: None)
    show = WebuiBase.show_progress

    def stop(host, step, total, preview):
        show(host, step, total, preview)
        if step and (total == 2 * STEPS) == with_card:
            shared.state.interrupt()

    with monkeypatch.context() as patched:
        patched.setattr(WebuiBase, "show_progress", stop)
        for with_card in (False, True):
            job = over(submit_forget(ForgetRequest("rose", make_config(resolution=64), "a rose")))
            assert (job.state, job.asked_to_stop) == ("stopped", True), job.error
            assert (loras / "a rose.safetensors").exists() == with_card and not (loras / "a rose.png").exists()
            if not with_card:
                assert job.step <= ENCODED_AT_ONCE < job.steps
    for file in loras.glob("a rose*"):
        file.unlink()
    assert over(submit_stack([("cat", 1.0)], "", False)).state == "done"
    JOBS.jobs.clear()


def test_an_interrupted_generation_leaves_no_hook(draw, monkeypatch):
    hooked = hooks()
    guess = processing.StableDiffusionProcessingTxt2Img.guess

    def stopping(*args):
        shared.state.interrupt()
        return guess(*args)

    with monkeypatch.context() as patched, pytest.raises(InterruptedException):
        patched.setattr(processing.StableDiffusionProcessingTxt2Img, "guess", stopping)
        draw("a photo of a cat", values(heat_maps=True))
    draw("a photo of a cat")
    assert hooks() == hooked
