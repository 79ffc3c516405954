"""Text from files, requests and widgets: never script in a page, a command to a terminal, or what cannot be encoded."""

from __future__ import annotations

import json
import math
import re
import time

import pytest
import torch
from comfyui_page import browser, open_page, page  # noqa: F401
from conftest import ROOT
from graphs import Graphs
from hostile_files import renamed, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from demo.server import ServerError
from fmn_core.errors import ForgetError
from fmn_core.log import CONTROL, displayable, plain, replace_surrogates
from fmn_core.patch.file import read_patch
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch

ANY_TEXT = st.text(st.characters(), max_size=40)  # surrogates too
SCRIPT = "cat<img src=x onerror='window.scripts = (window.scripts || 0) + 1'>"


@given(ANY_TEXT)
def test_displayable_text_can_be_encoded_and_commands_no_terminal(text):
    shown = displayable(text)
    shown.encode()
    assert not CONTROL.search(shown) and displayable(shown) == shown


@given(st.text(st.characters(blacklist_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]) | st.sampled_from("\n\t"), max_size=40))
def test_ordinary_text_is_shown_as_it_is(text):
    assert displayable(text) == text


@given(ANY_TEXT)
def test_a_text_in_the_log_is_one_line_in_quotes(text):
    told = plain(text)
    told.encode()
    assert len(told.splitlines()) == 1 and not CONTROL.search(told)
    assert told[0] == told[-1] == '"' and len(re.findall(r'(?<!\\)(?:\\\\)*"', told)) == 2


def test_letters_of_every_language_are_letters_in_the_log():
    assert [plain(name) for name in ("猫", "кошка", "two\nlines", 1.0, 7)] == ['"猫"', '"кошка"', '"two\\nlines"', "1", "7"]


@given(st.recursive(ANY_TEXT | st.floats(allow_nan=False) | st.none(), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8))  # fmt: skip
def test_json_without_surrogates_can_be_encoded(value):
    json.dumps(replace_surrogates(value), ensure_ascii=False).encode()


@given(ANY_TEXT)
def test_every_error_can_be_encoded(text):
    message = str(ForgetError(f"`{text}` is not there."))
    message.encode()
    assert not CONTROL.search(message)


def test_a_patch_with_half_a_character_that_does_not_fit_fails_in_a_sentence_that_can_be_encoded(loaded, tmp_path):
    from fmn_core.hosts.comfy.apply import apply_patch

    path = tmp_path / "p.safetensors"
    write(renamed("cat\ud800", "model\udfff"), path)
    patch = read_patch(path)
    module = patch.modules[0]
    for part in (".lora_down.weight", ".lora_up.weight", ".alpha"):
        patch[f"lora_unet_down_blocks_9_attentions_0_transformer_blocks_0_attn2_to_k{part}"] = patch[module + part]
    with pytest.raises(ForgetError) as raised:
        apply_patch(loaded[0], patch, 1.0)
    assert "cat\ufffd" in str(raised.value) and "model\ufffd" in str(raised.value)


@pytest.mark.parametrize("name", ["cat\x1b[31m\x1b]0;title\x07", "cat\u202etxt", "cat\ud800", "cat\x9b31m"])
@pytest.mark.parametrize("inside", [False, True], ids=["name", "report"])
def test_no_command_passes_a_files_control_characters_to_the_terminal(command_line, tmp_path, name, inside):
    one, two, both = (tmp_path / f"{file}.safetensors" for file in ("one", "two", "both"))
    patch = renamed("cat" if inside else name)
    patch.info["report"]["warnings"] = [name]
    write(patch, one)
    write(renamed("dog"), two)
    commands = [
        ["inspect", one],
        ["inspect", "--json", one],
        ["stack", one, two, "--output", both],
        ["unstack", both, "--output", tmp_path],
        ["convert", one, "--to", "peft", "--output", tmp_path / "peft.safetensors"],
        ["convert", one, "--output", tmp_path / "again.safetensors"],
    ]
    for command in commands:
        done = command_line(*command)
        (done.stdout + done.stderr).encode()
        assert not CONTROL.search(done.stdout + done.stderr) and "Traceback" not in done.stderr, command


def test_no_node_writes_a_files_control_characters_to_the_log(server):
    """A tensor's name may turn the direction of writing, and stands in the warning of what was left out."""
    raw = (ROOT / "demo/loras/forget-cat.safetensors").read_bytes()
    tensors = load(raw) | {"lora_te_\u202ebackwards.alpha": torch.ones(())}
    (server.output / "loras").mkdir(exist_ok=True)
    (server.output / "loras/turned.safetensors").write_bytes(save(tensors))
    graphs = Graphs(server)
    load_model = graphs.node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors")
    imported = graphs.node("FMN_ImportPatch", model=["load", 0], clip=["load", 1], file="turned.safetensors")
    shown = graphs.node("PreviewAny", source=["import", 0])
    server.run({"load": load_model, "import": imported, "shown": shown})
    log = server.log.read_text()
    assert r"\u202ebackwards" in log and "\u202e" not in log


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_no_number_is_refused(loaded, host, strength, tmp_path):
    from fmn_core.convert.exporter import merge
    from fmn_core.hosts.comfy.apply import apply_patch
    from fmn_core.hosts.comfy.hooks import gated
    from fmn_core.patch.apply import applied

    patch = read_patch(ROOT / "demo/loras/forget-cat.safetensors")
    attempts = [
        lambda: apply_patch(loaded[0], patch, strength),
        lambda: applied(host, patch, strength),
        lambda: stack([WeightedPatch(patch, strength)]),
        lambda: gated([], patch, (1.0, strength), (0.0, 1.0), 0.5),
        lambda: merge(ROOT / "demo/checkpoints/emoji-sd-128.safetensors", patch, strength, tmp_path / "m.safetensors"),
    ]
    for attempt in attempts:
        with pytest.raises(ForgetError, match="The strength is"):
            attempt()


def string_widgets(graphs: Graphs) -> list[tuple[str, str]]:
    """(node, input) of every text widget of the pack."""
    return [
        (node, name)
        for node, info in graphs.info.items()
        if node.startswith("FMN_")
        for group in ("required", "optional")
        for name, (type, *_) in info["input"].get(group, {}).items()
        if type == "STRING"
    ]


def test_a_surrogate_in_any_text_widget_is_refused_or_replaced(server):
    """JSON can hold one, and an error that repeats it would end the host's worker."""
    graphs = Graphs(server)
    base = graphs.forget("cat", record=True)
    wires = {
        "MODEL": ["load", 0], "CLIP": ["load", 1], "VAE": ["load", 2], "IMAGE": ["decode", 0],
        "FMN_RECORDING": ["record", 1], "LORA_MODEL": ["forget", 0], "CONDITIONING": ["asked", 0],
    }  # fmt: skip
    others = {
        "FMN_ImportPatch": {"file": "forget-cat.safetensors"},
        "FMN_EvaluatePatch": {"lora": ["forget", 0]},
        "FMN_ExportPatch": {"lora": ["forget", 0]},
    }
    widgets = string_widgets(graphs)
    assert len(widgets) > 10
    for node, name in widgets:
        required = graphs.info[node]["input"]["required"].items()
        inputs = {key: wires[type] for key, (type, *_) in required if isinstance(type, str) and type in wires}
        inputs |= others.get(node, {}) | {name: "cat {}\ud800"}
        inputs |= {"target": {"mode": "replace"}}.get(name, {})
        inputs |= {"concept_type": "custom"} if node == "FMN_InvertConcept" and name == "template" else {}
        graph = base | {"node": graphs.node(node, **inputs), "shown": graphs.node("PreviewAny", source=["node", 0])}
        if node.startswith("FMN_ForgetSettings_"):
            wired = {"concept_type": "custom", "preset": node.rpartition("_")[2], "settings": ["node", 0]}
            graph["forget"] = {**base["forget"], "inputs": {**base["forget"]["inputs"], **wired}}
            graph["shown"] = graphs.node("PreviewAny", source=["forget", 0])
        try:
            server.run(graph)
        except ServerError as error:
            assert "UnicodeEncodeError" not in str(error) and "codec" not in str(error), (node, name, error)
            assert "invalid Unicode" in str(error) or "\ufffd" in str(error) or r"\ud800" in str(error), (node, name, error)
    server.run(base)


def test_no_text_on_a_node_runs_as_script_in_the_page(page, server):  # noqa: F811
    """Every node that shows text, on names, descriptions and tensor names that are HTML, each in a real run."""
    folder = server.output / "loras"
    write(renamed(SCRIPT), folder / "hostile.safetensors")
    write(renamed("dog"), folder / "harmless.safetensors")
    graphs = Graphs(server)
    load = graphs.node("CheckpointLoaderSimple", ckpt_name="emoji-sd-128.safetensors")
    asked = graphs.node("CLIPTextEncode", clip=["load", 1], text="a photo of a cat")
    hostile = {"patch": "hostile.safetensors"}
    forget = graphs.node("FMN_ForgetConcept", model=["load", 0], clip=["load", 1], concept=SCRIPT)
    stack_both = graphs.node(
        "FMN_StackPatches", model=["load", 0], patch_1="hostile.safetensors", patch_2="harmless.safetensors"
    )
    nodes = {
        "1": load,
        "2": asked,
        "3": graphs.node("FMN_InspectPatch", **hostile),
        "4": stack_both,
        "5": graphs.node("FMN_GatePatch", conditioning=["2", 0], **hostile),
        "6": forget,
        "7": graphs.node("PreviewAny", source=["4", 4]),
        "8": graphs.node("PreviewAny", source=["5", 1]),
        "9": graphs.node("FMN_SavePatch", lora=["6", 0]),
    }
    prompt = json.loads(json.dumps(nodes).replace('"load"', '"1"'))
    open_page(page, server, "?template=apply-a-saved-patch&source=forget-me-not")  # without the page's first greeting
    page.evaluate("prompt => app.loadApiJson(prompt, 'hostile')", prompt)
    done = len(server.get("history"))
    page.evaluate("app.queuePrompt(0)")
    deadline = time.monotonic() + 180
    while len(server.get("history")) == done and time.monotonic() < deadline:
        page.wait_for_timeout(300)
    page.wait_for_timeout(1000)  # for what a picture that is not there would run
    entry = [*server.get("history").values()][-1]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    assert page.evaluate("window.scripts || 0") == 0
