"""Whatever a LoRA is made of, the import does what ComfyUI's own loader does with it, or says why it does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from spellings import SPELLINGS, module_name, written

from fmn_core.convert.config import ImportConfig
from fmn_core.convert.importer import import_patch
from fmn_core.convert.inventory import Layers
from fmn_core.errors import ForgetError
from fmn_core.lora.keys import OUTSIDE_BLOCKS, dotted
from fmn_core.patch.patch import model_shapes

DRAWN = {
    "deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture],
    "phases": [Phase.explicit, Phase.generate],
}  # fmt: skip
EXACT = ImportConfig(energy=1.0)
FACTOR = 4  # of LoKr; divides all sides but four of the latent's channels


class Draw:
    """Tensors of one layer, in each method's form."""

    def __init__(self, shape, rank, seed):
        self.shape, self.rank, self.generator = shape, rank, torch.Generator().manual_seed(seed)
        self.out, self.inner, self.window = shape[0], shape[1], shape[2:]
        self.flat = math.prod(shape[1:])

    def __call__(self, *shape):
        return torch.randn(*shape, generator=self.generator) * 0.2

    def lora(self):
        ones = [1] * len(self.window)
        return {
            "lora_down.weight": self(self.rank, self.inner, *self.window),
            "lora_up.weight": self(self.out, self.rank, *ones),
        }

    def locon(self):
        if not self.window:
            return self.lora()
        return {
            "lora_down.weight": self(self.rank, self.inner, 1, 1),
            "lora_mid.weight": self(self.rank, self.rank, *self.window),
            "lora_up.weight": self(self.out, self.rank, 1, 1),
        }

    def loha(self):
        sides = {"hada_w{}_a": (self.out, self.rank), "hada_w{}_b": (self.rank, self.flat)}
        return {name.format(n): self(*side) for n in (1, 2) for name, side in sides.items()}

    def loha_cp(self):
        if not self.window:
            return self.loha()
        core = (self.rank, self.rank, *self.window)
        sides = {"hada_w{}_a": (self.rank, self.out), "hada_w{}_b": (self.rank, self.inner), "hada_t{}": core}
        return {name.format(n): self(*side) for n in (1, 2) for name, side in sides.items()}

    def lokr(self, one=False, other=False, core=False):
        small = [side // FACTOR if side > FACTOR else 1 for side in (self.out, self.inner)]
        large = [self.out // small[0], self.inner // small[1]]
        parts = {"lokr_w1": self(*large)}
        if one:
            parts = {"lokr_w1_a": self(large[0], self.rank), "lokr_w1_b": self(self.rank, large[1])}
        if core and self.window:
            return parts | {
                "lokr_w2_a": self(self.rank, small[0]),
                "lokr_w2_b": self(self.rank, small[1]),
                "lokr_t2": self(self.rank, self.rank, *self.window),
            }
        if other or core:
            columns = small[1] * math.prod(self.window)
            return parts | {"lokr_w2_a": self(small[0], self.rank), "lokr_w2_b": self(self.rank, columns)}
        return parts | {"lokr_w2": self(*small, *self.window)}

    def diff(self):
        return {"diff": self(*self.shape)}

    def glora(self):
        return {
            "a1.weight": self(self.inner, self.rank),
            "a2.weight": self(self.rank, self.inner),
            "b1.weight": self(self.out, self.rank),
            "b2.weight": self(self.rank, self.flat),
        }

    def oft(self):
        return {"oft_blocks": self(self.out // 4, 4, 4), "rescale": self(self.out, 1)}

    def boft(self):
        return {"oft_blocks": self(2, self.out // 4, 4, 4)}

    def dora(self):
        return self.lora() | {"dora_scale": self(1, self.inner, *[1] * len(self.window)).abs() + 1}

    def dora_of_loha(self):
        return self.loha() | {"dora_scale": self(self.out, *[1] * (len(self.window) + 1)).abs() + 1}


READ = {
    "LoRA": Draw.lora, "LoCon with a middle": Draw.locon, "LoHa": Draw.loha, "LoHa around a core": Draw.loha_cp,
    "LoKr, whole": Draw.lokr, "LoKr, one factored": lambda draw: draw.lokr(one=True),
    "LoKr, other factored": lambda draw: draw.lokr(other=True), "LoKr, both": lambda draw: draw.lokr(True, True),
    "differences": Draw.diff,
}  # fmt: skip
REFUSED = {
    "DoRA": (Draw.dora, "that is a DoRA"), "DoRA of a LoHa": (Draw.dora_of_loha, "that is a DoRA"),
    "GLoRA": (Draw.glora, "that is a GLoRA"), "OFT": (Draw.oft, "that is an OFT"), "BOFT": (Draw.boft, "that is an OFT"),
}  # fmt: skip
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def embedded(loaded):
    from fmn_core.hosts.comfy.model import ComfyHost

    return ComfyHost(*loaded)


@pytest.fixture(scope="module")
def shapes(embedded):
    """Kohya name -> shape, of the cross-attention and of the others: blocks, and what is outside of them."""
    others = {key: tuple(module.weight.shape) for key, module in Layers(embedded).others.values()}
    return model_shapes(embedded), others


@pytest.fixture(scope="module")
def changes(comfy, embedded):
    """changes(tensors) -> weight's key -> its change, by ComfyUI's own loader."""
    names = comfy.lora.model_lora_keys_unet(embedded.base, {})

    def changes(tensors):
        model = embedded.patcher.clone()
        model.add_patches(comfy.lora.load_lora(dict(tensors), names, log_missing=False), 1.0)
        found = {}
        for key, patches in model.patches.items():
            base = comfy.utils.get_attr(embedded.base, key).float()
            found[key] = comfy.lora.calculate_weight(patches, base.clone(), key) - base
        return found

    return changes, names


def same(ours, theirs):
    """Within fp16's rounding of the factors, and of the sum with the weights."""
    return (ours - theirs).norm() <= 3e-3 * theirs.norm() + 1e-3


layouts = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 5), "alpha": st.none() | st.floats(0.5, 8), "seed": st.integers(0, 999),
        "spelling": st.sampled_from([*SPELLINGS]), "kinds": st.lists(st.sampled_from([*READ]), min_size=1, max_size=3),
        "cross": st.lists(st.integers(0, 999), min_size=1, max_size=3, unique=True),
        "others": st.lists(st.integers(0, 999), max_size=4, unique=True), "bias": st.booleans(), "norm": st.booleans(),
        "text": st.booleans(),
    }
)  # fmt: skip


def made(layout, shapes, methods):
    """Tensors under kohya's names: of the layout's layers, each in the next of the methods."""
    cross, others = ([*part] for part in shapes)
    chosen = {cross[number % len(cross)] for number in layout["cross"]}
    chosen |= {others[number % len(others)] for number in layout["others"]}
    tensors = {}
    for number, name in enumerate(sorted(chosen)):
        draw = Draw((shapes[0] | shapes[1])[name], layout["rank"], layout["seed"] + number)
        parts = methods[number % len(methods)](draw)
        if layout["alpha"]:
            parts["alpha"] = torch.tensor(layout["alpha"])
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors, chosen


def respelled(tensors, spelling):
    """The same tensors under another tool's names; alphas and what that tool does not write keep theirs."""
    renamed = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        down, up = SPELLINGS[spelling](name)
        own = {"lora_down.weight": down, "lora_up.weight": up}.get(part)
        renamed[own or (key if part == "alpha" else f"unet.{module_name(name)}.{part}")] = tensor
    return renamed


@settings(max_examples=60, **DRAWN)
@given(layout=layouts)
def test_a_file_is_imported_as_comfyui_loads_it_or_what_is_left_out_is_named(embedded, shapes, changes, tmp_path, layout):
    changes_by, names = changes
    tensors, chosen = made(layout, shapes, [READ[kind] for kind in layout["kinds"]])
    extras, left = {}, []
    if layout["bias"]:
        name = min(name for name in shapes[0] if name.endswith("to_out_0"))
        extras[f"{name}.diff_b"], left = torch.ones(shapes[0][name][0]), ["Biases of"]
    if layout["norm"]:
        extras |= {f"{NORM}.w_norm": torch.ones(64), f"{NORM}.b_norm": torch.ones(64)}
        left.append("norm1")
    if layout["text"]:
        extras |= {f"{TEXT}.lora_up.weight": torch.ones(4, 2), f"{TEXT}.lora_down.weight": torch.ones(2, 4)}
        left.append(TEXT)
    file = tmp_path / "a.safetensors"
    file.unlink(missing_ok=True)
    imported = import_patch(embedded, written(respelled(tensors, layout["spelling"]) | extras, file), EXACT)
    warnings = "\n".join(imported.info["report"]["warnings"])
    theirs, ours = changes_by(tensors), changes_by({**imported, **imported.unet_lora})
    assert {*theirs} == {*ours} == {names[name] for name in chosen}
    assert all(same(ours[key], theirs[key]) for key in theirs)
    assert all(word in warnings for word in left) and bool(warnings) == bool(left)


@settings(max_examples=20, **DRAWN)
@given(layout=layouts, kind=st.sampled_from([*REFUSED]))
def test_a_change_that_depends_on_the_weights_is_named_and_refused_only_inside_the_attention(
    embedded, shapes, changes, tmp_path, layout, kind
):
    method, reason = REFUSED[kind]
    file = tmp_path / "a.safetensors"
    file.unlink(missing_ok=True)
    tensors, _ = made(layout, shapes, [method])
    with pytest.raises(ForgetError, match=f"a.safetensors.*{reason}"):
        import_patch(embedded, written(tensors, file), EXACT)
    within, _ = made(layout | {"others": []}, shapes, [Draw.lora])
    outside = {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] in shapes[1]}
    file.unlink()
    imported = import_patch(embedded, written(within | outside, file), EXACT)
    warnings = "\n".join(imported.info["report"]["warnings"])
    assert not imported.unet_lora and (reason.removeprefix("that is ") in warnings) == bool(outside)
    theirs, ours = changes[0](within), changes[0](imported)
    assert {*theirs} == {*ours} and all(same(ours[key], theirs[key]) for key in theirs)


def test_a_lokr_around_a_core_is_multiplied_out(embedded, shapes, changes, tmp_path):
    """ComfyUI 0.3.75 itself stumbles over the strides of this one, and leaves the layer as it is."""
    name = next(name for name in shapes[1] if name.endswith("resnets_0_conv1"))
    inside = min(shapes[0])
    parts = Draw(shapes[1][name], 3, 1).lokr(core=True)
    tensors = {f"{name}.{part}": tensor for part, tensor in parts.items()} | {f"{name}.alpha": torch.tensor(6.0)}
    tensors |= {f"{inside}.{part}": tensor for part, tensor in Draw(shapes[0][inside], 3, 2).lora().items()}
    imported = import_patch(embedded, written(tensors, tmp_path / "a.safetensors"), EXACT)
    core, a, b = (parts[f"lokr_{part}"] for part in ("t2", "w2_a", "w2_b"))
    other = torch.stack([a.T @ core[..., i, j] @ b for i in range(3) for j in range(3)], -1).unflatten(-1, (3, 3))
    wanted = torch.stack([torch.kron(parts["lokr_w1"], other[..., i, j]) for i in range(3) for j in range(3)], -1) * 2
    found = changes[0](imported.unet_lora)[changes[1][name]]
    assert same(found.flatten(2), wanted)


def test_the_layers_outside_of_the_blocks_have_the_names_that_programs_know(embedded, changes, pipeline, xl_pipeline):
    from fmn_core.hosts.diffusers.model import DiffusersHost

    outside = {"conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"}
    for host, wanted in (
        (embedded, outside), (DiffusersHost(pipeline, progress_bar=False), outside),
        (DiffusersHost(xl_pipeline, progress_bar=False), outside | {"add_embedding_linear_1", "add_embedding_linear_2"}),
    ):  # fmt: skip
        others = Layers(host).others
        assert {name for name in others if name in OUTSIDE_BLOCKS.values()} == wanted
        for name in wanted:
            key, module = others[name]
            if host is embedded:
                assert changes[1][key] in host.base.state_dict()
            else:
                assert host.unet.get_submodule(dotted(name)) is module


def test_the_names_outside_of_the_blocks_are_those_of_comfyui(comfy):
    names = {tuple(name.removesuffix(".weight").replace(".", "_") for name in pair) for pair in comfy.utils.UNET_MAP_BASIC}
    assert {*OUTSIDE_BLOCKS.items()} < names
