"""Is a confidence of 80 % right in 80 % of the cases?

The reliability diagram of a run, on the target and on the sources. Under a distribution shift a network is
surer than it should be.
"""

import csv

import matplotlib.pyplot as plt
import numpy as np

import qtdog

run = qtdog.train(target="75", image_size=12, lr=0.01, steps=300, out="runs/lsq", progress=False)
errors = qtdog.analyze.errors(run, progress=False)
with open(errors.folder / "points.csv", newline="") as file:
    answers = list(csv.DictReader(file))

figure, axes = plt.subplots(figsize=(4, 3.6), layout="constrained")
edges = np.linspace(0, 1, 8)
for name, chosen in (("target", True), ("sources", False)):
    rows = [row for row in answers if (row["domain"] == run.target) == chosen]
    confidence = np.array([float(row["confidence"]) for row in rows])
    correct = np.array([row["label"] == row["predicted"] for row in rows])
    bins = np.digitize(confidence, edges[1:-1])
    filled = [k for k in range(len(edges) - 1) if (bins == k).sum() >= 5]
    axes.plot(
        [confidence[bins == k].mean() for k in filled], [correct[bins == k].mean() for k in filled], "o-", label=name
    )
    print(f"{name}: confidence {confidence.mean():.3f}, accuracy {correct.mean():.3f}")
axes.plot([0, 1], [0, 1], ":", color="gray", label="calibrated")
axes.set(xlabel="confidence", ylabel="accuracy")
axes.legend()
figure.savefig("calibration.png", dpi=90)
