"""Save Forget Patch, Apply FMN Patch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..fmn_core.errors import ForgetError
from ..fmn_core.files.atomic import save_under_next
from ..fmn_core.files.names import folder_and_name, slug
from ..fmn_core.hosts.comfy.apply import apply_patch
from ..fmn_core.patch.file import read_patch, save_patch
from ..fmn_core.patch.patch import Patch
from .schema import LoraModel, schema

FROM_INPUT = "from the lora input"


def as_patch(lora) -> Patch:
    """The LORA_MODEL of a wire, which must be a forget patch."""
    if lora is None:
        raise ForgetError("This input carries no patch: no forget patch is enabled in the node before.")
    if not isinstance(lora, Patch):
        raise ForgetError(
            "This LORA_MODEL is not a forget patch: connect the lora output of Forget Concept, "
            "and use the host's Load LoRA Model or Save LoRA Weights for others."
        )
    return lora


def listed_files(kind: str = "loras") -> list[str]:
    """The names of a kind of files that are safe to read."""
    return [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]


def require_file(name: str, kind: str = "loras") -> Path:
    """Where a file of the host's folders is; raises ForgetError where it is in none of them, or is unsafe to read."""
    path = find_file(name, kind)
    if path is None:
        raise ForgetError(f"{name} is not in any of the host's folders: press R to refresh, and choose again.")
    if path.suffix != ".safetensors":
        raise ForgetError(f"{name} is not a .safetensors file, and no other kind is read: convert it first.")
    return path


def find_file(name: str, kind: str) -> Path | None:
    """Where a file of the host's folders is, or None; the host itself keeps names inside its folders."""
    try:
        path = folder_paths.get_full_path(kind, name)
    except (OSError, ValueError):  # no file system has such a name
        return None
    return path and Path(path)


def written_at(name: str, kind: str) -> int | None:
    """When a file of the host's folders was written, or None where there is none."""
    path = find_file(name, kind)
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:  # taken away in between
        return None


def patch_input() -> io.Combo.Input:
    """The choice between the files in the host's LoRA folders and what is connected."""
    return io.Combo.Input(
        "patch",
        options=[FROM_INPUT, *listed_files()],
        tooltip="A saved patch, which goes before the one connected to `lora`, or that one. "
        "Press R after saving to refresh the list.",
    )


def choose(patch: str, lora) -> tuple[Patch, Path | None]:
    """The patch that a node's inputs name, and its file if it has one; raises ForgetError where there is none."""
    if patch != FROM_INPUT:
        path = require_file(patch)
        return read_patch(path), path
    if lora is None:
        raise ForgetError("There is no patch: choose a file, or connect the lora output of Forget Concept.")
    return as_patch(lora), None


def changed_at(patch) -> int | None:
    """When the chosen file was written: a node runs again where it was replaced."""
    return written_at(patch, "loras") if isinstance(patch, str) and patch != FROM_INPUT else None


class SavePatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_SavePatch",
            display_name="Save Forget Patch",
            description="Writes a patch as a LoRA file into output/loras, where every LoRA loader finds it at once "
            "(press R to refresh the lists). Files are numbered, never overwritten.",
            search_aliases=["save lora"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("lora", tooltip="The patch that Forget Concept made."),
                io.String.Input(
                    "filename_prefix",
                    default="forget-%concept%",
                    tooltip="Name of the file; %concept% becomes the concept's name. "
                    "A slash makes a folder in output/loras.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file's name as the LoRA loaders list it.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix) -> io.NodeOutput:
        patch = as_patch(lora)
        files = save_under_next(new_paths(filename_prefix, patch), lambda path: save_patch(patch, path))
        return io.NodeOutput(lora_name(files[0]), ui=ui.PreviewText("\n".join(f"Saved {file}" for file in files)))


def patches_folder() -> Path:
    """Where the host's LoRA loaders find what its nodes save."""
    return Path(folder_paths.get_output_directory(), "loras")


def lora_name(path: Path) -> str:
    """A saved file's name as the LoRA loaders list it."""
    return str(path.relative_to(patches_folder()))


def new_paths(prefix: str, patch: Patch) -> Iterator[Path]:
    """Numbered paths below output/loras that no file has, and whose names in the LoRA loaders' lists no file in any LoRA
    folder of the host has: loaders ask by that name and take the first they find.

    Raises ForgetError for a prefix that leads elsewhere.
    """
    root, concept = patches_folder(), slug(patch.info["concept"])
    prefix = folder_and_name(prefix.replace("%concept%", concept), root)
    if not prefix or prefix.endswith("/"):
        prefix += f"forget-{concept}"
    return numbered(root, prefix, "safetensors", lambda name: folder_paths.get_full_path("loras", name) is not None)


def numbered(root: Path, prefix: str, suffix: str, taken: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Numbered paths below `root` that no file has, and whose names below it are not taken elsewhere, one after another.

    Raises ForgetError for a prefix that leads elsewhere.
    """
    prefix = folder_and_name(prefix, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(root))
    except OSError as error:
        raise ForgetError(f"`{prefix}` cannot be used below {root}: {error.strerror}. Choose another name.") from error
    except Exception as error:  # the host raises a bare Exception for a folder outside
        raise ForgetError(f"`{prefix}` leads out of {root}: use a name, or a folder inside it, without `..`.") from error
    for number in itertools.count(counter):
        path = Path(folder, f"{stem}_{number:05}_.{suffix}")
        if not path.exists() and not taken(str(Path(subfolder, path.name))):
            yield path


class ApplyPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="FMN_ApplyPatch",
            display_name="Apply FMN Patch",
            description="Makes the model forget what a patch forgets. Chain several to forget several concepts.",
            search_aliases=["load forget patch", "forget lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch; a patched copy comes out."),
                io.Clip.Input("clip", tooltip="Passed through: a forget patch changes the UNet alone."),
                patch_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much of the patch to apply: 1 as it was made, 0 not at all, below 0 the other way.",
                ),
                LoraModel.Input("lora", optional=True, tooltip="A patch straight from Forget Concept."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The patched model."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder, as it came in."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, patch, **kwargs):
        return changed_at(patch)

    @classmethod
    def execute(cls, model, clip, patch, strength, lora=None) -> io.NodeOutput:
        return io.NodeOutput(apply_patch(model, choose(patch, lora)[0], strength), clip)
