"""A patch's own report: what of it can be trusted to have its form, and in words."""

from __future__ import annotations

from .conflicts import conflict_lines
from .patch import Patch

BEYOND = 1e9  # no figure of a report; nor is what is no number
WHEN = ("before", "fast", "after", "with rest")


def readable(report: object) -> dict:
    """What of a patch's report has the form that `summary` and the picture expect, drift largest first: a file may come
    from anywhere."""
    report = report if isinstance(report, dict) else {}
    found = {"warnings": texts(report.get("warnings"))}
    erased, drift, distance, mass = (numbers(report.get(key)) for key in ("erased", "drift", "distance", "attention_mass"))
    drift = dict(sorted(drift.items(), key=lambda item: -item[1]))
    if erased:
        found |= {"erased": erased, "also": texts(report.get("also"))}
    if erased or drift:
        found["drift"] = drift
    distance, mass = ({when: each[when] for when in WHEN if when in each} for each in (distance, mass))
    alone = ("noise drift", "steps", "strength", "empty prompt", "spill", "unrelated drift")
    single = numbers({key: report.get(key) for key in alone})
    found |= single
    if "after" in distance and {"noise drift", "steps", "strength"} <= single.keys():
        found["distance"] = distance
    if {"before", "after"} <= mass.keys():
        found["attention_mass"] = mass
    for key, wanted in (("conflicts", {"share"}), ("responses", {"added", "jointly"})):
        if key in report:  # of a stacked patch
            found[key] = rows(report[key], wanted)
    imported = report.get("imported")
    if isinstance(imported, dict) and isinstance(imported.get("worst"), dict):
        plain, worst = numbers(imported), {"error": 0.0} | numbers(imported["worst"])
        if {"rest", "rank", "projections", "error"} <= plain.keys():
            named = {key: str(imported.get(key, "")) for key in ("file", "kind")}
            found["imported"] = plain | named | {"worst": worst | {"projection": str(imported["worst"].get("projection"))}}
    evaluation = report.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("summary"), str):
        means = evaluation.get("prompt_drift")
        means = {group: several.get("mean") for group, several in means.items()} if mappings(means) else {}
        found["evaluation"] = {
            "summary": evaluation["summary"],
            "warnings": texts(evaluation.get("warnings")),
            "prompt_drift": numbers(means),
        }
    return found


def numbers(value: object) -> dict[str, float]:
    """The numbers in a dictionary that can be shares, masses or counts; nothing for anything else."""
    several = value.items() if isinstance(value, dict) else ()
    return {str(key): x for key, x in several if type(x) in (int, float) and abs(x) < BEYOND}


def rows(value: object, wanted: set[str]) -> list[dict]:
    """The dictionaries in a list that have these numbers, with the names of concepts beside them."""
    several = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return [
        {key: str(row.get(key, "")) for key in ("concept", "other")} | {key: numbers(row)[key] for key in wanted}
        for row in several
        if wanted <= numbers(row).keys()
    ]


def mappings(value: object) -> bool:
    """Whether this is a dictionary of dictionaries."""
    return isinstance(value, dict) and all(isinstance(several, dict) for several in value.values())


def texts(value: object) -> list[str]:
    """The strings in a list; nothing for anything else."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def import_summary(imported: dict) -> list[str]:
    """What the report of an import says, for people."""
    rest = f", and {imported['rest']} layers outside the cross-attention as an ordinary LoRA" if imported["rest"] else ""
    what, worst = f"{imported['projections']} projections at rank {imported['rank']}", imported["worst"]
    lost = f" Of the other layers': {imported['rest_error']:.2%}." if imported.get("rest_error") else ""
    return [
        f"From {imported['file']} ({imported['kind']}): {what}{rest}.",
        f"Relative error of the change (Frobenius norm): {imported['error']:.2%}; the worst, {worst['error']:.2%}, at "
        f"{worst['projection']}.{lost}",
    ]


MOST_TOLD = 200  # concepts, other names or warnings in a text


def few(texts: list[str]) -> str:
    """The texts between commas, and how many there are beyond what anybody reads."""
    more = f" and {len(texts) - MOST_TOLD:,} more" if len(texts) > MOST_TOLD else ""
    return ", ".join(texts[:MOST_TOLD]) + more


def summary(patch: Patch) -> str:
    """What a patch's own report says, in a line or two, its warnings first."""
    report = readable(patch.info["report"])
    lines = report["warnings"][:MOST_TOLD]
    if "imported" in report:
        lines += import_summary(report["imported"])
    if "erased" in report:
        erased = [f"`{name}` goes {share:.0%}" for name, share in report["erased"].items()]
        lines.append(f"{few(erased)} of the way to what stands in its place.")
        if report["also"]:
            lines.append(f"Forgotten as other names of the same: {few(report['also'])}. `keep` prevents it.")
        if report["drift"]:
            word, share = max(report["drift"].items(), key=lambda one: one[1])  # a file sorts them by name
            lines.append(f"Of the near words `{word}` moves most, by {share:.1%} of that way.")
    if "distance" in report:
        distance, drift = report["distance"]["after"], report["noise drift"]
        lines.append(
            f"Noise estimates of the concept are {distance:.0%} as far from what stands in its place as before, those of "
            f"near words move by {drift:.1%} of that; {report['steps']} steps, at strength {report['strength']}."
        )
    if "attention_mass" in report:
        mass = report["attention_mass"]
        with_rest = f", {mass['with rest']:.4f} with the rest" if "with rest" in mass else ""
        lines.append(f"Attention to the concept: {mass['before']:.4f} before, {mass['after']:.4f} after{with_rest}.")
    if "unrelated drift" in report:
        lines.append(f"Noise estimates of unrelated prompts change by {report['unrelated drift']:.2%}.")
    if "conflicts" in report:
        lines += conflict_lines(report)
    if "evaluation" in report:
        lines += ["Measured on the model:", report["evaluation"]["summary"]]
    return "\n".join(lines)
