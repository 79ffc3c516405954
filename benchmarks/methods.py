"""The methods compared: the pack's presets, and the published ones at the settings that benchmarks/grid.py found best."""

from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module

from benchmarks.baselines import esd, forget_me_not, uce, weight_name
from benchmarks.k_resteering import k_resteering
from demo.vocabulary import OBJECTS, PEOPLE, STYLES
from fmn_core.erasure.config import PRESETS, make_config
from fmn_core.erasure.forget import forget
from fmn_core.patch.apply import patch_factors
from fmn_core.patch.file import serialize
from fmn_core.text import features


def changes(host, patch):
    """A patch as changes of weights, as its file holds them."""
    return {weight_name(*target): up @ down for target, (up, down) in patch_factors(host, patch).items()}


@contextmanager
def replaced(values):
    """Context in which these names of modules stand for other values: {"fmn_core.erasure.closed_form.ERASED": 1.0}."""
    with ExitStack() as stack:
        for path, value in values.items():
            module, name = path.rsplit(".", 1)
            module = import_module(module)
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def by_preset(host, kind, names, instead=None, **settings):
    """A preset of the pack at its defaults, but for these settings, and with other values in place of its modules'."""
    with replaced(instead or {}):
        patch, _ = forget(host, "\n".join(names), make_config(concept_type=kind, **settings))
    return changes(host, patch), len(serialize(patch, "patch"))


def without_vocabulary():
    """The pack's word list and captions less every word that the demo model was trained on, for `replaced`: what
    the benchmark keeps is then nothing that the edit was told to keep."""
    own = {*OBJECTS, *STYLES, *PEOPLE, *(word for thing in OBJECTS.values() for word in thing.synonyms.split())}
    words = {type: tuple(word for word in words if word not in own) for type, words in features.WORDS.items()}
    captions = tuple(c for c in features.CAPTIONS if not any(f" {word} " in f" {c} " for word in own))
    neutral = {type: tuple(word for word in several if word not in own) for type, several in features.NEUTRAL.items()}
    lists = {"WORDS": words, "CAPTIONS": captions, "NEUTRAL": neutral}
    return {f"{features.__name__}.{name}": value for name, value in lists.items()}


BASELINES = {
    "FMN (original)": partial(forget_me_not, rate=1e-4, steps=100, pooler=False),
    "ESD/LECO": partial(esd, rate=3e-3, steps=30, eta=1.0),
    "UCE": partial(uce, generic=True),
}
METHODS = {
    **{name: partial(by_preset, preset=name) for name in PRESETS},
    **BASELINES,
    "fast, V alone": partial(by_preset, preset="fast", target_modules="v"),
    "K re-steered": k_resteering,
    "fast, words withheld": partial(by_preset, preset="fast", instead=without_vocabulary()),
    "paper, skip connections": partial(by_preset, preset="paper", backprop="skip_connections"),
    "paper, onward": partial(by_preset, preset="paper", penalized_tokens="concept_onward"),
    "FMN, published rate": partial(forget_me_not, rate=2e-6),
}
