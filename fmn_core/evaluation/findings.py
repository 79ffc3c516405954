"""What an evaluation's figures say, in sentences."""

from __future__ import annotations

from collections.abc import Collection

SMALL_DIFFERENCE = 0.3  # less of what the concept's prompts do changed,
LARGE_CHANGE = 0.1  # or more of what another prompt does,
EMPTY = 0.01  # or more of the empty prompt's noise estimate, is worth a warning
RECOVERED = 0.5  # and so is this much of the concept brought back by learned words
GROUP_NAMES = {"near": "near words", "kept": "kept words", "unrelated": "unrelated prompts"}


def findings(report: dict, preserved: Collection[str] = ()) -> dict:
    """`warnings`, a sentence for each figure above its limit; `limits`, what the figures do not promise; `summary`.
    `preserved` are the words that the patch was made to preserve."""
    found, bounds = warnings(report, preserved), limits(report)
    return {"warnings": found, "limits": bounds, "summary": "\n".join([*found, *effects(report), *bounds])}


def warnings(report: dict, preserved: Collection[str] = ()) -> list[str]:
    """A sentence for each figure that says the patch does little, or harms, or lets the concept be recovered."""
    found = [
        f"Little effect: what prompts of `{name}` do changes by {portion(part)}. Forget it again with another preset, or "
        "apply the patch more strongly."
        for name, part in report["prompt_drift"]["concept"]["each"].items()
        if part < SMALL_DIFFERENCE
    ]
    for group, title in GROUP_NAMES.items():
        harmed = {word: part for word, part in each(report, "prompt_drift", group).items() if part > LARGE_CHANGE}
        if harmed:
            words = ", ".join(f"`{word}` {portion(part)}" for word, part in harmed.items())
            advice = remedy(group, harmed, preserved)
            found.append(f"Harmed {title}, by how much what their prompts do changes: {words}.{advice}")
    empty = report["noise_drift"]["empty"]["mean"]
    if empty > EMPTY:
        found.append(f"The empty prompt's noise estimate changes by {empty:.1%}, and with it every picture.")
    recovery = (report.get("inversion") or {}).get("recovery", 0)
    if recovery > RECOVERED:
        found.append(f"Learned words bring {recovery:.0%} of the concept back through the patch.")
    return found


def remedy(group: str, harmed: Collection[str], preserved: Collection[str]) -> str:
    """What keeps these words from harm."""
    if group == "unrelated":
        return ""
    if all(word in preserved for word in harmed):
        return " They are in the patch's `preserve` already: apply it less strongly."
    return " Forget again with them in `preserve`; `paper` preserves nothing."


def effects(report: dict) -> list[str]:
    """What was forgotten and what was kept."""
    lines = []
    for name, part in report["prompt_drift"]["concept"]["each"].items():
        lines.append(f"`{name}`: what its prompts do changes by {portion(part)}{pictures_of(report, name)}.")
    mass = report["attention"]["own_tokens"]
    lines.append(f"Attention to it: {mass['before']:.4f} before, {mass['after']:.4f} after.")
    kept = [
        f"{title} {portion(report['prompt_drift'][group]['mean'])} (`{word}` most, {portion(part)})"
        for group, title in GROUP_NAMES.items()
        for word, part in [*each(report, "prompt_drift", group).items()][:1]
    ]
    lines.append(f"The rest, on the same scale: {', '.join(kept)}.")
    if "classifier" in report:
        before, after = (report["classifier"][when] for when in ("before", "after"))
        shares = [
            f"{key.upper()} {whole_percent(after[key])} ({whole_percent(before[key])} before)"
            for key in ("ua", "ira", "cra")
        ]
        lines.append(f"Recognised: {', '.join(shares)}, H {after['h']:.2f}.")
    if "clip" in report:
        scores = [
            f"{GROUP_NAMES.get(group, group)} {before['score']:.3f} to {report['clip']['after'][group]['score']:.3f}"
            for group, before in report["clip"]["before"].items()
        ]
        lines.append(f"CLIP scores: {', '.join(scores)}.")
    return lines


def pictures_of(report: dict, name: str) -> str:
    """How much the pictures of a concept change, where there are pictures."""
    change = each(report, "picture_change", "concept").get(name)
    return "" if change is None else f", its pictures by {change:.3f} of the range"


def portion(part: float) -> str:
    """A part of what a prompt does, in percent."""
    return f"{part:,.0%}" if part >= 0.1 else f"{part:.1%}"


def whole_percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def limits(report: dict) -> list[str]:
    """What a reader must not take the figures for."""
    token, found = report["adversarial_token"], []
    found.append(
        f"The best embedding gets {token['recovered']:.0%} of the concept's keys and values back through the patch: a patch "
        "hides a concept from words, and deletes nothing."
    )
    inversion = report.get("inversion")
    if inversion:
        score = inversion["m_score"]
        found.append(
            f"Words learned from its pictures bring back {inversion['recovery']:.0%}; M-Score {score['before']:.3f} before, "
            f"{score['after']:.3f} after."
        )
    else:
        found.append("Recovery by learned words was not tried: set `inversion`.")
    return found


def each(report: dict, measure: str, group: str) -> dict[str, float]:
    """The words of a group with their figures, the largest first; empty where the report has none."""
    return ((report.get(measure) or {}).get(group) or {"each": {}})["each"]
