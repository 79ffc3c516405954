"""Pictures that a user gives: read to the bit where they are small, shrunk where not, refused before they are decoded."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fmn_core.errors import ForgetError
from fmn_core.training.images import MOST_PIXELS, most_pixels, opened, picture_files, read_images, read_pictures

BOMB = """
import io, resource, torch
from PIL import Image
from fmn_core.training.images import read_pictures
data = io.BytesIO()
Image.new("RGB", (8000, 7999), (9, 8, 7)).save(data, "png")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images, _ = read_pictures([data.getvalue()] * 3, resolution=512)
print(images.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def noise(width, height, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def data_of(picture, kind="png", **options):
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def turned_by(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
    st.sampled_from(["L", "RGB", "RGBA"]),
    st.sampled_from(["png", "jpeg", "webp"]),
    st.integers(1, 8),
)
def test_what_training_can_use_is_read_to_the_bit(sizes, mode, kind, orientation):
    mode = "RGB" if (kind, mode) == ("jpeg", "RGBA") else mode
    sources = [data_of(noise(*size, mode, n), kind, exif=turned_by(orientation)) for n, size in enumerate(sizes)]
    plain = [ImageOps.exif_transpose(Image.open(io.BytesIO(source))).convert("RGB") for source in sources]
    wanted = np.stack([np.asarray(ImageOps.fit(picture, plain[0].size)) for picture in plain])
    found, _ = read_pictures(sources, resolution=64)
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), wanted)


@settings(max_examples=25, deadline=None)
@given(st.integers(130, 700), st.integers(130, 700), st.sampled_from(["png", "jpeg", "webp"]), st.sampled_from([1, 6]))
def test_what_is_larger_is_shrunk_in_its_shape_and_its_mask_with_it(width, height, kind, orientation):
    picture, mask = Image.new("RGB", (width, height), (200, 30, 90)), Image.new("L", (width, height), 255)
    sources = [data_of(each, kind, exif=turned_by(orientation)) for each in (picture, mask)]
    images, masks = read_pictures(sources[:1], sources[1:], resolution=64)
    (_, tall, wide, _), shape = images.shape, (height, width) if orientation == 1 else (width, height)
    assert tall * wide <= max(most_pixels(64), 1) and abs(tall / wide / (shape[0] / shape[1]) - 1) < 0.03
    assert tall * wide > 0.9 * min(most_pixels(64), width * height) and masks.shape == (1, tall, wide) and masks.min() > 250
    assert (images.float() - torch.tensor([200.0, 30, 90])).abs().max() < 6


def test_a_folder_is_read_as_its_pictures_are(tmp_path):
    (tmp_path / "b.PNG").write_bytes(data_of(noise(20, 30)))
    (tmp_path / "a.jpg").write_bytes(data_of(noise(30, 20), "jpeg"))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    files = picture_files(tmp_path)
    assert [file.name for file in files] == ["a.jpg", "b.PNG"]
    assert torch.equal(read_images(tmp_path, 64), read_pictures(files, resolution=64)[0].float() / 255)
    (tmp_path / "c.webp").write_bytes(b"no picture")
    with pytest.raises(ForgetError, match="c.webp cannot be read as a picture"):
        read_images(tmp_path)
    (tmp_path / "c.webp").write_bytes(data_of(noise(40, 40), "webp")[:-300])
    with pytest.raises(ForgetError, match="c.webp cannot be read as a picture"):
        read_images(tmp_path)


def png_that_says(width, height):
    """A PNG of a few bytes with that size in its head."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(8001, 8000), (60000, 60000), (2**31 - 1, 1), (1, MOST_PIXELS), (6500, 100)])
def test_what_is_no_photograph_is_refused_by_its_head(width, height):
    with pytest.raises(ForgetError, match="pixels|cannot be read"):
        opened(png_that_says(width, height))


def test_three_bombs_take_the_memory_of_one_decoded_picture():
    done = subprocess.run([sys.executable, "-c", BOMB], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, peak = map(int, done.stdout.split())
    assert kept <= 3 * 3 * most_pixels(512) and peak < 600_000, (
        "kB beyond what the process had: one picture decodes to 192 MB"
    )
