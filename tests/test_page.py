"""The example workflows in ComfyUI's real web page, in headless Chromium. FMN_SCREENSHOTS names a folder to keep
screenshots in."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
IMAGES = ("SaveImage", "PreviewImage")


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("FMN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium is installed: the page tests need one (or FMN_CHROMIUM with its path)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=FLAGS)


@pytest.fixture
def screenshots(tmp_path):
    folder = Path(os.environ.get("FMN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1900, "height": 1300})
    page.errors = []
    page.on("console", lambda m: m.type == "error" and page.errors.append(f"{m.text} {m.location.get('url', '')}"))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


def open_page(page, server, query=""):
    page.goto(f"{server.url}/{query}")
    page.wait_for_function("window.app?.graph && window.app.vueAppReady", timeout=90_000)
    page.wait_for_load_state("networkidle")


def plain(errors):
    """Errors without what differs from one load to the next: ports, queries, places in bundles; and without the
    page's questions to ComfyUI's registry about every custom node, which do not get out of here."""
    own = (error for error in errors if "https://api.comfy.org/" not in error)
    return {re.sub(r"127.0.0.1:\d+|\?\S*|:\d+:\d+", "", error) for error in own}


@pytest.fixture(scope="module")
def errors_of_the_host(browser, server):
    """What the bare page says on its own on this machine (no network, no core templates), with stock nodes alone."""
    page = browser.new_page()
    errors = []
    page.on("console", lambda m: m.type == "error" and errors.append(f"{m.text} {m.location.get('url', '')}"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    open_page(page, server, "?template=there-is-none&source=forget-me-not")
    workflow = json.loads(WORKFLOWS[0].read_text())
    workflow["nodes"] = [node for node in workflow["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    workflow["nodes"][0]["outputs"] = [{**output, "links": None} for output in workflow["nodes"][0]["outputs"]]
    workflow["links"] = []
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_load_state("networkidle")
    page.close()
    return plain(errors)


def wait_for_nodes(page, path):
    """Until the page shows a workflow's nodes: by type, since the page's own default graph may have as many."""
    wanted = sorted(node["type"] for node in json.loads(path.read_text())["nodes"])
    shown = "wanted => JSON.stringify(app.graph._nodes.map(node => node.type).sort()) == JSON.stringify(wanted)"
    page.wait_for_function(shown, arg=wanted, timeout=30_000)


def missing_types(page):
    return page.evaluate("app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_and_runs_to_its_pictures(page, server, errors_of_the_host, screenshots, path):
    open_page(page, server, f"?template={path.stem}&source=forget-me-not")
    wait_for_nodes(page, path)
    assert missing_types(page) == []

    done = len(server.get("history"))
    page.get_by_role("button", name="Run", exact=True).first.click()
    deadline = time.monotonic() + 180
    while len(server.get("history")) == done and time.monotonic() < deadline:
        page.wait_for_timeout(300)
    entry = list(server.get("history").values())[-1]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    shown = f"app.graph._nodes.filter(n => {list(IMAGES)}.includes(n.type)).every(n => n.imgs?.[0]?.naturalWidth > 0)"
    page.wait_for_function(shown, timeout=30_000)
    page.evaluate("app.canvas.fitViewToSelectionAnimated?.()")
    page.keyboard.press(".")  # fit the view
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / f"{path.stem}.png")
    assert plain(page.errors) <= errors_of_the_host, plain(page.errors) - errors_of_the_host


def test_a_workflow_file_is_taken_by_drag_and_drop(page, server):
    open_page(page, server)
    path = WORKFLOWS[0]
    page.evaluate(
        """([text, name]) => {
            const data = new DataTransfer()
            data.items.add(new File([text], name, { type: 'application/json' }))
            const at = { dataTransfer: data, bubbles: true, clientX: 600, clientY: 500 }
            document.dispatchEvent(new DragEvent('drop', at))
        }""",
        [path.read_text(), path.name],
    )
    wait_for_nodes(page, path)
    assert missing_types(page) == []


def test_the_template_browser_shows_the_workflows(page, server, screenshots):
    open_page(page, server)
    page.get_by_role("button", name="Templates").first.click()
    page.wait_for_timeout(2000)
    page.screenshot(path=screenshots / "templates.png")
    page.get_by_text("forget-me-not", exact=False).first.click()
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "templates.png")
    text = page.inner_text("body")
    for path in WORKFLOWS:
        assert path.stem in text or path.stem.replace("-", " ") in text.lower()


def test_a_new_forget_node_keeps_its_seed(page, server):
    """A control that randomises the seed would train anew at every queueing."""
    open_page(page, server)
    names = page.evaluate(
        """() => {
            const node = LiteGraph.createNode('FMN_ForgetConcept')
            app.graph.add(node)
            return node.widgets.map(w => w.name)
        }"""
    )
    assert names[names.index("seed") + 1] == "rank", names
