"""The robust subspace recovery autoencoder: its terms against closed forms, what each player moves,
the sign of its score; and mutants that each check must catch."""
import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from torch import nn
from torch.nn import functional as F

from ad_course.ae import AE
from ad_course.detector import _Progress, isolated, total_loss
from ad_course.networks import squared_weights
from ad_course.rsrae import RSRAE, Subspace, cosine_distance, norms, not_orthonormal, off_subspace
from tests.mutants import assert_caught, changed, each_mutant

X = np.random.default_rng(0).random((24, 1, 4, 4), dtype='float32')
XB = torch.tensor(X)
SMALL = dict(code_dim=2, wide_dim=5, width=2, verbose=False)
PLAYERS = ('reconstruction', 'orthogonality', 'subspace')


class Table(nn.Module):
    """A linear decoder."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 32).view(2, 16).flip(0))
    def forward(self, code): return (code @ self.w).view(-1, 1, 4, 4)


def linear_networks(self, shape):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False))
    return dict(encoder=wide, subspace=Subspace(5, 2), decoder=Table())


def ready(d):
    """The detector with optimizers and the memory of a fit, before its first step."""
    d.optimizers_ = d.optimizers()
    d._progress = _Progress(d)
    d._progress.turns = [(player, loss, 1) for player, loss in d.turns()]
    return d


def linear(cls, **params):
    """An untrained detector of this class with linear networks, in float64."""
    kind = changed(cls, networks=linear_networks)
    d = kind(epochs=0, **{**SMALL, **params}).fit(X)
    d.nets_.double()
    return ready(d)


def parameters(d): return d.nets_.encoder[1].weight, d.nets_.subspace.A, d.nets_.decoder.w


def both(weight): return dict(subspace_weight=weight, orthogonality_weight=weight)


def expected_terms(d, x):
    """Equation (3) by numpy alone, term by term, without weights."""
    W, A, V = (p.detach().numpy() for p in parameters(d))
    rows = x.numpy().reshape(len(x), -1)
    z = rows @ W.T
    return dict(reconstruction=np.linalg.norm(rows - z @ A.T @ V, axis=1),
                subspace=np.linalg.norm(z - z @ A.T @ A, axis=1),
                orthogonality=np.linalg.norm(A @ A.T - np.eye(2), 'fro')**2)


# ---------------------------------------------------------------- checks
def check_terms(cls):
    """Values of (3): each named term with its weight, distances not squared, one an image."""
    d, x = linear(cls, subspace_weight=.3, orthogonality_weight=.7), XB.double()
    ours, theirs = d.loss(x), expected_terms(d, x)
    assert sorted(ours) == sorted(theirs), 'names of the terms'
    for name, weight in dict(reconstruction=1, subspace=.3, orthogonality=.7).items():
        assert ours[name].shape == np.shape(theirs[name]), name
        assert np.allclose(ours[name].detach(), weight * theirs[name]), name


def check_gradients(cls):
    """Gradients of the sum against closed forms: one vote an image, through all three networks."""
    d, x = linear(cls, subspace_weight=.3, orthogonality_weight=.7), XB.double()
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
        by_penalty = .7 * 4 * (A @ A.T - eye) @ A
        by_distance = -.3 / n * ((v @ A.T).T @ z + y.T @ v)
        assert torch.allclose(gA, to_y.T @ z + by_distance + by_penalty), 'layer'
        assert torch.allclose(gW, (to_y @ A + to_z).T @ rows), 'encoder'


def check_votes(cls):
    """The pull of an image on its reconstruction does not grow with its residual; none at 0."""
    d = linear(cls)
    xhat = torch.cat([XB[:3], XB[:3] + .01, XB[:3] + 50]).double().requires_grad_()
    d.reconstruction = lambda xb: xhat
    terms = d.loss(torch.cat([XB[:3]] * 3).double())
    pulls = torch.autograd.grad(terms['reconstruction'].sum(), xhat)[0].flatten(1).norm(dim=1)
    assert torch.allclose(pulls, torch.tensor([0.] * 3 + [1.] * 6).double()), pulls.tolist()


def check_zero(cls):
    """Codes in the subspace and perfect images: the loss is zero and its gradient a number."""
    d = linear(cls)
    W, A, V = parameters(d)
    with torch.no_grad():
        W.zero_(); A.copy_(torch.eye(2, 5)); V.zero_()
        W[:2, :2] = V[:2, :2] = torch.eye(2)
    x, g = torch.zeros(4, 1, 4, 4).double(), torch.Generator().manual_seed(0)
    x[:, 0, 0, :2] = torch.rand(4, 2, generator=g).double()
    loss = total_loss(d.loss(x), 4)
    assert loss == 0, 'a perfect network has a loss'
    gradients = torch.autograd.grad(loss, [W, A, V])
    assert all(g.isfinite().all() for g in gradients), 'NaN at zero'


def check_score(cls):
    """1 - cosine: 0 for a perfect image, 1 for an orthogonal one; or on [-1, 1]; or the error."""
    d = cls(epochs=1, **SMALL).fit(X)
    x, xhat = (a.reshape(24, -1).astype(float) for a in (X, d.reconstruct(X)))
    def by(score): return d.set_params(score_by=score).decision_function(X)
    def cosine(a, b): return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.allclose(by('cosine'), 1 - cosine(x, xhat), atol=1e-5), 'cosine'
    signed = 1 - cosine(2 * x - 1, 2 * xhat - 1)
    assert np.allclose(by('signed cosine'), signed, atol=1e-5), 'signed cosine'
    assert np.allclose(by('error'), ((x - xhat)**2).mean(1), rtol=1e-4), 'error'
    up, side = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    up[..., 0, 0], side[..., 0, 1] = 1., 1.
    half = lambda a: (2 * a - 1).flatten().numpy()[None]
    seen = 1 - cosine(half(up), half(.3 * up))[0]
    for score, rebuilt, want in (
            ('cosine', .3 * up, 0), ('cosine', side, 1), ('cosine', up + side, 1 - .5**.5),
            ('signed cosine', up, 0), ('signed cosine', .3 * up, seen)):
        d.set_params(score_by=score)
        d.reconstruction = lambda xb: rebuilt
        assert np.isclose(float(d.image_score(up)), want, atol=1e-6), 'score of known pairs'
    assert seen > .01


def moved(d, name):
    """The networks that one turn of the named player moves, and the terms of that turn."""
    before = {k: [p.detach().clone() for p in net.parameters()] for k, net in d.nets_.items()}
    d._progress.turns = [turn for turn in d._progress.turns if turn[0] == name]
    with isolated(0): terms = d.step(XB)
    pairs = {k: zip(net.parameters(), before[k]) for k, net in d.nets_.items()}
    return {k for k, both in pairs.items() if any(not torch.equal(*two) for two in both)}, terms


def fresh(cls, **params):
    return ready(cls(epochs=0, alternate=True, **{**SMALL, **params}).fit(X))


def unweighted(d):
    """The three terms of (3) as they stand, by name."""
    with torch.no_grad():
        z, A = d.nets_.encoder(XB), d.nets_.subspace.A
        terms = norms(XB - d.reconstruction(XB)), not_orthonormal(A), off_subspace(z, A)
        return dict(zip(PLAYERS, (float(v.mean()) for v in terms)))


def check_alternating(cls):
    """A player for each term: what it moves, its rate, that its term falls; no weights."""
    assert tuple(player for player, _ in fresh(cls).turns()) == PLAYERS, 'turns'
    everybody = {'encoder', 'subspace', 'decoder'}
    for name, nets, rate in zip(PLAYERS, (everybody, {'subspace'}, {'encoder', 'subspace'}),
                                (1e-3, 1e-2, 1e-2)):
        d = fresh(cls)
        assert np.isclose(d.optimizers_[name].param_groups[0]['lr'], rate), f'rate of {name}'
        got, terms = moved(d, name)
        assert got == nets and list(terms) == [name], f'{name} moves {sorted(got)}'
        first = unweighted(d)[name]
        for _ in range(20): d.step(XB)
        assert unweighted(d)[name] < first, f'{name} does not fall'
    assert np.isclose(fresh(cls, penalty_lr_factor=3.).optimizers_['subspace'].defaults['lr'], 3e-3)
    a, b = (cls(epochs=2, alternate=True, **both(w), **SMALL).fit(X) for w in (0., 5.))
    same = np.array_equal(a.decision_function(X), b.decision_function(X))
    assert same, 'weights must not matter'
    terms = {f'{name}/{name}' for name in PLAYERS}
    assert set(a.history_) == terms | {'seconds'}, 'history'
    assert len(a.history_['subspace/subspace']) == 2


def check_decay(cls):
    """weight_decay is a term in both ways, of all networks, and it makes their weights smaller."""
    for alternate, name in ((False, 'decay'), (True, 'reconstruction/decay')):
        way = dict(alternate=alternate, epochs=30, lr=3e-3, **SMALL)
        free, held = (cls(weight_decay=w, **way).fit(X) for w in (0., .1))
        assert name in held.history_ and name not in free.history_, 'history'
        weights = [float(squared_weights(d.nets_).detach()) for d in (free, held)]
        assert weights[1] < .8 * weights[0], f'weights {weights}'
        d = linear(cls, alternate=alternate, weight_decay=.1)
        terms = [loss(XB.double()) for _, loss in d.turns()]
        decays = [term['decay'] for term in terms if 'decay' in term]
        assert len(decays) == 1 and torch.isclose(*decays, .1 * squared_weights(d.nets_)), 'once'


def check_training(cls):
    """Each weight does its work: A orthonormal, codes near the subspace, images drawn better."""
    def after(epochs=60, **weights):
        training = {**SMALL, 'batch_size': 12, 'lr': 3e-3}
        return unweighted(cls(epochs=epochs, **training, **weights).fit(X))
    free, near = after(**both(0.)), after(**both(1.))
    orthonormal = after(subspace_weight=0, orthogonality_weight=1)
    start = after(epochs=0)
    off = orthonormal['orthogonality']
    assert off < .01 and off < .1 * free['orthogonality'], f'orthogonality {off}'
    assert near['subspace'] < .5 * orthonormal['subspace'], 'distance to the subspace'
    assert free['reconstruction'] < start['reconstruction'] - .1, 'it does not learn to draw'


CHECKS = dict(terms=check_terms, gradients=check_gradients, votes=check_votes, zero=check_zero,
              score=check_score, alternating=check_alternating, decay=check_decay,
              training=check_training)


@pytest.mark.parametrize('name', CHECKS)
def test_the_chapter_keeps(name): CHECKS[name](RSRAE)


# ---------------------------------------------------------------- mutants
def with_term(term, f):
    """A mutant whose named term of the loss is f(term)."""
    def loss(self, xb):
        return {k: f(v) if k == term else v for k, v in RSRAE.loss(self, xb).items()}
    return changed(RSRAE, f'{term}Changed', loss=loss)

class Rebuilt(RSRAE):
    """The base of mutants of the first term, `of(residuals)`."""
    def reconstruction_loss(self, xb):
        return dict(reconstruction=self.of(xb - self.reconstruction(xb)))

class SquaredReconstruction(Rebuilt):
    def of(self, r): return norms(r)**2

class MeanSquare(Rebuilt):
    def of(self, r): return r.square().flatten(1).mean(1)

class AbsoluteDifferences(Rebuilt):
    def of(self, r): return r.abs().flatten(1).sum(1)

class RootOfSquares(Rebuilt):
    def of(self, r): return r.square().flatten(1).sum(1).sqrt()

class NormOfTheBatch(Rebuilt):
    def of(self, r): return r.norm()

class Recovered(RSRAE):
    """The base of mutants of the second term, `of(codes, A)`."""
    def subspace_loss(self, xb):
        return dict(subspace=self.of(self.nets_.encoder(xb), self.nets_.subspace.A))

class SquaredDistance(Recovered):
    def of(self, z, A): return off_subspace(z, A)**2

class DetachedCodes(Recovered):
    def of(self, z, A): return off_subspace(z.detach(), A)

class DetachedLayer(Recovered):
    def of(self, z, A): return off_subspace(z, A.detach())

class Ascends(Recovered):
    def of(self, z, A): return -off_subspace(z, A)

class Orthonormal(RSRAE):
    """The base of mutants of the third term, `of(A)`."""
    def orthogonality_loss(self, xb): return dict(orthogonality=self.of(self.nets_.subspace.A))

class NoSquare(Orthonormal):  # the blog's formula
    def of(self, A): return not_orthonormal(A).sqrt()

class MeanOfSquares(Orthonormal):  # the official code's
    def of(self, A): return not_orthonormal(A) / self.code_dim**2

class WrongSide(Orthonormal):  # A'A instead of AA'
    def of(self, A): return not_orthonormal(A.T)

class Similarity(RSRAE):
    def image_score(self, xb): return 1 - super().image_score(xb)

class AlwaysError(RSRAE):
    def image_score(self, xb): return AE.image_score(self, xb)

class NeverError(RSRAE):
    def image_score(self, xb): return cosine_distance(xb, self.reconstruction(xb))

class SignedIsPlain(NeverError):
    def image_score(self, xb):
        kind = AE if self.score_by == 'error' else NeverError
        return kind.image_score(self, xb)

class CosineOfRows(RSRAE):
    def image_score(self, xb):
        return 1 - F.cosine_similarity(self.reconstruction(xb), xb, dim=-1).flatten(1).mean(1)

class OneAdam(RSRAE):
    def optimizers(self): return {name: self.adam(*self.nets_) for name in PLAYERS}

class SameRate(RSRAE):
    def optimizers(self):
        return {k: torch.optim.Adam(v.param_groups[0]['params'], lr=self.lr)
                for k, v in super().optimizers().items()}

class FixedRate(RSRAE):
    def adam(self, *names, lr=None): return super().adam(*names, lr=lr and 10 * self.lr)

class OnlyTheLayer(RSRAE):
    def optimizers(self):
        return dict(super().optimizers(), subspace=self.adam('subspace', lr=10 * self.lr))

class WeightsInTheSteps(RSRAE):
    def reconstruction_loss(self, xb):
        off = off_subspace(self.nets_.encoder(xb), self.nets_.subspace.A)
        term = super().reconstruction_loss(xb)['reconstruction']
        return dict(reconstruction=term + self.subspace_weight * off)

class ForgetsATerm(RSRAE):
    def turns(self): return [turn for turn in super().turns() if turn[0] != 'orthogonality']

class OtherOrder(RSRAE):
    def turns(self): return super().turns()[::-1]

class AlwaysTogether(RSRAE):
    def turns(self): return [('all', self.loss)]
    def optimizers(self): return dict(all=self.adam(*self.nets_))

class NoDecay(RSRAE):
    def reconstruction_loss(self, xb):
        return dict(reconstruction=super().reconstruction_loss(xb)['reconstruction'])

class NoDecayInTurns(RSRAE):
    def reconstruction_loss(self, xb):
        terms = super().reconstruction_loss(xb)
        return {k: v for k, v in terms.items() if k != 'decay' or not self.alternate}

class DecayOfTheDecoder(RSRAE):
    def reconstruction_loss(self, xb):
        terms = super().reconstruction_loss(xb)
        part = self.weight_decay * squared_weights(self.nets_.decoder)
        return terms | dict(decay=part) if 'decay' in terms else terms


ZERO, FLIP, TWICE = (lambda v: v * 0), (lambda v: -v), (lambda v: v * 2)
def every_term(*fs): return [with_term(t, f) for t in PLAYERS for f in fs]
MUTANTS = {'terms': [*every_term(ZERO, FLIP, TWICE), SquaredReconstruction, MeanSquare,
                     AbsoluteDifferences, NormOfTheBatch, SquaredDistance, NoSquare, MeanOfSquares,
                     WrongSide],
           'gradients': [*every_term(ZERO, FLIP), SquaredReconstruction, SquaredDistance,
                         DetachedCodes, DetachedLayer, NoSquare, MeanOfSquares],
           'votes': [SquaredReconstruction, MeanSquare, AbsoluteDifferences, RootOfSquares,
                     NormOfTheBatch],
           'zero': [RootOfSquares, NoSquare],
           'score': [Similarity, AlwaysError, NeverError, SignedIsPlain, CosineOfRows],
           'alternating': [OneAdam, SameRate, FixedRate, OnlyTheLayer, Ascends, WeightsInTheSteps,
                           ForgetsATerm, OtherOrder, AlwaysTogether],
           'decay': [NoDecay, NoDecayInTurns, DecayOfTheDecoder],
           'training': [with_term('subspace', ZERO), with_term('orthogonality', ZERO),
                        with_term('reconstruction', FLIP)]}


@each_mutant(MUTANTS)
def test_mutants_fail(why, broken):
    assert_caught(CHECKS[why], broken, kinds=(AssertionError, KeyError, FloatingPointError))


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
    heap = [0, 0, 4, 0, 0] + .2 * g.normal(size=(20, 5))
    z, truth = torch.tensor(np.concatenate([inliers, heap])), np.diag([1., 1, 0, 0, 0])
    one, two = (np.abs(projection(recover(z, 2, q)) - truth).max() for q in (1, 2))
    assert one < .05 and two > .4


@pytest.mark.parametrize('seed', range(3))
def test_distance_is_that_of_least_squares(seed):
    """For orthonormal rows, A'Az is the nearest point of the row space, whatever its basis."""
    g = np.random.default_rng(seed)
    A = np.linalg.qr(g.normal(size=(6, 3)))[0].T
    z = g.normal(size=(4, 6))
    nearest = (A.T @ np.linalg.lstsq(A.T, z.T, rcond=None)[0]).T
    turn = np.linalg.qr(g.normal(size=(3, 3)))[0]
    for basis in (A, turn @ A):
        ours = off_subspace(torch.tensor(z), torch.tensor(basis))
        assert np.allclose(ours, np.linalg.norm(z - nearest, axis=1))


def test_norms_of_nothing_do_not_pull():
    r = torch.zeros(3, 1, 2, 2, requires_grad=True)
    g, = torch.autograd.grad(norms(r).sum(), r)
    assert torch.equal(g, torch.zeros_like(r))


# ---------------------------------------------------------------- half precision
def check_precision(distance, penalty):
    """Inside of bfloat16, codes near the subspace keep their distance, and A its defect."""
    with isolated(1):
        A = torch.linalg.qr(torch.randn(32, 4))[0].T + 1e-4 * torch.randn(4, 32)
        near = torch.randn(50, 4) @ A + .01 * torch.randn(50, 32)
    with torch.autocast('cpu', torch.bfloat16):
        off, defect = distance(near, A), penalty(A)
        halves = distance(near.bfloat16(), A)  # as an encoder gives them
    exact = distance(near.double(), A.double())
    torch.testing.assert_close(off.double(), exact, rtol=1e-3, atol=0)
    rounded = distance(near.bfloat16().double(), A.double())
    torch.testing.assert_close(halves.double(), rounded, rtol=1e-3, atol=0)
    torch.testing.assert_close(defect.double(), penalty(A.double()), rtol=.01, atol=0)


def half_distance(z, A): return norms(z - z @ A.T @ A)
def half_penalty(A): return (A @ A.T - torch.eye(len(A))).square().sum()


def test_half_precision_does_not_reach_the_terms(): check_precision(off_subspace, not_orthonormal)


@pytest.mark.parametrize('pair', [(half_distance, not_orthonormal), (off_subspace, half_penalty)])
def test_half_precision_mutants_fail(pair):
    kinds = AssertionError, RuntimeError
    assert_caught(lambda pair: check_precision(*pair), pair, kinds=kinds)


def test_training_in_bfloat16():
    for alternate in (False, True):
        d = RSRAE(epochs=3, precision='bfloat16', alternate=alternate, **SMALL).fit(X)
        assert np.isfinite(d.decision_function(X)).all()


# ---------------------------------------------------------------- the rest
def test_subspace_starts_about_orthonormal_in_any_width():
    for D in (32, 512):
        with isolated(0): A = Subspace(D, 8).A
        assert not_orthonormal(A) < 8 * 9 / D * 2.5  # its expectation is d (d + 1) / D


def test_without_weights_only_the_loss_differs_from_a_plain_network():
    d = linear(RSRAE, **both(0.))
    terms = d.loss(XB.double())
    assert terms['subspace'].abs().max() == 0 and terms['orthogonality'] == 0
    assert torch.allclose(terms['reconstruction'].square() / 16, AE.image_score(d, XB.double()))


def test_weight_decay_is_a_term_of_its_own():
    d = linear(RSRAE, weight_decay=.1)
    assert torch.isclose(d.loss(XB.double())['decay'], .1 * squared_weights(d.nets_))
    assert 'decay' not in linear(RSRAE).loss(XB.double())


def test_black_images_have_a_score():
    d = RSRAE(epochs=1, **SMALL).fit(X)
    assert np.allclose(d.decision_function(np.zeros((2, 1, 4, 4), 'float32')), 1)


@pytest.mark.parametrize('wrong', [
    dict(subspace_weight=-1), dict(subspace_weight=True), dict(orthogonality_weight=float('inf')),
    dict(orthogonality_weight=None), dict(wide_dim=1), dict(wide_dim=5.), dict(penalty_lr_factor=0),
    dict(alternate='sometimes'), dict(alternate=1), dict(score_by='feeling'),
    dict(weight_decay=-1)])
def test_wrong_parameters(wrong):
    with pytest.raises(ValueError, match=f'{[*wrong][0]} must be .*; got'):
        RSRAE(**SMALL | wrong).fit(X)
