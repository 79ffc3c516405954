"""The data set on disk: pictures, captions and what they show, made once and read as a memory map."""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .drawings import SIZE, read_objects, read_people
from .pictures import PLAIN_ARTISTS, Scene, caption, draw, scenes

DRAWINGS_OF_A_PERSON = 60
CAPTIONS = 4  # for each picture


def _take_drawings(objects, people):
    """Gives a worker the drawings, once for all its parts."""
    global _drawings
    _drawings = objects, people


def _make_part(folder, first, part, seed):
    """Draws scenes `first` and on into the memory map; every picture has its own seed."""
    pictures = np.lib.format.open_memmap(folder / "pictures.part.npy", "r+")
    for index, scene in enumerate(part, first):
        pictures[index] = np.asarray(draw(scene, *_drawings, random.Random(f"{seed} {index}")))
    return len(part)


def make_dataset(
    folder: Path, cache: Path, repeats: int, seed: int, limit: int | None = None, workers: int = 2, caption=caption
) -> None:
    """Writes pictures.npy [N, 128, 128, 3] bytes, and scenes.json: per picture [captions, scene]; nothing where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "pictures.npy").exists():
        return
    dice = random.Random(seed)
    every = list(scenes(repeats))
    dice.shuffle(every)
    every = every[:limit]
    captions = [[caption(scene, dice)[0] for _ in range(CAPTIONS)] for scene in every]
    (folder / "scenes.json").write_text(json.dumps(list(zip(captions, every, strict=True))))
    drawings = read_objects(PLAIN_ARTISTS, cache), read_people(DRAWINGS_OF_A_PERSON, seed, cache)
    np.lib.format.open_memmap(folder / "pictures.part.npy", "w+", np.uint8, (len(every), SIZE, SIZE, 3))
    step = 512
    pool = ProcessPoolExecutor(workers, initializer=_take_drawings, initargs=drawings)
    with pool, tqdm(total=len(every), desc="pictures") as bar:
        parts = [
            pool.submit(_make_part, folder, first, every[first : first + step], seed) for first in range(0, len(every), step)
        ]
        for part in parts:
            bar.update(part.result())
    (folder / "pictures.part.npy").rename(folder / "pictures.npy")


def read_dataset(folder: Path):
    """(pictures, captions, scenes) as make_dataset wrote them."""
    captions, every = zip(*json.loads((folder / "scenes.json").read_text()), strict=True)
    return np.load(folder / "pictures.npy", mmap_mode="r"), list(captions), [Scene(*scene) for scene in every]
