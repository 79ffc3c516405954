"""The webuis' tab in both versions of Gradio and in Chromium, and their API; FMN_SCREENSHOTS names a folder to keep
screenshots in."""

from __future__ import annotations

import base64
import io
import json
import re
import time

import pytest
from comfyui_page import PATIENCE, browser, screenshots, wait_for_frames  # noqa: F401
from PIL import Image
from safetensors import safe_open
from waiting import STALLED
from webui.ui.gradio_page import VERSIONS, WebuiPage

SMALL = {"resolution": 64, "num_inference_steps": 2, "num_images": 1}


@pytest.fixture(scope="module", params=VERSIONS)
def page(request, comfyui, tmp_path_factory):
    with WebuiPage(request.param, comfyui, tmp_path_factory.mktemp(request.param) / "Lora", "--api") as page:
        page.flavour = request.param
        yield page


@pytest.fixture
def tab(page, browser):  # noqa: F811
    """The tab, opened in a browser."""
    view = browser.new_page(viewport={"width": 1500, "height": 1250})
    view.set_default_timeout(PATIENCE)
    view.errors = []
    view.on("console", lambda m: m.type == "error" and view.errors.append(f"{m.text} {m.location.get('url', '')}"))
    view.on("pageerror", lambda error: view.errors.append(str(error)))
    open_tab(view, page)
    yield view
    view.close()


def open_tab(view, page, query=""):
    view.goto(f"{page.url}/{query}")
    view.wait_for_selector("#txt2img_prompt")
    choose_tab(view, "Forget-Me-Not")
    view.wait_for_selector("#fmn_status", state="visible")


def choose_tab(view, name):
    """A tab is a button to Gradio 3's eyes, and a tab to 4's."""
    view.get_by_role("tab", name=name).or_(view.get_by_role("button", name=name, exact=True)).first.click()


def open_list(view, field, entry):
    """Opens a field's list, again and again until it has the entry: one that is open does not change."""
    found = view.locator("[role=option], li").filter(has_text=entry).first
    started = time.monotonic()
    while not found.is_visible():
        assert time.monotonic() - started < STALLED, f"{field} never shows {entry}"
        view.locator(field).blur()
        view.locator(field).click()
        wait_for_frames(view)


def own(errors):
    """Errors without the fonts and the frame's script that Gradio asks the network for."""
    return [e for e in errors if not re.search("fonts.g|cdnjs|ERR_NAME_NOT_RESOLVED|ERR_INTERNET|manifest.json|woff2", e)]


def test_a_concept_is_forgotten_through_the_tab(page, tab, screenshots):  # noqa: F811
    tab.locator("#fmn_concept textarea").fill("cat")
    tab.locator("#fmn_name textarea, #fmn_name input").first.fill("my cat <i>")
    tab.locator("#fmn_forget").click()
    tab.wait_for_selector("#fmn_forget_message .fmn-error")
    assert "cannot be a patch's name" in tab.inner_text("#fmn_forget_message")

    tab.locator("#fmn_name textarea, #fmn_name input").first.fill("my cat")
    tab.get_by_text("Advanced", exact=True).first.click()
    tab.locator("#fmn_forget_resolution input[type=number]").fill("128")
    with_card = page.flavour == "webui"  # once is enough: it takes as long as the rest
    if not with_card:
        tab.locator("#fmn_card input").uncheck()
    tab.locator("#fmn_forget").click()
    tab.wait_for_selector("#fmn_status .fmn-job")
    open_tab(tab, page, "?__theme=dark")  # the browser was closed, and comes back
    tab.wait_for_selector("#fmn_status .fmn-done, #fmn_status .fmn-failed")
    tab.screenshot(path=screenshots / f"webui-{page.flavour}-forget.png")
    said = tab.inner_text("#fmn_status")
    assert "<lora:my cat:1>" in said and "of the way to its target" in said
    if with_card:
        assert tab.locator("#fmn_status img").first.evaluate("image => image.naturalWidth") == 256
        assert Image.open(page.loras / "my cat.png").size == (170, 256)

    with safe_open(page.loras / "my cat.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fmn.patch"])["concept"] == "cat" and file.metadata()["ss_output_name"] == "my cat"
    card = json.loads((page.loras / "my cat.json").read_text())
    assert card["sd version"] == "SD1" and card["preferred weight"] == 1.0 and card["activation text"] == ""

    choose_tab(tab, "Evaluate")
    tab.locator("#fmn_evaluate").click()
    tab.wait_for_selector("#fmn_evaluate_message .fmn-error")
    assert "There is no patch to evaluate: choose one." in tab.inner_text("#fmn_evaluate_message")
    choose_tab(tab, "Stack")
    tab.locator("#fmn_stack_report").click()
    tab.wait_for_selector("#fmn_stack_message .fmn-error")
    assert "choose one" in tab.inner_text("#fmn_stack_message")
    choose_tab(tab, "Evaluate")
    tab.locator("#fmn_evaluate_refresh").click()
    open_list(tab, "#fmn_evaluate_patch input", "my cat")
    tab.screenshot(path=screenshots / f"webui-{page.flavour}-evaluate.png")
    assert own(tab.errors) == []


def test_the_jobs_stay_in_sight_beside_a_long_form(page, tab, screenshots):  # noqa: F811
    tab.set_viewport_size({"width": 1500, "height": 800})
    tab.locator("#fmn_forget_preset label").filter(has_text="paper").click()
    tab.get_by_text("Settings", exact=True).first.click()
    tab.locator("#fmn_forget_steps").wait_for(state="visible")
    tab.locator("#fmn_forget").evaluate("button => button.scrollIntoView({block: 'end'})")
    tab.wait_for_function("scrollY > 400")
    place = tab.locator("#fmn_interrupt").bounding_box()
    assert 0 <= place["y"] < 300, place
    tab.screenshot(path=screenshots / f"webui-{page.flavour}-training.png")


def test_every_component_has_an_id_of_its_own(page):
    _, config = page.ask("/config")
    ids = [each["props"].get("elem_id") for each in config["components"]]
    assert [id for id in {*ids} if id and ids.count(id) > 1] == []


def test_the_script_is_beside_the_prompt(page, tab, screenshots):  # noqa: F811
    choose_tab(tab, "txt2img")
    tab.get_by_text("Forget-Me-Not", exact=True).locator("visible=true").last.click()
    tab.locator("#script_txt2img_forgetmenot_words textarea").fill("cat, hat")
    tab.locator("#txt2img_generate").click()
    tab.locator("#made").get_by_text("cat, hat").wait_for()
    tab.screenshot(path=screenshots / f"webui-{page.flavour}-script.png")
    assert own(tab.errors) == []


def test_the_api_makes_evaluates_and_stacks_patches(page):
    status, job = page.ask("/fmn/forget", {"concept": "dog", "name": "a dog", "card": False, "resolution": 64})
    assert status == 202 and job["state"] in ("queued", "running")
    _, second = page.ask("/fmn/forget", {"concept": "rose", "name": "a rose", "card": False, "resolution": 64})
    job = page.finished(job["id"])
    assert job["state"] == "done" and job["files"] == ["a dog.safetensors", "a dog.json"], job
    assert page.finished(second["id"])["state"] == "done"
    assert {"a dog", "a rose"} <= {each["name"] for each in page.ask("/fmn/patches")[1]}

    figures = {"prompts": 1, "num_inference_steps": 2, "resolution": 64}
    _, job = page.ask("/fmn/evaluate", {"patch": "a dog", "save_as": "measured", **figures})
    job = page.finished(job["id"])
    assert job["state"] == "done" and job["figures"]["prompts"]["concept"], job["error"]
    assert Image.open(io.BytesIO(base64.b64decode(job["picture"]))).width > 500

    _, job = page.ask("/fmn/stack", {"patches": [["a dog", 1], ["a rose", 0.5]], "name": "both"})
    job = page.finished(job["id"])
    assert job["state"] == "done" and (page.loras / "both.safetensors").exists(), job["error"]


def test_an_interrupt_keeps_what_was_trained(page):
    body = {"concept": "cat", "name": "stopped", "preset": "paper", "steps": 1000, "card": True, **SMALL}
    _, job = page.ask("/fmn/forget", body)
    _, waiting = page.ask("/fmn/forget", body | {"name": "waiting"})
    assert page.ask(f"/fmn/jobs/{waiting['id']}/interrupt", {})[1]["state"] == "stopped"
    while (now := page.ask(f"/fmn/jobs/{job['id']}")[1])["step"] < 6 and now["state"] in ("queued", "running"):
        pass
    assert now["preview"], now
    page.ask(f"/fmn/jobs/{job['id']}/interrupt", {})
    job = page.finished(job["id"])
    assert job["state"] == "stopped" and "Unfinished: stopped after step" in " ".join(job["lines"]), job
    assert not [path.name for path in page.loras.iterdir() if path.is_dir()], "the page of LoRAs has a button for each"
    assert [*page.loras.parent.glob("forget-me-not/*.checkpoint")]
    with safe_open(page.loras / "stopped-unfinished.safetensors", "pt") as file:
        assert 1 <= json.loads(file.metadata()["fmn.patch"])["report"]["steps"] < 1000
    assert not (page.loras / "waiting.safetensors").exists()


@pytest.mark.parametrize("path, body, status, said", [
    ("/fmn/forget", {}, 422, "concept is empty"),
    ("/fmn/forget", {"concept": "cat", "stepz": 3}, 422, "no setting"),
    ("/fmn/forget", {"concept": "cat", "preset": "paper", "steps": 0}, 422, "use a value"),
    ("/fmn/forget", {"concept": ["cat"]}, 422, "a text"),
    ("/fmn/forget", {"concept": "cat", "name": "../../evil"}, 422, "cannot be a patch's name"),
    ("/fmn/forget", {"concept": "cat", "images": ["bm90IGEgcGljdHVyZQ=="]}, 422, "cannot be read"),
    ("/fmn/forget", {"concept": "cat", "masks": ["bm8="]}, 422, "no picture"),
    ("/fmn/forget", ["cat"], 422, ""),
    ("/fmn/evaluate", {"patch": "../../etc/passwd"}, 422, "There is no patch"),
    ("/fmn/stack", {"patches": []}, 422, "no patch to stack"),
    ("/fmn/stack", {"patches": [["none", 1]], "more": 1}, 422, "unknown"),
    ("/fmn/jobs/nonsense", None, 404, "There is no job"),
    ("/fmn/jobs/nonsense/interrupt", {}, 404, "There is no job"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_a_sentence(page, path, body, status, said):
    found, answer = page.ask(path, body)
    assert found == status and said in str(answer["detail"]), answer
