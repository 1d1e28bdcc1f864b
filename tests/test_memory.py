"""The sum of labels and memory: who is set aside, what the memory holds, and equation (1)."""
import numpy as np
import pytest
import torch

from ad_course.batches import Part
from ad_course.data import label_anomalies
from ad_course.detector import load
from ad_course.deviation import Classifier
from ad_course.dra import DRA
from ad_course.feature_maps import remembered, to_pixels, top_mean
from ad_course.memory import MemoryClassifier, MemoryDRA, WithMemory
from ad_course.pretrained import local_mean, nearest_distances, places
from ad_course.surfaces import surfaces
from tests.labelled import check_labels_needed
from tests.mutants import assert_caught, changed, each_mutant

QUICK = dict(epochs=2, hidden=8, device='cpu', verbose=False)
CLOTH = label_anomalies(surfaces(n_train=30, n_test=24, size=32, seed=0), 6, seed=0)
X, Y, TEST = CLOTH.x_train, CLOTH.y_train, CLOTH.x_test


@pytest.fixture(scope='module', autouse=True)
def maps_once():
    with remembered(): yield


def fitted(cls, **settings): return cls(**QUICK | settings).fit(X, Y)
def view(d, x):
    with torch.no_grad(): return d.nets_.view(torch.tensor(x))
def parts(d, x):
    return np.array(d.for_each(lambda xb: torch.stack(d.parts(d.nets_.view(xb)), 1), x).T)


# ---------------------------------------------------------------- who learns from whom
def a_fifth_is_set_aside(cls):
    d = fitted(cls)
    aside = d.aside_.numpy()
    assert aside.sum() == 6 and not Y[aside].any(), 'set aside: a fifth of the normal images'


def the_learned_part_is_the_detector_alone(cls):
    d = fitted(cls)
    rest = ~d.aside_.numpy()
    alone = Classifier(**QUICK).fit(X[rest], Y[rest])
    close = np.allclose(parts(d, TEST)[0], alone.decision_function(TEST), rtol=1e-3, atol=1e-3)
    assert close, 'the learned part'


def the_memory_holds_the_other_normal_images(cls):
    d = fitted(cls)
    rest = ~d.aside_.numpy() & (Y == 0)
    wanted = places(local_mean(view(d, X[rest]), d.neighborhood))
    assert d.bank_.shape == wanted.shape, 'the memory holds others'
    there = nearest_distances(wanted, d.bank_).max(), nearest_distances(d.bank_, wanted).max()
    assert max(there) < 1e-2, 'the memory holds others'


def the_distance_is_to_the_nearest_place(cls):
    d = fitted(cls)
    m = local_mean(view(d, TEST), d.neighborhood)
    far = torch.cdist(m.flatten(2).mT.double(), d.bank_.double()).amin(2)
    torch.testing.assert_close(d.memory_map(view(d, TEST)).flatten(1), far.float(),
                               rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(parts(d, TEST)[1], top_mean(far, .1), rtol=1e-3)


def scales_come_from_those_set_aside(cls):
    d = fitted(cls)
    s = parts(d, X[d.aside_.numpy()])
    assert np.allclose(d.scales_, [s.mean(1), s.std(1, ddof=1)], rtol=1e-3), 'scales of others'


def the_score_is_equation_1(cls):
    d = fitted(cls)
    mean, scale = d.scales_.numpy()[:, :, None]
    wanted = ((parts(d, TEST) - mean) / scale).sum(0)
    close = np.allclose(d.decision_function(TEST), wanted, rtol=1e-3, atol=1e-3)
    assert close, 'the score is another one'


def the_map_is_equation_1_place_by_place(cls):
    d = fitted(cls)
    m, (mean, scale) = view(d, TEST), d.scales_
    with torch.no_grad(): of = d.place_scores(m), d.memory_map(m)
    wanted = sum((s - mean[i]) / scale[i] for i, s in enumerate(of))
    close = np.allclose(d.anomaly_map(TEST), to_pixels(wanted, d.shape_), rtol=1e-3, atol=1e-3)
    assert close, 'the map is another one'


def the_threshold_comes_from_those_set_aside(cls):
    d = fitted(cls)
    wanted = np.quantile(d.decision_function(X[d.aside_.numpy()]), .95)
    assert np.isclose(d.threshold_, wanted, rtol=1e-4), 'a threshold from others'


CHECKS = [a_fifth_is_set_aside, the_learned_part_is_the_detector_alone,
          the_memory_holds_the_other_normal_images, the_distance_is_to_the_nearest_place,
          scales_come_from_those_set_aside, the_score_is_equation_1,
          the_map_is_equation_1_place_by_place, the_threshold_comes_from_those_set_aside]


@pytest.mark.parametrize('promise', CHECKS, ids=lambda f: f.__name__)
def test_the_sum(promise): promise(MemoryClassifier)


class NobodySetAside(MemoryClassifier):
    """All learn and all are in the memory; some of them set the scales."""
    def train(self, data):
        super().train(data)
        scales = self.scales_
        Classifier.train(self, data)
        look = lambda xb: local_mean(self.nets_.view(xb), self.neighborhood)
        self.bank_ = places(torch.as_tensor(self.map_normal(look, data)))
        self.scales_ = scales

class LabelledInMemory(MemoryClassifier):
    """Labelled anomalies are in the memory too."""
    def train(self, data):
        super().train(data)
        bad = torch.as_tensor(X[Y == 1])
        with torch.no_grad(): more = places(local_mean(self.nets_.view(bad), self.neighborhood))
        self.bank_ = torch.cat([self.bank_, more])

class TrainingScales(MemoryClassifier):
    """Mean and deviation of images that both parts have learned from."""
    def train(self, data):
        super().train(data)
        both = lambda xb: torch.stack(self.parts(self.nets_.view(xb)), 1)
        seen = torch.as_tensor(self.map_normal(both, Part(data, ~self.aside_)))
        self.scales_ = torch.stack([seen.mean(0), seen.std(0).clamp(min=1e-6)])

class NoNeighbors(MemoryClassifier):
    """The memory is of means over neighbors, and what is compared with it is not."""
    def memory_map(self, m):
        return nearest_distances(places(m), self.bank_).view(len(m), *m.shape[2:])


def minus(self, parts):
    mean, scale = self.scales_
    a, b = ((s - mean[i]) / scale[i] for i, s in enumerate(parts))
    return a - b

def first_alone(self, parts): return (parts[0] - self.scales_[0, 0]) / self.scales_[1, 0]
def second_alone(self, parts): return (parts[1] - self.scales_[0, 1]) / self.scales_[1, 1]
def without_scales(self, parts): return parts[0] + parts[1]
def map_of_the_learned_part(self, xb):
    return to_pixels(self.place_scores(self.nets_.view(xb)), self.shape_)
def all_scores(self, data): return Classifier.training_scores(self, Part(data, ~self.aside_))


@each_mutant({
    'the learned part': [NobodySetAside], 'the memory holds others': [LabelledInMemory],
    'scales of others': [TrainingScales],
    'the score is another one': [changed(MemoryClassifier, summed=f) for f in
                                 (minus, first_alone, second_alone, without_scales)],
    'the map is another one': [changed(MemoryClassifier, pixel_score=map_of_the_learned_part)],
    'a threshold from others': [changed(MemoryClassifier, training_scores=all_scores)],
    'Tensor-likes are not close': [NoNeighbors]})
def test_mutant_is_caught(why, broken):
    check = {'the learned part': the_learned_part_is_the_detector_alone,
             'the memory holds others': the_memory_holds_the_other_normal_images,
             'scales of others': scales_come_from_those_set_aside,
             'the score is another one': the_score_is_equation_1,
             'the map is another one': the_map_is_equation_1_place_by_place,
             'a threshold from others': the_threshold_comes_from_those_set_aside,
             'Tensor-likes are not close': the_distance_is_to_the_nearest_place}[why]
    assert_caught(check, broken, why)


# ---------------------------------------------------------------- the detector
def test_with_dra_the_learned_part_is_dra():
    """Without pseudo-anomalies: those are drawn batch by batch, and batches are others."""
    same = dict(heads=('seen', 'residual', 'normality'), n_pseudo=0)
    d = fitted(MemoryDRA, **same)
    rest = ~d.aside_.numpy()
    alone = DRA(**QUICK | same).fit(X[rest], Y[rest])
    np.testing.assert_allclose(parts(d, TEST)[0], alone.decision_function(TEST), rtol=1e-3,
                               atol=1e-3)


def test_defaults_are_those_of_the_learned_part():
    """A mixin that is a detector itself would bring the defaults of all detectors."""
    for cls, parent in ((MemoryDRA, DRA), (MemoryClassifier, Classifier)):
        own, theirs = cls().get_params(), parent().get_params()
        assert {k: own[k] for k in theirs if k != 'hidden'} == {
            k: v for k, v in theirs.items() if k != 'hidden'}


def test_the_memory_looks_through_the_view_that_learned():
    d = fitted(MemoryClassifier, thaw=1, size=32, epochs=1, lr=1e-2)
    rest = ~d.aside_.numpy() & (Y == 0)
    wanted = places(local_mean(view(d, X[rest]), d.neighborhood))
    assert torch.cdist(wanted.double(), d.bank_.double()).amin(1).max() < 1e-3
    s = parts(d, X[d.aside_.numpy()])
    np.testing.assert_allclose(d.scales_[0], s.mean(1), rtol=1e-3, atol=1e-4)


def test_from_scratch():
    d = fitted(MemoryClassifier, backbone=None, width=4)
    assert np.isfinite(d.decision_function(TEST)).all() and d.bank_.shape[1] == 16


def test_the_memory_has_a_limit():
    d, whole = fitted(MemoryClassifier, memory=50), fitted(MemoryClassifier)
    assert len(d.bank_) == 50 and nearest_distances(d.bank_, whole.bank_).max() < 1e-2


def test_a_file_holds_both_parts(tmp_path):
    d = fitted(MemoryDRA)
    d.save(tmp_path/'d.safetensors')
    again = load(tmp_path/'d.safetensors')
    assert np.array_equal(again.decision_function(TEST), d.decision_function(TEST))
    assert np.array_equal(again.anomaly_map(TEST), d.anomaly_map(TEST))


@pytest.mark.parametrize('n, ok', [(3, True), (2, False)])
def test_two_are_set_aside_and_one_is_left(n, ok):
    kept = np.concatenate([np.flatnonzero(Y == 0)[:n], np.flatnonzero(Y == 1)])
    d = MemoryClassifier(**QUICK)
    if ok:
        assert len(d.fit(X[kept], Y[kept]).bank_) == 16
        return
    with pytest.raises(ValueError, match='fit needs at least 3 normal images; got 2'):
        d.fit(X[kept], Y[kept])


def test_labels_are_needed(): check_labels_needed(MemoryClassifier, X[:20], **QUICK)


@pytest.mark.parametrize('settings, name', [
    (dict(held_out=0), 'held_out'), (dict(held_out=.95), 'held_out'), (dict(memory=0), 'memory'),
    (dict(neighborhood=2), 'neighborhood'), (dict(neighborhood=0), 'neighborhood'),
    (dict(hidden=-1), 'hidden')], ids=str)
def test_wrong_settings(settings, name):
    with pytest.raises(ValueError, match=f'MemoryClassifier: {name} must be .*; got'):
        MemoryClassifier(**QUICK | settings).fit(X, Y)


def test_the_base_is_no_detector():
    assert not hasattr(WithMemory, 'fit')
