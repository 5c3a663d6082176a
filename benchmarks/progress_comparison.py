"""The comparison of benchmarks/progress_study.py: paired statistics of predictions with progress of two sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from pecn.scores import NUM_RESAMPLES, bootstrap_intervals

ALL_TASKS = "all"
FEW_SAMPLES = 20  # bootstrap intervals of fewer are known to be too narrow
MEASURES = {"psnr": "PSNR over the whole picture, dB", "moving_psnr": "PSNR where something moves, dB"}


def compare(
    pairs: Sequence[dict[str, Any]], measure: str, source: str, base: str, task: str = ALL_TASKS
) -> dict[str, Any]:
    """The paired comparison of one measure with progress of `source` and of `base`, over one task's pairs, or over all.

    A pair's difference (`source` minus `base`, dB) is first averaged over the seeds: the pairs are the statistical
    unit. Returns their number, `copy_mean`, `base_mean`, `source_mean` and the mean `difference`, the latter's
    `interval` (95%, bootstrap over pairs), `p_value` (random changes of sign), and the mean `difference_per_seed`.
    """
    rows = [pair[measure] for pair in pairs if task in (ALL_TASKS, pair["task"]) and pair[measure] is not None]
    comparison: dict[str, Any] = {"task": task, "measure": measure, "source": source, "base": base}
    comparison["num_pairs"] = len(rows)
    if not rows:
        names = ("copy_mean", "base_mean", "source_mean", "difference", "interval", "p_value", "difference_per_seed")
        return comparison | dict.fromkeys(names)
    of_base, of_source = (np.array([row[name] for row in rows]) for name in (base, source))
    differences = (of_source - of_base).mean(axis=1)
    return comparison | {
        "copy_mean": float(np.mean([row["copy"] for row in rows])),
        "base_mean": float(of_base.mean()),
        "source_mean": float(of_source.mean()),
        "difference": float(differences.mean()),
        "interval": bootstrap_intervals(differences[:, None])[0],
        "p_value": paired_permutation_test(differences) if len(rows) > 1 else None,
        "difference_per_seed": (of_source - of_base).mean(axis=0).tolist(),
    }


def paired_permutation_test(differences: Sequence[float] | np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value that paired differences are symmetric about zero, by random changes of their signs.

    All changes are tried where these are fewer than NUM_RESAMPLES (Phipson and Smyth, 2010).
    """
    table = np.asarray(differences, np.float64)
    result = stats.permutation_test(
        (table,),
        np.mean,
        permutation_type="samples",
        n_resamples=NUM_RESAMPLES,
        batch=100,  # tried at once: few enough for any memory
        rng=seed,
    )
    return float(result.pvalue)


def compare_all(pairs: Sequence[dict[str, Any]], sources: Sequence[str]) -> list[dict[str, Any]]:
    """`compare` of each source with the first one, for each measure: a row for each task, then one for all."""
    base, *others = sources
    tasks = [*sorted({pair["task"] for pair in pairs}), ALL_TASKS]
    return [compare(pairs, measure, source, base, task) for measure in MEASURES for source in others for task in tasks]


def format_table(comparisons: dict[str, list[dict[str, Any]]]) -> str:
    """The comparisons of each choice of frames ("20 -> 25") as text of about 120 columns."""
    heads = f"{'copying':>9}{'base':>9}{'source':>8}{'source - base (95%)':>27}{'p':>8}   for each seed"
    lines = [f"{'progress':>20}{'pairs':>22}{heads}"]
    for measure, title in MEASURES.items():
        lines.append(title)
        for frames, rows in comparisons.items():
            for row in rows:
                if row["measure"] == measure:
                    lines.append(_table_row(frames, row))
    return "\n".join(lines)


def _table_row(frames: str, row: dict[str, Any]) -> str:
    line = f"  {frames:<9} {row['source']:<12}{row['task']:<12}{row['num_pairs']:>6}"
    if not row["num_pairs"]:
        return f"{line}{'nothing moves':>17}"
    interval = "" if row["interval"] is None else "({:+.2f} to {:+.2f})".format(*row["interval"])
    means = f"{row['copy_mean']:>9.2f}{row['base_mean']:>9.2f}{row['source_mean']:>8.2f}"
    line += f"{means}{row['difference']:>+9.2f} {interval:<17}"
    seeds = " ".join(f"{difference:+.2f}" for difference in row["difference_per_seed"])
    p_value = "-" if row["p_value"] is None else f"{row['p_value']:.4f}"
    return f"{line}{p_value:>8}   {seeds}"


def answer(frames: str, row: dict[str, Any]) -> str:
    """One sentence for the row over all tasks: what the interval and the seeds allow to say."""
    where = "where something moves" if row["measure"] == "moving_psnr" else "over the whole picture"
    about = f"{frames}, progress {row['source']} against {row['base']}, {where}"
    if row["num_pairs"] < FEW_SAMPLES:
        return f"{about}: {row['num_pairs']} pairs are too few for an answer, it takes {FEW_SAMPLES} or more."
    low, high = row["interval"]
    if low <= 0 <= high or row["p_value"] >= 0.05:
        return f"{about}: no difference shown; it lies between {low:+.2f} and {high:+.2f} dB."
    per_seed = row["difference_per_seed"]
    same_sign = len({difference > 0 for difference in per_seed}) == 1
    verb = "helps" if row["difference"] > 0 else "hurts"
    if len(per_seed) == 1:
        seeds = "but only one seed was tried, so another training could reverse it"
    else:
        seeds = "with every seed" if same_sign else "but not with every seed, so another training could reverse it"
    return f"{about}: it {verb} by {abs(row['difference']):.2f} dB, {seeds}."


def how_to_read(num_rows: int, num_seeds: int, rendered: bool) -> str:
    lines = [
        "How to read this: base is the first source. Of estimated progress the training clips' is too good, since the",
        "estimator has seen them. A pair's difference is averaged over the seeds, and the pairs are what is counted;",
        "above 0 the source helps. The interval says how far other clips would move the mean; how far another",
        f"training would, show the means of the single seeds ({num_seeds}) in the last column. Without any effect p",
        f"falls below 0.05 in one row of 20; there are {num_rows} rows.",
    ]
    if rendered:
        lines.append(
            "These are rendered clips, not SSv2: their actions fill the whole clip and keep to a fixed motion profile."
        )
    return "\n".join(lines)
