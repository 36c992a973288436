"""RSC: what it mutes, against NumPy's percentiles, and its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def rsc_by_hand(case, feature_frac, image_frac):
    """DomainBed's recipe on a linear classifier, whose logit of class y has the gradient W[y]."""
    weight, bias = (p.detach().numpy() for p in case.network.classifier.parameters())
    features = case.network.features(case.batch.images).detach().numpy()
    labels = case.batch.labels.numpy()
    rows = np.arange(len(labels))
    gradient = weight[labels]
    limits = np.percentile(gradient, 100 * (1 - feature_frac), axis=1)
    kept = gradient < limits[:, None]
    before = softmax(features @ weight.T + bias)[rows, labels]
    after = softmax((features * kept) @ weight.T + bias)[rows, labels]
    spared = before - after < np.percentile(before - after, 100 * (1 - image_frac))
    mask = kept | spared[:, None]
    return mask, -np.log(softmax((features * mask) @ weight.T + bias)[rows, labels]).mean()


@pytest.mark.parametrize(("feature_frac", "image_frac"), [(1 / 3, 1 / 3), (0.5, 0.2), (0.1, 0.5), (0.0, 0.0), (1, 1)])
def test_the_loss_is_that_of_the_recipe(case, objective, feature_frac, image_frac):
    mask, expected = rsc_by_hand(case, feature_frac, image_frac)
    found = objective("rsc", feature_frac=feature_frac, image_frac=image_frac)(case.view, case.batch)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-9)
    assert not mask.all()


def test_muted_features_get_no_gradient_and_the_mask_adds_none(case, objective):
    mask, _ = rsc_by_hand(case, 1 / 3, 1 / 3)
    seen = []
    handle = case.network.featurizer.register_forward_hook(lambda module, inputs, output: output.retain_grad())
    hook = case.network.featurizer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    objective("rsc")(case.view, case.batch).backward()
    handle.remove()
    hook.remove()
    (features,) = seen
    np.testing.assert_array_equal(features.grad.numpy() != 0, mask)


def test_it_works_with_one_domain_and_one_image(case, objective):
    one = type(case.batch)(case.batch.images[:1], case.batch.labels[:1], (1,))
    assert torch.isfinite(objective("rsc")(case.view, one))
