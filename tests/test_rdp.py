"""Predicting random distances: independent targets, both terms, what a linear learner leaves."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import chi2, spearmanr
from torch.nn import functional as F

from ad_course.baselines import PCA
from ad_course.data import digits
from ad_course.detector import load
from ad_course.metrics import auroc
from ad_course.rdp import RDP, Layers, distortion_bound, expected_residual, pair_loss, residual
from tests.mutants import assert_caught, each_mutant
from tests.players import check_refused

SMALL = dict(epochs=2, members=3, code_dim=4, n_references=6, device='cpu', verbose=False)
X = np.random.default_rng(0).random((40, 1, 3, 4), dtype='float32')


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- equations
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.floats(.01, .99))
def test_the_bound_holds_for_chi_squared(k, epsilon):
    truth = chi2.cdf(k * (1 - epsilon), k) + chi2.sf(k * (1 + epsilon), k)
    assert truth <= distortion_bound(k, epsilon) + 1e-12


def check_pair(f):
    """By hand, blind to a rotation of all codes, and with slopes on both sides."""
    a, b, c, d = torch.tensor([[2., 0.], [3., 4.], [1., 1.], [0., 2.]])
    assert float(f(a, b, c, d)) == (6 / 2 - 2 / 2)**2, 'value'
    eta, Q = draws(9, 5), torch.linalg.qr(draws(5, 5, seed=1))[0]
    assert f(eta @ Q, eta.flip(0) @ Q, eta, eta.flip(0)).max() < 1e-20, 'rotation'
    phi = draws(9, 5, seed=2).requires_grad_()
    one, = torch.autograd.grad(f(phi, phi.flip(0), eta, eta.flip(0)).sum(), phi)
    gap = ((phi * phi.flip(0)).sum(1) - (eta * eta.flip(0)).sum(1)) / 5
    assert torch.allclose(one, 4 * gap[:, None] * phi.flip(0) / 5), 'slope'


def sums(a, b, c, d): return ((a * b).sum(-1) - (c * d).sum(-1)).square()
def elementwise(a, b, c, d): return (a * b - c * d).square().mean(-1)
def one_sided(a, b, c, d): return pair_loss(a, b.detach(), c, d)
def no_square(a, b, c, d): return pair_loss(a, b, c, d).sqrt()
def normalized(a, b, c, d):
    """As in the authors' code: products of codes of length one."""
    return pair_loss(*(F.normalize(v, p=1, dim=-1) for v in (a, b, c, d)))


def test_pairs(): check_pair(pair_loss)


@each_mutant({'value': (sums, no_square, normalized, elementwise), 'slope': (one_sided,)})
def test_wrong_pairs_are_caught(why, broken): assert_caught(check_pair, broken, why)


def test_residual_by_hand():
    assert residual(torch.tensor([2., 0.]), torch.tensor([3., 4.])) == 8.5
    assert residual(draws(3, 7, 5), draws(3, 7, 5)).eq(0).all()


def check_linear(f):
    """Equation (3) is what gradient descent leaves, on average over many random networks."""
    train, new = draws(30, 3) * torch.tensor([2., 1, .3]), draws(8, 3, seed=1)
    train = train - train.mean(0)
    k, rate = 2, .15
    B, A = draws(2, 20_000, k, 3, seed=2) * torch.tensor([1., .5]).double().view(2, 1, 1, 1)
    A.requires_grad_()
    for t in range(4):
        found = (new @ A.mT - new @ B.mT).square().mean(2).mean(0).detach()
        assert torch.allclose(f(new, train, t, rate, k, 1.25), found, rtol=.05), f'step {t}'
        loss = residual(train @ A.mT, train @ B.mT).mean(1).sum()
        with torch.no_grad(): A -= rate * torch.autograd.grad(loss, A)[0]


def one_power(r, t, n, rate, k, v=2.):
    return expected_residual(r, t, n / 2, rate, k, v)
def no_k(r, t, n, rate, k, v=2.): return expected_residual(r, t, n, rate / k, k, v)
def no_variance(r, t, n, rate, k, v=2.): return expected_residual(r, t, n, rate, k)
def standing(r, t, n, rate, k, v=2.): return expected_residual(r, t, 0, rate, k, v)


def test_what_a_linear_learner_leaves(): check_linear(expected_residual)


@each_mutant({'step 1': (one_power, no_k, standing), 'step 0': (no_variance,)})
def test_wrong_remainders_are_caught(why, broken): assert_caught(check_linear, broken, why)


def test_its_two_ends_are_the_distance_to_the_mean_and_to_the_plane():
    train, new = draws(6, 10), draws(12, 10, seed=1)
    center = train.mean(0)
    start, end = (expected_residual(new - center, train - center, t, 1e-2, 4, 1.)
                  for t in (0, math.inf))
    assert torch.allclose(start, (new - center).square().sum(1))
    rows = lambda z: (.5 + z / 20).clamp(0, 1).float()[:, None, None]
    plane = PCA(components=5).fit(rows(train)).decision_function(rows(new))
    assert np.allclose(end, plane * 400 * 10, rtol=1e-2)
    with pytest.raises(ValueError, match='rate must be below'):
        expected_residual(new, train, 3, 1e3, 4)


# ---------------------------------------------------------------- the detector
def codes_of(d, net, x):
    """Codes (m, b, k) of images in float64, by loops over the members."""
    W, b = (v.detach().double() for v in (d.nets_[net].weight, d.nets_[net].bias))
    rows = ((torch.as_tensor(x).flatten(1) - d.mean_) / d.scale_).double()
    z = torch.stack([rows @ w.T + c for w, c in zip(W, b)])
    return torch.where(z > 0, z, d.slope * z).numpy()


def check_loss(cls):
    """Both terms by loops, with their weights; partners are neighbors in the batch."""
    d = cls(**SMALL | dict(pair_weight=.5, residual_weight=3.)).fit(X)
    terms = {k: v.detach().numpy() for k, v in d.loss(torch.tensor(X[:7])).items()}
    assert terms.keys() == {'pair', 'residual'}, 'names'
    phi, eta = (codes_of(d, net, X[:7]) for net in ('learner', 'target'))
    pair = [np.mean([(phi[m, i] @ phi[m, i - 1] / 4 - eta[m, i] @ eta[m, i - 1] / 4)**2
                     for m in range(3)]) for i in range(7)]
    assert np.allclose(terms['pair'], .5 * np.array(pair), rtol=1e-3), 'the pairs'
    assert np.allclose(terms['residual'], 3 * ((phi - eta)**2).mean((0, 2)), rtol=1e-3), \
        'the residual'


def check_target(cls):
    """Learner and target are strangers at first; the target stays, the learner comes."""
    raw, d = (cls(**SMALL | dict(epochs=n, lr=1e-2)).fit(X) for n in (0, 40))
    a, b = (raw.nets_[net].weight.detach().flatten() for net in ('learner', 'target'))
    assert abs(np.corrcoef(a, b)[0, 1]) < .3, 'strangers'
    assert np.allclose(raw.mean_.cpu(), X.reshape(len(X), -1).mean(0), atol=1e-6), 'the middle'
    members = raw.nets_.target.weight.detach().flatten(1)
    assert np.corrcoef(members)[~np.eye(3, dtype=bool)].max() < .5, 'members'
    same = torch.equal(d.nets_.target.weight, raw.nets_.target.weight)
    assert same and not d.nets_.target.bias.any(), 'a target that moves'
    assert d.decision_function(X).mean() < .5 * raw.decision_function(X).mean(), 'it learns'


def check_scores(cls):
    """Either score by loops; no company, no call changes it."""
    for scoring in ('residual', 'pair'):
        d = cls(**SMALL, scoring=scoring).fit(X)
        new = 1 - X[:9] / 2
        scores = d.decision_function(new)
        assert np.array_equal(scores, d.decision_function(new)), 'twice'
        alone = np.concatenate([d.decision_function(x[None]) for x in new])
        assert np.allclose(alone, scores, rtol=1e-4), 'company'
        phi, eta = (codes_of(d, net, new) for net in ('learner', 'target'))
        if scoring == 'residual': wanted = ((phi - eta)**2).mean((0, 2))
        else:
            p, e = (codes_of(d, net, d.references_) for net in ('learner', 'target'))
            gap = phi @ p.swapaxes(1, 2) / 4 - eta @ e.swapaxes(1, 2) / 4
            wanted = (gap**2).mean((0, 2))
            known = X.reshape(40, -1)
            assert all((known == r).all(1).any() for r in d.references_.numpy()), 'references'
        assert np.allclose(scores, wanted, rtol=1e-3), scoring


class Copied(RDP):
    """As in a library: the target is a copy of the learner's first weights."""
    def networks(self, shape):
        nets = super().networks(shape)
        nets['target'].load_state_dict(nets['learner'].state_dict())
        return nets

class Trainable(RDP):
    """The target learns, too."""
    def networks(self, shape):
        return {k: net.requires_grad_() for k, net in super().networks(shape).items()}

class OneTarget(RDP):
    """All members have one target."""
    def networks(self, shape):
        nets = super().networks(shape)
        nets['target'].weight.data[:] = nets['target'].weight.data[:1].clone()
        return nets

class WithItself(RDP):
    """A row is its own partner."""
    def loss(self, xb):
        phi, eta = self.codes(xb)
        return super().loss(xb) | dict(
            pair=self.pair_weight * pair_loss(phi, phi, eta, eta).mean(0))

class NoPairs(RDP):
    """Only the residual."""
    def loss(self, xb):
        return {k: v * (k == 'residual') for k, v in super().loss(xb).items()}

class Swapped(RDP):
    """Each weight stands at the other term."""
    def loss(self, xb):
        t = super().loss(xb)
        return dict(pair=t['pair'] / self.pair_weight * self.residual_weight,
                    residual=t['residual'] / self.residual_weight * self.pair_weight)

class SumOfCodes(RDP):
    """The residual of the sum over the components."""
    def loss(self, xb):
        phi, eta = self.codes(xb)
        return super().loss(xb) | dict(
            residual=self.residual_weight * (phi.sum(2) - eta.sum(2)).square().mean(0))

class RandomPartners(RDP):
    """As in a library: partners at scoring are drawn from the batch, anew at each call."""
    def image_score(self, xb):
        phi, eta = self.codes(xb)
        i = torch.randint(len(xb), (len(xb),))
        return residual(phi, eta).mean(0) + pair_loss(phi, phi[:, i], eta, eta[:, i]).mean(0)

class Neighbors(RDP):
    """Partners at scoring are those of the batch."""
    def image_score(self, xb):
        phi, eta = self.codes(xb)
        return pair_loss(phi, phi.roll(1, 1), eta, eta.roll(1, 1)).mean(0)

class FirstMember(RDP):
    """No ensemble."""
    def image_score(self, xb): return residual(*(c[:1] for c in self.codes(xb))).mean(0)


@pytest.mark.parametrize('check', [check_loss, check_target, check_scores])
def test_the_chapter_keeps(check): check(RDP)


@each_mutant({'the pairs': (WithItself, NoPairs, Swapped), 'the residual': (SumOfCodes,)})
def test_wrong_losses_are_caught(why, broken): assert_caught(check_loss, broken, why)


@each_mutant({'strangers': (Copied,), 'a target that moves': (Trainable,),
              'members': (OneTarget,)})
def test_wrong_targets_are_caught(why, broken): assert_caught(check_target, broken, why)


@each_mutant({'twice': (RandomPartners,), 'company': (Neighbors,), 'residual': (FirstMember,)})
def test_wrong_scores_are_caught(why, broken): assert_caught(check_scores, broken, why)


def test_layers_are_members_and_a_slope_of_one_is_linear():
    torch.manual_seed(0)
    net = Layers(5, 2, 3, 1.)
    x = torch.randn(4, 5)
    assert net(x).shape == (3, 4, 2)
    assert torch.allclose(net(2 * x), 2 * net(x)) and torch.allclose(net(-x), -net(x))
    assert not Layers(5, 2, 3, .25, learns=False).weight.requires_grad


def test_without_pairs_it_is_distillation_and_one_that_is_copied_has_nothing_to_say():
    d = RDP(**SMALL, pair_weight=0.).fit(X)
    assert not any(d.history_['pair']) and all(d.history_['residual'])
    copied = Copied(**SMALL).fit(X)
    assert not any(copied.history_['residual']) and not copied.decision_function(X).any()


def test_the_closed_form_ranks_as_linear_members_do():
    t = digits(normal=3)
    d = RDP(epochs=0, slope=1., members=40, device='cpu', verbose=False).fit(t.x_train)
    rows = lambda x: torch.tensor(x).flatten(1).double() - d.mean_.double()
    wanted = expected_residual(rows(t.x_test), rows(t.x_train), 0, 1e-3, 1)
    assert spearmanr(wanted, d.decision_function(t.x_test))[0] > .98


def test_better_than_untrained_on_digits():
    t = digits(normal=8)
    a, b = (auroc(t.y_test, RDP(epochs=n, device='cpu', verbose=False).fit(t.x_train)
                  .decision_function(t.x_test)) for n in (30, 0))
    assert a > max(.97, b)


@pytest.mark.parametrize('params, message', [
    (dict(pair_weight=0., residual_weight=0.), 'pair_weight must be above 0 where'),
    (dict(scoring='both'), "scoring must be one of 'residual', 'pair'"),
    (dict(members=0), 'members'), (dict(code_dim=0), 'code_dim'), (dict(slope=-1.), 'slope'),
    (dict(n_references=0), 'n_references')])
def test_wrong_settings_are_named(params, message):
    check_refused(RDP, message, **SMALL | params)


def test_copies_of_one_image_are_refused():
    with pytest.raises(ValueError, match='training images must differ'):
        RDP(**SMALL).fit(np.full((20, 1, 2, 2), .5))


def test_a_saved_detector_scores_the_same(tmp_path):
    d = RDP(**SMALL, scoring='pair').fit(X)
    d.save(tmp_path/'d')
    assert np.array_equal(load(tmp_path/'d').decision_function(X), d.decision_function(X))
