"""DAGMM: its features, moments, energy and penalty; whose moments score; mutants of each."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ad_course import dagmm
from ad_course.classical import GMM
from ad_course.dagmm import (DAGMM, asked_variance, distinct_components, effective_components,
                             energy, error_features, inverse_variances, mixture_moments,
                             rows_as_images)
from ad_course.data import digits
from ad_course.detector import isolated, load

from .mutants import assert_caught, changed, each_mutant, mutant
from .players import check_any_image, check_refused

X = np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=2, width=2, n_components=3, verbose=False, device='cpu')


def drawn(n=60, d=3, k=2, seed=0):
    """Rows and memberships."""
    g = torch.Generator().manual_seed(seed)
    z, gamma = torch.randn(n, d, generator=g), torch.rand(n, k, generator=g)
    return z, gamma / gamma.sum(1, keepdim=True)


# ---------------------------------------------------------------- equations
def check_features(features):
    """Equation (1) by hand, without a unit, and finite where an image is black."""
    x, xhat = torch.tensor([[3., 4.], [1., 0.]]), torch.tensor([[0., 4.], [0., 2.]])
    found = features(x, xhat)
    assert torch.allclose(found[:, 0], torch.tensor([.6, 5**.5])), 'relative distance'
    assert torch.allclose(found[:, 1], torch.tensor([.8, 0.])), 'cosine'
    assert torch.allclose(features(.1 * x, .1 * xhat), found), 'a unit'
    black = features(torch.zeros(1, 4), torch.full((1, 4), .5))
    assert torch.allclose(black, torch.tensor([[50., 0.]])), 'black'
    slope = torch.autograd.functional.jacobian(lambda v: features(x, v), x.clone())
    assert slope.isfinite().all(), 'slope'


def check_moments(moments):
    """Equation (2) by loops over rows, and the EM step of scikit-learn."""
    z, gamma = drawn()
    shares, means, covariances = moments(z, gamma, .01)
    for k in range(2):
        total = sum(float(gamma[i, k]) for i in range(60))
        assert np.isclose(shares[k], total / 60), 'share'
        mean = sum(gamma[i, k].double() * z[i].double() for i in range(60)) / total
        assert torch.allclose(means[k], mean, atol=1e-5), 'mean'
        cov = sum(gamma[i, k].double() * torch.outer(*[(z[i].double() - mean)] * 2)
                  for i in range(60)) / total
        wanted = cov + .01 * torch.eye(3, dtype=torch.float64)
        assert torch.allclose(covariances[k], wanted, atol=1e-5), 'covariance'


def check_energy(form):
    """Equation (3) against scikit-learn, torch.distributions, our GMM, and a slope."""
    z = torch.cat([drawn(seed=s)[0] * (s + 1) + 4 * s for s in range(3)]).double()
    m = GaussianMixture(3, random_state=0).fit(z.numpy())
    own = [torch.tensor(v) for v in (m.weights_, m.means_, m.covariances_)]
    assert np.allclose(form(z, *own), -m.score_samples(z.numpy())), 'scikit-learn'
    parts = MixtureSameFamily(Categorical(own[0]), MultivariateNormal(*own[1:]))
    assert torch.allclose(form(z, *own), -parts.log_prob(z)), 'torch'
    v = z[:5].clone().requires_grad_()
    ours, = torch.autograd.grad(form(v, *own).sum(), v)
    theirs, = torch.autograd.grad(-parts.log_prob(v).sum(), v)
    assert torch.allclose(ours, theirs), 'slope'


def fourth_root(z, shares, means, covariances):
    """The determinant to the power of a quarter, as in a known re-implementation."""
    terms = MultivariateNormal(means, covariances).log_prob(z[:, None]) + covariances.logdet() / 4
    return -(shares.log() + terms).logsumexp(1)

def no_shares(z, shares, means, covariances):
    """All components count alike."""
    return energy(z, torch.full_like(shares, 1 / len(shares)), means, covariances)

def density(z, shares, means, covariances):
    """The sign of the density."""
    return -energy(z, shares, means, covariances)

def diagonal(z, shares, means, covariances):
    """Covariances without what lies off the diagonal."""
    return energy(z, shares, means, torch.diag_embed(covariances.diagonal(dim1=1, dim2=2)))

def divided_by_all(z, gamma, floor=0.):
    """Covariances divided by N, in the place of a component's share of it."""
    shares, means, c = mixture_moments(z, gamma)
    return shares, means, c * shares[:, None, None] + floor * torch.eye(z.shape[1])

def around_all(z, gamma, floor=0.):
    """Covariances around the mean of all rows."""
    shares, means, c = mixture_moments(z, gamma)
    away = means - z.double().mean(0)
    return shares, means, c + away[:, :, None] * away[:, None] + floor * torch.eye(z.shape[1])

def floorless(z, gamma, floor=0.):
    """The floor is forgotten."""
    return mixture_moments(z, gamma)

def swapped(x, xhat):
    """Relative to the reconstruction's length."""
    return error_features(xhat, x)

def squared(x, xhat):
    """The squared distance."""
    found = error_features(x, xhat)
    return torch.stack([found[:, 0].square(), found[:, 1]], 1)

def distance(x, xhat):
    """One minus the cosine."""
    found = error_features(x, xhat)
    return torch.stack([found[:, 0], 1 - found[:, 1]], 1)

def absolute(x, xhat):
    """The distance in the unit of the pixels."""
    found = error_features(x, xhat)
    return torch.stack([(x - xhat).flatten(1).norm(dim=1), found[:, 1]], 1)

def unguarded(x, xhat):
    """The length of a black image is a divisor."""
    return error_features(x, xhat, least=1e-9)


@pytest.mark.parametrize('check, real', [(check_features, error_features), (check_energy, energy),
                                         (check_moments, mixture_moments)])
def test_the_equations_hold(check, real): check(real)


@each_mutant({'relative distance': (swapped, squared, absolute), 'cosine': (distance,),
              'black': (unguarded,)})
def test_wrong_features_are_caught(why, broken): assert_caught(check_features, broken, why)


@each_mutant({'covariance': (divided_by_all, around_all, floorless)})
def test_wrong_moments_are_caught(why, broken): assert_caught(check_moments, broken, why)


@each_mutant({'scikit-learn': (fourth_root, no_shares, density, diagonal)})
def test_wrong_energies_are_caught(why, broken): assert_caught(check_energy, broken, why)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_moments_of_any_size(n, d, k, seed):
    """Shares sum to one, the mixture has the mean of the rows, energies are finite."""
    z, gamma = drawn(n, d, k, seed)
    shares, means, covariances = mixture_moments(z, gamma, 1e-6)
    assert np.isclose(shares.sum(), 1, atol=1e-6)
    assert torch.allclose(shares @ means, z.double().mean(0), atol=1e-5)
    assert energy(z, shares, means, covariances).isfinite().all()
    used = effective_components(shares / shares.sum())
    assert 1 - 1e-6 <= used <= k + 1e-6


def test_copies_are_a_place_without_a_slope():
    z = drawn(100)[0].double()
    for share, least, most in ((torch.zeros(100, 1), 0, 1e-10), (drawn(100)[1] * 3, 1e-5, 1)):
        logits = (share + torch.tensor([0., 1.])).double().requires_grad_()
        mean = energy(z, *mixture_moments(z, logits.softmax(1))).mean()
        assert least <= torch.autograd.grad(mean, logits)[0].abs().max() < most


def test_a_component_without_members_does_no_harm():
    z, gamma = drawn()
    gamma = torch.cat([gamma, torch.zeros(60, 1)], 1).requires_grad_()
    found = energy(z, *mixture_moments(z, gamma, 1e-6))
    assert torch.allclose(found, energy(z, *mixture_moments(z, gamma[:, :2], 1e-6)))
    with pytest.raises(torch.linalg.LinAlgError):
        energy(torch.zeros(5, 2), *mixture_moments(torch.zeros(5, 2), torch.ones(5, 1)))


def test_the_energy_is_that_of_our_gmm():
    t = digits(normal=1)
    d = GMM(components=3, n_components=2, verbose=False).fit(t.x_train)
    covariances = torch.linalg.inv(d.roots_ @ d.roots_.mT)
    z = d.features(torch.tensor(t.x_test[:50]))
    ours = energy(z, d.log_weights_.exp(), d.means_, covariances)
    assert np.allclose(ours, d.decision_function(t.x_test[:50]), rtol=1e-4)


def test_the_mean_energy_falls_by_the_log_of_the_scale_and_the_penalty_stops_it():
    z, gamma = drawn(400)
    one = torch.ones(400, 1)
    at = lambda t, g: energy(t * z, *mixture_moments(t * z, g)).mean()
    assert np.isclose(at(.01, gamma), at(1., gamma) + 3 * math.log(.01), atol=1e-4)
    spread = torch.linalg.cholesky(torch.cov(z.double().T, correction=0))
    white = torch.linalg.solve(spread, (z.double() - z.double().mean(0)).T).T
    def total(s):
        m = mixture_moments(white * s**.5, one)
        return float(.2 * energy(white * s**.5, *m).mean() + .01 * inverse_variances(m[2]))
    s = asked_variance(.2, .01)
    assert total(s) < min(total(.9 * s), total(1.1 * s))
    assert np.allclose([asked_variance(.1, .005), asked_variance(.1, .005, .25)], [.1, .4])


def test_effective_and_distinct_components():
    assert np.isclose(effective_components([.5, .5, 0.]), 2) and effective_components([1.]) == 1
    gamma = np.array([[.5, .5, 0], [.5, .5, 0], [0, 0, 1], [0, 0, 1]])   # two places of three
    assert np.isclose(distinct_components(gamma), 2)
    assert np.isclose(distinct_components([[.2, .8]] * 5), 1)


# ---------------------------------------------------------------- the detector
def raw(cls=DAGMM, **params): return cls(**SMALL | dict(epochs=0) | params).fit(X)


def check_terms(cls):
    """Equation (4) with each weight, in 64 bits, and P of all of z or of the code."""
    for whose, of in (('all', slice(None)), ('code', slice(2))):
        d = raw(cls, energy_weight=.3, covariance_weight=.02, penalized=whose, dropout=0.)
        with torch.no_grad():
            terms, code = d.loss(XB), d.nets_.encoder(XB)
            xhat = d.nets_.decoder(code)
            z = torch.cat([code, error_features(XB, xhat)], 1)
            gamma = d.nets_.estimation(z).softmax(1)
        assert terms.keys() == {'reconstruction', 'energy', 'covariance'}, 'names'
        wanted = (XB - xhat).flatten(1).square().sum(1)
        assert torch.allclose(terms['reconstruction'], wanted), 'reconstruction'
        m = mixture_moments(z, gamma, 1e-6)
        parts = MixtureSameFamily(Categorical(m[0]), MultivariateNormal(*m[1:]))
        wanted = -.3 * parts.log_prob(z.double())
        assert torch.allclose(terms['energy'], wanted, rtol=1e-3, atol=1e-3), 'energy'
        variances = m[2].diagonal(dim1=1, dim2=2)[:, of]
        wanted = .02 * sum(1 / v for v in variances.flatten())
        assert torch.allclose(terms['covariance'], wanted, rtol=1e-2), f'penalty on {whose}'


def check_paths(cls):
    """The energy alone moves all three networks: gradients pass through moments and errors."""
    d = raw(cls)
    for name, net in d.nets_.items():
        grads = torch.autograd.grad(d.loss(XB)['energy'].mean(), list(net.parameters()),
                                    allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads), f'nothing reaches {name}'
    z, weights = d.latent(XB), list(d.nets_.encoder.parameters())
    with isolated(0): moments = mixture_moments(z, d.nets_.estimation(z).double().softmax(1), 1e-6)
    parts = MixtureSameFamily(Categorical(moments[0]), MultivariateNormal(*moments[1:]))
    wanted = torch.autograd.grad(-d.energy_weight * parts.log_prob(z.double()).mean(), weights)
    with isolated(0): found = torch.autograd.grad(d.loss(XB)['energy'].mean(), weights,
                                                  allow_unused=True)
    assert all(g is not None and torch.allclose(g, w, rtol=1e-3, atol=1e-6)
               for g, w in zip(found, wanted)), 'the slope of the energy in the codes'


def check_scores(cls):
    """All training images' moments score, without dropout; the threshold is a quantile."""
    d = cls(**SMALL, epochs=3, batch_size=16, contamination=.1).fit(X)
    z = torch.tensor(d.embed(X))
    with torch.no_grad(): gamma = d.nets_.estimation.eval()(z).double().softmax(1)
    shares, means, covariances = mixture_moments(z, gamma, 1e-6)
    assert torch.allclose(d.shares_, shares, atol=1e-6), 'whose shares'
    assert torch.allclose(d.means_, means, atol=1e-5), 'whose means'
    assert torch.allclose(d.covariances_, covariances, atol=1e-6), 'whose covariances'
    scores = d.decision_function(X)
    parts = MixtureSameFamily(Categorical(shares), MultivariateNormal(means, covariances))
    assert np.allclose(scores, -parts.log_prob(z.double()), rtol=1e-3, atol=1e-2), 'the score'
    assert np.isclose(d.threshold_, np.quantile(scores, .9)), 'threshold'


CHECKS = check_terms, check_paths, check_scores


@pytest.mark.parametrize('check', CHECKS)
def test_the_chapter_keeps(check): check(DAGMM)


def term(name, change):
    """A class of which one term of the loss is another."""
    def loss(self, xb):
        terms = DAGMM.loss(self, xb)
        return terms | {name: change(self, terms[name], xb)}
    return changed(DAGMM, f'Other_{name}', loss=loss)


MEANS = term('reconstruction', lambda self, v, xb: v / xb[0].numel())
UNWEIGHTED = term('energy', lambda self, v, xb: v / self.energy_weight)
FLIPPED = term('energy', lambda self, v, xb: -v)
VARIANCES = term('covariance', lambda self, v, xb: 1 / v)

class PenaltyOnAll(DAGMM):
    """`penalized` is ignored."""
    def loss(self, xb):
        """All of z."""
        of, self.penalized = self.penalized, 'all'
        try: return super().loss(xb)
        finally: self.penalized = of

class Detached(DAGMM):
    """The mixture does not learn: its moments are constants."""
    def moments(self, z): return tuple(m.detach() for m in super().moments(z))

class ErrorsApart(DAGMM):
    """z is a constant for the autoencoder."""
    def both(self, xb):
        """z, detached, and the reconstruction."""
        z, xhat = super().both(xb)
        return z.detach(), xhat

class OnlyThroughMoments(DAGMM):
    """The energy of codes that stand still: the mixture moves under them."""
    def loss(self, xb):
        z, _ = self.both(xb)
        still = energy(z.detach(), *self.moments(z))
        return super().loss(xb) | dict(energy=self.energy_weight * still)

class LastBatch(DAGMM):
    """The moments of the last batch of training score, as in a known re-implementation."""
    def moments(self, z):
        """Kept, where a gradient is wanted."""
        found = super().moments(z)
        if torch.is_grad_enabled(): self._last = tuple(m.detach() for m in found)
        return found
    def set_threshold(self, data):
        """Theirs in the place of all."""
        super().set_threshold(data)
        self.shares_, self.means_, self.covariances_ = self._last
        del self._last

class DroppedOut(DAGMM):
    """Dropout acts while the final moments are taken."""
    def moments(self, z):
        """As in training."""
        self.nets_.estimation.train()
        return super().moments(z)

class Turned(DAGMM):
    """High density scores high."""
    def image_score(self, xb): return -super().image_score(xb)

class Errors(DAGMM):
    """The score of an autoencoder."""
    def image_score(self, xb): return self.errors(xb).flatten(1).mean(1)


@each_mutant({'reconstruction': (MEANS,), 'energy': (UNWEIGHTED, FLIPPED),
              'penalty on all': (VARIANCES,), 'penalty on code': (PenaltyOnAll,)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_terms, broken, why)


@each_mutant({'estimation': (Detached,), 'encoder': (ErrorsApart,),
              'slope of the energy': (OnlyThroughMoments,)})
def test_broken_paths_are_caught(why, broken):
    assert_caught(check_paths, broken, why)


@each_mutant({'whose shares': (LastBatch, DroppedOut), 'the score': (Turned, Errors)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_scores, broken, why)


def test_the_fourth_root_would_also_be_seen_in_a_detector():
    with mutant(dagmm, energy=fourth_root): assert_caught(check_scores, DAGMM, 'the score')


@pytest.mark.parametrize('params, message', [
    (dict(n_components=0), 'n_components must be a whole number, at least 1'),
    (dict(hidden=0), 'hidden'), (dict(dropout=1.), 'dropout must be a number, at least 0 and'),
    (dict(energy_weight=-1.), 'energy_weight'), (dict(covariance_weight=-1.), 'covariance_weight'),
    (dict(variance_floor=0.), 'variance_floor must be a number above 0'),
    (dict(penalized='errors'), "penalized must be one of 'all', 'code'")])
def test_wrong_settings_are_named(params, message): check_refused(DAGMM, message, **SMALL | params)


def test_an_exploding_training_is_named():
    check_refused(DAGMM, 'epoch|finite|factorization', (FloatingPointError, RuntimeError),
                  **SMALL | dict(epochs=4, lr=1e30))


def test_any_image_fits():
    check_any_image(DAGMM, (2, 9), **SMALL | dict(code_dim=3))


def test_rows_as_images():
    like = np.array([[0., 5.], [2., 5.]])
    found = rows_as_images([[0., 5.], [2, 5], [1, 6], [9, 0]], like)
    assert found.shape == (4, 1, 1, 2) and found.dtype == np.float32
    assert np.allclose(found[:, 0, 0], [[.25, .25], [.75, .25], [.5, .75], [1, 0]])
    for wrong in (np.zeros((2, 3)), np.zeros(2)):
        with pytest.raises(ValueError, match='rows and like must be'): rows_as_images(wrong, like)


def test_a_saved_detector_scores_the_same_and_has_no_map(tmp_path):
    d = DAGMM(**SMALL, epochs=2).fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))
    assert d.embed(X).shape == (40, 4)
    with pytest.raises(NotImplementedError, match='DAGMM gives no anomaly map'): d.anomaly_map(X)


def test_the_penalty_on_all_of_z_makes_the_errors_differ():
    """Equation (5) asks a variance of the errors, too; trained digits beat untrained networks."""
    t, how = digits(normal=1), dict(verbose=False, device='cpu', code_dim=4)
    fits = {w: DAGMM(penalized=w, epochs=30, **how).fit(t.x_train) for w in ('all', 'code')}
    relative = {w: d.embed(t.x_train)[:, -2] for w, d in fits.items()}
    assert relative['all'].std() > 1.5 * relative['code'].std()
    assert relative['all'].mean() > relative['code'].mean()
    untrained = DAGMM(epochs=0, **how).fit(t.x_train).score(t.x_test, t.y_test)
    assert fits['code'].score(t.x_test, t.y_test) > max(untrained, .9)
