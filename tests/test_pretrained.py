"""Pretrained features: right distances, honest thresholds, a memory that covers what it left."""
import itertools

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from ad_course import pretrained as module
from ad_course.backbones import backbone, features
from ad_course.data import label_anomalies
from ad_course.detector import load
from ad_course.feature_maps import feature_maps, remembered, usual_size
from ad_course.metrics import auroc, pixel_auroc
from ad_course.pretrained import (DN2, Mahalanobis, NearestPatches, PatchView, joined, k_center,
                                  local_mean, nearest_distances, places, squared_mahalanobis)
from ad_course.surfaces import surfaces
from tests.mutants import assert_caught, changed, mutant

QUIET = dict(device='cpu', verbose=False)
POOLED, PATCHES = dict(size=32) | QUIET, dict(stride=16) | QUIET


def draws(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module', autouse=True)
def seen_once():
    """The same few images are looked at again and again."""
    with remembered(): yield


CLOTH = label_anomalies(surfaces(n_train=40, n_test=60, size=64, seed=0), 6, seed=0)
NORMAL = CLOTH.x_train[CLOTH.y_train == 0]
LITE = backbone('efficientnet_lite0', size=32)
ROWS, NEW = (torch.nn.functional.normalize(torch.tensor(features(LITE, x)))
             for x in (NORMAL, CLOTH.x_test))


def fit(cls, **settings):
    """A detector that was fitted on the cloth with its labels."""
    base = PATCHES if issubclass(cls, NearestPatches) else POOLED
    return cls(**base | settings).fit(CLOTH.x_train, CLOTH.y_train)


# ---------------------------------------------------------------- rows of images
def is_knn_of_the_normal_rows(cls):
    d = fit(cls, k=3)
    search = NearestNeighbors(n_neighbors=3, algorithm='brute').fit(ROWS.numpy())
    wanted = search.kneighbors(NEW.numpy())[0].mean(1) / ROWS.shape[1]**.5
    np.testing.assert_allclose(d.decision_function(CLOTH.x_test), wanted, rtol=1e-3)


def is_ledoit_and_wolfs(cls):
    """With fewer rows than dimensions."""
    d = fit(cls)
    wanted = LedoitWolf().fit(ROWS.double().numpy()).mahalanobis(NEW.double().numpy())
    np.testing.assert_allclose(d.decision_function(CLOTH.x_test), wanted, rtol=1e-2)


def thresholds_fit_new_images(cls, **settings):
    """The median of the training scores is near that of new normal ones."""
    d = fit(cls, contamination=.5, **settings)
    alarms = d.predict(CLOTH.x_test[CLOTH.y_test == 0]).mean()
    assert .2 < alarms < .85, f'{alarms:.0%} alarms where half of them were wanted'


def labelled_ones_are_left_out(cls):
    d = fit(cls)
    alone = cls(**d.get_params()).fit(NORMAL)
    np.testing.assert_allclose(d.decision_function(CLOTH.x_test),
                               alone.decision_function(CLOTH.x_test), rtol=1e-4)
    assert d.threshold_ == pytest.approx(alone.threshold_, rel=1e-4)


PROMISES = {DN2: [is_knn_of_the_normal_rows, thresholds_fit_new_images, labelled_ones_are_left_out],
            Mahalanobis: [is_ledoit_and_wolfs, thresholds_fit_new_images,
                          labelled_ones_are_left_out],
            NearestPatches: [thresholds_fit_new_images, labelled_ones_are_left_out]}


@pytest.mark.parametrize('cls, promise', [(c, p) for c in PROMISES for p in PROMISES[c]],
                         ids=lambda v: v.__name__)
def test_promise(cls, promise): promise(cls)


def plain_covariance(self, rows):
    z = rows.double().cpu()
    w, v = torch.linalg.eigh(torch.cov(z.T, correction=0))
    return z.mean(0).float(), (v * w.clamp(min=1e-12)**-.5 @ v.T).float()

def frozen_all(*a, real=module.frozen_rows):
    rows, y = real(*a)
    return rows, 0 * y

own_knn = changed(DN2, held_out_scores=lambda self, rows: self.row_score(rows))
root = changed(Mahalanobis, row_score=lambda self, rows: Mahalanobis.row_score(self, rows).sqrt())
own_mean = changed(Mahalanobis, held_out_scores=lambda self, rows: self.row_score(rows))
unshrunk = changed(Mahalanobis, whiten=plain_covariance)
whole = changed(DN2, map_normal=lambda d, f, data, most=None: np.concatenate(
    [out for out, _ in d.each_batch(f, data)]), name='with_labelled_ones')
one_less = changed(DN2, nearest=lambda self, rows: DN2.nearest(self, rows)[:, :2])
summed = changed(DN2, row_score=lambda self, rows: 3 * DN2.row_score(self, rows))


def own_places(self, data):
    """Each place of the memory counts as its own neighbor."""
    real = nearest_distances
    with mutant(module, nearest_distances=lambda rows, bank, *_: real(rows, bank)):
        NearestPatches.train(self, data)

def labelled_places(self, data):
    with mutant(module, frozen_rows=frozen_all): NearestPatches.train(self, data)


@pytest.mark.parametrize('broken, promise', [
    (own_knn, thresholds_fit_new_images), (whole, labelled_ones_are_left_out),
    (whole, is_knn_of_the_normal_rows), (one_less, is_knn_of_the_normal_rows),
    (summed, is_knn_of_the_normal_rows), (root, is_ledoit_and_wolfs),
    (unshrunk, is_ledoit_and_wolfs), (own_mean, thresholds_fit_new_images),
    (changed(NearestPatches, train=own_places, name='own_places'), thresholds_fit_new_images),
    (changed(NearestPatches, train=labelled_places, name='labelled'), labelled_ones_are_left_out)],
    ids=lambda v: v.__name__)
def test_mutant_is_caught(broken, promise): assert_caught(promise, broken)


def test_squared_mahalanobis_by_hand():
    mean, matrix = torch.tensor([1., 2]), torch.tensor([[2., 0], [0, .5]])
    found = squared_mahalanobis(torch.tensor([[1., 2], [2, 2], [1, 6]]), mean, matrix)
    assert found.tolist() == [0, 4, 4]


def test_a_fold_is_measured_by_the_others():
    d = fit(Mahalanobis, folds=len(NORMAL), contamination=.5)
    for i in (0, 7):
        others = np.delete(ROWS.double().numpy(), i, 0)
        wanted = LedoitWolf().fit(others).mahalanobis(ROWS[i:i + 1].double().numpy())
        np.testing.assert_allclose(d.held_out_[i], wanted[0], rtol=1e-2)


def test_pixels_in_the_place_of_features():
    d = DN2(backbone=None, normalize=False, k=1, **QUIET).fit(NORMAL)
    far = np.abs(CLOTH.x_test[:1] - NORMAL).reshape(len(NORMAL), -1)
    wanted = ((far**2).sum(1).min() / far.shape[1])**.5
    assert d.decision_function(CLOTH.x_test[:1])[0] == pytest.approx(wanted, rel=1e-4)
    assert not list(d.nets_) and not list(Mahalanobis(backbone=None, **QUIET).fit(NORMAL).nets_)


def test_rows_have_length_one_or_their_own():
    x = torch.tensor(CLOTH.x_test[:5])
    with torch.no_grad(): unit, raw = (fit(DN2, normalize=n).rows(x) for n in (True, False))
    torch.testing.assert_close(unit, NEW[:5])
    torch.testing.assert_close(unit * raw.norm(dim=1, keepdim=True), raw)
    assert raw.norm(dim=1).min() > 1.5


def test_small_images_are_seen_large():
    sizes = [d.networks(s)['view'].size for d, s in (
        (DN2(), (1, 28, 28)), (DN2(), (3, 200, 256)), (DN2(size=64), (1, 28, 28)),
        (DN2(backbone='vit_b_16'), (1, 28, 28)))]
    assert sizes == [160, 256, 64, 224] and usual_size((1, 28, 28)) == 64


def test_untrained_weights_come_from_the_seed():
    a, b, c = (fit(DN2, weights='random', seed=s).decision_function(CLOTH.x_test[:8])
               for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.allclose(a, c)


@pytest.mark.parametrize('cls', [DN2, Mahalanobis, NearestPatches])
def test_one_normal_image_is_not_enough(cls):
    y = np.array([0, 1, 1])
    with pytest.raises(ValueError, match='fit needs at least 2 normal images; got 1'):
        cls(**QUIET | dict(size=32)).fit(CLOTH.x_train[-3:], y)


def test_an_interruption_leaves_nothing():
    class Interrupted(DN2):
        def learn(self, rows): raise KeyboardInterrupt
    d = fit(DN2)
    d.__class__ = Interrupted
    before = d.decision_function(CLOTH.x_test)
    with pytest.raises(KeyboardInterrupt): d.fit(NORMAL)
    assert np.array_equal(d.decision_function(CLOTH.x_test), before)


# ---------------------------------------------------------------- the coreset
def is_the_slow_loop(f):
    rows = draws(60, 5)
    found, radii = f(rows, 12, 3)
    z, chosen = rows.double().numpy(), [3]
    for _ in range(12):
        far = [min(np.linalg.norm(z[i] - z[j]) for j in chosen) for i in range(60)]
        assert radii[len(chosen) - 1] == pytest.approx(max(far), rel=1e-4), 'another radius'
        chosen.append(int(np.argmax(far)))
    assert found.tolist() == chosen[:12], 'other rows'


def is_at_most_twice_the_best(f):
    """Gonzalez (1985): no three of nine rows cover them with less than half of the radius."""
    for seed in range(20):
        rows = draws(9, 2, seed=seed)
        found, _ = f(rows, 3)
        reach = lambda some: torch.cdist(rows, rows[list(some)]).amin(1).max()
        best = min(map(reach, itertools.combinations(range(9), 3)))
        assert best <= reach(found.tolist()) <= 2 * best + 1e-5, 'more than twice the best'


def ends_where_copies_are_left(f):
    rows = draws(4, 3).repeat(5, 1)
    found, radii = f(rows, 20)
    assert sorted(i % 4 for i in found.tolist()) == [0, 1, 2, 3] and radii[-1] < 1e-2


COVERS = [is_the_slow_loop, is_at_most_twice_the_best, ends_where_copies_are_left]


@pytest.mark.parametrize('promise', COVERS, ids=lambda f: f.__name__)
def test_k_center(promise): promise(k_center)


def spread_of(rows, found):
    return torch.stack([torch.cdist(rows, rows[found[:i + 1]]).amin(1).max()
                        for i in range(len(found))])

def at_random(rows, k, first=0):
    found = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:k]
    return found, spread_of(rows, found)

def by_the_last(rows, k, first=0):
    found = [first]
    for _ in range(k - 1): found.append(int((rows - rows[found[-1]]).norm(dim=1).argmax()))
    return torch.tensor(found), spread_of(rows, torch.tensor(found))

def the_nearest(rows, k, first=0):
    found = [first]
    for _ in range(k - 1):
        far = torch.cdist(rows, rows[found]).amin(1)
        far[found] = torch.inf
        found.append(int(far.argmin()))
    return torch.tensor(found), spread_of(rows, torch.tensor(found))


@pytest.mark.parametrize('broken, promise', [
    (at_random, is_the_slow_loop), (at_random, is_at_most_twice_the_best),
    (by_the_last, is_the_slow_loop), (by_the_last, ends_where_copies_are_left),
    (the_nearest, is_the_slow_loop), (the_nearest, is_at_most_twice_the_best)],
    ids=lambda v: v.__name__)
def test_mutant_of_the_coreset_is_caught(broken, promise): assert_caught(promise, broken)


def test_the_detector_keeps_a_cover():
    """In its projection or in all dimensions, greedy covers better than a random choice."""
    found = draws(600, 3) @ draws(3, 20, seed=1)
    def reach(**kw):
        d = NearestPatches(memory=60, **QUIET, **kw)
        return nearest_distances(found, found[d.choose(found)]).max()
    assert reach(projection=0) < reach(projection=10) < reach(coreset='random')
    d = NearestPatches(memory=60, **QUIET)
    assert torch.equal(d.choose(found), d.choose(found)), 'the same seed, another choice'
    assert not torch.equal(d.choose(found), d.set_params(seed=1).choose(found))


def test_a_random_memory_keeps_the_threshold():
    thresholds_fit_new_images(NearestPatches, memory=100, coreset='random')


def test_a_greedy_memory_gives_few_alarms():
    """Its choice has seen all training images: the threshold is too high, never too low."""
    d = fit(NearestPatches, memory=100, contamination=.5)
    assert d.predict(CLOTH.x_test[CLOTH.y_test == 0]).mean() < .5


def test_memory_is_a_bound():
    for memory, n in ((7, 7), (10_000, len(NORMAL) * 16)):
        d = fit(NearestPatches, memory=memory)
        assert d.bank_.shape == (n, 112)
    assert len(d.held_out_) == len(NORMAL)


def test_who_fills_the_memory_gives_no_threshold():
    d = fit(NearestPatches, memory=1)
    assert len(d.held_out_) == len(NORMAL) - 1 and np.isfinite(d.threshold_)


# ---------------------------------------------------------------- places
def test_nearest_distances_in_blocks():
    rows, bank = draws(50, 6), draws(30, 6, seed=1)
    wanted = torch.cdist(rows.double(), bank.double()).amin(1).float()
    for most in (1, 100, 10**9):
        torch.testing.assert_close(nearest_distances(rows, bank, most=most), wanted)
    own = torch.arange(50) // 5
    found = nearest_distances(rows, rows, own, own, most=200)
    for i in (0, 17, 49):
        others = rows[own != own[i]]
        torch.testing.assert_close(found[i], (others - rows[i]).norm(dim=1).min())
    assert nearest_distances(rows[:5], rows[:5], own[:5], own[:5]).isinf().all()


def averages_neighbors(f):
    m = draws(2, 3, 5, 4)
    found = f(m, 3)
    for y, x in ((0, 0), (2, 1), (4, 3), (0, 2)):
        window = m[:, :, max(0, y - 1):y + 2, max(0, x - 1):x + 2]
        torch.testing.assert_close(found[:, :, y, x], window.mean((2, 3)))
    assert torch.equal(f(m, 1), m)

def test_local_mean(): averages_neighbors(local_mean)

@pytest.mark.parametrize('broken', [
    lambda m, side: torch.nn.functional.avg_pool2d(m, side, 1, side // 2),
    lambda m, side: torch.nn.functional.max_pool2d(m, side, 1, side // 2),
    lambda m, side: m], ids=['padded with zeros', 'maximum', 'nothing'])
def test_mutant_of_the_mean_is_caught(broken): assert_caught(averages_neighbors, broken)


def lies_under_the_finer_one(f):
    fine, coarse = draws(2, 3, 8, 8), torch.zeros(2, 1, 4, 4)
    coarse[:, :, 1, 2] = 1
    both = f([fine, coarse])
    assert both.shape == (2, 4, 8, 8), 'not the finest places'
    assert torch.equal(both[:, :3], fine)
    y, x = divmod(int(both[0, 3].argmax()), 8)
    assert (y // 2, x // 2) == (1, 2), 'another place'
    assert both[0, 3, 2:4, 4:6].min() > .5 and both[0, 3, 0, 0] == 0

def test_joined_maps(): lies_under_the_finer_one(joined)

def pooled_down(maps):
    small = maps[-1].shape[2:]
    return torch.cat([torch.nn.functional.adaptive_avg_pool2d(m, small) for m in maps], 1)

def cut_off(maps):
    h, w = maps[-1].shape[2:]
    return torch.cat([m[:, :, :h, :w] for m in maps], 1)

def padded(maps):
    h, w = maps[0].shape[2:]
    return torch.cat([torch.nn.functional.pad(m, (0, w - m.shape[3], 0, h - m.shape[2]))
                      for m in maps], 1)

@pytest.mark.parametrize('broken', [pooled_down, cut_off, padded], ids=lambda f: f.__name__)
def test_mutant_of_the_join_is_caught(broken): assert_caught(lies_under_the_finer_one, broken)


def test_a_view_of_two_strides():
    view = PatchView((1, 64, 64), 'efficientnet_lite0', (16, 8), neighborhood=3)
    view.load()
    x = torch.tensor(CLOTH.x_test[:6])
    eight, sixteen = (local_mean(torch.tensor(m), 3) for m in feature_maps(
        backbone('efficientnet_lite0', size=64), CLOTH.x_test[:6], (8, 16)))
    with torch.no_grad(): m = view(x)
    torch.testing.assert_close(m, joined([eight, sixteen]), rtol=1e-3, atol=1e-4)
    view.standardize(m)
    with torch.no_grad(): m = view(x)
    assert m.mean((0, 2, 3)).abs().max() < 1e-3
    for part in m.split([eight.shape[1], sixteen.shape[1]], 1):
        assert part.var((0, 2, 3)).mean() == pytest.approx(1, abs=1e-3)


def test_views_are_remembered_apart():
    x = torch.tensor(CLOTH.x_test[:3])
    with remembered():
        for kw in (dict(strides=(16,)), dict(strides=(8, 16)),
                   dict(strides=(16,), neighborhood=3), dict(strides=(16,))):
            view = PatchView((1, 64, 64), 'efficientnet_lite0', **kw)
            view.load()
            torch.testing.assert_close(view.frozen(x), view.look(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('neighborhood, second', [(1, None), (3, None), (3, 8)])
def test_places_by_an_independent_search(neighborhood, second):
    d = fit(NearestPatches, neighborhood=neighborhood, second_stride=second)
    train, test = (d.for_each(d.nets_.view, x) for x in (NORMAL, CLOTH.x_test))
    rows = lambda m: np.moveaxis(m, 1, -1).reshape(-1, m.shape[1])
    far = NearestNeighbors(n_neighbors=1).fit(rows(train)).kneighbors(rows(test))[0]
    far = np.sort(far.reshape(len(test), -1), 1)
    k = max(1, far.shape[1] // 10)
    np.testing.assert_allclose(d.decision_function(CLOTH.x_test), far[:, -k:].mean(1), rtol=1e-3)


def takes_the_top(cls):
    d = fit(cls)
    with torch.no_grad():
        far = nearest_distances(places(d.nets_.view(torch.tensor(CLOTH.x_test))), d.bank_)
    np.testing.assert_allclose(d.decision_function(CLOTH.x_test), far.view(60, -1).amax(1),
                               rtol=1e-4)     # a tenth of 16 places is one


def test_the_score_is_the_top(): takes_the_top(NearestPatches)

def test_a_mean_of_all_places_is_caught():
    assert_caught(takes_the_top, changed(
        NearestPatches, map_score=lambda self, m: self.place_scores(m).mean((1, 2))))


def test_a_training_image_is_measured_by_the_others():
    d = fit(NearestPatches)
    for i in (0, 11):
        others = NearestPatches(**PATCHES).fit(np.delete(NORMAL, i, 0))
        others.nets_.view.load_state_dict(d.nets_.view.state_dict())      # one scale
        apart = d.bank_.view(len(NORMAL), -1, 112)
        others.bank_ = apart[np.arange(len(NORMAL)) != i].flatten(0, 1)
        assert float(d.held_out_[i]) == pytest.approx(
            float(others.decision_function(NORMAL[i:i + 1])[0]), rel=1e-3)


def test_defects_light_up():
    d = fit(NearestPatches, stride=8)
    maps = d.anomaly_map(CLOTH.x_test)
    assert maps.shape == CLOTH.masks_test.shape and pixel_auroc(CLOTH.masks_test, maps) > .8


@pytest.mark.parametrize('cls', [DN2, Mahalanobis, NearestPatches])
def test_pretrained_beats_its_untrained_twin(cls):
    trained, raw = (np.mean([auroc(CLOTH.y_test, fit(cls, weights=w, seed=s, size=64)
                                   .decision_function(CLOTH.x_test)) for s in range(3)])
                    for w in ('imagenet', 'random'))
    assert trained > .75 and trained > raw + .05, (trained, raw)


@pytest.mark.parametrize('cls', [DN2, Mahalanobis, NearestPatches])
def test_a_file_holds_all(cls, tmp_path, monkeypatch):
    d = fit(cls)
    d.save(tmp_path/'d.safetensors')
    monkeypatch.setattr('ad_course.backbones.load_packaged', lambda *a: pytest.fail('loaded'))
    again = load(tmp_path/'d.safetensors')
    assert np.array_equal(again.decision_function(CLOTH.x_test), d.decision_function(CLOTH.x_test))
    assert torch.equal(again.held_out_, d.held_out_)


@pytest.mark.parametrize('cls, settings, name', [
    (DN2, dict(backbone='resnet19'), 'backbone'), (DN2, dict(size=16), 'size'),
    (DN2, dict(weights='imagenet-v1'), 'weights'), (DN2, dict(k=0), 'k'),
    (Mahalanobis, dict(folds=1), 'folds'), (NearestPatches, dict(stride=7), 'stride'),
    (NearestPatches, dict(second_stride=7), 'second_stride'),
    (NearestPatches, dict(second_stride=8), 'second_stride'),
    (NearestPatches, dict(neighborhood=2), 'neighborhood'),
    (NearestPatches, dict(neighborhood=0), 'neighborhood'),
    (NearestPatches, dict(memory=0), 'memory'), (NearestPatches, dict(coreset='k'), 'coreset'),
    (NearestPatches, dict(projection=-1), 'projection'),
    (NearestPatches, dict(top_share=0), 'top_share'),
    (NearestPatches, dict(backbone='vit_b_16'), 'backbone')], ids=str)
def test_wrong_settings(cls, settings, name):
    with pytest.raises(ValueError, match=f'{cls.__name__}: {name} must be .*; got'):
        cls(**QUIET | settings).fit(NORMAL)
