"""Several processes that save into one folder: each takes the next number, and no file is refused, torn or taken over."""

from __future__ import annotations

import errno
import multiprocessing
import os

import pytest
from conftest import ROOT
from safetensors import safe_open

from fmn_core.convert.exporter import save_as
from fmn_core.errors import ForgetError
from fmn_core.files.atomic import save_under_next
from fmn_core.patch.file import read_patch, save_patch
from fmn_core.patch.patch import Patch
from fmn_core.training.checkpoint import beside
from fmn_webui.names import new_files

PATCH = ROOT / "demo/loras/forget-cat.safetensors"
PROCESSES, EACH = 3, 10


def no_link(*names):
    raise OSError(errno.EPERM, "this file system has no hard links")


def patch_with_unet_lora():
    patch = read_patch(PATCH)
    return Patch(dict(patch), patch.info, dict(patch))


def save_patches(folder):
    save_under_next(new_files(folder, "", "cat"), lambda path: save_patch(patch_with_unet_lora(), path))


def save_exports(folder):
    save_under_next(new_files(folder, "forget-cat", "cat", True), lambda path: save_as(patch_with_unet_lora(), "peft", path))


def save_unfinished(folder):
    beside(folder / "forget-cat.safetensors", save_patch).rescue(patch_with_unet_lora())


KINDS = {"patches": save_patches, "exports": save_exports, "unfinished": save_unfinished}


def work(folder, links, start):
    if not links:
        os.link = no_link
    for kind, save in KINDS.items():
        start.wait()
        for _ in range(EACH):
            save(folder / kind)


@pytest.mark.parametrize("links", [True, False])
def test_processes_that_save_at_once_take_the_next_number(links, tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(PROCESSES)
    several = [context.Process(target=work, args=(tmp_path, links, start)) for _ in range(PROCESSES)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * PROCESSES
    for kind in KINDS:
        files = sorted((tmp_path / kind).iterdir())
        wholes = [file for file in files if not file.stem.endswith("-unet")]
        assert len(wholes) == PROCESSES * EACH and len(files) == 2 * len(wholes)
        for file in wholes:
            for one in (file, file.with_stem(f"{file.stem}-unet")):
                with safe_open(one, "pt") as opened:  # each was written for the name that it has
                    assert opened.metadata()["ss_output_name"] == one.stem and opened.keys()


def test_what_is_no_taken_name_is_told_and_not_tried_again(tmp_path):
    tried = []

    def save(path):
        tried.append(path)
        raise ForgetError("The disk is full.")

    with pytest.raises(ForgetError, match="full"):
        save_under_next(new_files(tmp_path, "", "cat"), save)
    assert len(tried) == 1
    only = tmp_path / "only.safetensors"
    only.write_bytes(b"")
    with pytest.raises(ForgetError, match="never overwritten"):
        save_under_next([only], lambda path: save_patch(patch_with_unet_lora(), path))
