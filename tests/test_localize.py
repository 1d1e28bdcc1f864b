"""Maps and their scores against slow references and closed forms; each check also fails on classes with a defect put in."""
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ad_course.ae import AE
from ad_course.check import check_detector
from ad_course.localize import MapAE, MapScore, SSIMAE, gaussian_matrix, local_mean, smooth, ssim_map, top_mean

C1, C2 = .01**2, .03**2
SMALL = dict(epochs=1, batch_size=16, width=4, code_dim=4, verbose=False)


def pictures(n=2, c=1, h=14, w=17, seed=0): return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    """The product of Wang's three factors (equations 6, 9, 10), not the shortened form; moments about the mean, not raw ones."""
    out = np.zeros(x.shape)
    for (i, j), _ in np.ndenumerate(x):
        at = np.zeros(x.shape); at[i, j] = 1
        k, l = np.indices(x.shape)
        g = np.exp(-((k - i)**2 + (l - j)**2) / (2 * sigma**2)) * (abs(k - i) <= window // 2) * (abs(l - j) <= window // 2)
        g /= g.sum()
        mx, my = (g * x).sum(), (g * y).sum()
        sx, sy, cov = np.sqrt((g * (x - mx)**2).sum()), np.sqrt((g * (y - my)**2).sum()), (g * (x - mx) * (y - my)).sum()
        out[i, j] = (2*mx*my + C1) / (mx**2 + my**2 + C1) * (2*sx*sy + C2) / (sx**2 + sy**2 + C2) * (cov + C2/2) / (sx*sy + C2/2)
    return out


# ---------------------------------------------------------------- local means
@pytest.mark.parametrize('window, sigma', [(11, 1.5), (3, 1.), (5, 100.)])
def test_local_mean_equals_the_loop(window, sigma):
    x = pictures()[0, 0]
    np.testing.assert_allclose(local_mean(x, window, sigma), slow_mean(x.numpy(), window, sigma), atol=1e-12)


def test_rows_of_the_matrix_sum_to_one_and_are_cut():
    m = gaussian_matrix(9, 5, 1.5, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(m.sum(1), torch.ones(9, dtype=torch.float64))
    i, j = np.indices((9, 9))
    assert ((m.numpy() > 0) == (abs(i - j) <= 2)).all()


def test_wide_gaussian_is_a_box():
    x = pictures(h=9, w=9)
    torch.testing.assert_close(local_mean(x, 3, 1e6)[..., 1:-1, 1:-1], F.avg_pool2d(x, 3, 1))


def test_smooth_keeps_the_sum_of_a_point_inside_and_cuts_at_three_sigma():
    point = torch.zeros(1, 31, 31, dtype=torch.float64); point[0, 15, 15] = 1
    soft = smooth(point, 1.5)
    assert abs(float(soft.sum()) - 1) < 1e-12 and smooth(point, 0) is point
    assert soft[0, 15, 20] > 0 and soft[0, 15, 21] == 0   # 3 * 1.5 rounded up to 5


# ---------------------------------------------------------------- ssim_map
def ssim_is_right(f):
    """Everything that structural similarity must be; `f` has the signature of ssim_map."""
    x, y = pictures(c=2), pictures(c=2, seed=1)
    for i in range(2):
        for c in range(2): np.testing.assert_allclose(f(x, y)[i, c], slow_ssim(x[i, c].numpy(), y[i, c].numpy()), atol=1e-9, err_msg='loop')
    torch.testing.assert_close(f(x, x), torch.ones_like(x), msg='identity')
    torch.testing.assert_close(f(x, y), f(y, x), msg='symmetry')
    flat = lambda v: torch.full((1, 1, 13, 13), v, dtype=torch.float64)
    torch.testing.assert_close(f(flat(.2), flat(.6)), flat((.24 + C1) / (.40 + C1)), msg='flat images')
    torch.testing.assert_close(f(flat(0.), flat(0.)), flat(1.), msg='black images')
    assert f(x, 1 - x).max() < 0, 'a negative'


def test_ssim(): ssim_is_right(ssim_map)


def zero_padded(x, y):
    line = torch.exp(-torch.arange(-5., 6)**2 / 4.5).double(); line /= line.sum()
    mean = lambda t: F.conv2d(t, torch.outer(line, line).expand(t.shape[1], 1, 11, 11), padding=5, groups=t.shape[1])
    mx, my = mean(x), mean(y)
    return (2*mx*my + C1) * (2*(mean(x*y) - mx*my) + C2) / ((mx**2 + my**2 + C1) * (mean(x*x) - mx**2 + mean(y*y) - my**2 + C2))


SSIM_MUTANTS = dict(
    constants_without_squares=lambda x, y: ssim_map(x, y, c1=.01, c2=.03),
    swapped_constants=lambda x, y: ssim_map(x, y, c1=C2, c2=C1),
    window_7=lambda x, y: ssim_map(x, y, window=7),
    sigma_1=lambda x, y: ssim_map(x, y, sigma=1.),
    zero_padding=zero_padded,
    mixed_channels=lambda x, y: ssim_map(x.mean(1, keepdim=True), y.mean(1, keepdim=True)).expand_as(x),
    negated=lambda x, y: -ssim_map(x, y),
    dissimilarity=lambda x, y: 1 - ssim_map(x, y),
    one_number=lambda x, y: ssim_map(x, y).mean().expand_as(x))


@pytest.mark.parametrize('mutant', SSIM_MUTANTS)
def test_ssim_mutants_are_caught(mutant):
    with pytest.raises(AssertionError): ssim_is_right(SSIM_MUTANTS[mutant])


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
    np.testing.assert_allclose(ssim_map(x, y)[0, 0], slow_ssim(x[0, 0].numpy(), y[0, 0].numpy()), atol=1e-12)


def test_ssim_against_scikit_image():
    metrics = pytest.importorskip('skimage.metrics', reason='scikit-image is not installed, and not required')
    x, y = pictures(h=24, w=24)[:, 0].numpy()
    _, full = metrics.structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1., full=True)
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
def fitted(kind, x, **params): return kind(**{**SMALL, **params}).fit(x)


def by_hand(kind):
    """Loss, map and score of an SSIM autoencoder against the loop, and the knobs of MapScore against their definition."""
    x = pictures(6, 2, 8, 9).float()
    d = fitted(kind, x, smoothing=1., top=.1)
    with torch.no_grad(): xhat, terms = d.reconstruction(x), d.loss(x)
    want = np.array([[1 - slow_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(i, j)] for i, j in zip(x, xhat)])  # (n, c, h, w)
    assert list(terms) == ['reconstruction'], 'terms'
    np.testing.assert_allclose(float(terms['reconstruction']), want.mean(), rtol=1e-4, err_msg='loss')
    maps = np.array([slow_mean(m, 7, 1.) for m in want.sum(1)])
    np.testing.assert_allclose(d.anomaly_map(x), maps, rtol=1e-3, atol=1e-5, err_msg='map')
    np.testing.assert_allclose(d.decision_function(x), np.sort(maps.reshape(6, -1), 1)[:, -7:].mean(1), rtol=1e-3, err_msg='score')


def test_ssimae_by_hand(): by_hand(SSIMAE)


class Similar(SSIMAE):
    def errors(self, xb): return ssim_map(xb, self.reconstruction(xb))
class Silent(SSIMAE):
    def loss(self, xb): return dict(reconstruction=0 * self.errors(xb).mean())
class Flipped(SSIMAE):
    def loss(self, xb): return dict(reconstruction=-self.errors(xb).mean())
class Summed(SSIMAE):
    def loss(self, xb): return dict(reconstruction=self.errors(xb).sum())
class TrainedOnSquares(SSIMAE):
    def loss(self, xb): return dict(reconstruction=(xb - self.reconstruction(xb)).square().mean())
class ScoredBySquares(SSIMAE):
    def pixel_score(self, xb): return smooth((xb - self.reconstruction(xb)).square().sum(1), self.smoothing)
class NotSmoothed(SSIMAE):
    def pixel_score(self, xb): return self.errors(xb).sum(1)
class ScoredByMean(SSIMAE):
    def image_score(self, xb): return self.pixel_score(xb).flatten(1).mean(1)
class LeastAnomalous(SSIMAE):
    def image_score(self, xb): return -top_mean(-self.pixel_score(xb), self.top)
class WindowIgnored(SSIMAE):
    def errors(self, xb): return 1 - ssim_map(xb, self.reconstruction(xb), 3, .5)
class ScaledPerImage(SSIMAE):
    def pixel_score(self, xb):
        m = super().pixel_score(xb)
        return (m - m.amin((1, 2), keepdim=True)) / (m.amax((1, 2), keepdim=True) - m.amin((1, 2), keepdim=True))


@pytest.mark.parametrize('mutant', [Similar, Silent, Flipped, Summed, TrainedOnSquares, ScoredBySquares, NotSmoothed, ScoredByMean, LeastAnomalous, WindowIgnored, ScaledPerImage],
                         ids=lambda m: m.__name__)
def test_detector_mutants_are_caught(mutant):
    with pytest.raises(AssertionError): by_hand(mutant)


def test_knobs_at_rest_change_nothing():
    x = pictures(8, 1, 8, 8).float()
    a, b = (fitted(k, x, epochs=2) for k in (AE, MapAE))
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
    np.testing.assert_allclose(d.decision_function(x), np.abs(x.numpy() - d.reconstruct(x)).max((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize('kind, wrong', [(MapAE, dict(top=1.1)), (MapAE, dict(top=-.1)), (MapAE, dict(smoothing=-1)), (MapAE, dict(smoothing=float('nan'))), (SSIMAE, dict(window=4)),
                                         (SSIMAE, dict(window=1)), (SSIMAE, dict(sigma=0)), (SSIMAE, dict(sigma='wide')), (SSIMAE, dict(code_dim=0))])
def test_wrong_settings_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): fitted(kind, pictures(4, 1, 8, 8).float(), **wrong)


def test_promises(): check_detector(SSIMAE(epochs=30, batch_size=32, top=.2))
