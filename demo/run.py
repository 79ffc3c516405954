"""The demo: a concept forgotten in a real ComfyUI through the pack's own nodes, looked at and measured.

Run by `python install.py demo`; `python -m demo.run --help` names the arguments.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from tqdm import tqdm

from fmn_core.errors import ForgetError
from fmn_core.files.atomic import NameTakenError, write_new

from .classifier import Classifier
from .server import PACK, ComfyServer, ServerError
from .workflow import by_title, load_workflow

OBJECTS = ("cat", "dog", "lion", "rabbit", "rose", "house", "car")  # forgotten one by one, the others kept
PROMPTS = ("an emoji of a {}", "a {} in neon style")
QUICK = 2  # kept things
STEPS = 10  # of each picture
TILE = 128


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("fmn-demo"))
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--python", type=Path, help="the interpreter of ComfyUI")
    parser.add_argument("--own", action="store_true", help="the ComfyUI is the demo's own and runs in this environment")
    parser.add_argument("--concept", choices=OBJECTS, default=OBJECTS[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    python = sys.executable if arguments.own else str(arguments.python or find_python(arguments.comfyui))
    arguments.output.mkdir(parents=True, exist_ok=True)
    place_patches(arguments.comfyui)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with timed(seconds, "start"):
            server = stack.enter_context(ComfyServer(arguments.comfyui, arguments.output / "comfyui", python))
        report = run(server, arguments.concept, arguments.output, seconds, arguments.quick)
        (arguments.output / "report.json").write_text(json.dumps(report, indent=1))
        print_summary(report, arguments.output)
        if arguments.serve:
            serve(server)
    return 0


def place_patches(comfyui: Path) -> None:
    """Copies the examples' patches into the host's own LoRA folder, before it starts: other packs list that alone, and what
    a pack adds to the host's folders later only the host's own loaders see. A file that is there stays as it is."""
    for patch in sorted((PACK / "demo/loras").glob("*.safetensors")):
        try:
            write_new(patch.read_bytes(), comfyui / "models/loras" / patch.name)
        except NameTakenError:
            continue
        except ForgetError as error:  # the examples work without, by the pack's own folder
            print(error, file=sys.stderr)


def find_python(comfyui: Path) -> Path:
    """The interpreter in an installed ComfyUI's folder, or beside it in the portable build."""
    places = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe")
    for path in (*(comfyui / place for place in places), comfyui.parent / "python_embeded/python.exe"):
        if path.exists():
            return path
    sys.exit(f"{comfyui} has no environment of its own: name the interpreter that runs it with --python.")


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the time spent in the context to a phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = round(seconds.get(phase, 0) + time.perf_counter() - start, 2)


def run(server: ComfyServer, concept: str, out: Path, seconds: dict[str, float], quick: bool = False) -> dict:
    """The whole job on a running server: forgets, samples before and after, judges; returns the report. `quick`: one prompt,
    and two kept things."""
    kept = [name for name in OBJECTS if name != concept][: QUICK if quick else None]
    prompts = PROMPTS[:1] if quick else PROMPTS
    workflow = load_workflow(PACK / "workflows/forget-a-concept.json", server.get("object_info"))
    id = by_title(workflow)
    workflow[id["Forget Concept"]]["inputs"]["concept"] = concept
    for title in ("Before", "After"):
        workflow[id[title]]["inputs"]["steps"] = STEPS

    def sample(name: str, prompt: str, titles: list[str]) -> dict[str, torch.Tensor]:
        """Pictures [B, H, W, 3] in 0..1 that the nodes with these titles save for a prompt about `name`."""
        text = prompt.format(name)
        workflow[id["Prompt"]]["inputs"]["value"] = text
        for title in ("Attention before", "Attention after"):
            workflow[id[title]]["inputs"]["words"] = name
        outputs = run_with_bar(server, workflow, text)
        return {title: load_pictures(server, outputs[id[title]]["images"]) for title in titles}

    with timed(seconds, "forget and first pictures"):
        first = sample(concept, PROMPTS[0], ["Pictures before", "Pictures after", "Heat maps before", "Heat maps after"])
    saved = max((server.output / "loras").glob("forget-*.safetensors"), key=lambda path: path.stat().st_mtime)
    for title in ("Heat maps before", "Heat maps after"):  # which are shown of the first pictures alone
        del workflow[id[title]]
    with timed(seconds, "pictures"):
        before, after = {}, {}
        for name in (concept, *kept):
            pictures = [sample(name, prompt, ["Pictures before", "Pictures after"]) for prompt in prompts]
            before[name] = torch.cat([p["Pictures before"] for p in pictures])
            after[name] = torch.cat([p["Pictures after"] for p in pictures])
    with timed(seconds, "checks"):
        zero = with_node(workflow, id["Apply FMN Patch"], strength=0.0)
        pictures = run_with_bar(server, zero, "strength 0")
        identical = torch.equal(
            load_pictures(server, pictures[id["Pictures before"]]["images"]),
            load_pictures(server, pictures[id["Pictures after"]]["images"]),
        )
        unloaded = unloaded_keys(server, workflow, id["Apply FMN Patch"], saved.name)
    with timed(seconds, "classifier"):
        classifier = Classifier.load()
        accuracy = {
            "before": classifier.accuracy(before[concept], concept),
            "after": classifier.accuracy(after[concept], concept),
            "kept_before": sum(classifier.accuracy(before[name], name) for name in kept) / len(kept),
            "kept_after": sum(classifier.accuracy(after[name], name) for name in kept) / len(kept),
        }
    draw_grid(before, after, concept).save(out / "before-after.png")
    draw_heat_maps(first, concept).save(out / "attention.png")
    patch = out / saved.name
    shutil.copyfile(saved, patch)
    return {
        "host": {"name": "ComfyUI", "version": server.get("system_stats")["system"]["comfyui_version"]},
        "concept": concept,
        "kept": kept,
        "accuracy": {key: round(value, 4) for key, value in accuracy.items()},
        "classifier_accuracy_on_held_out_drawings": classifier.held_out["object, drawings"],
        "patch": {"path": str(patch), "bytes": patch.stat().st_size, **unloaded},
        "strength_zero_identical": identical,
        "seconds": seconds,
    }


def run_with_bar(server: ComfyServer, workflow: dict, label: str) -> dict[str, dict]:
    """Runs a prompt with a progress bar of the node at work."""
    with tqdm(total=1, desc=label, leave=False, bar_format="{desc:44.44} {bar:30} {n_fmt}/{total_fmt} {postfix}") as bar:

        def show(kind: str, data: dict) -> None:
            if kind == "progress":
                bar.total, bar.n = data["max"], data["value"]
                bar.set_postfix_str(workflow[data["node"]]["_meta"]["title"])

        return server.run(workflow, show)


def load_pictures(server: ComfyServer, images: list[dict]) -> torch.Tensor:
    """A node's saved pictures as [B, H, W, 3] in 0..1."""
    arrays = [np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).float() / 255


def with_node(workflow: dict, id: str, class_type: str | None = None, **inputs) -> dict:
    """The workflow with one node's inputs changed, or with another node in its place that has these inputs alone."""
    node = workflow[id]
    inputs = inputs if class_type else {**node["inputs"], **inputs}
    return {**workflow, id: {**node, "class_type": class_type or node["class_type"], "inputs": inputs}}


def unloaded_keys(server: ComfyServer, workflow: dict, apply: str, name: str) -> dict[str, int]:
    """Keys of the patch, and how many of them the host's own Load LoRA leaves out, by its log."""
    seen = len(server.log.read_text())
    wired = {key: workflow[apply]["inputs"][key] for key in ("model", "clip")}
    stock = with_node(workflow, apply, "LoraLoader", **wired, lora_name=name, strength_model=1.0, strength_clip=1.0)
    run_with_bar(server, stock, "the host's own Load LoRA")
    log = server.log.read_text()[seen:]
    with safe_open(server.output / "loras" / name, "pt") as file:
        keys = len(file.keys())
    return {"keys": keys, "unloaded_keys": log.count("lora key not loaded") + log.count("NOT LOADED")}


def draw_grid(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], concept: str) -> Image.Image:
    """Two rows a concept, before and after, one column a seed and prompt; the forgotten concept first."""
    columns = len(before[concept])
    margin, band = 150, 14
    grid = Image.new("RGB", (margin + columns * TILE, len(before) * (2 * TILE + band)), "white")
    text = ImageDraw.Draw(grid)
    large, small = ImageFont.load_default(19), ImageFont.load_default(14)
    for row, name in enumerate(before):
        top = row * (2 * TILE + band)
        text.text((12, top + TILE - 24), name, "black", large)
        fate, color = ("forgotten", "firebrick") if name == concept else ("kept", "gray")
        text.text((12, top + TILE), fate, color, small)
        for half, (word, pictures) in enumerate((("before", before[name]), ("after", after[name]))):
            text.text((margin - 50, top + half * TILE + TILE // 2 - 8), word, "gray", small)
            for column, picture in enumerate(pictures):
                grid.paste(tile(picture), (margin + column * TILE, top + half * TILE))
    return grid


def draw_heat_maps(pictures: dict[str, torch.Tensor], concept: str) -> Image.Image:
    """Pictures and where they attend to the concept, before in the upper rows and after in the lower, one scale."""
    rows = ("Pictures before", "Heat maps before", "Pictures after", "Heat maps after")
    margin, size = 170, 2 * TILE
    grid = Image.new("RGB", (margin + len(pictures[rows[0]]) * size, len(rows) * size), "white")
    text = ImageDraw.Draw(grid)
    for row, title in enumerate(rows):
        label = title.replace("Heat maps ", f"attention to\n“{concept}”,\n").replace("Pictures ", "")
        text.text((12, row * size + size // 2 - 24), label, "black", ImageFont.load_default(18))
        for column, picture in enumerate(pictures[title]):
            grid.paste(tile(picture).resize((size, size), Image.Resampling.BICUBIC), (margin + column * size, row * size))
    return grid


def tile(picture: torch.Tensor) -> Image.Image:
    """A picture [H, W, 3] at the grid's size."""
    image = Image.fromarray((picture * 255).round().byte().numpy())
    return image.resize((TILE, TILE), Image.Resampling.BICUBIC)


def print_summary(report: dict, out: Path) -> None:
    """What happened, in a few lines, and where to look."""
    accuracy, patch = report["accuracy"], report["patch"]
    zero = "identical to the base" if report["strength_zero_identical"] else "DIFFERS from the base"
    print(
        f"\n{report['host']['name']} {report['host']['version']} forgot `{report['concept']}`:\n"
        f"  recognised as it    {accuracy['before']:.0%} before, {accuracy['after']:.0%} after\n"
        f"  kept concepts       {accuracy['kept_before']:.0%} before, {accuracy['kept_after']:.0%} after"
        f"   (the classifier knows {report['classifier_accuracy_on_held_out_drawings']:.0%} of unseen real drawings)\n"
        f"  strength 0          {zero}\n"
        f"  patch               {patch['bytes']:,} bytes, {patch['keys']} keys, "
        f"{patch['unloaded_keys']} not loaded by the host's Load LoRA\n"
        f"  time                {sum(report['seconds'].values()):.0f} s\n\n"
        f"{out / 'before-after.png'}\n{out / 'attention.png'}\n{patch['path']}\n{out / 'report.json'}"
    )


def serve(server: ComfyServer) -> None:
    """Leaves the server up until it is stopped by Ctrl+C."""
    try:
        print(f"\nOpen {server.url}/?template=forget-a-concept&source=forget-me-not   (Ctrl+C stops the server)", flush=True)
        server.process.wait()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(f"The demo failed: {error}")
