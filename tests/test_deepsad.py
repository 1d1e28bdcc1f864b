"""Deep SAD and the hypersphere classifier: the loss against closed forms, what labels reach,
what the center is made of; and mutants that each check must catch."""
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ad_course.batches import warn_of_overlap
from ad_course.data import balanced, digits, label_anomalies
from ad_course.deepsad import HSC, DeepSAD, pseudo_huber
from ad_course.deepsvdd import DeepSVDD, guarded_mean, quantile_radius
from ad_course.check import loss_values
from ad_course.detector import total_loss
from ad_course.metrics import auroc
from ad_course.networks import squared_weights
from tests.mutants import assert_caught, changed, each_mutant

TASK = digits(normal=3)
X = np.concatenate([TASK.x_train[:60], TASK.x_reserve[:12]])
Y = np.repeat([0, 1], [60, 12])
SMALL = dict(code_dim=4, width=2, batch_size=24, verbose=False)


def probe(cls, **params):
    """An untrained detector in float64 whose codes are its inputs."""
    d = cls(**{**SMALL, 'epochs': 0, 'code_dim': 3, **params}).fit(X, Y)
    d.center_, d.code = torch.tensor([.1, -.2, .3], dtype=torch.float64), lambda xb: xb
    return d


Z, LABELS = np.random.default_rng(0).normal(size=(6, 3)), torch.tensor([0, 1, 0, 0, 1, 0])


def codes(): return torch.tensor(Z, requires_grad=True)


# ---------------------------------------------------------------- checks
def check_terms(cls):
    """One number an image, zero where the label says so, over n + m and not over each set."""
    d = probe(cls, eta=.7, weight_decay=.3)
    terms = d.loss(codes(), LABELS)
    assert sorted(terms) == ['anomalies', 'decay', 'normal'], f'names {sorted(terms)}'
    distance, y = ((Z - d.center_.numpy())**2).sum(1), LABELS.numpy()
    h = np.sqrt(distance + 1) - 1
    pull, push = (h, -np.log(1 - np.exp(-h))) if issubclass(cls, HSC) else (distance, 1 / distance)
    want = dict(normal=np.where(y == 0, pull, 0), anomalies=np.where(y == 1, .7 * push, 0))
    for name, values in want.items():
        assert terms[name].shape == (6,), f'shape of {name}'
        assert np.allclose(terms[name].detach(), values, rtol=1e-4), name
    decay = .15 * float(squared_weights(d.nets_.encoder).detach())
    assert np.isclose(float(terms['decay'].detach()), decay), 'decay'
    assert 'decay' not in probe(cls, weight_decay=0).loss(codes(), LABELS), 'decay of weight 0'


def check_gradients(cls):
    """What pulls a code and what pushes it, in closed form."""
    d, z = probe(cls, eta=.7, weight_decay=0), codes()
    g, = torch.autograd.grad(total_loss(d.loss(z, LABELS), 6), z)
    away = (z - d.center_).detach()
    dd = away.square().sum(1, keepdim=True)
    root = (dd + 1).sqrt()
    if issubclass(cls, HSC): pull, push = .5 / root, -.5 / root / torch.expm1(root - 1)
    else: pull, push = torch.ones_like(dd), -1 / dd**2
    want = torch.where(LABELS[:, None] == 0, pull, .7 * push) * 2 * away / 6
    assert torch.allclose(g, want, rtol=1e-4), 'gradient'


def check_empty_sets(cls):
    """Batches without one of the two sets give numbers; their mean is the loss of all."""
    d, z = probe(cls, weight_decay=0), codes()
    for label in (0, 1):
        assert total_loss(d.loss(z, LABELS * 0 + label), 6).isfinite(), f'only label {label}'
    value = lambda i: float(total_loss(d.loss(z[i], LABELS[i]), len(i)).detach())
    whole, parts = value([0, 1, 2, 3, 4, 5]), [value([0, 2]), value([1, 4]), value([3, 5])]
    assert np.isclose(np.mean(parts), whole), f'{np.mean(parts)} over batches, {whole} over all'


def check_at_center(cls):
    """An anomaly at the center, or far away: numbers, and a push that falls with the distance."""
    d = probe(cls, weight_decay=0)
    c = d.center_
    z = torch.stack([c, c + 1e-3, c + .5, c + 1e3]).requires_grad_()
    terms = d.loss(z, torch.ones(4, dtype=torch.long))
    g, = torch.autograd.grad(terms['anomalies'].sum(), z)
    assert g.isfinite().all() and terms['anomalies'].isfinite().all(), 'not finite'
    cost, push = terms['anomalies'].detach(), g.norm(dim=1)
    falls = (cost.diff() < 0).all() and (push[1:].diff() < 0).all()
    assert falls, 'the push must fall with the distance'


def check_labels_belong(cls):
    """Exchanging two labels changes the loss, and flipping all labels turns the ranking over."""
    d = cls(epochs=0, **SMALL).fit(X, Y)
    one, other = (loss_values(d, X[[0, 60]], np.array(labels)) for labels in ([0, 1], [1, 0]))
    assert abs(one - other) > 1e-3, 'labels do not belong to images'
    x = np.concatenate([TASK.x_train, TASK.x_reserve[:128]])
    fit = lambda labels: cls(**{**SMALL, 'epochs': 40, 'width': 8}).fit(x, np.repeat(labels, 128))
    right, flipped = (auroc(TASK.y_test, fit(labels).decision_function(TASK.x_test))
                      for labels in ([0, 1], [1, 0]))
    assert right > .85 and flipped < .25, f'AUROC {right:.3f}, flipped {flipped:.3f}'


def check_center(cls):
    """Center, radius, threshold come from what is not labelled, wherever the others stand."""
    x, y = np.concatenate([X[60:], X[:60]]), np.repeat([1, 0], [12, 60])
    d = cls(epochs=0, nu=.2, **SMALL).fit(x, y)
    with torch.no_grad(): z = d.nets_.encoder(torch.tensor(X[:60]))
    center = guarded_mean(z.numpy(), d.center_guard)
    s = (z - center).square().sum(1).numpy()
    assert torch.allclose(d.center_, center, atol=1e-5), 'center'
    assert np.isclose(d.radius_, quantile_radius(s, .2), rtol=1e-3), 'radius'
    assert np.isclose(d.threshold_, np.quantile(s, .95), rtol=1e-3), 'threshold'


def check_labels_help(cls):
    """Labelled kinds rank higher with labels than without, with the same settings."""
    task = label_anomalies(digits(normal=(0, 1, 2, 3, 4)), 20, kinds=(5, 6))
    among = (task.y_test == 0) | np.isin(task.kinds_test, ['5', '6'])
    def area(keep):
        d = cls(**{**SMALL, 'epochs': 20, 'width': 8, 'batch_size': 64})
        d.fit(task.x_train[keep], task.y_train[keep])
        return auroc(task.y_test[among], d.decision_function(task.x_test[among]))
    a, b = area(task.y_train >= 0), area(task.y_train == 0)
    assert a > b + .04 and a > .95, f'AUROC {a:.3f} with labels, {b:.3f} without'


def check_overlap(cls):
    """fit warns where one image is labelled 0 and 1, and only then."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        cls(epochs=0, **SMALL).fit(np.concatenate([X, X[:2]]), np.append(Y, [1, 1]))
        said = [str(w.message) for w in caught]
        cls(epochs=0, **SMALL).fit(np.concatenate([X, X[60:]]), np.append(Y, Y[60:]))
    assert len(said) == 1 and '2 of 14 ' in said[0], f'overlap: {said}'
    assert len(caught) == 1, 'a warning without an overlap'


CHECKS = dict(terms=check_terms, gradients=check_gradients, empty_sets=check_empty_sets,
              at_center=check_at_center, labels_belong=check_labels_belong, center=check_center,
              labels_help=check_labels_help, overlap=check_overlap)


@pytest.mark.parametrize('cls', [DeepSAD, HSC])
@pytest.mark.parametrize('name', CHECKS)
def test_the_chapter_keeps(name, cls): CHECKS[name](cls)


# ---------------------------------------------------------------- mutants
def term(base, term, f, name):
    """A mutant whose named term of the loss is f(term)."""
    def loss(self, xb, yb):
        return {k: f(v) if k == term else v for k, v in base.loss(self, xb, yb).items()}
    return changed(base, f'{base.__name__}{term.title()}{name}', loss=loss)

class MeanOfEachSet(DeepSAD):
    def loss(self, xb, yb):
        d = self.squared_distances(xb)
        anomalies = self.eta * (1 / (d[yb == 1] + self.eps)).mean()
        return dict(normal=d[yb == 0].mean(), anomalies=anomalies)

class SkipsEmptySets(DeepSAD):
    def loss(self, xb, yb):
        d = self.squared_distances(xb)
        mean = lambda costs: costs.sum() / max(len(costs), 1)
        anomalies = self.eta * mean(1 / (d[yb == 1] + self.eps))
        return dict(normal=mean(d[yb == 0]), anomalies=anomalies)

class IgnoresLabels(DeepSAD):
    def loss(self, xb, yb): return super().loss(xb, yb * 0)

class WrongWayRound(DeepSAD):
    def loss(self, xb, yb): return super().loss(xb, 1 - yb)

class Broadcast(DeepSAD):  # (b, 1) against (b,), averaged
    def loss(self, xb, yb):
        d, y = self.squared_distances(xb)[:, None], yb.to(torch.float32)
        anomalies = self.eta * (y / (d + self.eps)).mean()
        return dict(normal=((1 - y) * d).mean(), anomalies=anomalies)

class ExchangedArguments(DeepSAD):  # each distance meets nothing but a constant of the batch
    def loss(self, xb, yb):
        d, y = self.squared_distances(xb)[:, None], yb.to(torch.float32)
        return dict(normal=((1 - d) * y).mean(), anomalies=(d * (1 - y)).mean())

class NoEps(DeepSAD):
    def repulsion(self, d): return 1 / d

class Linear(DeepSAD):  # unbounded below
    def repulsion(self, d): return -d

class Root(DeepSAD):
    def repulsion(self, d): return 1 / (d + self.eps).sqrt()

class SquaredPull(DeepSAD):
    def attraction(self, d): return d**2

class CenterOfAll(DeepSAD):  # the official code's
    def map_normal(self, f, data, most=None):
        return np.concatenate([out for out, _ in self.each_batch(f, data)])

class ThresholdOfAll(DeepSAD):
    def training_scores(self, data):
        scores, labels = super().training_scores(data)
        return scores, labels * 0

class Silent(DeepSAD):
    def _fit(self, *args):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            super()._fit(*args)

class SquaredHuber(HSC):
    def attraction(self, d): return d

class NoHuber(HSC):
    def repulsion(self, d): return -torch.log(-torch.expm1(-d) + self.eps)

class NoEpsHSC(HSC):
    def repulsion(self, d): return -torch.log(-torch.expm1(-pseudo_huber(d)))

class WrongProbability(HSC):
    def repulsion(self, d): return pseudo_huber(d)

class InverseRepulsion(HSC):
    def repulsion(self, d): return 1 / (pseudo_huber(d) + self.eps)


FORGOTTEN, NEGATIVE = (lambda v: 0 * v, 'Forgotten'), (lambda v: -v, 'Negative')
SILENT_PUSH = term(DeepSAD, 'anomalies', *FORGOTTEN)
MUTANTS = dict(
    terms=(
        *(term(base, name, *how) for base in (DeepSAD, HSC)
          for name in ('normal', 'anomalies', 'decay') for how in (FORGOTTEN, NEGATIVE)),
        term(DeepSAD, 'normal', lambda v: v.mean(), 'Averaged'),
        term(DeepSAD, 'anomalies', lambda v: v.sum(), 'Summed'), MeanOfEachSet, IgnoresLabels,
        WrongWayRound, Root, SquaredPull, SquaredHuber, NoHuber, InverseRepulsion),
    gradients=(
        SILENT_PUSH, term(HSC, 'normal', lambda v: v.detach(), 'Detached'), Linear, Root,
        SquaredHuber, WrongProbability),
    empty_sets=(MeanOfEachSet, SkipsEmptySets, Broadcast),
    at_center=(NoEps, Linear, NoEpsHSC, WrongProbability),
    labels_belong=(IgnoresLabels, WrongWayRound, Broadcast, ExchangedArguments),
    labels_help=(SILENT_PUSH, term(HSC, 'anomalies', *NEGATIVE), IgnoresLabels),
    center=(CenterOfAll, ThresholdOfAll), overlap=(Silent,))


@pytest.mark.filterwarnings('ignore')
@each_mutant(MUTANTS)
def test_mutants_are_caught(why, broken):
    assert_caught(CHECKS[why], broken, kinds=(AssertionError, FloatingPointError))


# ---------------------------------------------------------------- the rest
def scores(d, *xy): return d.fit(*xy).decision_function(X)


def test_without_labels_it_is_deep_svdd():
    same = dict(epochs=3, lr=1e-3, pretrain_epochs=1, arch='auto', gcn=False, **SMALL)
    plain = scores(DeepSAD(**same), X)
    assert np.array_equal(plain, scores(DeepSVDD(**same), X))
    assert np.array_equal(plain, scores(DeepSAD(eta=5, **same), X, Y * 0))


def test_the_warm_start_learns_from_all_images_whatever_their_labels():
    class Watched(DeepSAD):
        def place_sphere(self, data):
            self.first_ = [p.detach().clone() for p in self.nets_.encoder.parameters()]
            super().place_sphere(data)
    warm = dict(epochs=1, pretrain_epochs=2, **SMALL)
    with_labels, without, fewer = (Watched(**warm).fit(*xy).first_
                                   for xy in ((X, Y), (X,), (X[:60],)))
    assert all(torch.equal(a, b) for a, b in zip(with_labels, without))
    assert not all(torch.equal(a, b) for a, b in zip(with_labels, fewer))


def test_balance_is_a_factor_on_eta():
    x, y = balanced(X, Y)
    r = y.sum() // 12
    assert len(x) == len(y) and r == 5 and y.mean() == .5
    one, other = (DeepSAD(epochs=0, weight_decay=0, eta=eta, **SMALL).fit(X, Y) for eta in (1, r))
    repeated, weighted = loss_values(one, x, y), loss_values(other, X, Y)
    assert np.isclose(repeated * len(y), weighted * len(Y), rtol=1e-4)


def test_pseudo_huber_near_and_far():
    d = torch.tensor([0., 1e-12, 1e-8, .5, 3., 1e12])
    want = torch.tensor([0., 5e-13, 5e-9, 1.5**.5 - 1, 1., 1e6 - 1], dtype=torch.float64)
    assert torch.allclose(pseudo_huber(d).double(), want, rtol=1e-6, atol=0)
    some = torch.tensor([1e-3, .7, 5.], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pseudo_huber, some)


def test_hsc_is_a_cross_entropy():
    d = torch.tensor([.3, 2., 9.], dtype=torch.float64)
    p = torch.exp(1 - (d + 1).sqrt())
    h = HSC(eps=1e-12)
    for f, target in ((h.attraction, torch.ones(3)), (h.repulsion, torch.zeros(3))):
        entropy = F.binary_cross_entropy(p, target.double(), reduction='none')
        assert torch.allclose(f(d), entropy)


def test_overlap_counts_images_once():
    xb = torch.tensor(X)
    batches = [(xb[:4], torch.tensor([0, 0, 0, 1])), (xb[[0, 0, 5]], torch.tensor([1, 1, 1]))]
    with pytest.warns(UserWarning, match='1 of 3 different'): assert warn_of_overlap(batches) == 1


@pytest.mark.parametrize('wrong', [
    dict(eta=-1), dict(eta=float('inf')), dict(eta=True), dict(eps=0), dict(eps=-1e-6),
    dict(eps=float('nan')), dict(objective='soft-boundary')], ids=str)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): DeepSAD(**wrong).fit(X, Y)


def test_saved_and_loaded(tmp_path):
    d = HSC(epochs=1, **SMALL).fit(X, Y)
    d.save(tmp_path/'d.safetensors')
    again = HSC.load(tmp_path/'d.safetensors')
    assert np.array_equal(again.decision_function(X), d.decision_function(X))


def test_a_large_outside_set_may_stand_first():
    noise = np.random.default_rng(0).random((1100, 1, 8, 8), dtype='float32')
    x, y = np.concatenate([noise, X[:60]]), np.repeat([1, 0], [1100, 60])
    assert np.isfinite(DeepSAD(epochs=1, **SMALL).fit(x, y).spread_ratio_)
