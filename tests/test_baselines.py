"""The baselines against loops and closed forms; each check also fails on a broken one."""
import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA as LinearPCA

from ad_course import baselines
from ad_course.baselines import KNN, PCA, ClosedForm, MeanImage, whitening
from tests.mutants import assert_caught, changed, each_mutant, mutant

RNG = np.random.default_rng(0)
X, NEW = RNG.random((30, 2, 3, 4), dtype='float32'), RNG.random((7, 2, 3, 4), dtype='float32')
ROWS, OTHERS = (x.reshape(len(x), -1).astype('float64') for x in (X, NEW))


def fitted(cls, x=X, **params): return cls(verbose=False, batch_size=8, **params).fit(x)


def check_mean(cls=MeanImage):
    d, away = fitted(cls), (OTHERS - ROWS.mean(0))**2
    np.testing.assert_allclose(d.decision_function(NEW), away.mean(1), rtol=1e-5, err_msg='score')
    maps = away.reshape(7, 2, 3, 4).sum(1)
    np.testing.assert_allclose(d.anomaly_map(NEW), maps, rtol=1e-4, atol=1e-7, err_msg='map')


def check_pca(cls=PCA):
    for k in (1, 5, 24, .5, .9):
        d, theirs = fitted(cls, components=k), LinearPCA(k, svd_solver='full').fit(ROWS)
        rest = (OTHERS - theirs.inverse_transform(theirs.transform(OTHERS)))**2
        close = dict(rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(d.decision_function(NEW), rest.mean(1), **close, err_msg='score')
        np.testing.assert_allclose(d.anomaly_map(NEW), rest.reshape(7, 2, 3, 4).sum(1), rtol=1e-3,
                                   atol=1e-8, err_msg='map')
        assert len(d.components_) == theirs.n_components_, 'number of components'


def check_knn(cls=KNN):
    for k in (1, 3, 29):
        d = fitted(cls, k=k, contamination=.3)
        away = np.sqrt(((OTHERS[:, None] - ROWS[None])**2).mean(2))
        want = np.sort(away, 1)[:, :k].mean(1)
        np.testing.assert_allclose(d.decision_function(NEW), want, rtol=1e-4, err_msg='score')
        among = np.sort(np.sqrt(((ROWS[:, None] - ROWS[None])**2).mean(2)), 1)[:, 1:k + 1].mean(1)
        scores, labels = d.training_scores(d.as_batches(X))
        np.testing.assert_allclose(scores, among, rtol=1e-4, err_msg='training scores')
        assert labels.tolist() == [0] * 30
        assert d.threshold_ == pytest.approx(np.quantile(among, .7), rel=1e-4), 'threshold'


@pytest.mark.parametrize('check', [check_mean, check_pca, check_knn], ids=lambda f: f.__name__)
def test_by_hand(check): check()


def times(parent, hook, factor=2.):
    """A class like `parent` whose hook gives so many times as much."""
    return changed(parent, **{hook: lambda self, xb: factor * getattr(parent, hook)(self, xb)})


class Median(MeanImage):
    def learn(self, rows): self.mean_ = rows.median(0).values
class NotCentered(PCA):
    def residual(self, xb): return super().residual(xb + self.mean_.view(1, *self.shape_))
class OneLess(PCA):
    def learn(self, rows): super().learn(rows); self.components_ = self.components_[:-1]
class FirstBatch(PCA):
    def learn(self, rows): super().learn(rows[:25])
class SeesItself(KNN):
    def nearest(self, rows): return super().nearest(self.bank_.numpy() if rows is None else rows)
class KthOnly(KNN):
    def nearest(self, rows): return super().nearest(rows)[:, -1:]
class NotScaled(KNN):
    def nearest(self, rows): return super().nearest(rows) * self.bank_.shape[1]**.5


@each_mutant({'score': [Median, times(MeanImage, 'image_score')],
              'map': [times(MeanImage, 'pixel_score')]})
def test_wrong_means_are_caught(why, broken): assert_caught(check_mean, broken, why)


@each_mutant({'score': [NotCentered, OneLess, FirstBatch], 'map': [times(PCA, 'pixel_score')]})
def test_wrong_planes_are_caught(why, broken): assert_caught(check_pca, broken, why)


@each_mutant({'training scores': [SeesItself], 'score': [KthOnly, NotScaled]})
def test_wrong_neighbors_are_caught(why, broken): assert_caught(check_knn, broken, why)


def check_whitening(whiten):
    """Symmetric, and a root of scikit-learn's precision; any scale, any number of rows."""
    for n, scale in ((6, 1.), (6, 1e-9), (6, 1e6), (60, 1.)):
        rows = np.random.default_rng(1).normal(size=(n, 20)) * np.geomspace(1, .01, 20)
        rows = scale * (rows + 2)
        mean, matrix = whiten(rows)
        theirs = LedoitWolf().fit(rows)
        np.testing.assert_allclose(mean, rows.mean(0), err_msg='mean')
        np.testing.assert_allclose(matrix @ matrix * scale**2, theirs.precision_ * scale**2,
                                   rtol=1e-6, atol=1e-6, err_msg='root')
        np.testing.assert_allclose(matrix, matrix.T, err_msg='symmetric')


def test_whitening():
    check_whitening(whitening)
    single = whitening(ROWS.astype('float32'))
    assert all(a.dtype == np.float64 for a in single)
    np.testing.assert_allclose(single[1], whitening(ROWS)[1], rtol=1e-4, atol=1e-4)


def test_whitening_of_few_or_equal_rows():
    """Nothing infinite: the identity for equal rows, large numbers off the line of two."""
    mean, matrix = whitening(np.full((4, 3), .3))
    np.testing.assert_allclose(mean, .3)
    np.testing.assert_array_equal(matrix, np.eye(3))
    mean, matrix = whitening([[1., 0, 0], [-1, 0, 0]])
    assert np.isfinite(matrix).all() and matrix[0, 0] == pytest.approx(1, rel=1e-3)
    assert matrix[1, 1] == matrix[2, 2] > 1


def test_a_wrong_whitening_is_caught():
    off = lambda rows: (whitening(rows)[0] + 1e-3, whitening(rows)[1])
    assert_caught(check_whitening, off, 'mean')
    for rho in (0., .5):
        with mutant(baselines, ledoit_wolf_shrinkage=lambda rows: rho):
            assert_caught(check_whitening, whitening, 'root')


@pytest.mark.parametrize('cls, params, x, message', [
    *((PCA, dict(components=c), X, 'PCA: components must be a share.*; got')
      for c in (0, -1, 2.5, True, None, float('nan'), '2')),
    (PCA, dict(components=25), X, 'at most the number.*got 25 for 30 images of 24 pixels'),
    (PCA, {}, np.full((9, 4, 4), .5), 'must differ, or there is no plane; got 9 alike'),
    *((KNN, dict(k=k), X, 'KNN: k must be a whole number, at least 1; got')
      for k in (0, -1, 2., True, None)),
    (KNN, dict(k=30), X, 'k must be below the number of training images; got 30 for 30'),
], ids=str)
def test_wrong_use(cls, params, x, message):
    with pytest.raises(ValueError, match=message): fitted(cls, x, **params)


def test_closed_form_wants_learn():
    class Nothing(ClosedForm):
        def image_score(self, xb): return torch.zeros(len(xb))
    with pytest.raises(NotImplementedError, match='Nothing defines no learn'): fitted(Nothing)
