"""What LSQ computes, and the gradients that it lets pass.

Left: a weight on a grid of 3 bits. Right: the straight-through gradient of the weight, and the gradient of the
step size.
"""

import matplotlib.pyplot as plt
import torch

from qtdog.quantizers.lsq import lsq_quantize

weight = torch.linspace(-3, 3, 601, requires_grad=True)
scales = torch.full((601,), 0.5, requires_grad=True)  # a step size for each weight, so that each has its own gradient
value = lsq_quantize(weight, scales, -4, 3)
value.sum().backward()

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(weight.detach(), value.detach())
left.plot(weight.detach(), weight.detach(), ":", color="gray")
left.set(xlabel="weight w", ylabel="quantized weight", title="step size 0.5, codes −4 … 3")
right.plot(weight.detach(), weight.grad, label="of the weight")
right.plot(weight.detach(), scales.grad, label="of the step size")
right.set(xlabel="weight w", ylabel="gradient")
right.legend()
figure.savefig("straight_through.png", dpi=90)
