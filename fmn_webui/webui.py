"""What the pack asks of the webui: its lock and state, its folders, its list of LoRAs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from modules import call_queue, paths, shared
from PIL import Image
from torch import Tensor

from fmn_core.errors import ForgetError
from fmn_core.host import DiffusionHost
from fmn_core.hosts.webui.model import current_host

from .jobs import Job
from .shown import Shown


def lora_folder() -> Path:
    """Where the webui looks for LoRAs."""
    return Path(shared.cmd_opts.lora_dir)


def states_folder() -> Path:
    """Where the states of trainings are kept until they end: among the webui's models, and out of the LoRA folder, where the
    page of LoRAs has a button for every folder, and the command line may keep its own."""
    return Path(paths.models_path) / "forget-me-not"


def refresh_loras() -> None:
    """Tells the Lora extension, where it is there, that a file came."""
    listed = getattr(sys.modules.get("networks"), "list_available_networks", None)
    try:
        if listed is not None:
            listed()
    except Exception as error:  # another file in the folder may be what it stumbles over; ours is saved
        logging.warning("Forget-Me-Not: the list of LoRAs could not be refreshed", exc_info=error)


@contextmanager
def host_lock(job: Job) -> Iterator[None]:
    """Context in which the job has the model: generations wait, and the host shows that it is at work."""
    with call_queue.queue_lock:
        shared.state.begin(job=f"forget-me-not-{job.kind}")
        try:
            yield
        finally:
            shared.state.end()
            shared.state.interrupted = False


def interrupt() -> None:
    """Asks what has the model now to stop, as the host's own button does."""
    shared.state.interrupt()


def error_sentence(error: BaseException) -> str:
    """The sentence of an error; what nobody foresaw goes to the console whole."""
    if isinstance(error, ForgetError):
        return str(error)
    logging.error("Forget-Me-Not failed", exc_info=error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"{error} Or start the webui with --medvram."
    return f"{type(error).__name__}: {error}. The console shows where; please report it."


def host_for(job: Job) -> DiffusionHost:
    """The loaded model, which tells the job how far it is, and whether the user has stopped it, and makes previews while
    somebody looks at the job."""
    host = current_host()
    show, check, shown = host.show_progress, host.check_interrupt, host.shows_previews

    def show_progress(step: int, total: int, preview: Tensor | None) -> None:
        job.step, job.steps = step, total
        if preview is not None:
            job.preview = Shown(picture_of(preview))
        show(step, total, preview)

    def check_interrupt() -> None:
        job.asked_to_stop = job.asked_to_stop or shared.state.interrupted
        check()

    host.show_progress, host.check_interrupt = show_progress, check_interrupt
    host.shows_previews, host.may_show_previews = lambda: job.watched and shown(), shown
    return host


def picture_of(image: Tensor) -> Image.Image:
    """A picture [H, W, 3] in 0..1 as Pillow's."""
    return Image.fromarray((image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy())
