"""What a real ComfyUI server lists of the pack: nodes, help, workflows; and what it imports."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from demo.workflow import load_workflow

NODES = [
    "FMN_ForgetConcept", "FMN_InvertConcept", "FMN_SavePatch", "FMN_ApplyPatch", "FMN_StackPatches", "FMN_GatePatch",
    "FMN_EvaluatePatch", "FMN_InspectPatch", "FMN_RecordAttention", "FMN_RecordPictureAttention",
    "FMN_VisualizeTokenAttention", "FMN_CompareTokenAttention", "FMN_SaveTokenAttention", "FMN_ImportPatch",
    "FMN_ExportPatch", "FMN_ForgetSettings_fast", "FMN_ForgetSettings_paper", "FMN_ForgetSettings_balanced",
    "FMN_ForgetSettings_robust",
]  # fmt: skip
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def info(server):
    return server.get("object_info")


def test_nodes_are_there_with_a_tooltip_on_every_input_and_output(info):
    for name in NODES:
        node = info[name]
        assert node["category"] == "Forget-Me-Not" and node["description"]
        for group in ("required", "optional"):
            for input, (_, *options) in node["input"].get(group, {}).items():
                assert options and options[0].get("tooltip"), f"{name}.{input}"
        assert all(node["output_tooltips"]), name


def test_no_help_that_the_page_may_take_for_markdown_has_marks_of_code(info):
    for name in NODES:
        node = info[name]
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        texts = [node["description"], *node["output_tooltips"], *(options["tooltip"] for _, options in inputs.values())]
        assert "`" not in "".join(texts), name
    for path in (ROOT / "workflows").glob("*.json"):
        notes = [node["widgets_values"] for node in json.loads(path.read_text())["nodes"] if node["type"] == "MarkdownNote"]
        assert notes and "`" not in str(notes), path.name


def test_an_input_whose_0_is_no_value_says_so_in_its_name(info):
    named = {
        "FMN_ForgetSettings_paper": ("learning_rate", "resolution"),
        "FMN_ForgetSettings_robust": ("learning_rate", "resolution"),
        "FMN_EvaluatePatch": ("resolution",),
        "FMN_InvertConcept": ("resolution",),
        "FMN_ImportPatch": ("rank",),
        "FMN_VisualizeTokenAttention": ("vmax",),
    }
    for name, inputs in named.items():
        for input in inputs:
            assert info[name]["input"]["required"][input][1]["display_name"] == f"{input} (0: auto)"


def test_every_node_has_its_help_page(info, server):
    for name in NODES:
        page = (ROOT / f"web/docs/{name}.md").read_text()
        for group in ("required", "optional"):
            for input, (_, options) in info[name]["input"].get(group, {}).items():
                row = next((line for line in page.splitlines() if line.startswith(f"| `{input}`")), "")
                assert options["tooltip"] in row.replace("`", ""), f"{name}.md does not say of {input} what its tooltip says"
        assert server.read(f"extensions/forget-me-not/docs/{name}.md").decode() == page


def test_the_embedded_model_is_in_the_hosts_loader(info):
    assert "emoji-sd-128.safetensors" in info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_what_the_server_has_and_carry_a_thumbnail(path, info):
    workflow = json.loads(path.read_text())
    assert workflow["version"] == 0.4 and path.with_suffix(".jpg").exists()
    for node in load_workflow(path, info).values():
        known = info[node["class_type"]]["input"]
        assert set(known["required"]) <= set(node["inputs"]) <= set(known["required"]) | set(known.get("optional", {}))


def test_templates_are_listed_by_the_server(server):
    assert sorted(server.get("workflow_templates")["forget-me-not"]) == [path.stem for path in WORKFLOWS]


IMPORTED = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

sys.path.insert(0, "{comfyui}")
import utils.install_util  # before the host's nodes put a folder with another `utils` first
from demo.host import import_comfyui

import_comfyui(Path("{comfyui}"))
import comfy_api.latest, nodes, server

before, name = set(sys.modules), "pack"
spec = spec_from_file_location(name, "{root}/__init__.py", submodule_search_locations=["{root}"])
sys.modules[name] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
new = {{module.split(".")[0] for module in set(sys.modules) - before}}
assert name + ".nodes" in sys.modules
assert not new - set(sys.stdlib_module_names) - {{name}}, new
"""


def test_importing_the_pack_imports_nothing_that_the_host_has_not(run_python, comfyui):
    """What is heavy is imported when it is used: seconds of every start of the host."""
    run_python("-c", IMPORTED.format(comfyui=comfyui, root=ROOT))
