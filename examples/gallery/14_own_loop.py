"""Quantizers in a training loop of your own.

`qtdog.attach` gives every layer a quantizer that passes weights through until it is enabled. The picture shows
the weights of one layer at the end, and the grid that they lie on.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import qtdog

torch.manual_seed(0)
inputs = torch.randn(256, 2)
labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

quantizers = qtdog.attach(model, bits=4, exclude=["4"], granularity="layer")
optimizer = torch.optim.Adam(quantizers.param_groups(lr=0.01))
for step in range(200):
    if step == 80:
        quantizers.enable()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
print(f"accuracy {(model(inputs).argmax(1) == labels).float().mean():.3f}")

latent = model[2].parametrizations.weight.original.detach().flatten()
rounded = model[2].weight.detach().flatten()
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(latent, bins=120, label="latent weights")
axes.vlines(rounded.unique(), 0, axes.get_ylim()[1] * 0.12, color="tab:orange", label="points of the grid in use")
axes.set(xlabel="weight", ylabel="count")
axes.legend()
figure.savefig("own_loop.png", dpi=90)
