"""WPCA: the published values, whiteness, and its refusals."""

import numpy as np
import pytest
import torch

from patchnetvlad.errors import UserError
from patchnetvlad.whitening import PLACE_SHRINKAGE, WPCA, fit_place_whitening, fit_wpca


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


def test_place_whitening_by_hand():
    # Two axes of equal spread among the samples; at one place only the first one changes.
    samples = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    fit = fit_place_whitening(samples, np.array([[0.5, 0.0], [-0.3, 0.0]]), 1)
    # Scatter diag(2, 0), drawn to even by 0.2: diag(1.8, 0.2); whitened, the second axis has nine times the variance
    np.testing.assert_allclose(np.abs(fit.weight), [[0, PLACE_SHRINKAGE**-0.5]], atol=1e-12)
    assert fit.explained_variance == pytest.approx(0.9)


def test_place_whitening_tells_places_apart_that_wpca_does_not():
    rng = np.random.default_rng(4)
    places = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 24)) * 0.3
    changes = np.zeros((120, 24))
    changes[:, :3] = rng.standard_normal((120, 3)) * 3  # what changes is large and known
    seen = np.concatenate([places + changes[:60], places + changes[60:]])
    queries, database = seen[:60], seen[60:]

    def found(fit):
        rows = [part @ fit.weight.T + fit.bias for part in (queries, database)]
        rows = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in rows]
        return ((rows[0] @ rows[1].T).argmax(1) == np.arange(60)).mean()

    learned = found(fit_place_whitening(seen, queries - database, 8))
    assert learned > found(fit_wpca(seen, 8)) + 0.1 and learned > 0.9


def test_place_whitening_to_the_power_0_is_a_rotation():
    rng = np.random.default_rng(5)
    samples, differences = rng.standard_normal((40, 12)), rng.standard_normal((10, 12))
    rotated = fit_place_whitening(samples, differences, 6, whitening=0.0)
    plain = fit_wpca(samples, 6, whitening=0.0)
    np.testing.assert_allclose(np.abs(rotated.weight), np.abs(plain.weight), atol=1e-9)
    np.testing.assert_allclose(rotated.eigenvalues, plain.eigenvalues, atol=1e-9)
