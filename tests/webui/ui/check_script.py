"""The script in a webui's process: run by tests/webui/test_webui_script.py, once in each flavour with its Gradio."""

from __future__ import annotations

import math
import os
import re
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from modules import extra_networks, images, processing, shared
from modules.scripts import ScriptRunner
from modules.sd_samplers_common import InterruptedException
from PIL import Image
from webui.ui.fixtures import NOTHING

from fmn_core.erasure.config import make_config
from fmn_core.errors import ForgetError
from fmn_core.host import ENCODED_AT_ONCE
from fmn_core.hosts.webui.base import WebuiBase
from fmn_core.hosts.webui.model import current_host
from fmn_core.patch.file import read_patch, serialize
from fmn_core.patch.patch import Patch
from fmn_core.text import features
from fmn_webui import stacks
from fmn_webui.applying import ALLOW
from fmn_webui.lora_cards import STEPS, upright
from fmn_webui.names import STACKS
from fmn_webui.stacks import place_of
from fmn_webui.tasks import JOBS, ForgetRequest, submit_forget, submit_stack


class Runner(ScriptRunner):
    """The webui's order: tags are taken from prompts after `before_process_batch`, and LoRAs loaded."""

    def before_process_batch(self, p, **kwargs):
        self.script.before_process_batch(p, *self.values, **kwargs)
        p.prompts, tags = extra_networks.parse_prompts(p.prompts)
        p.tags = [[each.items[0], float(each.items[1])] for each in tags["lora"]]
        files = [str(next(Path(shared.cmd_opts.lora_dir).rglob(f"{name}.safetensors"))) for name, _ in p.tags]
        networks.load_networks(files, [strength for _, strength in p.tags], [strength for _, strength in p.tags])
        if p.hires_tags is not None:
            p.hr_extra_network_data = {"lora": [extra_networks.ExtraNetworkParams([*items]) for items in p.hires_tags]}

    def postprocess(self, p, processed):
        processed.index_of_first_image, processed.all_prompts, processed.all_seeds = 0, p.all_prompts, p.all_seeds
        self.script.postprocess(p, processed, *self.values)


@pytest.fixture
def draw(script):
    """draw(prompt, values, script=(number in the list, what it does)) -> the job and what it made, pictures as arrays."""
    own = script

    def draw(prompt, values=NOTHING, *, hires_tags=None, script=(0, processing.process_images), **options):
        options = {"steps": 2, "width": 64, "height": 64, "cfg_scale": 3.0, **options}
        disabled = options.pop("disable_extra_networks", False)
        p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, **options)
        p.disable_extra_networks = disabled
        p.scripts, p.hires_tags, p.comments, p.outpath_samples = Runner(own, values), hires_tags, [], "outputs"
        p.comment = p.comments.append
        chosen, run = script
        p.script_args = [chosen, *values]
        shared.state.begin("test")
        try:
            processed = run(p)
        finally:
            shared.state.end()
        return p, processed, [np.asarray(image) for image in processed.images]

    return draw


def values(*rows, jointly=True, heat_maps=False, words="", layout="overlay", save=False):
    rows = [*rows, *[("None", 1.0)] * 3][:3]
    return (*(each for row in rows for each in row), jointly, heat_maps, words, layout, 0.6, "inferno", save)


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


def test_words_that_are_not_there_are_told_under_the_picture(draw):
    p, processed, _ = draw("a photo of a cat", values(heat_maps=True, words="whale"))
    assert "`whale` is not in the recorded prompt" in p.comments[0] and len(processed.images) == 1


@contextmanager
def away(file):
    """The file under a name that nobody asks for."""
    file.rename(file.with_suffix(".away"))
    try:
        yield
    finally:
        file.with_suffix(".away").rename(file)


@contextmanager
def holding(file, data):
    """The file with other bytes in it."""
    with away(file):
        file.write_bytes(data)
        try:
            yield
        finally:
            file.unlink()


def changed(file, change, **info):
    """The bytes of a patch with other tensors and other words about itself."""
    patch = read_patch(file)
    return serialize(Patch({key: change(key, each) for key, each in patch.items()}, patch.info | info), file.stem)


def same(key, tensor):
    return tensor


def for_wider_text(key, tensor):
    return torch.cat([tensor] * 2, 1) if key.endswith("to_k.lora_down.weight") else tensor


def missing(loras, way):
    """A context in which the patch `cat` cannot be had, and what has to be said of it."""
    file = loras / "cat.safetensors"
    return {
        "gone": lambda: (away(file), "There is no patch `cat`"),
        "no patch": lambda: (holding(file, b"nothing"), "There is no patch `cat`"),
        "cut off": lambda: (holding(file, file.read_bytes()[:-9]), "There is no patch `cat`"),
        "damaged": lambda: (
            holding(file, changed(file, lambda key, each: each * math.nan)),
            "copy the original again|damaged",
        ),
        "of another schema": lambda: (holding(file, changed(file, same, schema=99)), "schema 99"),
        "for another model": lambda: (holding(file, changed(file, for_wider_text)), "another shape"),
    }[way]()


@pytest.mark.parametrize("rows", [[("cat", 1.0)], [("dog", 1.0), ("cat", 0.5)]])
@pytest.mark.parametrize("way", ["gone", "no patch", "cut off", "damaged", "of another schema", "for another model"])
def test_without_a_patch_there_is_no_picture_unless_the_user_allows_it(draw, loras, monkeypatch, rows, way):
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: None)
    context, said = missing(loras, way)
    with context:
        with pytest.raises(ForgetError, match=said) as refused:
            draw("a photo of a cat", values(*rows))
        assert (refused.value.status_code, refused.value.detail) == (422, str(refused.value))
        assert vars(shared.opts)[ALLOW] is False
        monkeypatch.setitem(vars(shared.opts), ALLOW, True)
        p, _, made = draw("a photo of a cat", values(*rows))
        assert re.search(said, p.comments[0]) and p.tags == [[*row] for row in rows if row[0] == "dog"]
        assert np.array_equal(made, draw("a photo of a cat", values(*rows[:-1]))[2])
    assert draw("a photo of a cat", values(*rows))[0].comments == []


@pytest.mark.parametrize("wrong", [
    values(("Cat", 1.0)), values(("../../evil", 1.0)), values((["cat"], 1.0)), values(("cat.safetensors", 1.0)),
    values((7, 1.0)), values(("cat", math.nan)), values(("cat", math.inf)), values(("cat", 10**4000)),
    values(("cat", "much")), values(("cat", None)),
    values(("cat", 1.0), layout="spiral"), values(("cat", 1.0))[:-2], values(("cat\ud800", 1.0)),
])  # fmt: skip
def test_a_request_that_is_wrong_has_no_picture(draw, monkeypatch, wrong):
    for allowing in (False, True):
        monkeypatch.setitem(vars(shared.opts), ALLOW, allowing)
        if allowing and isinstance(wrong[1], float) and math.isfinite(wrong[1]) and wrong[0] != "cat" and len(wrong) == 13:
            continue  # a name that is none is a patch that is missing
        with pytest.raises(ForgetError) as refused:
            draw("a photo of a cat", wrong)
        assert refused.value.status_code == 422


@pytest.mark.parametrize("base, said", [
    ({"name": "another", "hash": "0" * 64}, True), ({"name": "another", "hash": ""}, False), ({"name": "another"}, False),
    ({"hash": "0" * 64}, False), ({"name": "another", "hash": None}, False),
])  # fmt: skip
@pytest.mark.parametrize("rows", [[("cat", 1.0)], [("dog", 1.0), ("cat", 0.5)]])
def test_a_patch_of_another_checkpoint_is_told_under_the_picture(draw, loras, monkeypatch, base, said, rows):
    monkeypatch.setitem(vars(networks), "list_available_networks", lambda: None)
    file = loras / "cat.safetensors"
    made = changed(file, same, base=read_patch(file).info["base"] | base)
    plain = draw("a photo of a cat", values(*rows))
    with holding(file, made):
        p, _, pictures = draw("a photo of a cat", values(*rows))
    assert plain[0].comments == [] and np.array_equal(plain[2], pictures)
    assert [("`cat` was made for another" in sentence) for sentence in p.comments] == [True] * said


@pytest.mark.skipif(find_spec("backend") is None, reason="Forge's layers alone have scales")
@pytest.mark.parametrize("added, storage, refused", [
    ("merged", torch.float8_e4m3fn, True), ("in fp16", torch.float8_e4m3fn, False), ("in fp16", torch.bfloat16, True),
    ("in fp16, with fp8 sums", torch.float8_e4m3fn, True),
])  # fmt: skip
def test_a_patch_is_refused_where_scaled_fp8_would_hide_it(draw, monkeypatch, added, storage, refused):
    """The host merges LoRAs into weights before they are scaled, unless `Diffusion in Low Bits` has it add them in fp16."""
    from backend.args import dynamic_args

    host = current_host()
    plain, patched = (draw("a photo of a cat", values(*rows))[2] for rows in ([], [("cat", 1.0)]))
    monkeypatch.setattr(host.base, "storage_dtype", storage)
    monkeypatch.setitem(dynamic_args, "online_lora", added != "merged")
    monkeypatch.setitem(dynamic_args, "ops", "fp8" if "sums" in added else None)
    assert np.array_equal(draw("a photo of a cat", values(("cat", 1.0)))[2], patched)
    scaled = next(layer for layer in host.unet.modules() if hasattr(layer, "scale_weight"))
    monkeypatch.setattr(scaled, "scale_weight", torch.ones(()))
    assert np.array_equal(draw("a photo of a cat")[2], plain)
    if not refused:
        assert np.array_equal(draw("a photo of a cat", values(("cat", 1.0)))[2], patched)
        return
    with pytest.raises(ForgetError, match="scaled fp8.*no patch would be seen.*No picture was made"):
        draw("a photo of a cat", values(("cat", 1.0)))
    monkeypatch.setitem(vars(shared.opts), ALLOW, True)
    p, _, pictures = draw("a photo of a cat", values(("cat", 1.0)))
    assert "scaled fp8" in p.comments[0] and np.array_equal(pictures, plain)


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


def loads_nothing(*_):
    networks.loaded_networks.clear()


def loads_another(load):
    def loads(files, *strengths):
        load(files, *strengths)
        for net in networks.loaded_networks:
            net.network_on_disk.filename = str(Path(files[0]).with_name("dog.safetensors"))

    return loads


@pytest.mark.parametrize("loads, said", [
    (lambda load: loads_nothing, "has not loaded `cat`"), (loads_another, "in the place of"),
])  # fmt: skip
def test_a_patch_that_the_host_did_not_load_ends_the_generation(draw, monkeypatch, loads, said):
    with monkeypatch.context() as patched:
        patched.setattr(networks, "load_networks", loads(networks.load_networks))
        with pytest.raises(ForgetError, match=said):
            draw("a photo of a cat", values(("cat", 1.0)))
        patched.setitem(vars(shared.opts), ALLOW, True)
        assert said in draw("a photo of a cat", values(("cat", 1.0)))[0].comments[0]
    with pytest.raises(ForgetError, match="are disabled"):
        draw("a photo of a cat", values(("cat", 1.0)), disable_extra_networks=True)
    assert draw("a photo of a cat", values(("cat", 1.0)))[0].comments == []


def test_whatever_fails_in_the_script_ends_the_generation(draw, monkeypatch):
    monkeypatch.setattr("fmn_webui.applying.find_patch", lambda name: 1 / 0)
    with pytest.raises(ForgetError, match="ZeroDivisionError"):
        draw("a photo of a cat", values(("cat", 1.0)))
    assert draw("a photo of a cat")[0].comments == []


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


def image_grid(pictures, rows):
    """Pictures beside and below one another, as the webui's scripts have it."""
    columns = math.ceil(len(pictures) / rows)
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    return grid


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
