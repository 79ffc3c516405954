"""What each part of the presets is worth: `python -m benchmarks.ablation [--quick] [--json FILE]`.

The presets with one part taken away or put in, in the table of benchmarks/quality.py, on two objects, a style and a
person (--quick: the object alone).
"""

import argparse
import time
from functools import partial

from benchmarks.k_resteering import k_and_v, k_resteering
from benchmarks.methods import by_preset, without_vocabulary
from benchmarks.quality import add_arguments, benchmark, jobs_of, show_groups, show_means
from fmn_core.erasure import closed_form, plan, resteering, targets
from fmn_core.text import features
from fmn_core.text.features import TokenSpan, pair_spans
from fmn_core.text.templates import NEAR_TEMPLATES

JOBS = [("object", ("cat",)), ("object", ("rose",)), ("style", ("neon",)), ("identity", ("ada",))]


def name_alone(ours, theirs):
    """`pair_spans` of the name's own tokens, and none of those after it."""
    return pair_spans(TokenSpan(ours.name, ours.suffix[:0]), TokenSpan(theirs.name, theirs.suffix[:0]))


def already_there(edit, x, y):
    """In place of `progress`: an edit that needs no scaling."""
    return closed_form.ERASED


def no_attention_loss(maps, token_mask, regions=None):
    """In place of the attention re-steering loss: zero, with a graph."""
    return 0.0 * sum(A.sum() for A in maps)


def fast_with(module=closed_form, **values):
    """`fast` with these values in place of a module's own."""
    return partial(by_preset, preset="fast", instead={f"{module.__name__}.{name}": v for name, v in values.items()})


onward = partial(by_preset, preset="paper", penalized_tokens="concept_onward")
PARTS = {
    "fast": fast_with(),
    "- paraphrases": fast_with(plan, TEMPLATES={kind: templates[:1] for kind, templates in NEAR_TEMPLATES.items()}),
    "- later tokens": fast_with(targets, pair_spans=name_alone),
    "- other names": fast_with(features, SAME_MEANING=2.0),
    "- null space": partial(
        by_preset,
        preset="fast",
        instead={f"{closed_form.__name__}.EXACT": 2.0, f"{targets.__name__}.EMPTY": 0.0},
    ),
    "- kept words": fast_with(targets, KEPT=0.0),
    "- neighbours": fast_with(targets, NEAR=0.0),
    "- kept and neighbours": fast_with(targets, KEPT=0.0, NEAR=0.0),
    "- known words": partial(by_preset, preset="fast", instead=without_vocabulary()),
    "- scaling": fast_with(progress=already_there),
    "V alone": partial(by_preset, preset="fast", target_modules="v"),
    "K alone": partial(by_preset, preset="fast", target_modules="k"),
    "K re-steered": k_resteering,
    "K re-steered, V": partial(k_and_v, v=partial(by_preset, preset="fast", target_modules="v")),
    "paper": partial(by_preset, preset="paper"),
    "+ visual": partial(by_preset, preset="paper", visual_loss_weight=1.0),
    "concept and end": partial(by_preset, preset="paper", penalized_tokens="concept_and_end"),
    "onward": onward,
    "onward + visual": partial(onward, visual_loss_weight=1.0),
    "visual alone": partial(
        onward, visual_loss_weight=1.0, instead={f"{resteering.__name__}.attention_resteering_loss": no_attention_loss}
    ),
}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    add_arguments(parser, PARTS)
    options = parser.parse_args()
    parts = {name: PARTS[name] for name in options.methods or PARTS}
    jobs = jobs_of(options) if options.targets else JOBS[: 1 if options.quick else None]
    start = time.monotonic()
    rows = benchmark(parts, jobs, options.seeds or (1 if options.quick else 2), options.quick, options.workers, options.json)
    show_means(rows, parts)
    show_groups(rows, parts)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
