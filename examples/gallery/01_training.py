"""Accuracy over the steps of a run.

Digits rotated by 75 degrees are the target. Quantization begins at 40 % of the steps. The validation split of
the sources selects the checkpoint; the curve of the target is for the record.
"""

import qtdog

run = qtdog.train(target="75", image_size=12, lr=0.01, steps=300, out="runs/lsq", progress=False)
print(f"{run.method}: target {run.accuracy:.3f}, sources {run.source_accuracy:.3f}")
run.plot("training.png")
