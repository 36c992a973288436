"""The loss on the straight line between two runs.

0 is the float run, 1 the quantized one. A barrier between them means that they lie in different valleys.
"""

import qtdog

SETTINGS = {"target": "75", "image_size": 12, "lr": 0.01, "steps": 300, "progress": False}
runs = [qtdog.train(quantizer="none", out="runs/float", **SETTINGS), qtdog.train(out="runs/lsq", **SETTINGS)]
found = qtdog.analyze.surface(runs, num_points=9, num_images=60, out="analyses/path", progress=False)
found.plot().save("path_between_runs.png")
