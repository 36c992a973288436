"""An ensemble and its members.

Three members share their float steps and go on with their own seeds. One file holds them all.
"""

import matplotlib.pyplot as plt

import qtdog

found = qtdog.train(
    target="75", image_size=12, lr=0.01, steps=300, members=3, fork_at="start", out="runs/three", progress=False
)
names = [*(f"seed {run.config.train.seed}" for run in found.runs), "ensemble"]
accuracies = [100 * run.accuracy for run in [*found.runs, *found.ensembles]]
print(dict(zip(names, [round(value, 1) for value in accuracies], strict=True)))

figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
bars = axes.barh(names, accuracies, color=["tab:blue"] * 3 + ["tab:orange"])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xlim=(0, 100), xlabel="accuracy on the target (%)")
axes.invert_yaxis()
figure.savefig("ensemble.png", dpi=90)
