"""What the tab and the API can have done: forgetting, evaluating, stacking, each as a job."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmn_core.erasure.config import ForgetConfig, TrainingConfig
from fmn_core.erasure.forget import forget
from fmn_core.errors import ForgetError
from fmn_core.evaluation.config import EvaluationConfig
from fmn_core.evaluation.evaluate import evaluate, with_evaluation
from fmn_core.evaluation.plot import draw_report
from fmn_core.files.atomic import save_under_next
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import Patch
from fmn_core.patch.stack import stack
from fmn_core.patch.summary import summary
from fmn_core.patch.weighted import WeightedPatch
from fmn_core.text.concept import joint_name, make_concepts
from fmn_core.training.checkpoint import Checkpoint
from fmn_core.training.images import check_pictures

from . import webui
from .forms import given_pictures
from .jobs import Job, JobResult, Jobs
from .lora_cards import before_and_after, write_picture, write_words
from .names import PatchList, check_name, new_files, new_patch_path, unfinished_name
from .shown import Shown

JOBS = Jobs(webui.host_lock, webui.interrupt, webui.error_sentence)
PATCHES = PatchList()


def patches() -> dict[str, Path]:
    """Name -> file of the patches in the LoRA folder."""
    return PATCHES(webui.lora_folder())


def find_patch(name: str) -> Path:
    """The file of a patch; raises ForgetError where there is none of that name."""
    return find_patches([name])[0]


def find_patches(names: Iterable[str]) -> list[Path]:
    """The file of each patch, found in one walk through the folder; raises ForgetError where there is none of a name."""
    known, found = patches(), []
    for name in names:
        if str(name) not in known:
            raise ForgetError(f"There is no patch `{name}` in {webui.lora_folder()}: refresh the list and choose again.")
        found.append(known[str(name)])
    return found


def patches_in(rows: Sequence[tuple[str, float]]) -> Iterator[WeightedPatch]:
    """The patches of rows of a name and a strength, read when they are asked for."""
    paths = find_patches(name for name, _ in rows)
    return (WeightedPatch(read_patch(path), strength) for path, (_, strength) in zip(paths, rows, strict=True))


@dataclass(frozen=True)
class ForgetRequest:
    """What is to be forgotten, and how; `name` of the file, or empty for one made of the concept; pictures and masks as
    `read_pictures` gives them."""

    concept: str
    config: ForgetConfig
    name: str = ""
    images: Tensor | None = None
    mask: Tensor | None = None
    card: bool = True


def pictures_for(
    config: ForgetConfig | EvaluationConfig, sources: Sequence[Path | bytes], masks: Sequence[Path | bytes] = ()
) -> tuple[Tensor | None, Tensor | None]:
    """Pictures and masks for a job with these settings, None where it needs none; raises ForgetError as `given_pictures`
    does, and where the queue is full."""
    JOBS.require_room()
    needed = config.inversion if isinstance(config, EvaluationConfig) else isinstance(config, TrainingConfig)
    return given_pictures(sources, masks, getattr(config, "resolution", 0), needed)


def from_bytes(pictures: Tensor | None) -> Tensor | None:
    """Pictures of bytes in 0..1."""
    return None if pictures is None else pictures.float() / 255


def submit_forget(request: ForgetRequest) -> Job:
    """Queues the making of a patch; raises ForgetError at once for what cannot work."""
    concepts = make_concepts(request.concept, request.config.concept_type, request.config.template)
    check_pictures(request.images, request.mask)
    named = joint_name(concepts)
    new_patch_path(webui.lora_folder(), request.name, named)

    def work(job: Job) -> JobResult:
        host = webui.host_for(job)
        rescued: list[JobResult] = []

        def rescue(patch: Patch) -> Path:
            name = unfinished_name(request.name, patch.info["concept"])
            rescued.append(keep(patch, name, numbered=True))
            return rescued[0].files[0]

        try:
            with Checkpoint(webui.states_folder(), rescue) as checkpoint:
                images, mask = from_bytes(request.images), from_bytes(request.mask)
                patch, _ = forget(host, request.concept, request.config, images=images, mask=mask, checkpoint=checkpoint)
                result = keep(patch, request.name)
        except BaseException as error:  # the webui's interrupt is no Exception
            if not rescued:
                raise
            if not job.asked_to_stop:
                raise ForgetError(" ".join([webui.error_sentence(error), *rescued[0].lines[:2]])) from error
            rescued[0].stopped = True
            return rescued[0]
        if request.card:
            add_picture(result, host, patch)
            result.stopped = result.picture is None and job.asked_to_stop
        return result

    holds = sum(given.nbytes for given in (request.images, request.mask) if given is not None)
    return JOBS.submit("forget", f"Forget {named}", work, holds)


def keep(patch: Patch, name: str, numbered: bool = False) -> JobResult:
    """Writes a patch into the LoRA folder, with its card's words; `numbered`: under the next free name of the kind. Where
    its name was taken while it was made, it gets another: what was learned is not thrown away."""
    folder = webui.lora_folder()
    text, paths = summary(patch), new_files(folder, name, patch.info["concept"], numbered)
    files = save_under_next(paths, lambda path: save_patch(patch, path))
    path = files[0]
    tags = " ".join(f"<lora:{file.stem}:1>" for file in files)
    lines = [f"Saved {path.name}: {tags} in a prompt applies it.", *text.splitlines()]
    try:
        files.append(write_words(patch, path, text))
    except ForgetError as error:
        lines.append(str(error))
    webui.refresh_loras()
    return JobResult(lines, files)


def add_picture(result: JobResult, host, patch: Patch) -> None:
    """The card's picture; the patch is saved by now, so that whatever prevents it becomes a sentence."""
    try:
        with torch.inference_mode(False), host.sized(patch.info["settings"].get("resolution", 0)):
            picture = before_and_after(host, patch)
        if picture is not None:
            result.picture = Shown(picture)
            result.files.append(write_picture(picture, result.files[0]))
            webui.refresh_loras()
    except BaseException as error:  # the webui's interrupt is no Exception
        logging.info("Forget-Me-Not: no picture for the card", exc_info=error)
        result.lines.append("The card has no picture: it could not be drawn, or was interrupted.")


def submit_evaluate(name: str, settings: EvaluationConfig, images: Tensor | None = None, save_as: str = "") -> Job:
    """Queues the measuring of a patch; `save_as` names a copy with the report in it."""
    read_patch(find_patch(name))
    check_pictures(images, None)
    if save_as.strip():
        new_patch_path(webui.lora_folder(), save_as, "")

    def work(job: Job) -> JobResult:
        host, patch = webui.host_for(job), read_patch(find_patch(name))
        evaluation = evaluate(host, patch, settings, images=from_bytes(images))
        saved = keep(with_evaluation(patch, evaluation.report), save_as) if save_as.strip() else JobResult([])
        return JobResult(
            [*saved.lines[:1], *evaluation.report["summary"].splitlines()],
            saved.files,
            Shown(webui.picture_of(draw_report(evaluation))),
            evaluation.report,
        )

    return JOBS.submit("evaluate", f"Evaluate {name}", work, 0 if images is None else images.nbytes)


def submit_stack(rows: Sequence[tuple[str, float]], name: str, save: bool) -> Job:
    """Queues the stacking of patches: a report, and with `save` a file."""
    if not rows:
        raise ForgetError("There is no patch to stack: choose one.")
    JOBS.require_room()
    for _ in patches_in(rows):  # what waits holds none of them
        pass
    if save and name.strip():
        new_patch_path(webui.lora_folder(), check_name(name), "")

    def work(job: Job) -> JobResult:
        joint = stack([*patches_in(rows)])
        return keep(joint, name) if save else JobResult(summary(joint).splitlines())

    return JOBS.submit("stack", f"Stack {', '.join(patch for patch, _ in rows)}", work)
