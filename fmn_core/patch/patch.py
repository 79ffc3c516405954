"""The patch file: a LoRA that every loader takes, with what the pack wants to remember in its metadata."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..errors import ForgetError, brief
from ..files.atomic import write_all_new
from ..files.bounded_json import parse_json, require_bounded_json
from ..files.header import one_line, read_header, read_raw_header, require_bounded_header, tensor_hash, with_sorted_header
from ..files.safetensors import UNREADABLE, read_small
from ..host import FAMILIES, MATRICES, DiffusionHost
from ..log import replace_surrogates
from ..lora.layers import LoRAs, balanced
from ..text.concept import Concept, described
from .bounds import require_brief, require_room
from .statistics import Moments

SCHEMA = 1
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
KNOWN = {"concept": str, "settings": dict, "report": dict, "version": str}  # of every patch's info
MOST_BYTES = 1 << 30  # of a file: SDXL's at rank 128 has 202 million, a hundred concepts of rank 4 stacked 380 million
MODULE = re.compile(r"lora_unet_\w+_attn2_to_(q|k|v|out_0)", re.ASCII)


class Patch(dict):
    """A forget patch: tensors by kohya name, as the host's LoRA nodes take them, and `info`, the JSON of `fmn.patch`.

    `rest`: an ordinary LoRA of what was trained outside the cross-attention, which goes into a file of its own.
    """

    def __init__(self, tensors: dict[str, Tensor], info: dict, rest: dict[str, Tensor] | None = None):
        super().__init__(tensors)
        self.info, self.rest = info, rest or {}

    @property
    def modules(self) -> list[str]:
        """Names of the patched projections."""
        return sorted(key[: -len(ALPHA)] for key in self if key.endswith(ALPHA))

    @property
    def rank(self) -> int:
        """The one rank of all modules."""
        return len(self[self.modules[0] + DOWN])


def make_patch(
    host: DiffusionHost,
    factors: dict[tuple[str, str], tuple[Tensor, Tensor]],
    concepts: tuple[Concept, ...],
    settings: dict,
    report: dict,
    moments: Moments | None,
) -> Patch:
    """Patch from factors, (layer, matrix) -> (up [out, r], down [r, in]) of one r: singular values' roots on both
    sides, fp16, alpha = rank; without moments where nobody knows the concept's words. Raises ForgetError where they are
    not finite."""
    tensors = {}
    for (layer, matrix), (up, down) in factors.items():
        name = host.lora_key(layer, matrix)
        require_finite(up, down)  # the decomposition in `balanced` takes no others
        up, down = balanced(up.detach().cpu(), down.detach().cpu())
        tensors[name + DOWN] = down.half().contiguous()
        tensors[name + UP] = up.half().contiguous()
        tensors[name + ALPHA] = torch.tensor(float(len(down)), dtype=torch.float16)
    require_finite(*tensors.values())
    info = {
        "schema": SCHEMA,
        "version": __version__,
        **described(concepts),
        "settings": settings,
        "base": {"name": one_line(host.model_name()), "family": host.family, "hash": fingerprint(host)},
        "report": report,
    }
    if moments is not None:
        info["moments"] = moments.encoded()
    return Patch(dict(sorted(tensors.items())), info)


def rest_tensors(loras: LoRAs) -> dict[str, Tensor]:
    """An ordinary LoRA of adapters whose names are kohya's; raises ForgetError where they are not finite."""
    tensors = {}
    for name in loras.patched:
        lora = loras[name]
        tensors[name + DOWN], tensors[name + UP] = (x.detach().half().cpu().contiguous() for x in (lora.down, lora.up))
        tensors[name + ALPHA] = torch.tensor(float(len(lora.down)), dtype=torch.float16)
    require_finite(*tensors.values())
    return tensors


def require_finite(*weights: Tensor) -> None:
    """Raises ForgetError where a patch's weights hold infinity or no number."""
    if not all(torch.isfinite(weight).all() for weight in weights):
        raise ForgetError("The patch's weights are not finite in half precision: lower the learning rate.")


def fingerprint(host: DiffusionHost) -> str:
    """sha256 of the cross-attention's K and V weights: the same for every copy of a base model in one precision."""
    digest = hashlib.sha256()
    for layer in host.cross_attentions():
        for matrix in ("to_k", "to_v"):
            weight = host.weight(layer, matrix).detach().cpu().contiguous()
            digest.update(weight.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metadata(patch: Patch, name: str, digest: str) -> dict[str, str]:
    """What goes into a file beside a patch's tensors, or its rest's, of this sha256: keys that kohya's tools, the webuis
    and model managers read. No date: the same patch gives the same file."""
    info, base = patch.info, patch.info["base"]
    version, architecture = FAMILIES[base["family"]]
    written = ("seed",) if info["settings"].get("preset") == "fast" else ("seed", "steps", "learning_rate")
    taken = info["settings"] | {key: info["report"][key] for key in ("steps",) if key in info["report"]}
    training = {f"ss_{key}": str(taken[key]) for key in written if key in taken}
    title = f"Forget {info['concept']}"
    said = {
        "ss_base_model_version": version,
        "ss_v2": str(base["family"].startswith("sd2")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(patch.rank),
        "ss_network_alpha": str(float(patch.rank)),
        "ss_output_name": name,
        **training,
        "ss_training_comment": f"{title}: a patch of Forget-Me-Not {info['version']}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": f"Makes the model forget `{info['concept']}`. Hides it from prompts, deletes nothing.",
        "modelspec.usage_hint": "Apply at strength 1; no trigger word.",
        "modelspec.hash_sha256": "0x" + digest,
        "sshs_model_hash": digest,
    }
    return replace_surrogates(said)


def serialize(patch: Patch, name: str) -> bytes:
    """The bytes of a patch file; the same for the same patch and name. Raises ForgetError for one that `read_patch` would
    refuse for its size."""
    try:
        require_brief(patch.info)
        require_room(shapes_of(patch), patch.rank)
        stored = json.dumps(patch.info, sort_keys=True)
        require_bounded_json(stored.encode())
        raw = with_sorted_header(save(dict(patch), metadata(patch, name, tensor_hash(patch)) | {"fmn.patch": stored}))
        require_bounded_header(raw)
        if len(raw) > MOST_BYTES:
            raise ValueError(f"it has {len(raw):,} bytes, and {MOST_BYTES:,} are the most")
    except ValueError as error:
        raise ForgetError(
            f"The patch cannot be saved, {error}: forget or stack fewer concepts at once, or with a lower rank."
        ) from None
    return raw


def serialize_rest(patch: Patch, name: str) -> bytes:
    """The bytes of the file with a patch's rest: an ordinary LoRA."""
    described = {
        "modelspec.title": f"Forget {patch.info['concept']}, outside the cross-attention",
        "modelspec.usage_hint": "Load beside the forget patch of the same name, at strength 1.",
    }
    return with_sorted_header(save(patch.rest, metadata(patch, name, tensor_hash(patch.rest)) | described))


def save_patch(patch: Patch, path: Path) -> list[Path]:
    """Writes a patch under a name that must be new, whole or not at all, and with it its rest, if it has one, beside it as
    `<name>-rest`; returns the files.

    Raises ForgetError where a name is taken or a file cannot be written.
    """
    files = {path: serialize(patch, path.stem)}
    if patch.rest:
        beside = path.with_stem(f"{path.stem}-rest")
        files[beside] = serialize_rest(patch, beside.stem)
    write_all_new({path: lambda file, raw=raw: file.write(raw) for path, raw in files.items()})
    return list(files)


def is_patch(path: Path) -> bool:
    """Whether a file says that it is a forget patch; other LoRA files, and what cannot be read, do not."""
    try:
        with open(path, "rb") as file:
            if b'"fmn.patch"' not in read_raw_header(file):  # as of most files in a folder, which are not worth parsing
                return False
            file.seek(0)
            return "fmn.patch" in read_header(file).metadata
    except (OSError, ValueError):
        return False


def read_patch(path: Path) -> Patch:
    """Reads and checks a patch file; raises ForgetError with the file's name and the remedy."""
    try:
        with open(path, "rb") as file:
            if b'"fmn.patch"' not in read_raw_header(file):
                raise ForgetError(f"{path.name} is no forget patch: use the host's Load LoRA for ordinary LoRA files.")
        tensors, told = read_small(path, MOST_BYTES)
        patch = Patch(dict(sorted(tensors.items())), parse_json(told.pop("fmn.patch")))
    except FileNotFoundError:
        raise ForgetError(f"{path.name} is not there any more: refresh the list of patches and choose again.") from None
    except ForgetError:
        raise
    except UNREADABLE as error:
        raise ForgetError(
            f"{path.name} cannot be read ({brief(error)}): it is damaged or no safetensors file; copy it anew."
        ) from error
    check_patch(patch, path.name)
    return patch


def check_patch(patch: Patch, name: str) -> None:
    """Raises ForgetError unless this is a patch of a known schema with well-formed, finite tensors."""
    check_info(patch.info, name)
    check_tensors(patch, name)
    bounded(name, require_room, shapes_of(patch), patch.rank)


def check_info(info: object, name: str) -> None:
    """Raises ForgetError unless this is what a patch of a known schema says of itself, its parts left out."""
    info = info if isinstance(info, dict) else {}
    if info.get("schema") != SCHEMA:
        raise ForgetError(
            f"{name} is a patch of schema {brief(info.get('schema'))}, and this version reads {SCHEMA}: update "
            "Forget-Me-Not."
        )
    bounded(name, require_brief, info)
    base = info.get("base")
    known = isinstance(base, dict) and str(base.get("family")) in FAMILIES and isinstance(base.get("name"), str)
    told = all(isinstance(info.get(key), kind) for key, kind in KNOWN.items())
    if not known or not told:
        raise ForgetError(f"{name} does not say what it forgets or for which model: it is damaged; copy it anew.")
    concepts = info.get("concepts")
    if concepts is not None and not (isinstance(concepts, list) and all(map(is_concept, concepts))):
        raise ForgetError(f"What {name} says of its concepts cannot be read: it is damaged; copy it anew.")


def bounded(name: str, check: Callable[..., None], *given: object) -> None:
    """Raises ForgetError with the patch's name where a check of its bounds raises ValueError."""
    try:
        check(*given)
    except ValueError as error:
        raise ForgetError(f"{name} cannot be used, {error}: it is damaged or was edited; copy the original anew.") from None


def check_tensors(patch: Patch, name: str) -> None:
    """Raises ForgetError unless these are the tensors of a patch, of one rank, fp16, finite."""
    modules = patch.modules
    expected = {module + suffix for module in modules for suffix in (DOWN, UP, ALPHA)}
    if not modules or set(patch) != expected or not all(MODULE.fullmatch(module) for module in modules):
        raise ForgetError(f"{name} holds other tensors than a forget patch does: it is damaged or was edited; copy it anew.")
    rank = (*patch[modules[0] + DOWN].shape, 0)[0]
    for module in modules:
        up, down = patch[module + UP], patch[module + DOWN]
        alpha = patch[module + ALPHA]
        if down.ndim != 2 or up.ndim != 2 or alpha.ndim or not len(down) == up.shape[1] == rank > 0:
            raise ForgetError(f"{name} has tensors of the wrong shape in {module}: it is damaged; copy it anew.")
        if not up.dtype == down.dtype == alpha.dtype == torch.float16 or alpha != rank:
            raise ForgetError(f"{name} is not fp16 with alpha = rank in {module}: it was edited; copy the original anew.")
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise ForgetError(f"{name} has values that are not finite in {module}: it is damaged; forget the concept anew.")


def is_concept(value: object) -> bool:
    """Whether this is a concept as `make_patch` writes it down."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return False
    several = (value.get("names"), value.get("templates"))
    return all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in several)


def check_strength(strength: float) -> None:
    """Raises ForgetError for a strength that is infinite or no number."""
    if not math.isfinite(strength):
        raise ForgetError(f"The strength is {strength}: use a number, 1 for the patch as it was made.")


def check_fits(patch: Patch, shapes: dict[str, tuple[int, int]], model: str) -> None:
    """Raises ForgetError unless every module of the patch is a projection of the model: name -> (out, in)."""
    for module, own in shapes_of(patch).items():
        found = shapes.get(module)
        if found != own:
            base = patch.info["base"]
            raise ForgetError(
                f"The patch that forgets `{patch.info['concept']}` was made for {base['name']} ({base['family']}), and "
                f"this model, {model}, has {'another shape' if found else 'no layer'} at {module}: "
                "load the checkpoint it was made for, or forget the concept in this one."
            )


def shapes_of(patch: Patch) -> dict[str, tuple[int, int]]:
    """Kohya name -> (out, in) of every projection that a patch changes."""
    return {module: (len(patch[module + UP]), patch[module + DOWN].shape[1]) for module in patch.modules}


def model_shapes(host: DiffusionHost) -> dict[str, tuple[int, int]]:
    """Kohya name -> (out, in) of every projection a patch may hold."""
    return {
        host.lora_key(layer, matrix): tuple(cross.linear(matrix).weight.shape)
        for layer, cross in host.cross_attentions().items()
        for matrix in MATRICES
    }
