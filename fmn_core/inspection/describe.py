"""An inspection in words: short lines of plain text."""

from __future__ import annotations

import textwrap

from ..erasure.config import PRESETS
from ..errors import ForgetError
from ..files.header import tensor_hash
from ..patch.patch import ALPHA, Patch
from ..patch.report import PatchReport, texts
from ..patch.summary import MOST_LISTED, report_lines
from ..patch.weighted import stored_parts
from .inspect import Change, Inspection

LETTERS = {"to_k": "K", "to_v": "V", "to_q": "Q", "to_out": "out"}
SHOWN, MOST_LETTERS = 8, 160  # near words; letters of a setting


def text_of(inspection: Inspection) -> str:
    """What the patch forgets, how and for which model it was made, its file, its own report, and its changes."""
    name = inspection.file.name if inspection.file else "This patch"
    sections = [
        [f"{name} {purpose(inspection.patch)}", *made(inspection.patch), *base(inspection)],
        file_facts(inspection),
        ["Its own report:", *own_words(inspection)],
        [f"Change of the weights, {measure_of(inspection)}:", *strengths(inspection.changes)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def purpose(patch: Patch) -> str:
    """What a patch is for, as the end of a sentence."""
    info, settings = patch.info, patch.info["settings"]
    if settings.get("mode") == "correct":
        return f"lets the other meaning of {settings.get('target')} through, which {info['concept']} overshadows."
    if settings.get("mode") == "replace":
        return f"forgets {info['concept']}; {settings.get('target')} stands in its place."
    return f"forgets {info['concept']}."


def made(patch: Patch) -> list[str]:
    """How a patch was made: other names of its concepts, preset, mode, seed, version, settings of the user's own."""
    info, settings = patch.info, patch.info["settings"]
    concepts = info.get("concepts")
    concepts = [concept for concept in concepts if isinstance(concept, dict)] if isinstance(concepts, list) else []
    lines = [
        f"`{first}` also as {', '.join(f'`{name}`' for name in others)}."
        for first, *others in (texts(c.get("names")) or [""] for c in concepts)
        if others
    ][:MOST_LISTED]
    preset, by = preset_of(settings), f"Forget-Me-Not {info.get('version', '')}".strip()
    if "patches" in info:
        return [*lines, f"It was stacked by {by} of {stacked_patches(patch)}."]
    if preset in PRESETS:
        start = f"It was made by the preset {preset} of {by}"
    elif preset:
        start = f"It is {preset}: made by no preset of {by}"
    else:
        start = f"It does not say by which preset of {by} it was made"
    facts = [f"{key} {settings[key]}" for key in ("mode", "seed") if key in settings]
    kinds = [f"type {kind}" for kind in dict.fromkeys(str(c["type"]) for c in concepts if c.get("type"))]
    lines.append(", ".join([start, *facts, *kinds]) + ".")
    own = own_settings(settings)
    if own:
        title = "Settings unlike the preset's" if preset in PRESETS else "Settings"
        lines.append(f"{title}: {'; '.join(own)}.")
    return lines


def stacked_patches(patch: Patch) -> str:
    """The patches that a stacked one was made of, with their strengths."""
    try:
        parts = stored_parts(patch.info)
    except ForgetError:
        return "patches that it does not name"
    named = [
        f"{part.info.get('concept')}{'' if part.strength == 1 else f' at strength {part.strength:g}'}" for part in parts
    ]
    return f"{len(parts)} patches: {'; '.join(named)}"


def preset_of(settings: dict) -> str:
    """The preset's name, or nothing."""
    return str(settings.get("preset") or "")


def own_settings(settings: dict) -> list[str]:
    """The settings that are not the preset's defaults and that it reads, each as `name value`."""
    preset = preset_of(settings)
    defaults = PRESETS[preset]().resolved().plain() if preset in PRESETS else {}
    elsewhere = {"preset", "mode", "target", "seed", "concept_type"}
    return [
        f"{key} {textwrap.shorten(', '.join(str(value).split(chr(10))), MOST_LETTERS, placeholder=' ...')}"
        for key, value in settings.items()
        if key not in elsewhere and value not in ("", defaults.get(key)) and (not defaults or key in defaults)
    ]


def base(inspection: Inspection) -> list[str]:
    """Which model a patch is for, and whether it fits the one that is there."""
    made_for = inspection.patch.info["base"]
    return [
        f"It was made for {made_for['name']} ({made_for['family']}).",
        *([inspection.fit.sentence] if inspection.fit else []),
    ]


def file_facts(inspection: Inspection) -> list[str]:
    """Rank, projections, bytes and hash."""
    patch, layers = inspection.patch, {(c.unet_block, c.block, c.depth) for c in inspection.changes}
    matrices = [letter for matrix, letter in LETTERS.items() if any(c.matrix == matrix for c in inspection.changes)]
    lines = [
        f"Rank {patch.rank}, {len(patch.modules)} projections ({', '.join(matrices)}) in {len(layers)} layers, "
        f"{inspection.size:,} bytes{'' if inspection.file else ' of weights, not saved yet'}.",
        f"sha256 of the weights: {tensor_hash(dict(patch))}",
    ]
    if patch.unet_lora:
        count = sum(key.endswith(ALPHA) for key in patch.unet_lora)
        lines.append(f"Beside it {count} layers outside the cross-attention: an ordinary LoRA, in a file of its own.")
    return lines


def own_words(inspection: Inspection) -> list[str]:
    """The patch's own report, with the near words that move most; an evaluation, if it has one, last."""
    report = inspection.report
    lines = report_lines(report.updated(evaluation={}))
    if report.preserve_drift:
        most = ", ".join(f"`{word}` {way:.1%}" for word, way in [*report.preserve_drift.items()][:SHOWN])
        lines.append(f"Near words by how far they move: {most}.")
    if report.empty_prompt_drift is not None:
        lines.append(f"The empty prompt moves by {report.empty_prompt_drift:.2%} of the way.")
    lines += report_lines(PatchReport(evaluation=report.evaluation))
    return lines or ["It holds no figures."]


def measure_of(inspection: Inspection) -> str:
    """What the figures of change are."""
    known = any(change.relative is not None for change in inspection.changes)
    return "|delta W| and what part of |W| that is" if known else "|delta W|"


def strengths(changes: list[Change]) -> list[str]:
    """A line for each layer with the change of each of its projections, and the largest of all."""
    most = max(changes, key=lambda change: change.amount)
    layers: dict[str, list[Change]] = {}
    for change in changes:
        layers.setdefault(layer_label(change, changes), []).append(change)
    lines = [f"{label}: {', '.join(f'{LETTERS[c.matrix]} {figure(c)}' for c in of)}" for label, of in layers.items()]
    return [f"Most in {layer_label(most, changes)}, {LETTERS[most.matrix]}: {figure(most)}.", *lines]


def layer_label(change: Change, changes: list[Change]) -> str:
    """A layer's block and numbers, without those that tell nothing: `down 1.0`, `mid`, `up 2.1.9` of deep blocks."""
    deep = any(other.depth for other in changes)
    block = () if change.unet_block == "mid" else change.block
    return f"{change.unet_block} {'.'.join(map(str, (*block, *((change.depth,) if deep else ()))))}".strip()


def figure(change: Change) -> str:
    return f"{change.norm:.3g}" + ("" if change.relative is None else f" ({change.relative:.1%})")
