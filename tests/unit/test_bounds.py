"""The bounds of what is read: whatever is inside them is read as ever, and the largest real files are well inside."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest
import torch
from conftest import ROOT
from hostile_files import Maker, joined, lora, statistics, with_length
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from fmn_core.cli.config_values import read_number
from fmn_core.cli.run_config import read_config
from fmn_core.convert.exporter import save_as, to_diff, to_peft
from fmn_core.erasure.config import ResteeringConfig, make_config
from fmn_core.errors import ForgetError
from fmn_core.files import bounded_json, header
from fmn_core.files.header import read_header, tensor_hash, with_sorted_header
from fmn_core.files.safetensors import TYPES, read_small
from fmn_core.lora.decompose import of_one_rank
from fmn_core.patch import bounds as patch_bounds
from fmn_core.patch.conflicts import conflict_warnings
from fmn_core.patch.file import is_patch, metadata, read_patch, save_patch
from fmn_core.patch.patch import Patch
from fmn_core.patch.stack import stack
from fmn_core.patch.statistics import TextStatistics
from fmn_core.patch.weighted import WeightedPatch
from fmn_core.text.concept import make_concepts

CAT = ROOT / "demo/loras/forget-cat.safetensors"


@pytest.fixture
def maker():
    return Maker(random.Random(0))


def count(value):
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + sum(map(count, inner))


TENSORS = st.tuples(st.sampled_from(sorted(TYPES)), st.lists(st.integers(0, 4), max_size=4))  # type and shape


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=5), TENSORS, max_size=5))
def test_tensors_are_those_that_the_library_reads(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    tensors = {name: (torch.randn(shape) * 9).to(TYPES[dtype]) for name, (dtype, shape) in shapes.items()}
    path.write_bytes(save(tensors, {"a": "b"}))
    found, told = read_small(path, 1 << 20)
    wanted = load(path.read_bytes())
    assert told == {"a": "b"} and found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape
        assert torch.equal(tensor, wanted[name]) and tensor.is_contiguous()


def test_numbers_at_odd_places_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(joined({"a": ("U8", [1], b"\7"), "b": ("F32", [2], struct.pack("<2f", 1.5, -2.0))}))
    assert read_small(path, 1 << 20)[0]["b"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("name", "why"),
    [("a\n", "control"), ("a\x1b[2J", "control"), ("a\u2028b", "control"), ("9" * 5000, "5,000 characters")],
)
def test_a_tensors_name_is_one_short_line(tmp_path, name, why):
    path = tmp_path / "x.safetensors"
    path.write_bytes(joined({name: ("F16", [], b"\0\0")}))
    with open(path, "rb") as file, pytest.raises(ValueError, match=why) as told:
        read_header(file)
    assert str(told.value).isprintable() and len(str(told.value)) < 200


def test_more_than_the_bounds_is_refused_with_a_sentence_and_less_is_read(tmp_path, maker):
    """The layer's own shape or what the patch says, one step inside and one outside."""
    own, name = maker, next(iter(maker.layers(1, 1)))
    few = own.info["concepts"][0]
    many = {count: {str(n): n for n in range(count)} for count in (256, 257)}
    long, longer = (few | {"names": ["x" * letters]} for letters in (1000, 1001))
    for inside, outside, why in (
        (own.patch(shapes={name: (1, 1, 2048)}), own.patch(shapes={name: (1, 1, 4096)}), "rank of 4,096"),
        (own.patch(shapes={name: (4096, 1, 1)}), own.patch(shapes={name: (4097, 1, 1)}), "side of 4,097"),
        (own.patch(shapes=own.layers(1024, 1)), own.patch(shapes=own.layers(1025, 1)), "1,025 layers"),
        (own.patch(shapes=own.layers(64, 1, 4096)), own.patch(shapes=own.layers(65, 1, 4096)), "weights"),
        (own.patch(concepts=[few] * 1024), own.patch(concepts=[few] * 1025), "1,025 concepts"),
        (own.patch(concepts=[long]), own.patch(concepts=[longer]), "1,001 characters"),
        (own.patch(concept="x"), own.patch(concept="x\ny"), "control characters"),
        (own.patch(settings=many[256]), own.patch(settings=many[257]), "257 settings"),
        (own.patch(own.stacked(256)), own.patch(own.stacked(257)), "257 patches"),
        (own.patch(report={"x": "x" * 65536}), own.patch(report={"x": "x" * 65537}), "65,537 characters"),
        (own.patch(report={"x": ["x" * 60_000] * 69}), own.patch(report={"x": ["x" * 60_000] * 70}), "characters together"),
    ):  # fmt: skip
        path = tmp_path / "x.safetensors"
        path.write_bytes(inside["bad.safetensors"])
        assert read_patch(path) and is_patch(path)
        path.write_bytes(outside["bad.safetensors"])
        with pytest.raises(ForgetError, match=why) as told:
            read_patch(path)
        assert "x.safetensors" in str(told.value) and len(str(told.value)) < 400


def test_statistics_of_more_rows_than_are_ever_kept_are_damaged(maker):
    own = maker.info
    assert WeightedPatch(Patch({}, own | {"statistics": statistics(128, 4096)})).statistics.keys.shape == (128, 4096)
    for rows, columns in ((129, 1), (1, 4097), (30_000, 1)):
        with pytest.raises(ForgetError, match="damaged"):
            WeightedPatch(Patch({}, own | {"statistics": statistics(rows, columns)})).statistics  # noqa: B018


def sdxl() -> dict[str, tuple[int, int]]:
    """Shapes of all projections of SDXL's cross-attention: 10 layers of 640, 60 of 1280."""
    widths = [640] * 10 + [1280] * 60
    return {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_{n}_attn2_{matrix}": (width, read or width)
        for n, width in enumerate(widths)
        for matrix, read in (("to_q", 0), ("to_k", 2048), ("to_v", 2048), ("to_out_0", 0))
    }


def test_the_largest_real_patch_is_well_inside_the_bounds(tmp_path, maker):
    """SDXL, all projections, a hundred concepts of rank 4 stacked, each with what it remembers of its words."""
    shapes = sdxl()
    assert len(shapes) == 280 and 2 * len(shapes) < patch_bounds.MOST_MODULES
    patch_bounds.require_room(shapes, 2 * 400)
    info = maker.stacked(100)
    noise = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0)).double()
    for part in info["patches"]:
        part["info"] |= {"statistics": TextStatistics(noise, noise, 0.1).encoded(), "settings": info["settings"]}
        part["info"]["report"] = copy.deepcopy(info["report"])
    names = [part["info"]["concept"] for part in info["patches"]]
    pairs = [
        {"concept": one, "other": other, "interference": 0.123456789} for one in names for other in names if one != other
    ]
    info["report"] = {"interference": pairs, "response_errors": [], "collateral_change": 0.1, "warnings": []}
    info["concepts"] = [part["info"]["concepts"][0] for part in info["patches"]]
    text = json.dumps(info)
    assert 1.5 * len(text) < header.MOST_HEADER_BYTES and 4 * text.count(",") < bounded_json.MOST_VALUES
    assert 4 * 2 * text.count('"') < 4 * bounded_json.MOST_ESCAPES
    path = tmp_path / "x.safetensors"
    path.write_bytes(joined(lora({name: (*shape, 1) for name, shape in shapes.items()}), {"fmn.patch": text}))
    patch = read_patch(path)
    assert len(patch.modules) == 280 and patch.info == info
    save_patch(patch, tmp_path / "again.safetensors")
    assert read_patch(tmp_path / "again.safetensors").info == info


def test_what_could_not_be_read_again_is_not_written(tmp_path, maker):
    whole = read_patch(CAT)
    for info in (whole.info | {"concept": "a\nb"}, whole.info | {"report": {"x": ["x" * 60_000] * 70}}):
        with pytest.raises(ForgetError, match="cannot be saved"):
            save_patch(Patch(whole, info), tmp_path / "x.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1001,
        "cat\x07",
        "\n".join(f"c{n}" for n in range(1025)),
        ",".join(map(str, range(257))),
        "\n".join(f"{n:0100}" for n in range(700)),  # each is short, and what all are called together is not
        "\n".join(",".join(f"{n}-{m:0900}" for m in range(250)) for n in range(20)),
    ],
)
def test_what_a_patch_could_not_remember_is_not_forgotten(text):
    with pytest.raises(ForgetError, match="cannot be forgotten"):
        make_concepts(text)


def test_settings_have_no_text_that_a_patch_could_not_remember():
    assert make_config(preserve="x" * 65536)
    with pytest.raises(ForgetError, match="65,537 characters"):
        make_config(preserve="x" * 65537)


@pytest.mark.parametrize("format", ["peft", "diff"])
def test_exports_written_layer_by_layer_are_what_they_would_be_at_once(tmp_path, format):
    patch = read_patch(CAT)
    save_as(patch, format, tmp_path / "x.safetensors")
    converted = to_peft(patch) if format == "peft" else dict(to_diff(patch))
    whole = with_sorted_header(save(converted, metadata(patch, "x", tensor_hash(converted))))
    assert (tmp_path / "x.safetensors").read_bytes() == whole


def test_one_rank_for_all_is_no_excuse_for_zeros():
    factors = {n: (torch.ones(2000, 1), torch.ones(1, 2000)) for n in range(20)}
    assert of_one_rank(factors | {0: (torch.ones(2000, 4), torch.ones(4, 2000))}, lambda name: 2000).rank == 4
    with pytest.raises(ValueError, match="rank of 1000"):
        of_one_rank(factors | {0: (torch.ones(2000, 1000), torch.ones(1000, 2000))}, lambda name: 2000)


def test_the_same_concept_many_times_is_stacked_once(maker):
    patch = read_patch(CAT)
    several = [patch.info["concepts"][0]] * 1000 + [patch.info["concepts"][0] | {"names": ["lion"]}]
    assert stack([WeightedPatch(Patch(patch, patch.info | {"concepts": several}))]).info["concepts"] == several[-2:]


def test_each_spelling_of_a_kept_word_that_another_patch_forgets_is_warned_of():
    cat = read_patch(CAT)
    keeping = Patch(cat, cat.info | {"concept": "dog", "settings": {"preserve": "Cat, lion, cat"}, "concepts": []})
    assert [w.split("`")[1] for w in conflict_warnings([WeightedPatch(keeping), WeightedPatch(cat)])] == ["Cat", "cat"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &a [x, x]\nb: [*a, *a]\n", "alias"),
        ("[" * 30_000, "YAML"),
        (f"Attn:\n  seed: {'9' * 5000}\n", "YAML"),
        ("Attn:\n  when: 2001-99-99\n", "YAML"),
        ("#" * 40_000, "32,768 bytes"),
    ],
)
def test_a_config_that_would_take_much_is_refused(tmp_path, text, why):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ForgetError, match=why) as told:
        read_config(path)
    assert len(str(told.value)) < 500


def test_a_number_without_an_end_is_no_number_of_steps():
    with pytest.raises(ForgetError, match="write a number"):
        read_number({"max_train_steps": float("inf")}, "max_train_steps", ResteeringConfig, "steps")


def test_a_header_is_bounded_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:  # a file with a hole: it takes no room
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate((1 << 40) + 8)
    with pytest.raises(ForgetError, match="header has 1,099,511,627,776 bytes"):
        read_patch(path)
    path.write_bytes(with_length(b'{"__metadata__":{"fmn.patch":1}}'))
    with pytest.raises(ForgetError, match="no texts"):
        read_patch(path)
