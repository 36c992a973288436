"""Can selection be trusted?

`analyze.stability` compares the accuracy on the sources' validation split with that on the target, over all
checkpoints. Near 1 the sources choose well, near 0 blindly.
"""

import qtdog

SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
runs = [
    qtdog.train(quantizer="none", out="runs/float", **SETTINGS),
    qtdog.train(out="runs/lsq", **SETTINGS),
    qtdog.train(averager="sma", out="runs/lsq-sma", **SETTINGS),
]
found = qtdog.analyze.stability(runs)
found.plot().save("stability.png")
