"""A patch's report on itself: what its own check measured, as JSON in its file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TypeGuard

BEYOND = 1e9  # no figure of a report is larger, and none is not a number
WHEN = ("before", "fast", "after", "with_unet_lora")


@dataclass(frozen=True)
class ImportReport:
    """Where an imported patch comes from, and how near it comes: relative errors (Frobenius norm) of its change, of that
    outside the cross-attention, and of the worst projection."""

    file: str
    kind: str
    rank: int
    projections: int
    unet_layers: int
    error: float
    unet_error: float = 0.0
    worst_projection: str = ""
    worst_error: float = 0.0


@dataclass(frozen=True)
class PatchReport:
    """What a patch's own check measured; a field is empty where the preset does not measure it.

    `erasure`: name -> how far its prompts go to what takes their place, 1 being there. `preserve_drift`: near word -> how
    far it moves, on the same scale, the largest first, and `empty_prompt_drift`. `attention_mass`: the share of attention to
    the concept, by time. `target_error` and `noise_drift`: errors of noise estimates for the concept, by time, and for near
    words, over the unpatched model's for the concept. `unrelated_drift`: change of the noise estimates for unrelated
    prompts. `interference`, `response_errors` and `collateral_change` are those of a stack: see `conflicts`.
    """

    erasure: dict[str, float] = field(default_factory=dict)
    synonyms: list[str] = field(default_factory=list)
    preserve_drift: dict[str, float] = field(default_factory=dict)
    empty_prompt_drift: float | None = None
    attention_mass: dict[str, float] = field(default_factory=dict)
    target_error: dict[str, float] = field(default_factory=dict)
    noise_drift: float | None = None
    unrelated_drift: float | None = None
    learned_word_errors: list[float] = field(default_factory=list)
    steps: int | None = None
    strength: float | None = None
    loss: list[float] = field(default_factory=list)
    interference: list[dict] = field(default_factory=list)
    response_errors: list[dict] = field(default_factory=list)
    collateral_change: float | None = None
    imported: ImportReport | None = None
    evaluation: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def updated(self, **values: object) -> PatchReport:
        """The same with these fields."""
        return replace(self, **values)  # type: ignore[arg-type]  # which field a keyword is for cannot be written down

    def plain(self) -> dict:
        """The fields that are not empty, for JSON, and the warnings."""
        return {name: value for name, value in asdict(self).items() if name == "warnings" or value not in (None, {}, [])}

    @classmethod
    def read(cls, report: object) -> PatchReport:
        """What of a report in a file has the right form, which may come from anywhere; the rest is left out."""
        report = report if isinstance(report, dict) else {}
        drift = sorted(numbers(report.get("preserve_drift")).items(), key=lambda item: -item[1])
        singles = numbers({f.name: report.get(f.name) for f in fields(cls)})
        steps = singles.get("steps")
        by_time = {name: numbers(report.get(name)) for name in ("target_error", "attention_mass")}
        by_time = {name: {when: each[when] for when in WHEN if when in each} for name, each in by_time.items()}
        return cls(
            erasure=numbers(report.get("erasure")),
            synonyms=texts(report.get("synonyms")),
            preserve_drift=dict(drift),
            empty_prompt_drift=singles.get("empty_prompt_drift"),
            attention_mass=by_time["attention_mass"] if {"before", "after"} <= by_time["attention_mass"].keys() else {},
            target_error=by_time["target_error"] if "after" in by_time["target_error"] else {},
            noise_drift=singles.get("noise_drift"),
            unrelated_drift=singles.get("unrelated_drift"),
            steps=None if steps is None else int(steps),
            strength=singles.get("strength"),
            interference=rows(report.get("interference"), {"interference"}),
            response_errors=rows(report.get("response_errors"), {"added", "jointly"}),
            collateral_change=singles.get("collateral_change"),
            imported=read_import(report.get("imported")),
            evaluation=read_evaluation(report.get("evaluation")),
            warnings=texts(report.get("warnings")),
        )


def read_import(imported: object) -> ImportReport | None:
    """An import's report, or None for anything else."""
    figures = numbers(imported)
    if not isinstance(imported, dict) or not {"unet_layers", "rank", "projections", "error"} <= figures.keys():
        return None
    return ImportReport(
        file=str(imported.get("file", "")),
        kind=str(imported.get("kind", "")),
        rank=int(figures["rank"]),
        projections=int(figures["projections"]),
        unet_layers=int(figures["unet_layers"]),
        error=figures["error"],
        unet_error=figures.get("unet_error", 0.0),
        worst_projection=str(imported.get("worst_projection", "")),
        worst_error=figures.get("worst_error", 0.0),
    )


def read_evaluation(evaluation: object) -> dict:
    """An evaluation's summary, warnings and mean drift of each group; nothing for anything else."""
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("summary"), str):
        return {}
    means = evaluation.get("prompt_drift")
    means = {group: each.get("mean") for group, each in means.items()} if mappings(means) else {}
    return {
        "summary": evaluation["summary"],
        "warnings": texts(evaluation.get("warnings")),
        "prompt_drift": numbers(means),
    }


def numbers(value: object) -> dict[str, float]:
    """The numbers in a dictionary that can be shares, masses or counts; nothing for anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(key): x for key, x in items if type(x) in (int, float) and abs(x) < BEYOND}


def rows(value: object, wanted: set[str]) -> list[dict]:
    """The dictionaries in a list that have these numbers, with the names of concepts beside them."""
    found = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return [
        {key: str(row.get(key, "")) for key in ("concept", "other")} | {key: numbers(row)[key] for key in wanted}
        for row in found
        if wanted <= numbers(row).keys()
    ]


def mappings(value: object) -> TypeGuard[dict[str, dict]]:
    """Whether this is a dictionary of dictionaries."""
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


def texts(value: object) -> list[str]:
    """The strings in a list; nothing for anything else."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
