"""The robust subspace recovery autoencoder: its terms against closed forms, what each optimizer moves, the sign of its score; and mutants that each check must catch."""
import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from torch import nn
from torch.nn import functional as F

from ad_course.ae import AE
from ad_course.detector import isolated, total_loss
from ad_course.rsrae import RSRAE, Subspace, norms, not_orthonormal, off_subspace

X = np.random.default_rng(0).random((24, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=2, wide_dim=5, width=2, verbose=False)


class Table(nn.Module):
    """A linear decoder."""
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.linspace(-1, 1, 32).view(2, 16).flip(0))
    def forward(self, code): return (code @ self.w).view(-1, 1, 4, 4)


def linear(cls, **params):
    """An untrained detector of this class with linear networks, in float64."""
    kind = type('Linear', (cls,), dict(networks=lambda self, shape: dict(encoder=nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False)), subspace=Subspace(5, 2), decoder=Table())))
    d = kind(epochs=0, **{**SMALL, **params}).fit(X)
    d.nets_.double()
    d.optimizers_ = d.optimizers()
    return d


def parameters(d): return d.nets_.encoder[1].weight, d.nets_.subspace.A, d.nets_.decoder.w


def expected_terms(d, x):
    """Equation (3) by numpy alone, term by term, without weights."""
    W, A, V = (p.detach().numpy() for p in parameters(d))
    rows = x.numpy().reshape(len(x), -1)
    z = rows @ W.T
    return dict(reconstruction=np.linalg.norm(rows - z @ A.T @ V, axis=1), subspace=np.linalg.norm(z - z @ A.T @ A, axis=1),
                orthogonality=np.linalg.norm(A @ A.T - np.eye(2), 'fro')**2)


# ---------------------------------------------------------------- checks
def check_terms(cls):
    """Values of equation (3): each named term with its weight, distances not squared, one number an image."""
    d, x = linear(cls, lambda1=.3, lambda2=.7), XB.double()
    ours, theirs = d.loss(x), expected_terms(d, x)
    assert sorted(ours) == sorted(theirs), 'names of the terms'
    for name, weight in dict(reconstruction=1, subspace=.3, orthogonality=.7).items():
        assert ours[name].shape == np.shape(theirs[name]) and np.allclose(ours[name].detach(), weight * theirs[name]), name


def check_gradients(cls):
    """Gradients of the sum against closed forms: one vote an image, through encoder, layer and decoder."""
    d, x = linear(cls, lambda1=.3, lambda2=.7), XB.double()
    W, A, V = parameters(d)
    gW, gA, gV = torch.autograd.grad(total_loss(d.loss(x), len(x)), [W, A, V])
    with torch.no_grad():
        rows, n = x.flatten(1), len(x)
        z = rows @ W.T
        y = z @ A.T
        u, v = -F.normalize(rows - y @ V), F.normalize(z - y @ A)          # (n, 16), (n, 5)
        eye = torch.eye(2, dtype=A.dtype)
        assert torch.allclose(gV, y.T @ u / n), 'decoder'
        to_y, to_z = u @ V.T / n, .3 / n * (v - v @ A.T @ A)
        assert torch.allclose(gA, to_y.T @ z - .3 / n * ((v @ A.T).T @ z + y.T @ v) + .7 * 4 * (A @ A.T - eye) @ A), 'layer'
        assert torch.allclose(gW, (to_y @ A + to_z).T @ rows), 'encoder'


def check_votes(cls):
    """The pull of an image on its reconstruction does not grow with its residual, and a perfect one does not pull at all."""
    d = linear(cls)
    xhat = torch.cat([XB[:3], XB[:3] + .01, XB[:3] + 50]).double().requires_grad_()
    d.reconstruction = lambda xb: xhat
    terms = d.loss(torch.cat([XB[:3]] * 3).double())
    pulls = torch.autograd.grad(terms['reconstruction'].sum(), xhat)[0].flatten(1).norm(dim=1)
    assert torch.allclose(pulls, torch.tensor([0.] * 3 + [1.] * 6).double()), f'votes {pulls.tolist()}'


def check_zero(cls):
    """Codes in the subspace and perfect images: the loss is zero and its gradient a number."""
    d = linear(cls)
    W, A, V = parameters(d)
    with torch.no_grad(): W.zero_(); A.copy_(torch.eye(2, 5)); W[:2, :2] = torch.eye(2); V.zero_(); V[:2, :2] = torch.eye(2)
    x = torch.zeros(4, 1, 4, 4).double()
    x[:, 0, 0, :2] = torch.rand(4, 2, generator=torch.Generator().manual_seed(0)).double()
    loss = total_loss(d.loss(x), 4)
    assert loss == 0, 'a perfect network has a loss'
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [W, A, V])), 'NaN at zero'


def check_score(cls):
    """1 - cosine: 0 for a perfect image of any brightness, 1 for an orthogonal one, higher for worse; 'error' is the mean square."""
    d = cls(epochs=1, **SMALL).fit(X)
    x, xhat = X.reshape(24, -1).astype(float), d.reconstruct(X).reshape(24, -1).astype(float)
    assert np.allclose(d.decision_function(X), 1 - (x * xhat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(xhat, axis=1), atol=1e-5), 'cosine'
    assert np.allclose(d.set_params(score_by='error').decision_function(X), ((x - xhat)**2).mean(1), rtol=1e-4), 'error'
    d.set_params(score_by='cosine')
    up, side = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    up[..., 0, 0], side[..., 0, 1] = 1., 1.
    for rebuilt, want in ((.3 * up, 0), (side, 1), (up + side, 1 - .5**.5)):
        d.reconstruction = lambda xb: rebuilt
        assert np.isclose(float(d.image_score(up)), want, atol=1e-6), 'score of known pairs'


def moved(d, name):
    """The networks that one step of the named optimizer moves, for one alternating step with the others held still."""
    before = {k: [p.detach().clone() for p in net.parameters()] for k, net in d.nets_.items()}
    d.optimizers_ = {name: d.optimizers_[name]}
    with isolated(0): terms = d.step(XB)
    return {k for k, net in d.nets_.items() if any(not torch.equal(p, q) for p, q in zip(net.parameters(), before[k]))}, terms


def fresh(cls, **params):
    d = cls(epochs=0, alternate=True, **{**SMALL, **params}).fit(X)
    d.optimizers_ = d.optimizers()
    return d


def check_alternating(cls):
    """One optimizer for each term: what it moves, its rate, and that it lowers its own term; the weights play no part."""
    for name, term, nets, rate in (('rebuilt', 'reconstruction', {'encoder', 'subspace', 'decoder'}, 1e-3), ('orthonormal', 'orthogonality', {'subspace'}, 1e-2),
                                   ('recovered', 'subspace', {'encoder', 'subspace'}, 1e-2)):
        d = fresh(cls)
        assert np.isclose(d.optimizers_[name].param_groups[0]['lr'], rate), f'rate of {name}'
        got, terms = moved(d, name)
        assert got == nets and list(terms) == [term], f'{name} moves {sorted(got)}'
        def value():
            with torch.no_grad(): return float({'rebuilt': norms(XB - d.reconstruction(XB)), 'orthonormal': not_orthonormal(d.nets_.subspace.A), 'recovered': off_subspace(d.nets_.encoder(XB), d.nets_.subspace.A)}[name].mean())
        first = value()
        for _ in range(20): d.step(XB)
        assert value() < first, f'{name} does not fall'
    a, b = (cls(epochs=2, alternate=True, lambda1=w, lambda2=w, **SMALL).fit(X) for w in (0., 5.))
    assert np.array_equal(a.decision_function(X), b.decision_function(X)), 'weights must not matter'
    assert sorted(k for k in a.history_ if k != 'seconds') == ['orthogonality', 'reconstruction', 'subspace'], 'history'


def check_training(cls):
    """Each weight does its work: A becomes orthonormal by lambda2, codes come closer to the subspace by lambda1, images are drawn better."""
    def after(**weights):
        d = cls(**{**SMALL, 'epochs': 60, 'batch_size': 12, 'lr': 3e-3, **weights}).fit(X)
        with torch.no_grad(): return [float(v) for v in (not_orthonormal(d.nets_.subspace.A), off_subspace(d.nets_.encoder(XB), d.nets_.subspace.A).mean(), norms(XB - d.reconstruction(XB)).mean())]
    free, orthonormal, near = after(lambda1=0, lambda2=0), after(lambda1=0, lambda2=1), after(lambda1=1, lambda2=1)
    start = after(epochs=0)
    assert orthonormal[0] < .01 and orthonormal[0] < .1 * free[0], f'orthogonality {orthonormal[0]} against {free[0]}'
    assert near[1] < .5 * orthonormal[1], f'distance to the subspace {near[1]} against {orthonormal[1]}'
    assert free[2] < start[2] - .1, 'the network does not learn to draw'


CHECKS = dict(terms=check_terms, gradients=check_gradients, votes=check_votes, zero=check_zero, score=check_score, alternating=check_alternating, training=check_training)


@pytest.mark.parametrize('name', CHECKS)
def test_the_chapter_keeps(name): CHECKS[name](RSRAE)


# ---------------------------------------------------------------- mutants
def changed(term, f):
    """A mutant whose named term of the loss is f(term)."""
    return type(f'{term}Changed', (RSRAE,), dict(loss=lambda self, xb: {k: f(v) if k == term else v for k, v in RSRAE.loss(self, xb).items()}))

class SquaredReconstruction(RSRAE):
    def rebuilt(self, xb): return dict(reconstruction=norms(xb - self.reconstruction(xb))**2)

class MeanSquare(RSRAE):
    def rebuilt(self, xb): return dict(reconstruction=self.errors(xb).flatten(1).mean(1))

class AbsoluteDifferences(RSRAE):
    def rebuilt(self, xb): return dict(reconstruction=(xb - self.reconstruction(xb)).abs().flatten(1).sum(1))

class RootOfSquares(RSRAE):
    def rebuilt(self, xb): return dict(reconstruction=(xb - self.reconstruction(xb)).square().flatten(1).sum(1).sqrt())

class NormOfTheBatch(RSRAE):
    def rebuilt(self, xb): return dict(reconstruction=(xb - self.reconstruction(xb)).norm())

class SquaredDistance(RSRAE):
    def recovered(self, xb): return dict(subspace=off_subspace(self.nets_.encoder(xb), self.nets_.subspace.A)**2)

class DetachedCodes(RSRAE):
    def recovered(self, xb): return dict(subspace=off_subspace(self.nets_.encoder(xb).detach(), self.nets_.subspace.A))

class DetachedLayer(RSRAE):
    def recovered(self, xb): return dict(subspace=off_subspace(self.nets_.encoder(xb), self.nets_.subspace.A.detach()))

class NoSquare(RSRAE):  # the blog's formula
    def orthonormal(self, xb): return dict(orthogonality=not_orthonormal(self.nets_.subspace.A).sqrt())

class MeanOfSquares(RSRAE):  # the official code's
    def orthonormal(self, xb): return dict(orthogonality=not_orthonormal(self.nets_.subspace.A) / self.code_dim**2)

class WrongSide(RSRAE):  # A'A instead of AA'
    def orthonormal(self, xb): return dict(orthogonality=not_orthonormal(self.nets_.subspace.A.T))

class Similarity(RSRAE):
    def image_score(self, xb): return F.cosine_similarity(self.reconstruction(xb).flatten(1), xb.flatten(1))

class AlwaysError(RSRAE):
    def image_score(self, xb): return AE.image_score(self, xb)

class CosineOfRows(RSRAE):
    def image_score(self, xb): return 1 - F.cosine_similarity(self.reconstruction(xb), xb, dim=-1).flatten(1).mean(1)

class OneAdam(RSRAE):
    def optimizers(self): return {name: self.adam(*self.nets_) for name in ('rebuilt', 'orthonormal', 'recovered')}

class SameRate(RSRAE):
    def optimizers(self): return {k: torch.optim.Adam(v.param_groups[0]['params'], lr=self.lr) for k, v in super().optimizers().items()}

class OnlyTheLayer(RSRAE):
    def optimizers(self): return dict(super().optimizers(), recovered=torch.optim.Adam(self.nets_.subspace.parameters(), lr=self.pace * self.lr))

class Ascends(RSRAE):
    def recovered(self, xb): return {k: -v for k, v in super().recovered(xb).items()}

class WeightsInTheSteps(RSRAE):
    def rebuilt(self, xb): return {k: v + self.lambda1 * off_subspace(self.nets_.encoder(xb), self.nets_.subspace.A) for k, v in super().rebuilt(xb).items()}

class ForgetsATerm(RSRAE):
    def optimizers(self): return {k: v for k, v in super().optimizers().items() if k != 'orthonormal' or len(self.history_) > 0}


ZERO, FLIP, TWICE = (lambda v: v * 0), (lambda v: -v), (lambda v: v * 2)
TERMS = ('reconstruction', 'subspace', 'orthogonality')
MUTANTS = {'terms': [*(changed(t, f) for t in TERMS for f in (ZERO, FLIP, TWICE)), SquaredReconstruction, MeanSquare, AbsoluteDifferences, NormOfTheBatch, SquaredDistance, NoSquare, MeanOfSquares, WrongSide],
           'gradients': [*(changed(t, f) for t in TERMS for f in (ZERO, FLIP)), SquaredReconstruction, SquaredDistance, DetachedCodes, DetachedLayer, NoSquare, MeanOfSquares],
           'votes': [SquaredReconstruction, MeanSquare, AbsoluteDifferences, RootOfSquares, NormOfTheBatch],
           'zero': [RootOfSquares, NoSquare], 'score': [Similarity, AlwaysError, CosineOfRows],
           'alternating': [OneAdam, SameRate, OnlyTheLayer, Ascends, WeightsInTheSteps, ForgetsATerm],
           'training': [changed('subspace', ZERO), changed('orthogonality', ZERO), changed('reconstruction', FLIP)]}


@pytest.mark.parametrize('name, mutant', [(n, m) for n, ms in MUTANTS.items() for m in ms], ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_mutants_fail(name, mutant):
    with pytest.raises((AssertionError, KeyError, FloatingPointError)): CHECKS[name](mutant)


# ---------------------------------------------------------------- pieces
def recover(z, d, q, steps=600):
    with isolated(0):
        A = nn.Parameter(torch.randn(d, z.shape[1], dtype=z.dtype) / z.shape[1]**.5)
        optimizer = torch.optim.Adam([A], lr=.02)
        for _ in range(steps):
            loss = (off_subspace(z, A)**q).mean() + not_orthonormal(A)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    return A.detach()


def projection(A): return (A.T @ A).numpy()


def test_squares_give_the_subspace_of_a_truncated_svd():
    z = torch.tensor(np.random.default_rng(0).normal(size=(200, 5)) * [3, 2, .4, .3, .2] + .3)
    basis = TruncatedSVD(2, algorithm='arpack').fit(z.numpy()).components_
    assert np.abs(projection(recover(z, 2, 2, 1500)) - basis.T @ basis).max() < 1e-3


def test_distances_find_the_majority_and_squares_do_not():
    g = np.random.default_rng(0)
    inliers = np.concatenate([g.normal(size=(200, 2)), .02 * g.normal(size=(200, 3))], 1)
    z = torch.tensor(np.concatenate([inliers, [0, 0, 4, 0, 0] + .2 * g.normal(size=(20, 5))]))
    truth = np.diag([1., 1, 0, 0, 0])
    one, two = (np.abs(projection(recover(z, 2, q)) - truth).max() for q in (1, 2))
    assert one < .05 and two > .4


@pytest.mark.parametrize('seed', range(3))
def test_distance_is_that_of_least_squares(seed):
    """For orthonormal rows, the distance to A'Az is the distance to the nearest point of the row space, whatever its basis."""
    g = np.random.default_rng(seed)
    A = np.linalg.qr(g.normal(size=(6, 3)))[0].T
    z = g.normal(size=(4, 6))
    nearest = (A.T @ np.linalg.lstsq(A.T, z.T, rcond=None)[0]).T
    turn = np.linalg.qr(g.normal(size=(3, 3)))[0]
    for basis in (A, turn @ A): assert np.allclose(off_subspace(torch.tensor(z), torch.tensor(basis)), np.linalg.norm(z - nearest, axis=1))


def test_norms_of_nothing_do_not_pull():
    r = torch.zeros(3, 1, 2, 2, requires_grad=True)
    g, = torch.autograd.grad(norms(r).sum(), r)
    assert torch.equal(g, torch.zeros_like(r))


def test_subspace_starts_about_orthonormal_in_any_width():
    for D in (32, 512):
        with isolated(0): A = Subspace(D, 8).A
        assert not_orthonormal(A) < 8 * 9 / D * 2.5  # its expectation is d (d + 1) / D


def test_without_weights_only_the_loss_differs_from_a_plain_network():
    d = linear(RSRAE, lambda1=0, lambda2=0)
    terms = d.loss(XB.double())
    assert terms['subspace'].abs().max() == 0 and terms['orthogonality'] == 0
    assert torch.allclose(terms['reconstruction'].square() / 16, AE.image_score(d, XB.double()))


def test_weight_decay_is_a_term_of_its_own():
    assert 'decay' in linear(RSRAE, weight_decay=.1).loss(XB.double()) and 'decay' not in linear(RSRAE).loss(XB.double())


def test_black_images_have_a_score():
    d = RSRAE(epochs=1, **SMALL).fit(X)
    assert np.allclose(d.decision_function(np.zeros((2, 1, 4, 4), 'float32')), 1)
