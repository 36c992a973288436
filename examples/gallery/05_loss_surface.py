"""The loss surface around a run.

Two random directions, each scaled to the length of every filter (Li et al., 2018).
"""

import qtdog

run = qtdog.train(target="75", image_size=12, lr=0.01, steps=300, out="runs/lsq", progress=False)
found = qtdog.analyze.surface(run, plane=True, num_points=7, num_images=40, out="analyses/around", progress=False)
found.plot().save("loss_surface.png")
