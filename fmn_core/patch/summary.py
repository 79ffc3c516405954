"""A patch's report in words."""

from __future__ import annotations

from .conflicts import conflict_lines
from .patch import Patch
from .report import ImportReport, PatchReport

MOST_LISTED = 200  # concepts, other names or warnings in a text


def summary(patch: Patch) -> str:
    """What a patch's own report says, in a few lines, its warnings first."""
    return "\n".join(report_lines(PatchReport.read(patch.info["report"])))


def report_lines(report: PatchReport) -> list[str]:
    """What a report says, a sentence or two a line, the warnings first."""
    lines = report.warnings[:MOST_LISTED]
    if report.imported:
        lines += import_lines(report.imported)
    lines += erasure_lines(report)
    if report.target_error and None not in (report.noise_drift, report.steps, report.strength):
        lines.append(
            f"Noise estimates of the concept are {report.target_error['after']:.0%} as far from its target as before, those "
            f"of near words move by {report.noise_drift:.1%} of that; {report.steps} steps, at strength {report.strength}."
        )
    if report.attention_mass:
        mass = report.attention_mass
        more = f", {mass['with_unet_lora']:.4f} with the UNet's LoRA" if "with_unet_lora" in mass else ""
        lines.append(f"Attention to the concept: {mass['before']:.4f} before, {mass['after']:.4f} after{more}.")
    if report.unrelated_drift is not None:
        lines.append(f"Noise estimates of unrelated prompts change by {report.unrelated_drift:.2%}.")
    lines += conflict_lines(report)
    if report.evaluation:
        lines += ["Measured on the model:", *report.evaluation["summary"].splitlines()]
    return lines


def erasure_lines(report: PatchReport) -> list[str]:
    """How far the concepts go, and what else moves."""
    if not report.erasure:
        return []
    lines = [f"{few([f'`{name}` goes {way:.0%}' for name, way in report.erasure.items()])} of the way to its target."]
    if report.synonyms:
        lines.append(f"Forgotten as synonyms: {few(report.synonyms)}. Put one into `preserve` to prevent it.")
    if report.preserve_drift:
        word, way = max(report.preserve_drift.items(), key=lambda item: item[1])
        lines.append(f"Of the near words `{word}` moves most, by {way:.1%} of that way.")
    return lines


def import_lines(imported: ImportReport) -> list[str]:
    """Where an imported patch comes from, and how near it comes."""
    outside = f", and {imported.unet_layers} layers outside the cross-attention as an ordinary LoRA"
    what = f"{imported.projections} projections at rank {imported.rank}{outside if imported.unet_layers else ''}"
    lost = f" Of the other layers': {imported.unet_error:.2%}." if imported.unet_error else ""
    return [
        f"From {imported.file} ({imported.kind}): {what}.",
        f"Relative error of the change (Frobenius norm): {imported.error:.2%}; the worst, {imported.worst_error:.2%}, at "
        f"{imported.worst_projection}.{lost}",
    ]


def few(names: list[str]) -> str:
    """The names between commas, and how many there are beyond what anybody reads."""
    more = f" and {len(names) - MOST_LISTED:,} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
