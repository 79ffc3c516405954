"""Ten patches of like concepts at once: `python -m benchmarks.stacking [--quick] [--json FILE]`.

Each concept is forgotten alone; the ten patches are then simply added, as a chain of LoRA loaders does, and stacked; beside
them one patch that was made for all ten together. The table is that of benchmarks/quality.py. Then for every pair what the
conflict report says of it, beside what adding the one patch to the other really does to the noise estimates of the
concept's prompts, and how well the two orders agree (Spearman's rho).
"""

import argparse
import json
import statistics
from functools import partial

import torch

from benchmarks.baselines import applied
from benchmarks.methods import by_preset, changes
from benchmarks.quality import add_arguments, benchmark, model, show_groups, show_means
from demo.vocabulary import with_article
from fmn_core.erasure.config import make_config
from fmn_core.erasure.forget import forget
from fmn_core.evaluation.metrics import noise_estimates, noised
from fmn_core.patch.conflicts import conflict_lines, conflicts
from fmn_core.patch.file import serialize
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import WeightedPatch

LIKE = ("cat", "lion", "tiger", "dog", "fox", "wolf", "bear", "panda", "rabbit", "mouse")


def alone(host, kind, names, preset):
    """The patch of each concept by itself."""
    return [forget(host, name, make_config(preset, concept_type=kind))[0] for name in names]


def stacked(host, kind, names, preset):
    """Each alone, stacked."""
    patch = stack([WeightedPatch(patch) for patch in alone(host, kind, names, preset)])
    return changes(host, patch), len(serialize(patch, "stack"))


def simply_added(host, kind, names, preset):
    """Each alone, added."""
    patches = alone(host, kind, names, preset)
    total = {}
    for patch in patches:
        for target, change in changes(host, patch).items():
            total[target] = total.get(target, 0) + change
    return total, sum(len(serialize(patch, "one")) for patch in patches)


METHODS = {
    f"{preset}, {name}": partial(method, preset=preset)
    for preset in ("fast", "balanced", "paper")
    for name, method in (("together", by_preset), ("stacked", stacked), ("added", simply_added))
}


def damage(host, members) -> list[dict]:
    """Each pair of `conflicts` with `damage`: |eps - eps1|^2 / |eps1 - eps0|^2 of prompts of the concept, eps with both
    patches added, eps1 with its own alone and eps0 with none."""
    asked = ("{}", "a photo of {}", "{} in a garden", "{} in neon style")
    noise = torch.randn(len(asked), *host.latent_shape(), generator=torch.Generator().manual_seed(0))
    x_t, t, _ = noised(host, noise, 0)
    weights = {member.name: changes(host, member.patch) for member in members}

    def estimate(concept, *names):
        total = {}
        for name in names:
            for target, change in weights[name].items():
                total[target] = total.get(target, 0) + change
        with host.training(x_t.shape[1:]), applied(host, total):
            return noise_estimates(host, x_t, t, prompts[concept])

    prompts = {member.name: host.encode([a.format(with_article(member.name)) for a in asked]) for member in members}
    none = {name: estimate(name) for name in prompts}
    own = {name: estimate(name, name) for name in prompts}
    pairs = conflicts(members)
    for pair in pairs:
        name = pair["concept"]
        moved = (estimate(name, name, pair["other"]) - own[name]).square().sum()
        pair["damage"] = (moved / (own[name] - none[name]).square().sum()).item()
    return pairs


def spearman(x: list[float], y: list[float]) -> float:
    """The correlation of two lists' ranks."""

    def ranks(values):
        order = sorted(range(len(values)), key=values.__getitem__)
        return [order.index(i) for i in range(len(values))]

    return statistics.correlation(ranks(x), ranks(y))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stacking", description=__doc__)
    add_arguments(parser, METHODS)
    options = parser.parse_args()
    names = tuple(options.targets or LIKE)
    methods = {name: METHODS[name] for name in options.methods or METHODS}
    jobs = [("object", names)]
    rows = benchmark(methods, jobs, options.seeds or 1, options.quick, options.workers, options.json)
    show_means(rows, methods)
    show_groups(rows, methods)
    host, _ = model()
    for preset in dict.fromkeys(name.split(",")[0] for name in methods):
        members = [WeightedPatch(patch) for patch in alone(host, "object", names, preset)]
        print(f"\n{preset}: {conflict_lines(stack(members).info['report'])[-1]}")
        pairs = damage(host, members)
        rho = spearman([pair["share"] for pair in pairs], [pair["damage"] for pair in pairs])
        print(f"\n{preset}: of {len(pairs)} pairs, reported share and measured damage agree in order by rho = {rho:.2f}")
        for pair in pairs[:10]:
            print(f"  {pair['other']:>8} on {pair['concept']:10} share {pair['share']:.3f}   damage {pair['damage']:.3f}")
        if options.json:
            options.json.with_stem(f"{options.json.stem}-{preset}-pairs").write_text(json.dumps(pairs, indent=1))


if __name__ == "__main__":
    main()
