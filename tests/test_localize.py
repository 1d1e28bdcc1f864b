"""Maps and their scores against slow references and closed forms; each check also fails on a
method with a defect put in."""
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ad_course.ae import AE
from ad_course.localize import (MapAE, MapScore, SSIMAE, gaussian_matrix, local_mean, smooth,
                                ssim_map, top_mean)
from tests.mutants import assert_caught, changed, each_mutant

C1, C2 = .01**2, .03**2
SMALL = dict(epochs=1, batch_size=16, width=4, code_dim=4, verbose=False)


def pictures(n=2, c=1, h=14, w=17, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, c, h, w, generator=rng, dtype=torch.float64)


def slow_mean(x, window=11, sigma=1.5):
    """Weighted mean around each pixel of (h, w): loops, windows cut at the border."""
    (h, w), r, out = x.shape, window // 2, np.zeros(x.shape)
    for i in range(h):
        for j in range(w):
            total = weights = 0
            for k in range(max(i - r, 0), min(i + r + 1, h)):
                for l in range(max(j - r, 0), min(j + r + 1, w)):
                    g = math.exp(-((k - i)**2 + (l - j)**2) / (2 * sigma**2))
                    total, weights = total + g * x[k, l], weights + g
            out[i, j] = total / weights
    return out


def slow_ssim(x, y, window=11, sigma=1.5):
    """The product of Wang's three factors (equations 6, 9, 10), not the shortened form.

    Moments are taken about the mean, not raw ones."""
    out, (k, l) = np.zeros(x.shape), np.indices(x.shape)
    for (i, j), _ in np.ndenumerate(x):
        near = (abs(k - i) <= window // 2) * (abs(l - j) <= window // 2)
        g = near * np.exp(-((k - i)**2 + (l - j)**2) / (2 * sigma**2))
        g /= g.sum()
        mx, my = (g * x).sum(), (g * y).sum()
        sx, sy = np.sqrt((g * (x - mx)**2).sum()), np.sqrt((g * (y - my)**2).sum())
        cov = (g * (x - mx) * (y - my)).sum()
        brightness = (2*mx*my + C1) / (mx**2 + my**2 + C1)
        contrast, structure = (2*sx*sy + C2) / (sx**2 + sy**2 + C2), (cov + C2/2) / (sx*sy + C2/2)
        out[i, j] = brightness * contrast * structure
    return out


# ---------------------------------------------------------------- local means
@pytest.mark.parametrize('window, sigma', [(11, 1.5), (3, 1.), (5, 100.)])
def test_local_mean_equals_the_loop(window, sigma):
    x = pictures()[0, 0]
    want = slow_mean(x.numpy(), window, sigma)
    np.testing.assert_allclose(local_mean(x, window, sigma), want, atol=1e-12)


def test_rows_of_the_matrix_sum_to_one_and_are_cut():
    m = gaussian_matrix(9, 5, 1.5, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(m.sum(1), torch.ones(9, dtype=torch.float64))
    i, j = np.indices((9, 9))
    assert ((m.numpy() > 0) == (abs(i - j) <= 2)).all()


def test_wide_gaussian_is_a_box():
    x = pictures(h=9, w=9)
    torch.testing.assert_close(local_mean(x, 3, 1e6)[..., 1:-1, 1:-1], F.avg_pool2d(x, 3, 1))


def test_smooth_keeps_the_sum_of_a_point_inside_and_cuts_at_three_sigma():
    point = torch.zeros(1, 31, 31, dtype=torch.float64)
    point[0, 15, 15] = 1
    soft = smooth(point, 1.5)
    assert abs(float(soft.sum()) - 1) < 1e-12 and smooth(point, 0) is point
    assert soft[0, 15, 20] > 0 and soft[0, 15, 21] == 0   # 3 * 1.5 rounded up to 5


# ---------------------------------------------------------------- ssim_map
def ssim_is_right(f):
    """Everything that structural similarity must be; `f` has the signature of ssim_map."""
    flat = lambda v: torch.full((1, 1, 13, 13), v, dtype=torch.float64)
    torch.testing.assert_close(f(flat(.2), flat(.6)), flat((.24 + C1) / (.40 + C1)),
                               msg='flat images')
    torch.testing.assert_close(f(flat(0.), flat(0.)), flat(1.), msg='black images')
    x, y = pictures(c=2), pictures(c=2, seed=1)
    torch.testing.assert_close(f(x, x), torch.ones_like(x), msg='identity')
    torch.testing.assert_close(f(x, y), f(y, x), msg='symmetry')
    assert f(x, 1 - x).max() < 0, 'a negative'
    for i, c in np.ndindex(2, 2):
        want = slow_ssim(x[i, c].numpy(), y[i, c].numpy())
        np.testing.assert_allclose(f(x, y)[i, c], want, atol=1e-9, err_msg='the loop')


def test_ssim(): ssim_is_right(ssim_map)


def zero_padding(x, y):
    line = torch.exp(-torch.arange(-5., 6)**2 / 4.5).double()
    line /= line.sum()
    square = torch.outer(line, line).expand(x.shape[1], 1, 11, 11)
    mean = lambda t: F.conv2d(t, square, padding=5, groups=t.shape[1])
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x*x) - mx**2, mean(y*y) - my**2, mean(x*y) - mx*my
    return (2*mx*my + C1) * (2*cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))


def constants_without_squares(x, y): return ssim_map(x, y, c1=.01, c2=.03)
def swapped_constants(x, y): return ssim_map(x, y, c1=C2, c2=C1)
def window_7(x, y): return ssim_map(x, y, window=7)
def sigma_1(x, y): return ssim_map(x, y, sigma=1.)
def negated(x, y): return -ssim_map(x, y)
def dissimilarity(x, y): return 1 - ssim_map(x, y)
def one_number(x, y): return ssim_map(x, y).mean().expand_as(x)
def mixed_channels(x, y):
    gray = lambda t: t.mean(1, keepdim=True)
    return ssim_map(gray(x), gray(y)).expand_as(x)


@each_mutant({'flat images': [constants_without_squares, swapped_constants, zero_padding, negated,
                              dissimilarity],
              'the loop': [window_7, sigma_1, mixed_channels],
              'a negative|the loop': [one_number]})
def test_ssim_mutants_are_caught(why, broken): assert_caught(ssim_is_right, broken, why)


def test_ssim_gradient():
    x, y = pictures(1, 1, 6, 6), pictures(1, 1, 6, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ssim_map(x, t), y)


def test_ssim_is_not_computed_in_half_precision():
    x, y = (.9 + .01 * pictures(seed=s).float() for s in (0, 1))
    with torch.autocast('cpu', dtype=torch.bfloat16): half = ssim_map(x, y)
    assert half.dtype == torch.float32 and torch.equal(half, ssim_map(x, y))
    torch.testing.assert_close(ssim_map(x.bfloat16(), x.bfloat16()), torch.ones_like(x))


def test_ssim_works_on_images_smaller_than_the_window():
    x, y = pictures(1, 1, 3, 1), pictures(1, 1, 3, 1, seed=1)
    want = slow_ssim(x[0, 0].numpy(), y[0, 0].numpy())
    np.testing.assert_allclose(ssim_map(x, y)[0, 0], want, atol=1e-12)


def test_ssim_against_scikit_image():
    why = 'scikit-image is not installed, and not required'
    metrics = pytest.importorskip('skimage.metrics', reason=why)
    x, y = pictures(h=24, w=24)[:, 0].numpy()
    as_ours = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.)
    _, full = metrics.structural_similarity(x, y, full=True, **as_ours)
    ours = ssim_map(torch.tensor(x)[None, None], torch.tensor(y)[None, None])[0, 0]
    np.testing.assert_allclose(ours[5:-5, 5:-5], full[5:-5, 5:-5], atol=1e-7)


def test_ssim_refuses_unlike_shapes():
    for y in (pictures(h=13), pictures()[0], pictures(c=3)):
        with pytest.raises(ValueError, match='compares two'): ssim_map(pictures(), y)


# ---------------------------------------------------------------- top_mean
def test_top_mean_by_hand():
    maps = torch.tensor([[[0., 1.], [2., 5.]], [[4., 4.], [4., 4.]]])
    for top, want in {1: [2, 4], .5: [3.5, 4], .25: [5, 4], 0: [5, 4], .01: [5, 4]}.items():
        assert top_mean(maps, top).tolist() == want


# ---------------------------------------------------------------- detectors
def fitted(cls, x, **params): return cls(**{**SMALL, **params}).fit(x)


def by_hand(cls):
    """Loss, map and score of an SSIM autoencoder against the loop, its knobs by definition."""
    x = pictures(6, 2, 8, 9).float()
    d = fitted(cls, x, smoothing=1., top=.1)
    with torch.no_grad(): xhat, terms = d.reconstruction(x), d.loss(x)
    pairs = [zip(*images) for images in zip(x.double().numpy(), xhat.double().numpy())]
    want = np.array([[1 - slow_ssim(a, b) for a, b in pair] for pair in pairs])  # (n, c, h, w)
    assert list(terms) == ['reconstruction'], 'terms'
    loss = float(terms['reconstruction'])
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-4, err_msg='loss')
    maps = np.array([slow_mean(m, 7, 1.) for m in want.sum(1)])
    got = d.anomaly_map(x)
    np.testing.assert_allclose(got, maps, rtol=1e-3, atol=1e-5, err_msg='map')
    worst = np.sort(maps.reshape(6, -1), 1)[:, -7:].mean(1)
    np.testing.assert_allclose(d.decision_function(x), worst, rtol=1e-3, err_msg='score')


def test_ssimae_by_hand(): by_hand(SSIMAE)


def squares(d, xb): return (xb - d.reconstruction(xb)).square()


def scaled_per_image(self, xb):
    m = MapScore.pixel_score(self, xb)
    low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
    return (m - low) / (high - low)


def wrong(name, **methods): return changed(SSIMAE, name, **methods)


def wrong_loss(name, loss): return wrong(name, loss=lambda d, xb: dict(reconstruction=loss(d, xb)))


@each_mutant({
    'loss': [
        wrong('Similar', errors=lambda d, xb: ssim_map(xb, d.reconstruction(xb))),
        wrong('WindowIgnored', errors=lambda d, xb: 1 - ssim_map(xb, d.reconstruction(xb), 3, .5)),
        wrong_loss('Silent', lambda d, xb: 0 * d.errors(xb).mean()),
        wrong_loss('Flipped', lambda d, xb: -d.errors(xb).mean()),
        wrong_loss('Summed', lambda d, xb: d.errors(xb).sum()),
        wrong_loss('TrainedOnSquares', lambda d, xb: squares(d, xb).mean())],
    'map': [
        wrong('ScoredBySquares',
              pixel_score=lambda d, xb: smooth(squares(d, xb).sum(1), d.smoothing)),
        wrong('NotSmoothed', pixel_score=lambda d, xb: d.errors(xb).sum(1)),
        wrong('ScaledPerImage', pixel_score=scaled_per_image)],
    'score': [
        wrong('ScoredByMean', image_score=lambda d, xb: d.pixel_score(xb).flatten(1).mean(1)),
        wrong('LeastAnomalous', image_score=lambda d, xb: -top_mean(-d.pixel_score(xb), d.top))]})
def test_detector_mutants_are_caught(why, broken): assert_caught(by_hand, broken, why)


def test_knobs_at_rest_change_nothing():
    x = pictures(8, 1, 8, 8).float()
    a, b = (fitted(cls, x, epochs=2) for cls in (AE, MapAE))
    np.testing.assert_allclose(a.decision_function(x), b.decision_function(x), rtol=1e-6)
    np.testing.assert_allclose(a.anomaly_map(x), b.anomaly_map(x), rtol=1e-6)


def test_smoothing_and_top_do_not_touch_the_training():
    x = pictures(8, 1, 8, 8).float()
    a, b = fitted(MapAE, x, epochs=2), fitted(MapAE, x, epochs=2, smoothing=2., top=0)
    assert all(torch.equal(p, q) for p, q in zip(a.nets_.parameters(), b.nets_.parameters()))
    np.testing.assert_allclose(b.decision_function(x), b.anomaly_map(x).max((1, 2)), rtol=1e-6)


def test_mapscore_goes_with_any_detector_that_reconstructs():
    @dataclass(kw_only=True, eq=False, repr=False)
    class AbsoluteAE(AE):
        def errors(self, xb): return (xb - self.reconstruction(xb)).abs()
    @dataclass(kw_only=True, eq=False, repr=False)
    class MapAbsolute(MapScore, AbsoluteAE): pass
    x = pictures(8, 1, 8, 8).float()
    d = fitted(MapAbsolute, x, top=0)
    worst = np.abs(x.numpy() - d.reconstruct(x)).max((1, 2, 3))
    np.testing.assert_allclose(d.decision_function(x), worst, rtol=1e-6)


@pytest.mark.parametrize('cls, wrong', [
    (MapAE, dict(top=1.1)), (MapAE, dict(top=-.1)), (MapAE, dict(top=True)),
    (MapAE, dict(smoothing=-1)), (MapAE, dict(smoothing=float('nan'))),
    (SSIMAE, dict(window=4)), (SSIMAE, dict(window=1)), (SSIMAE, dict(sigma=0)),
    (SSIMAE, dict(sigma='wide')), (SSIMAE, dict(sigma=True)), (SSIMAE, dict(code_dim=0))])
def test_wrong_settings_are_refused(cls, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fitted(cls, pictures(4, 1, 8, 8).float(), **wrong)
