"""The script and the API in a webui's process: run by tests/test_webui_script.py, once in each flavour with its Gradio."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import standin

sys.path.insert(0, str(Path(__file__).parent))
import host_page

host_page.import_standin(forge=any("webui_forge" in path for path in sys.path))

import gradio as gr  # noqa: E402
import networks  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from modules import extra_networks, images, processing, script_callbacks, shared  # noqa: E402
from modules.scripts import ScriptRunner  # noqa: E402
from modules.sd_samplers_common import InterruptedException  # noqa: E402

from fmn_core.forget import forget  # noqa: E402
from fmn_core.hosts.webui import current_host  # noqa: E402
from fmn_core.patch import save_patch  # noqa: E402
from fmn_core.settings import ForgetSettings  # noqa: E402

NOTHING = ("None", 1.0) * 3 + (True, False, "", "overlay", 0.6, "inferno", False)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """The LoRA folder, with two patches in it."""
    folder = tmp_path_factory.mktemp("Lora")
    host_page.set_options(folder, api=True)
    host = current_host(64)
    for name in ("cat", "dog"):
        save_patch(forget(host, name, ForgetSettings(resolution=64))[0], folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def script(loras):
    made = host_page.load_extension()
    with gr.Blocks():
        assert [control.value for control in made.ui(False)] == [*NOTHING]
    return made


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
    """draw(prompt, values) -> the job and what it made, pictures as arrays."""

    def draw(prompt, values=NOTHING, *, hires_tags=None, **options):
        options = {"steps": 2, "width": 64, "height": 64, "cfg_scale": 3.0, **options}
        p = processing.StableDiffusionProcessingTxt2Img(prompt=prompt, **options)
        p.scripts, p.hires_tags, p.comments, p.outpath_samples = Runner(script, values), hires_tags, [], "outputs"
        p.comment = p.comments.append
        shared.state.begin("test")
        try:
            processed = processing.process_images(p)
        finally:
            shared.state.end()
        return p, processed, [np.asarray(image) for image in processed.images]

    return draw


@pytest.fixture(autouse=True)
def reaches_for_nothing_else():
    standin.REACHED.clear()
    yield
    assert not standin.REACHED, standin.REACHED


def values(*rows, jointly=True, heat_maps=False, words="", layout="overlay", save=False):
    rows = [*rows, *[("None", 1.0)] * 3][:3]
    return (*(each for row in rows for each in row), jointly, heat_maps, words, layout, 0.6, "inferno", save)


def hooks():
    unet = current_host(64).unet
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


def test_what_is_not_there_is_told_under_the_picture(draw):
    p, _, made = draw("a photo of a cat", values(("../../evil", 1.0)))
    assert "There is no patch" in p.comments[0] and p.tags == [] and p.extra_generation_params == {}
    assert np.array_equal(made, draw("a photo of a cat")[2])
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


def test_a_grid_has_every_word_and_hires_fix_its_own_size(draw):
    p, _, made = draw("a photo of a cat", values(heat_maps=True, layout="contact sheet"), batch_size=1)
    assert len(made) == 2 and made[1].shape[0] > 2 * 64 and p.comments == []
    p, _, made = draw("a photo of a cat", values(heat_maps=True, words="cat"), enable_hr=True)
    assert [each.shape for each in made] == [(128, 128, 3)] * 2 and p.comments == []


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


def client(app) -> TestClient:
    for callback in script_callbacks.app_started[-1:]:
        callback(None, app)
    return TestClient(app)


def test_the_routes_stand_behind_the_hosts_own_locks(script, loras):
    host_page.set_options(loras, api=False)
    assert client(FastAPI()).get("/fmn/jobs").status_code == 404
    host_page.set_options(loras, api=False, nowebui=True)
    assert client(FastAPI()).get("/fmn/jobs").json() == []
    host_page.set_options(loras, api=True, api_auth="eve:x,ada:se:cret")
    locked = client(FastAPI())
    host_page.set_options(loras, api=True)
    with gr.Blocks() as page:
        gr.Markdown("locked")
    page.queue()
    app, *_ = page.launch(prevent_thread_lock=True, auth=[("ada", "se:cret")], quiet=True, show_api=False)
    for guarded in (locked, client(app)):
        for wrong in (None, ("ada", "x"), ("eve", "se:cret"), ("", "")):
            for path in ("/fmn/jobs", "/fmn/patches"):
                assert guarded.get(path, auth=wrong).status_code == 401
            assert guarded.post("/fmn/forget", json={"concept": "cat"}, auth=wrong).status_code == 401
        assert guarded.get("/fmn/jobs", auth=("ada", "se:cret")).json() == []
        assert [each["name"] for each in guarded.get("/fmn/patches", auth=("ada", "se:cret")).json()] == ["cat", "dog"]
    page.close()
