"""The robust deep autoencoder: proximal operators and the split against closed forms, minimizers
and certificates; every part defended by a mutant."""
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ad_course.ae import AE
from ad_course.baselines import PCA
from ad_course.batches import Cleaned
from ad_course.data import contaminate, digits
from ad_course.detector import _Progress, isolated
from ad_course.metrics import auroc
from ad_course.rda import (PENALTIES, RDA, RPCA, penalty_prox, position_factor, rpca, shrink_factor,
                           shrink_l1, shrink_l21, shrink_singular, sparse_part, zero_sparse)
from tests.mutants import assert_caught

TASK = contaminate(digits(normal=3), .2)
X = TASK.x_train[:48]
SMALL = dict(batch_size=16, verbose=False)


def draw(*shape, seed=0, scale=1.):
    return torch.tensor(np.random.default_rng(seed).normal(0, scale, shape))


# ---------------------------------------------------------------- proximal operators
def check_l21(f):
    rows = torch.tensor([[3.], [.5], [.1]])
    torch.testing.assert_close(f(rows, 1.), torch.tensor([[2.], [0.], [0.]]))
    left = f(torch.tensor([[3.], [1.], [.5], [.1]]), 1.) > 0
    assert torch.equal(left, torch.tensor([[True], [False], [False], [False]]))
    long_and_zero = torch.tensor([[3., 4.], [0., 0.]])
    torch.testing.assert_close(f(long_and_zero, 1.), torch.tensor([[2.4, 3.2], [0., 0.]]))
    columns = torch.tensor([[3., 1.], [4., 0.]])
    torch.testing.assert_close(f(columns, 1., 0), torch.tensor([[2.4, 0.], [3.2, 0.]]))
    x, exact = draw(5, 4), dict(xatol=1e-8, fatol=1e-13, maxiter=5000)
    torch.testing.assert_close(f(x, 0.), x)
    for row, t in zip(x.numpy(), (.1, .5, 1., 2., 3.)):
        cost = lambda s: .5 * ((row - s)**2).sum() + t * np.sqrt((s**2).sum())
        search = lambda start: minimize(cost, start, method='Nelder-Mead', options=exact)
        best = min((search(start) for start in (row, .3 * row, 0 * row)), key=lambda m: m.fun)
        ours = f(torch.tensor(row)[None], t)[0].numpy()
        assert cost(ours) <= best.fun + 1e-10
        np.testing.assert_allclose(ours, best.x, atol=1e-4)


def check_l1(f):
    assert f(torch.tensor([3., .5, -.1, -2.]), 1.).tolist() == [2, 0, 0, -1]
    x, grid = draw(50, seed=1), torch.linspace(-4, 4, 80_001).double()
    for t in (.2, 1.):
        costs = (.5 * (v - grid)**2 + t * grid.abs() for v in x[:12])
        best = torch.stack([grid[cost.argmin()] for cost in costs])
        torch.testing.assert_close(f(x[:12], t), best, atol=1e-4, rtol=0)
    s = f(x, .3)
    huber = F.huber_loss(x, torch.zeros_like(x), delta=.3, reduction='none')
    torch.testing.assert_close(.5 * (x - s)**2 + .3 * s.abs(), huber)


def check_singular(f):
    shrunk = f(torch.diag(torch.tensor([3., 1., .2])), .5)
    torch.testing.assert_close(shrunk, torch.diag(torch.tensor([2.5, .5, 0.])))
    for shape in ((6, 4), (4, 6)):
        x = draw(*shape, seed=2)
        s = f(x, .8)
        y = (x - s) / .8  # a subgradient of the nuclear norm at s: that makes s the minimizer
        assert torch.linalg.matrix_norm(y, 2) <= 1 + 1e-9
        torch.testing.assert_close((y * s).sum(), torch.linalg.matrix_norm(s, 'nuc'))


def lengths(x, dim): return x.norm(dim=dim, keepdim=True)
def l21_min(x, t, dim=1):  # a published baseline's defect
    return x * (1 - t / lengths(x, dim).clamp(min=1e-30)).clamp(max=0)
def l21_hard(x, t, dim=1): return x * (lengths(x, dim) > t)
def l21_other_way(x, t, dim=1): return shrink_l21(x, t, 1 - dim)
def l21_squared(x, t, dim=1):
    return x * (1 - t / x.square().sum(dim, keepdim=True).clamp(min=1e-30)).clamp(min=0)
def l21_nan(x, t, dim=1): return x * (1 - t / lengths(x, dim)).clamp(min=0)  # 0 / 0


def test_shrink_l21(): check_l21(shrink_l21)
def test_shrink_l1(): check_l1(shrink_l1)
def test_shrink_singular(): check_singular(shrink_singular)


def test_factor_at_zero():
    assert shrink_factor(torch.zeros(2), 1.).tolist() == [0, 0]
    assert shrink_factor(torch.ones(1), math.inf).item() == 0


@pytest.mark.parametrize('mutant', [l21_min, l21_hard, l21_other_way, l21_squared],
                         ids=lambda f: f.__name__)
def test_l21_mutants_fail(mutant):
    assert_caught(check_l21, mutant)


def test_zero_rows_give_no_nan():
    nothing = torch.zeros(2, 3)
    assert shrink_l21(nothing, 0.).isfinite().all() and not l21_nan(nothing, 0.).isfinite().all()


@pytest.mark.parametrize('mutant', [
    lambda x, t: x * (x.abs() > t), lambda x, t: (x - t).clamp(min=0),
    lambda x, t: shrink_l1(x, t / 2)])
def test_l1_mutants_fail(mutant):
    assert_caught(check_l1, mutant)


# ---------------------------------------------------------------- robust PCA
def low_and_sparse(n=60, d=40, rank=2, share=.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(n, rank, generator=g).double() @ torch.randn(rank, d, generator=g).double()
    where, sign = torch.rand(n, d, generator=g) < share, torch.randn(n, d, generator=g).sign()
    return low, 5. * where * sign


def check_rpca(f):
    for seed, shape in ((0, (60, 40)), (1, (40, 60))):
        low, sparse = low_and_sparse(*shape, seed=seed)
        L, S, Y = f(low + sparse)
        assert (L - low).norm() < 1e-5 * low.norm() and torch.equal(S != 0, sparse != 0)
        check_certificate(low + sparse, L, S, Y, 1 / 60**.5)


def check_certificate(x, L, S, Y, lam, tol=1e-4):
    assert (x - L - S).norm() <= tol * x.norm()
    assert torch.linalg.matrix_norm(Y, 2) <= 1 + tol and Y.abs().max() <= lam * (1 + tol)
    assert abs((Y * L).sum() / torch.linalg.matrix_norm(L, 'nuc') - 1) < tol
    assert abs((Y * S).sum() / (lam * S.abs().sum()) - 1) < tol


def no_multiplier(x, rounds=300):
    lam, mu = 1 / max(x.shape)**.5, x.numel() / (4 * float(x.abs().sum()))
    S = torch.zeros_like(x)
    for _ in range(rounds): L = shrink_singular(x - S, 1 / mu); S = shrink_l1(x - L, lam / mu)
    return L, S, mu * (x - L - S)


def test_rpca(): check_rpca(rpca)


@pytest.mark.parametrize('mutant', [
    no_multiplier, lambda x: rpca(x, sparse_weight=3 / max(x.shape)**.5, tol=1e-3),
    lambda x: rpca(x, sparse_weight=.3 / max(x.shape)**.5, tol=1e-5),
    lambda x: rpca(x, mu=1e3, tol=1e-3), lambda x: [v * s for v, s in zip(rpca(x), (1, 1, -1))]])
def test_rpca_mutants_fail(mutant):
    assert_caught(check_rpca, mutant)


def test_rpca_on_real_digits_has_a_certificate():
    x = torch.tensor(X).flatten(1).double()
    L, S, Y = rpca(x, tol=1e-5)
    check_certificate(x, L, S, Y, 1 / 8, tol=1e-3)


def test_rpca_refuses():
    for wrong in (torch.zeros(3, 3), torch.ones(3), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match='finite matrix'): rpca(wrong)
    with pytest.raises(RuntimeError, match='allow more rounds'): rpca(draw(9, 9), rounds=2)


def test_rpca_detector():
    d = RPCA(components=5, tol=1e-4).fit(X)
    L, S, _ = rpca(torch.tensor(X).flatten(1), tol=1e-4)
    same = PCA(components=5).fit((L.view(X.shape)).clamp(0, 1).numpy())
    np.testing.assert_allclose(d.outliers_, S.norm(dim=1) / 8, atol=1e-5)
    scores = [m.decision_function(TASK.x_test[:200]) for m in (d, same)]
    assert np.corrcoef(*scores)[0, 1] > .97
    for wrong in (dict(sparse_weight=0), dict(tol=0), dict(tol=math.inf), dict(tol=None),
                  dict(sparse_weight='a'), dict(tol=True)):
        with pytest.raises(ValueError, match=f'{[*wrong][0]}.*above 0'): RPCA(**wrong).fit(X)
    with pytest.raises(ValueError, match='the same'): RPCA().fit(np.full((5, 1, 4, 4), .5))


def test_rpca_has_its_own_weight():
    found = [RPCA(sparse_weight=w, tol=1e-4).fit(X).outliers_.mean() for w in (.08, .12, .2)]
    assert found[0] > found[1] > found[2]


# ---------------------------------------------------------------- groups
def check_groups(prox):
    r = torch.zeros(4, 1, 1, 2); r[0] = .5; r[1:, ..., 0] = .05
    first = torch.tensor([[.4, .4], [0, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(prox(r, .1, 'l1').flatten(1), first)
    torch.testing.assert_close(prox(r, .1, 'l21 samples').flatten(1), first)
    rms = torch.tensor([((.25 + 3 * .0025) / 4)**.5, (.25 / 4)**.5])
    features = prox(r, .1, 'l21 features').flatten(1)
    torch.testing.assert_close(features, r.flatten(1) * (1 - .1 / rms))
    g, big = torch.Generator().manual_seed(0), draw(7, 2, 3, 3, scale=.3, seed=3)
    def cost(s, dim):
        rows = s.flatten(1)
        penalty = s.abs().sum() if dim is None else rows.shape[dim]**.5 * rows.norm(dim=dim).sum()
        return .5 * (big - s).square().sum() + .2 * penalty
    for name, dim in PENALTIES.items():
        s = prox(big, .2, name)
        change = lambda k: 10.**-k * torch.randn(s.shape, generator=g, dtype=s.dtype)
        tries = (s + change(k) for k in (1, 2, 3, 4) for _ in range(50))
        assert min(cost(t, dim) for t in tries) >= cost(s, dim)


def test_groups(): check_groups(penalty_prox)


SWAPPED = {'l21 samples': 'l21 features', 'l21 features': 'l21 samples'}


@pytest.mark.parametrize('mutant', [
    lambda r, w, p: penalty_prox(r, w, SWAPPED.get(p, p)), lambda r, w, p: -penalty_prox(r, w, p),
    lambda r, w, p: 0 * r, lambda r, w, p: r - penalty_prox(r, w, p),
    lambda r, w, p: penalty_prox(r, w / 2, p)])
def test_group_mutants_fail(mutant):
    assert_caught(check_groups, mutant)


@pytest.mark.parametrize('penalty', PENALTIES)
def test_cleaned_images_lie_between_image_and_reconstruction(penalty):
    with isolated(1): x, rebuilt = torch.rand(2, 30, 1, 5, 5)
    L = x - penalty_prox(x - rebuilt, .15, penalty)
    low, high = torch.minimum(x, rebuilt) - 1e-6, torch.maximum(x, rebuilt) + 1e-6
    assert (L >= low).all() and (L <= high).all() and not torch.equal(L, x)


def test_position_factor_is_that_of_the_groups():
    r = draw(6, 2, 3, 3, scale=.2)
    r[:, :, 0, 0] = 0
    s = penalty_prox(r, .15, 'l21 features')
    torch.testing.assert_close(r * position_factor(r, .15), s)
    assert (s == 0).any() and (s != 0).any()


def test_sparse_part_is_a_fixed_point():
    x, shrink = draw(5, 1, 3, 3), lambda r: shrink_l1(r, .1)
    half = sparse_part(x, lambda v: v / 2, shrink)
    torch.testing.assert_close(half, shrink_l1(x, .2), atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse_part(x, torch.zeros_like, shrink), shrink_l1(x, .1))
    assert not sparse_part(x, lambda v: v, shrink).any()


# ---------------------------------------------------------------- the source
def check_cleaned(kind):
    disk = AE().as_batches(TensorDataset(torch.tensor(X)))
    for data in (AE().as_batches(X), AE().as_batches((X * 255).astype('uint8')), disk):
        whole = torch.cat([xb for xb, _ in data.batches(100)])
        for size in (48, 7):
            for seed in (None, 3):
                g = None if seed is None else torch.Generator().manual_seed(seed)
                for lb, _ in kind(data, whole).batches(size, g):
                    assert not lb.any(), 'rows of S went to other images'
    marks = torch.arange(len(X)).view(-1, 1, 1, 1).expand(X.shape).float()
    sources = AE().as_batches(X), kind(AE().as_batches(X), marks)
    pairs = zip(*(s.batches(7, torch.Generator().manual_seed(2)) for s in sources), strict=True)
    gone = torch.cat([xb - lb for (xb, _), (lb, _) in pairs])[:, 0, 0, 0].round().long().tolist()
    assert gone != list(range(len(X))) and sorted(gone) == list(range(len(X)))


class WrongOrder(Cleaned):
    def batches(self, size, rng=None):
        for i, (xb, yb) in enumerate(self.data.batches(size, rng)):
            yield xb - self.s[i * size:i * size + len(xb)], yb


class Added(Cleaned):
    def batches(self, size, rng=None):
        pairs = zip(self.data.batches(size), super().batches(size))
        return ((2 * xb - lb, yb) for (xb, yb), (lb, _) in pairs)


def test_cleaned(): check_cleaned(Cleaned)


@pytest.mark.parametrize('mutant', [WrongOrder, Added])
def test_cleaned_mutants_fail(mutant):
    assert_caught(check_cleaned, mutant, kinds=(AssertionError, RuntimeError))


# ---------------------------------------------------------------- the detector
WEIGHT = .12


def by_hand(penalty):
    """Two rounds of 3 and 2 epochs in one order: the network, S and the last residuals."""
    twin = RDA(penalty=penalty, sparse_weight=WEIGHT, **SMALL)
    data, x = twin.as_batches(X), torch.tensor(X)
    s = torch.zeros_like(x)
    with isolated(0):
        twin.shape_, twin.history_ = data.shape, {}
        twin.nets_ = torch.nn.ModuleDict(twin.networks(data.shape))
        twin.optimizers_ = twin.optimizers()
        twin._progress = _Progress(twin)
        for epochs in (3, 2):
            twin.run(Cleaned(data, s), epochs, twin.turns())
            with torch.no_grad(): r = x - twin.reconstruction(x - s)
            s = penalty_prox(r, WEIGHT, penalty)
    return twin, s, r


def check_training(kind):
    """Two rounds by hand with the loop of AE: train on X, renew S, train on X - S, renew S."""
    x, rms = torch.tensor(X), lambda s: s.flatten(1).square().mean(1).sqrt()
    for penalty in PENALTIES:
        two = dict(epochs=5, epochs_per_round=3, **SMALL)
        d = kind(penalty=penalty, sparse_weight=WEIGHT, **two).fit(X)
        twin, s, _ = by_hand(penalty)
        losses = [m.history_['reconstruction'] for m in (d, twin)]
        np.testing.assert_allclose(*losses, rtol=1e-3)
        np.testing.assert_allclose(d.outliers_, rms(s), atol=1e-4)
        assert len(d.support_share_) == 2
        assert np.isclose(d.support_share_[-1], (rms(s) > 0).float().mean())
        with torch.no_grad(): r = x - d.reconstruction(x)
        np.testing.assert_allclose(d.decision_function(X), r.flatten(1).square().mean(1), rtol=1e-3)
        np.testing.assert_allclose(d.anomaly_map(X), r.square().sum(1), atol=1e-5)


class NeverCleans(RDA):                 # trains on X all the time
    def train(self, data):
        super().train(data)
        with isolated(0): self.nets_ = torch.nn.ModuleDict(self.networks(self.shape_))
        self.optimizers_, self.history_ = self.optimizers(), {}
        self._progress = _Progress(self)
        self.run(data, self.epochs, self.turns())
class Accumulates(RDA):                 # the residual of L instead of that of X
    def residuals(self, cleaned): return super().residuals(cleaned) - cleaned.s
class LooksAtX(RDA):                    # the residual of the uncleaned input
    def residuals(self, cleaned):
        return super().residuals(Cleaned(cleaned.data, torch.zeros_like(cleaned.s)))
class KeepsOld(RDA):                    # S from the first round only
    def renewed(self, r):
        if not self.support_share_: self.first = super().renewed(r)
        else: self.support_share_.append(self.support_share_[-1])
        return self.first
class SameOrders(RDA):                  # each round begins with the first order again
    def after_epoch(self, cleaned, epoch):
        super().after_epoch(cleaned, epoch)
        if epoch % self.epochs_per_round == 0: self._progress.order.manual_seed(self.seed)
class NoLoss(RDA):
    def loss(self, xb): return {k: 0 * v for k, v in super().loss(xb).items()}
class Ascends(RDA):
    def loss(self, xb): return {k: -v for k, v in super().loss(xb).items()}
class SumsLoss(RDA):
    def loss(self, xb): return dict(reconstruction=self.errors(xb).sum())
class MinForMax(RDA):
    def renewed(self, r):
        super().renewed(r)
        s = l21_min(r.flatten(1), self.sparse_weight * 8).view(r.shape)
        self.outliers_ = s.flatten(1).square().mean(1).sqrt()
        return s
class ScoresS(RDA):
    def image_score(self, xb):
        shrink = lambda r: penalty_prox(r, self.sparse_weight, self.penalty)
        return sparse_part(xb, self.reconstruction, shrink).flatten(1).square().mean(1)


def test_training(): check_training(RDA)


@pytest.mark.parametrize('mutant', [
    NeverCleans, Accumulates, LooksAtX, KeepsOld, SameOrders, NoLoss, Ascends, SumsLoss, MinForMax,
    ScoresS], ids=lambda c: c.__name__)
def test_training_mutants_fail(mutant):
    assert_caught(check_training, mutant)


def check_split(kind):
    """Twenty times equation (7) by hand; positions keep the share that the training gave them."""
    x = torch.tensor(TASK.x_test[:30])
    for penalty in PENALTIES:
        two = dict(epochs=5, epochs_per_round=3, **SMALL)
        d = kind(penalty=penalty, sparse_weight=WEIGHT, **two).fit(X)
        *_, r = by_hand(penalty)
        length = r.norm(dim=0).numpy()
        factor = np.maximum(1 - WEIGHT * len(X)**.5 / np.maximum(length, 1e-30), 0)
        shrink = lambda v: penalty_prox(v, WEIGHT, penalty)
        if penalty == 'l21 features': shrink = lambda v: v * torch.tensor(factor)
        s = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(20): s = shrink(x - d.reconstruction(x - s))
        L, S = d.split(x)
        np.testing.assert_allclose(S, s, atol=1e-3)
        np.testing.assert_allclose(L + S, x, atol=1e-6)
        assert S.any()


class PositionsOfOneImage(RDA):         # the length of a group from a new image alone
    def split(self, x):
        one = lambda v: penalty_prox(v, self.sparse_weight, self.penalty)
        S = self.for_each(lambda xb: sparse_part(xb, self.reconstruction, one), x)
        return x.numpy() - S, S
class OneStep(RDA):                     # (7) once
    def split(self, x):
        s = super().split(x)[1]
        residual = x - torch.tensor(self.reconstruct(x))
        first = penalty_prox(residual, self.sparse_weight, self.penalty)
        s = s if self.penalty == 'l21 features' else first.numpy()
        return x.numpy() - s, s
class FirstFactor(RDA):                 # the factor of the first round
    def renewed(self, r):
        old, s = self.position_factor_, super().renewed(r)
        if len(self.support_share_) > 1: self.position_factor_ = old
        return s
class HalfWeight(RDA):
    def renewed(self, r):
        s = super().renewed(r)
        self.position_factor_ = position_factor(r, self.sparse_weight / 2)
        return s
class NoRoot(RDA):                      # the weight without the root of the size of the group
    def renewed(self, r):
        s = super().renewed(r)
        self.position_factor_ = shrink_factor(r.norm(dim=0), self.sparse_weight)
        return s
class AllOfIt(RDA):
    def renewed(self, r):
        s = super().renewed(r)
        self.position_factor_ = torch.ones_like(r[0])
        return s


def test_split(): check_split(RDA)


@pytest.mark.parametrize('mutant', [PositionsOfOneImage, OneStep, FirstFactor, HalfWeight, NoRoot,
                                    AllOfIt], ids=lambda c: c.__name__)
def test_split_mutants_fail(mutant):
    assert_caught(check_split, mutant)


def test_without_s_it_is_an_autoencoder():
    never = RDA(epochs=4, sparse_weight=math.inf, epochs_per_round=4, **SMALL).fit(X)
    ae = AE(epochs=4, **SMALL).fit(X)
    np.testing.assert_allclose(never.decision_function(X), ae.decision_function(X), rtol=1e-4)
    assert never.support_share_ == [0.]


def test_without_s_the_rounds_do_not_matter():
    """One order of shuffles for the whole fit: rounds of one epoch or of four, all the same."""
    models = [RDA(epochs=4, sparse_weight=math.inf, epochs_per_round=k, **SMALL).fit(X)
              for k in (1, 4)]
    np.testing.assert_array_equal(*(d.decision_function(X) for d in models))


def test_weight_decay_still_counts():
    d = RDA(epochs=1, weight_decay=1e-3, **SMALL).fit(X)
    assert set(d.history_) == {'reconstruction', 'decay', 'seconds'}


def test_split_adds_up_and_is_a_fixed_point_for_each_image():
    for penalty in PENALTIES:
        d = RDA(penalty=penalty, sparse_weight=.08, epochs=20, **SMALL).fit(X)
        L, S = d.split(TASK.x_test[:40])
        np.testing.assert_allclose(L + S, TASK.x_test[:40], atol=1e-6)
        assert L.min() >= -1e-6 and L.max() <= 1 + 1e-6 and S.any()
        alone = d.split(TASK.x_test[3:4])[1]
        np.testing.assert_allclose(alone, S[3:4], atol=1e-5)  # as in a batch


def test_both_kinds_of_score():
    d = RDA(sparse_weight=.1, epochs=30, **SMALL).fit(TASK.x_train)
    rms = np.sqrt(d.decision_function(TASK.x_test))
    residual = torch.tensor(TASK.x_test - d.reconstruct(TASK.x_test))
    s = penalty_prox(residual, .1, 'l21 samples').flatten(1).square().mean(1).sqrt()
    np.testing.assert_allclose(s, np.maximum(rms - .1, 0), atol=1e-5)  # same order, with ties
    hidden = (TASK.kinds_train != 'normal').astype(int)
    assert d.outliers_.shape == (len(TASK.x_train),) and auroc(hidden, d.outliers_.numpy()) > .85


def test_memory_and_disk_and_a_budget(tmp_path):
    sources = X, TensorDataset(torch.tensor(X))
    a, b = (RDA(epochs=3, epochs_per_round=1, **SMALL).fit(x) for x in sources)
    assert torch.equal(a.outliers_, b.outliers_)
    assert np.array_equal(a.decision_function(X), b.decision_function(X))
    for x in sources:
        with pytest.raises(ValueError, match='max_gb=1e-06; got .* 48 training images'):
            RDA(max_gb=1e-6, **SMALL).fit(x)
    a.save(tmp_path/'m.safetensors')
    weights = 4 * sum(p.numel() for p in a.nets_.parameters())
    assert (tmp_path/'m.safetensors').stat().st_size < weights + 8000  # no training set in the file
    assert torch.equal(RDA.load(tmp_path/'m.safetensors').outliers_, a.outliers_)


def test_the_budget_is_that_of_float32():
    data = AE().as_batches(X)
    gb = 4e-9 * X.size
    assert zero_sparse(data, 1.001 * gb).numel() == X.size and zero_sparse(data, math.inf).ndim == 4
    with pytest.raises(ValueError, match='max_gb'): zero_sparse(data, .999 * gb)


def test_untrained_and_interrupted():
    d = RDA(epochs=0, **SMALL).fit(X)
    assert d.support_share_ == [] and not d.outliers_.any()

    class Stops(RDA):
        def after_epoch(self, data, epoch):
            super().after_epoch(data, epoch)
            if len(self.history_['seconds']) == 3: raise KeyboardInterrupt
    with pytest.warns(UserWarning, match='interrupted'):
        d = Stops(epochs=9, epochs_per_round=2, **SMALL).fit(X)
    assert len(d.support_share_) == 1 and np.isfinite(d.decision_function(X)).all()


@pytest.mark.parametrize('wrong', [
    dict(penalty='l2'), dict(sparse_weight=0), dict(sparse_weight=math.nan),
    dict(sparse_weight=-math.inf), dict(sparse_weight='a'), dict(sparse_weight=True),
    dict(epochs_per_round=0), dict(epochs_per_round=1.5), dict(max_gb=0), dict(max_gb=True),
    dict(code_dim=0)])
def test_wrong_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): RDA(**wrong).fit(X)
