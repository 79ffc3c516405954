"""The patches that a generation is drawn with: all that it asks for, or there is no picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modules import shared

from fmn_core.errors import ForgetError
from fmn_core.hosts.webui.model import adapt
from fmn_core.patch.file import read_patch
from fmn_core.patch.patch import Patch, check_fits, model_shapes

from .infotext import ScriptOptions
from .models import made_elsewhere
from .stacks import joint
from .tasks import find_patch

ALLOW = "fmn_draw_without_missing_patches"  # the setting's key


@dataclass(frozen=True)
class Applied:
    """LoRA tags by name and strength, their files, and what these hold."""

    rows: tuple[tuple[str, float], ...] = ()
    files: tuple[Path, ...] = ()
    patches: tuple[Patch, ...] = ()


class Refused(ForgetError):
    """What the webuis' API answers with 422 and the sentence, and their page shows in the picture's place."""

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.status_code, self.detail = 422, sentence


class NoSampler:
    """In the place of a sampler: whatever is asked of it raises."""

    def __init__(self, sentence: str):
        self.__dict__["sentence"] = sentence

    def __getattr__(self, name: str):
        raise Refused(self.sentence)


def refuse(p, sentence: str) -> None:
    """Ends a generation before it begins. The hosts log what a script raises and go on, so their own next call raises."""

    def init(*args, **kwargs):
        raise Refused(sentence)

    p.init = init


def refuse_sampling(p, sentence: str) -> None:
    """The same from the hook before every sampling, where the sampler is called next."""
    p.sampler = NoSampler(sentence)


def allowed() -> bool:
    """Whether the user lets pictures be drawn without the patches that cannot be applied."""
    return bool(getattr(shared.opts, ALLOW, False))


def add_page_setting() -> None:
    """The page's setting, under Settings."""
    label = "Draw pictures without the patches that are missing, damaged or made for another model"
    section = ("forget_me_not", "Forget-Me-Not")
    shared.opts.add_option(ALLOW, shared.OptionInfo(False, label, section=section))


def prepared(p, options: ScriptOptions) -> tuple[Applied, ScriptOptions, list[str]]:
    """What is to be applied, what of the wish that is, and a sentence for each patch that the user lets go or that was made
    for another checkpoint.

    Raises ForgetError for a patch that is missing, damaged or made for another model, unless the user lets it go.
    """
    if not options.patches:
        return Applied(), options, []
    if getattr(p, "disable_extra_networks", False):
        raise ForgetError("Extra networks are disabled, and patches are such: enable them, or take the patches off.")
    found, gone = [], []
    for name, strength in options.patches:
        try:
            path = find_patch(name)
            patch = read_patch(path)
            check_model(p.sd_model, [patch])
            found.append((name, strength, path, patch))
        except ForgetError as error:
            gone.append(str(error))
    if gone and not allowed():
        raise ForgetError(" ".join([*gone, "No picture was made, since the concept would be in it."]))
    left = replace(options, patches=tuple((name, strength) for name, strength, *_ in found))
    elsewhere = [made_elsewhere(adapt(p.sd_model, to_train=False), name, patch) for name, _, _, patch in found]
    sentences = [*gone, *filter(None, elsewhere)]
    if left.jointly and len(found) > 1:
        path = joint(left.patches)
        return Applied(((path.stem, 1.0),), (path,), (read_patch(path),)), left, sentences
    return Applied(left.patches, tuple(each[2] for each in found), tuple(each[3] for each in found)), left, sentences


def check_model(model, patches: Sequence[Patch]) -> None:
    """Raises ForgetError unless every patch has its layers in the webui's model and would be seen in its pictures. Names and
    shapes are read alone: models that can only draw, torn by --lowvram or quantised, will do."""
    host = adapt(model, to_train=False)
    for patch in patches:
        if host.hides_loras:
            raise ForgetError(
                "The checkpoint is in scaled fp8, where this webui adds LoRAs before the scale and no patch would be seen: "
                "set Diffusion in Low Bits to Automatic (fp16 LoRA), or load it in fp16, bf16 or fp8 without scales."
            )
        if host.quantised:
            base = patch.info["base"]
            if base["family"][:3] != host.family[:3]:
                raise ForgetError(
                    f"The patch that forgets `{patch.info['concept']}` was made for {base['name']} ({base['family']}), and "
                    f"this model, {host.model_name()}, is of another kind: load the checkpoint it was made for."
                )
        else:
            check_fits(patch, model_shapes(host), host.model_name())


def check_loaded(p, applied: Applied) -> None:
    """Raises ForgetError unless the host has loaded what is to be applied, and the model that draws takes it."""
    check_model(p.sd_model, applied.patches)
    loaded = {net.name: net for net in getattr(sys.modules.get("networks"), "loaded_networks", ())}
    for (name, _), path in zip(applied.rows, applied.files, strict=True):
        if name not in loaded:
            raise ForgetError(
                f"The webui has not loaded `{name}`, {path}: is its Lora extension on, and the prompt free of unclosed `<`?"
            )
        file = Path(loaded[name].network_on_disk.filename)
        if not (file.exists() and path.exists() and file.samefile(path)):
            raise ForgetError(f"The webui has loaded {file} in the place of {path}: rename one of the two, and try again.")
