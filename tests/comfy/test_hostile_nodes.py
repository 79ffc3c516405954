"""Text from files and widgets on nodes: no command to a terminal, and nothing that cannot be encoded."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ROOT
from graphs import Graphs
from hostile_files import renamed, write
from safetensors.torch import load, save

from demo.server import ServerError
from fmn_core.errors import ForgetError
from fmn_core.patch.file import read_patch
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch


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
