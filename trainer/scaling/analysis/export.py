"""The results of a StudyFit as plain values, for JSON."""

from typing import Any

from forescale.scaling.analysis import judge
from forescale.scaling.analysis.answer import StudyFit


def as_dict(made: StudyFit) -> dict[str, Any]:
    """Return all results of a fit."""
    c, r, prediction = made.fit.certificate, made.replicates, made.predict()
    ends = zip(made.form.symbols, r.interval(made.job.level).T.tolist(), strict=True)
    return {
        "runs": len(made.points),
        "convention": made.points.convention,
        "weights": None if made.weights is None else made.weights.tolist(),
        "noise": vars(made.noise),
        "form": made.form.name,
        "source": made.form.source,
        "objective": made.fit.value,
        "values": made.fit.values,
        "errors": r.errors,
        "interval": dict(ends),
        "level": made.job.level,
        "certificate": {
            "holds": c.holds,
            "scaled_gradient": c.scaled_gradient,
            "curvature": c.curvature,
            "method": c.method,
            "edges": list(c.edges),
            "minima": [vars(m) for m in c.minima],
            "failed_starts": c.failed_starts,
        },
        "uncertified_replicates": r.uncertified,
        "others": {name: other.values for name, other in made.others.items()},
        "allocation": None if made.allocation is None else [
            made.allocation[0], *map(float, made.allocation[1])
        ],
        "prediction": vars(prediction) if prediction else None,
        "sensitivity": None if made.sensitivity is None else [
            vars(row) for row in made.sensitivity
        ],
        "discrepancy_per_decade": made.discrepancy.per_decade,
        "backtests": [
            {
                "budgets": b.budgets,
                "runs": b.runs,
                "factors": b.factors.tolist(),
                "errors": b.errors.tolist(),
                "inside_resampled": b.inside_resampled.tolist(),
                "inside": b.inside_calibrated.tolist(),
            }
            for b in made.backtests
        ],
        "skill": judge.as_dict(made.skill)["scores"],
        "doubts": made.doubts,
        "notes": made.notes,
    }  # fmt: skip
