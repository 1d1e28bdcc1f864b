"""The industrial detector: F1 and its share, min-max residuals, two terms; mutants of each."""
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score

from ad_course.cnngan import (
    CNNGAN, f1_at, false_alarms, min_max, normalized_residual, origin_distance)
from ad_course.detector import load
from ad_course.fanogan import FAnoGAN

from .mutants import assert_caught, each_mutant
from .players import SHAPES, Scale, check_any_image, check_refused, moved, ready

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(latent_dim=3, width=2, verbose=False)
PIXELS = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(2))


def shown(cls, **params):
    """The class with networks that multiply, on images of three pixels."""
    def networks(self, shape):
        return dict(generator=Scale([.9, .5, .2], 1, 1, 3), critic=Scale([1., 2., 3.], 3),
                    encoder=Scale([1., -2., 3.], 3))
    kind = type('Shown', (cls,), dict(networks=networks))
    return kind(**dict(epochs=0, latent_dim=3, verbose=False) | params).fit(PIXELS)


def by_hand(normalize=True):
    """L_n and the length over its root, from formulas in float64: (6,) each."""
    x = PIXELS.flatten(1).double().numpy()
    z = x * [1, -2, 3]
    r = z * [.9, .5, .2]
    if normalize:
        x, r = ((v - v.min(1, keepdims=True)) / np.ptp(v, axis=1)[:, None] for v in (x, r))
    return x - r, np.sqrt(((x - r)**2).sum(1)) / 3, np.sqrt((z**2).sum(1)) / np.sqrt(3)


# ---------------------------------------------------------------- the score
def check_score(cls):
    """Both terms against formulas, under both signs, any weight, normalized and not."""
    d = shown(cls)
    for normalize in (True, False):
        _, near, length = by_hand(normalize)
        for sign in (-1, 1):
            d.set_params(normalize=normalize, origin_sign=sign)
            parts = d.for_each(lambda xb: torch.stack(d.score_parts(xb), 1), PIXELS, dims=2).T
            assert np.allclose(parts[0], near, atol=1e-6), 'the residual'
            assert np.allclose(parts[1], sign * length, atol=1e-6), 'the length'
            for weight in (0., .05, .6, 1.):
                d.set_params(residual_weight=weight)
                wanted = weight * near + (1 - weight) * sign * length
                assert np.allclose(d.decision_function(PIXELS), wanted, atol=1e-6), 'the sum'


def check_defaults(cls):
    """As printed: minus the length, .05 of the residual, normalized; a match in image space."""
    d = cls()
    found = d.origin_sign, d.residual_weight, d.normalize, d.encoder_loss, d.latent_dim
    assert found == (-1, .05, True, 'izi', 128), 'defaults'


def check_map(cls):
    """The map is the squared difference of each pixel, normalized or not."""
    d = shown(cls)
    for normalize in (True, False):
        maps = d.set_params(normalize=normalize).anomaly_map(PIXELS)
        wanted = by_hand(normalize)[0]**2
        assert np.allclose(maps.reshape(6, 3), wanted, atol=1e-6), 'the map'


def check_company(cls):
    """An image is normalized by itself, whoever is beside it."""
    d = shown(cls)
    alone = np.concatenate([d.decision_function(PIXELS[i:i + 1]) for i in range(6)])
    assert np.allclose(alone, d.decision_function(PIXELS), atol=1e-6), 'its company decides'


def check_phases(cls):
    """The game is f-AnoGAN's; afterwards the encoder alone moves, down the plain residual."""
    d = ready(cls(**SMALL, epochs=0).fit(X))
    assert moved(d, 'encoder', d.encoder_terms, XB) == {'encoder'}, 'step of the encoder'
    with torch.no_grad():
        wanted = (XB - d.reconstruction(XB)).square().flatten(1).mean(1)
        terms = d.encoder_terms(XB)
    assert terms.keys() == {'image'} and torch.allclose(terms['image'], wanted), 'its loss'
    recorded = cls(**SMALL, epochs=2, batch_size=8).fit(X).history_
    assert {'critic/penalty', 'generator/fooling', 'encoder/image'} <= recorded.keys(), 'records'


CHECKS = check_score, check_defaults, check_map, check_company, check_phases


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(CNNGAN)


# ---------------------------------------------------------------- mutants
def scored(change, name):
    """A class whose two terms come from change(self, L_n, L_o)."""
    def score_parts(self, xb): return change(self, *CNNGAN.score_parts(self, xb))
    return type(name, (CNNGAN,), dict(score_parts=score_parts))

PLUS = scored(lambda self, n, o: (n, -o), 'Plus')
ONE_SIGN = scored(lambda self, n, o: (n, -o.abs()), 'OneSign')
UNSCALED = scored(lambda self, n, o: (n, o * 3**.5), 'Unscaled')
SQUARED = scored(lambda self, n, o: (n, o * o.abs()), 'Squared')
MEAN = scored(lambda self, n, o: (n * 3**.5, o), 'Mean')
SQUARES = scored(lambda self, n, o: (n.square(), o), 'Squares')

class Swapped(CNNGAN):
    """The weight is at the length."""
    def image_score(self, xb):
        near, far = self.score_parts(xb)
        return (1 - self.residual_weight) * near + self.residual_weight * far

class NotConvex(CNNGAN):
    """The length counts in full."""
    def image_score(self, xb):
        near, far = self.score_parts(xb)
        return self.residual_weight * near + far

class Residual(CNNGAN):
    """The score of f-AnoGAN."""
    def image_score(self, xb): return FAnoGAN.image_score(self, xb)

class NeverNormalized(CNNGAN):
    """Plain differences."""
    def differences(self, xb, rebuilt): return (xb - rebuilt).square()

class ImageOnly(CNNGAN):
    """The reconstruction stays as it is."""
    def differences(self, xb, rebuilt):
        return ((min_max(xb) if self.normalize else xb) - rebuilt).square()

class OneScale(CNNGAN):
    """Both are scaled by the image."""
    def differences(self, xb, rebuilt):
        if not self.normalize: return super().differences(xb, rebuilt)
        low, high = (f(xb, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        return ((xb - rebuilt) / (high - low)).square()

class OfTheBatch(CNNGAN):
    """The extremes are those of the batch."""
    def differences(self, xb, rebuilt):
        if not self.normalize: return super().differences(xb, rebuilt)
        f = lambda v: (v - v.min()) / (v.max() - v.min())
        return (f(xb) - f(rebuilt)).square()

class PlainMap(CNNGAN):
    """The score is normalized, the map is not."""
    def errors(self, xb): return (xb - self.reconstruction(xb)).square()

class Absolute(CNNGAN):
    """A map of absolute differences."""
    def errors(self, xb): return super().errors(xb).sqrt()

class NormalizedTraining(CNNGAN):
    """The encoder learns on normalized images."""
    def encoder_terms(self, xb): return dict(image=self.errors(xb).flatten(1).mean(1))

class MovesAll(CNNGAN):
    """The encoder's Adam holds everything."""
    def optimizers(self): return super().optimizers() | dict(encoder=self.adam(*self.nets_))


@each_mutant({'the length': (PLUS, ONE_SIGN, UNSCALED, SQUARED),
              'the residual': (MEAN, SQUARES, NeverNormalized, ImageOnly, OneScale, OfTheBatch),
              'the sum': (Swapped, NotConvex, Residual)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_score, broken, why)


@each_mutant({'the map': (PlainMap, Absolute, NeverNormalized, ImageOnly, OneScale)})
def test_wrong_maps_are_caught(why, broken): assert_caught(check_map, broken, why)


@each_mutant({'its company': (OfTheBatch,)})
def test_extremes_of_a_batch_are_caught(why, broken): assert_caught(check_company, broken, why)


@each_mutant({'step of the encoder': (MovesAll,), 'its loss': (NormalizedTraining,)})
def test_wrong_phases_are_caught(why, broken): assert_caught(check_phases, broken, why)


# ---------------------------------------------------------------- pieces
@pytest.mark.parametrize('share', [.1, .5, .9])
def test_f1_and_false_alarms_from_counts(share):
    n = 1000
    y = (np.arange(n) < share * n).astype(int)
    rng = np.random.default_rng(0)
    called = (rng.random(n) < np.where(y, .7, .2)).astype(int)
    recall, alarms = called[y == 1].mean(), called[y == 0].mean()
    assert np.isclose(f1_at(share, recall, alarms), f1_score(y, called))
    assert np.isclose(false_alarms(share, precision_score(y, called), recall), alarms)
    assert np.isclose(f1_at(share), f1_score(y, np.ones(n)))


def test_min_max_by_hand_and_what_it_cannot_see():
    x = torch.tensor([[[.2, .6]], [[.5, .5]], [[0., 1.]]])
    assert torch.allclose(min_max(x), torch.tensor([[[0., 1.]], [[0., 0.]], [[0., 1.]]]))
    assert torch.allclose(min_max(.3 * XB + .1), min_max(XB), atol=1e-5)
    assert not torch.allclose(min_max(1 - XB), min_max(XB))
    color = torch.tensor([[[[.2]], [[.4]], [[.6]]]])            # over all channels together
    assert torch.allclose(min_max(color).flatten(), torch.tensor([0., .5, 1.]))


def test_min_max_lets_slopes_through_and_leaves_its_input():
    x = torch.tensor([[.3, .3], [.1, .4]], requires_grad=True)
    before = x.detach().clone()
    slope, = torch.autograd.grad(min_max(x).sum(), x)
    assert slope.isfinite().all() and torch.equal(x, before)


def test_the_terms_by_hand():
    assert torch.allclose(normalized_residual(torch.tensor([[[9., 16.]]])), torch.tensor([2.5]))
    assert torch.allclose(origin_distance(torch.tensor([[3., -4., 0., 0.]])), torch.tensor([-2.5]))
    assert origin_distance(torch.zeros(2, 5)).tolist() == [0, 0]


def test_a_constant_image_has_a_score():
    d = CNNGAN(**SMALL, epochs=1, batch_size=8).fit(X)
    assert np.isfinite(d.decision_function(np.full((2, 1, 4, 4), .5, 'float32'))).all()


def test_with_plain_residuals_alone_it_ranks_like_izi():
    params = dict(**SMALL, epochs=3, batch_size=8)
    ours = CNNGAN(**params, residual_weight=1., normalize=False).fit(X).decision_function(X)
    theirs = FAnoGAN(**params, encoder_loss='izi', feature_weight=0.).fit(X).decision_function(X)
    assert np.allclose(ours, np.sqrt(theirs / 16), rtol=1e-4)


def test_settings_of_the_score_may_be_set_after_fit(tmp_path):
    d = CNNGAN(**SMALL, epochs=2, batch_size=8).fit(X)
    first = d.decision_function(X)
    assert not np.allclose(d.set_params(residual_weight=1.).decision_function(X), first)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))
    with pytest.raises(ValueError, match='residual_weight'):
        d.set_params(residual_weight=2.).decision_function(X)


@pytest.mark.parametrize('params, message', [
    (dict(residual_weight=-.1), 'residual_weight must be a number, at least 0 and at most 1'),
    (dict(residual_weight=1.1), 'residual_weight'),
    (dict(origin_sign=0), 'origin_sign must be one'),
    (dict(normalize=1), 'normalize must be one of False, True')])
def test_wrong_settings_are_named(params, message):
    check_refused(CNNGAN, message, **SMALL | params)


@pytest.mark.parametrize('shape', SHAPES)
def test_any_image_fits(shape): check_any_image(CNNGAN, shape, **SMALL)


def test_all_channels_of_an_image_have_one_range():
    x = torch.rand(2, 3, 8, 8) * torch.tensor([.2, .5, 1.]).view(3, 1, 1)
    w = min_max(x)
    assert w[:, 0].max() < .5 and torch.equal(w.flatten(1).amax(1), torch.ones(2))
    d = CNNGAN(**SMALL).fit(x)
    with torch.no_grad(): rebuilt = min_max(d.reconstruction(x))
    np.testing.assert_allclose(d.errors(x).detach(), (w - rebuilt).square().detach(), atol=1e-6)


def test_false_alarms_above_one_say_that_no_such_test_exists():
    assert false_alarms(.9, .8112, .7784) > 1
