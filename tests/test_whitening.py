"""WPCA: the published values, whiteness, and its refusals."""

import numpy as np
import pytest
import torch

from patchnetvlad.errors import UserError
from patchnetvlad.whitening import WPCA, fit_wpca


@pytest.mark.parametrize(("rows", "form"), [(300, "pca"), (30, "pca_dual")])
def test_components_equal_the_published_values(reference, rows, form):
    fit = fit_wpca(reference["pca_x"][:rows], 8)
    np.testing.assert_allclose(fit.eigenvalues, reference[f"{form}_lams"], atol=1e-6)
    np.testing.assert_allclose(np.abs(fit.directions), reference[f"{form}_abs_u"], atol=1e-6)
    if rows == 300:
        np.testing.assert_allclose(fit.mean, reference["pca_mu"], atol=1e-6)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_variances_after_the_projection(whitening):
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((400, 12)) * np.linspace(3, 0.5, 12) + 7
    fit = fit_wpca(samples, 5, whitening)
    projected = samples @ fit.weight.T + fit.bias
    np.testing.assert_allclose(projected.mean(0), 0, atol=1e-9)
    expected = np.diag(fit.eigenvalues ** (1 - whitening))
    np.testing.assert_allclose(np.cov(projected.T), expected, atol=1e-6)
    assert np.all(np.diff(fit.eigenvalues) <= 0)
    assert 0 < fit.explained_variance < 1


def test_dual_and_primal_forms_agree():
    samples = np.random.default_rng(1).standard_normal((41, 40))
    primal, dual = fit_wpca(samples, 6), fit_wpca(samples[:, :39] @ np.eye(39, 60), 6)
    embedded = fit_wpca(samples[:, :39], 6)
    np.testing.assert_allclose(dual.eigenvalues, embedded.eigenvalues, atol=1e-9)
    assert primal.num_samples == 41


def test_layer_equals_the_fit_and_a_convolution():
    samples = np.random.default_rng(2).standard_normal((50, 10)).astype(np.float32)
    fit, layer = fit_wpca(samples, 4), WPCA(10, 4)
    layer.set_fit(fit)
    projected = samples @ fit.weight.T + fit.bias
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    rows = torch.from_numpy(samples)
    np.testing.assert_allclose(layer(rows).detach(), expected, atol=1e-5)
    convolved = layer.get_submodule("0")(rows[:, :, None, None]).flatten(1)
    torch.testing.assert_close(layer(rows), torch.nn.functional.normalize(convolved, dim=1))
    assert list(layer.state_dict()) == ["0.weight", "0.bias"]


def test_refusals_name_both_numbers():
    samples = np.random.default_rng(3).standard_normal((20, 10))
    with pytest.raises(UserError, match=r"num_pcs = 20 .* there are 20"):
        fit_wpca(samples, 20)
    with pytest.raises(UserError, match=r"num_pcs = 11 is outside 1 to 10"):
        fit_wpca(samples, 11)
    with pytest.raises(UserError, match="whitening = 2"):
        fit_wpca(samples, 3, whitening=2)


def test_a_reduced_weight_follows_the_weight():
    generator = torch.Generator().manual_seed(0)
    layer, rows = WPCA(32, 8), torch.randn(5, 32, generator=generator)
    with torch.no_grad():
        before = layer(rows, torch.bfloat16)
        torch.testing.assert_close(before, layer(rows), atol=0.02, rtol=0)
        layer.weight.neg_()
        layer.bias.neg_()
        torch.testing.assert_close(layer(rows, torch.bfloat16), -before)
