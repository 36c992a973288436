"""`qtdog analyse stability`."""

from __future__ import annotations

from qtdog.cli.analyse_common import OUT, AsJson, Out, Runs, Seed, labels_of, show


def stability(runs: Runs, *, seed: Seed = 0, out: Out = OUT, as_json: AsJson = False) -> None:
    """Draw accuracy over the steps of runs, and measure how far selection on the sources can be trusted.

    The rank correlation is between source-validation and target accuracy over the checkpoints that could be shipped:
    near 1 the sources choose well, near 0 they choose blindly. Runs need not be finished.

    Example:
      qtdog analyse stability runs/float runs/lsq runs/lsq-swad
    """
    from qtdog.analysis.stability import measure_stability

    folder = out / "stability"
    said = measure_stability(runs, labels_of(runs), folder, seed=seed)
    columns = ["run", "n_checkpoints", "target_std", "largest_drop", "spearman", "spearman_low", "spearman_high"]
    show(said, folder, [*columns, "selected", "best"], as_json=as_json)
