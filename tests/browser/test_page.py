"""The example workflows in ComfyUI's real web page, its own and the newest, on the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from itertools import combinations

import pytest
from comfyui_page import (  # noqa: F401
    PAGES,
    WORKFLOWS,
    browser,
    open_page,
    open_template,
    overview,
    page,
    run,
    screenshots,
    troubles,
    wait_for_frames,
    wait_for_nodes,
)

from fmn_core.attention import compare as attention_compare
from fmn_core.attention import recorder as recording
from fmn_core.attention import visualize as attention_picture
from fmn_core.erasure.config import MAIN_FIELDS, PRESETS
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.inversion.config import InversionConfig

IMAGES = ("SaveImage", "PreviewImage")
SETTINGS = {
    **{f"FMN_ForgetSettings_{preset}": config for preset, config in PRESETS.items()},
    "FMN_InvertConcept": InversionConfig,
    "FMN_EvaluatePatch": EvaluationConfig,
    "FMN_RecordAttention": recording.RecordingConfig,
    "FMN_VisualizeTokenAttention": attention_picture.ViewConfig,
    "FMN_CompareTokenAttention": attention_compare.CompareConfig,
}
FEW = {"steps": 4, "num_inference_steps": 2, "prompts": 1, "inversion_steps": 2}
TALLEST = 160  # of a text field, in the graph's units
# Each node's box with its title, and the heights of its text fields, in the graph's units.
BOXES = """() => {
    const { scale, offset } = app.canvas.ds
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return app.graph._nodes.map(node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        const r = element?.getBoundingClientRect()
        const [x, y, width, height] = r
            ? [(r.x - canvas.x) / scale - offset[0], (r.y - canvas.y) / scale - offset[1], r.width / scale, r.height / scale]
            : [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]
        const drawn = element ? [...element.querySelectorAll('textarea')] : []
        const fields = element
            ? drawn.map(field => field.getBoundingClientRect().height / scale)
            : (node.widgets ?? []).filter(w => w.type == 'customtext' && !w.hidden).map(w => w.computedHeight)
        return { title: node.title, x, y, width, height, fields }
    })
}"""


def missing_types(page):  # noqa: F811
    return page.evaluate("app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])")


def show(page, path):  # noqa: F811
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads(path.read_text()))
    wait_for_nodes(page, path)


def require_tidy(page, tallest=TALLEST):  # noqa: F811
    """No two nodes overlap, none of ours is larger than the page makes it, and so no text field is stretched."""
    overview(page)
    boxes = page.evaluate(BOXES)
    for a, b in combinations(boxes, 2):
        beside = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
        assert beside or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"], (a, b)
    if page.kind != ("own", "nodes-2"):  # which writes what it draws into the sizes
        ours = "app.graph._nodes.filter(node => node.type.startsWith('FMN_'))"
        large = f"{ours}.filter(node => node.size[1] > node.computeSize()[1] + 1).map(node => node.title)"
        assert page.evaluate(large) == []
    stretched = [(box["title"], box["fields"]) for box in boxes if any(height > tallest for height in box["fields"])]
    assert not stretched, stretched


def with_few_steps(page):  # noqa: F811
    """Fewer steps than the workflow has, which is run whole in tests/comfy."""
    page.evaluate(
        """most => app.graph._nodes.flatMap(node => node.widgets ?? []).forEach(widget => {
            if (widget.name in most) widget.value = Math.min(widget.value, most[widget.name])
        })""",
        FEW,
    )


# The two pages of a workflow one after the other: the second finds the host's cache filled.
@pytest.mark.parametrize("page", [PAGES[0], PAGES[-1]], indirect=True, ids="-".join)
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_opens_and_runs_to_its_pictures(page, server, screenshots, path):  # noqa: F811
    open_template(page, server, path)
    assert missing_types(page) == []
    require_tidy(page)
    with_few_steps(page)
    job = run(page, server)
    assert job["status"]["status_str"] == "success", job["status"]["messages"]
    page.wait_for_function(
        """types => app.graph._nodes.filter(node => types.includes(node.type)).every(node => {
            const element = document.querySelector(`[data-node-id="${node.id}"]`)
            return (element ? element.querySelector('img') : node.imgs?.[0])?.naturalWidth > 0
        })""",
        arg=IMAGES,
    )
    require_tidy(page)
    if "FMN_SCREENSHOTS" in os.environ:
        page.keyboard.press(".")  # fit the view
        wait_for_frames(page, 40)
        page.screenshot(path=screenshots / f"{path.stem}-{'-'.join(page.kind)}.png")
    assert not troubles(page), troubles(page)


@pytest.mark.parametrize("page", PAGES[1:3], indirect=True, ids="-".join)  # the others have run them above
def test_no_workflow_overlaps_or_is_stretched(page, server, screenshots):  # noqa: F811
    open_page(page, server)
    for path in WORKFLOWS:
        show(page, path)
        require_tidy(page)
        page.screenshot(path=screenshots / f"{path.stem}-{'-'.join(page.kind)}-new.png")
    assert not troubles(page), troubles(page)


@pytest.mark.parametrize("page", PAGES[-1:], indirect=True, ids="-".join)
def test_no_workflow_overlaps_where_advanced_inputs_are_hidden(page, server):  # noqa: F811
    """Newer hosts know of advanced inputs, and Nodes 2.0 then hides them until asked."""

    def answer(route):
        info = route.fetch().json()
        for name, kind in SETTINGS.items():
            for field in dataclasses.fields(kind):
                if field.metadata["advanced"] and field.name not in MAIN_FIELDS:
                    info[name]["input"]["required"][field.name][1]["advanced"] = True
        route.fulfill(json=info)

    page.route("**/object_info", answer)
    open_page(page, server)
    for path in WORKFLOWS:
        show(page, path)
        if "FMN_InvertConcept" in path.read_text():
            assert page.get_by_text("norm_decay", exact=True).count() == 0, "advanced inputs are shown"
        require_tidy(page, tallest=math.inf)  # the page gives what it hides to the fields, of a new node too


def test_a_workflow_file_is_taken_by_drag_and_drop(page, server):  # noqa: F811
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


def test_the_template_browser_shows_the_workflows(page, server, screenshots):  # noqa: F811
    open_page(page, server)
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text("forget-me-not", exact=False).first.click()
    stems = [path.stem for path in WORKFLOWS]
    page.wait_for_function(
        """stems => {
            const text = document.body.innerText.toLowerCase();
            return stems.every(stem => text.includes(stem) || text.includes(stem.replaceAll("-", " ")));
        }""",
        arg=stems,
    )
    page.screenshot(path=screenshots / "templates.png")


@pytest.mark.parametrize("page", PAGES, indirect=True, ids="-".join)
def test_a_new_settings_node_keeps_its_seed_and_names_what_0_stands_for(page, server):  # noqa: F811
    """A control that randomises the seed would train anew at every queueing."""
    open_page(page, server)
    widgets = page.evaluate(
        """() => {
            const node = LiteGraph.createNode('FMN_ForgetSettings_paper')
            app.graph.add(node)
            return node.widgets.map(w => [w.name, w.label])
        }"""
    )
    names = [name for name, _ in widgets]
    assert names[names.index("seed") + 1] == "penalized_tokens", names
    assert dict(widgets)["learning_rate"] == "learning_rate (0: auto)"
    if page.kind[1] == "nodes-2":
        page.get_by_text("learning_rate (0: auto)").wait_for()
