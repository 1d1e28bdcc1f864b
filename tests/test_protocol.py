"""The table of results: every value by hand, failures kept apart, and mutants that must be seen."""
import functools
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.base import clone

from ad_course import protocol
from ad_course.baselines import KNN, PCA, MeanImage
from ad_course.data import Task, digits
from ad_course.detector import Detector
from ad_course.metrics import auroc, oracle_f1, report
from ad_course.protocol import Comparison, compare, wins

from tests.mutants import assert_caught, each_mutant, mutant


@dataclass(kw_only=True, eq=False, repr=False)
class Told(Detector):
    """Scores with what it has been told: the seed, the task's first pixel, the labels."""
    sign: float = 1.
    def train(self, data):
        batches = [*data.batches(self.batch_size)]
        self.first_ = float(batches[0][0].flatten()[0])
        self.labelled_ = sum(int(y.sum()) for _, y in batches)
    def image_score(self, xb):
        return self.sign * (xb.mean((1, 2, 3)) + self.seed + self.first_ + self.labelled_)


@dataclass(kw_only=True, eq=False, repr=False)
class ToldLabels(Told):
    uses_labels = True


@dataclass(kw_only=True, eq=False, repr=False)
class Fails(MeanImage):
    """Fails for one seed, on tasks of one size."""
    on: int = 1
    size: int = 3
    def learn(self, rows):
        if self.seed == self.on and rows.shape[1] == self.size**2: raise OSError('out of disk')
        super().learn(rows)


def drawn(seed, size=3):
    """A task of flat images: normal ones are dark, and brighter with the seed."""
    rng = np.random.default_rng([seed, size])
    x = rng.random((20, 1, size, size), dtype='float32')
    y = np.arange(10) % 2
    test = x[:10] * .5 + .3 * rng.random((10, 1, 1, 1), dtype='float32') * y[:, None, None, None]
    marked = np.arange(10) < 2
    kinds = np.where(y, 'bright', 'normal')
    return Task(f'{size}', x[10:], test, y == 1, f'seed {seed}', y_train=marked,
                kinds_test=kinds, kinds_train=np.where(marked, 'bright', 'normal'))


TASKS = {'small': functools.partial(drawn, size=3), 'fixed': drawn(7, size=4)}
total = lambda y, scores: float(scores.astype('float64').sum())     # shows all that was told


def check_compare(f=compare):
    """Each value is that of a fresh copy on the task of its own seed; nothing else is touched."""
    contest = dict(plain=Told(), minus=Told(sign=-1.), labels=ToldLabels())
    seeds, before = (3, 1), torch.get_rng_state()
    params = {name: d.get_params() for name, d in contest.items()}
    result = f(contest, TASKS, seeds=seeds, metric=total)
    assert result.values.shape == result.seconds.shape == (3, 2, 2), 'shape'
    for name, d in contest.items():
        for i, make in enumerate(TASKS.values()):
            for j, seed in enumerate(seeds):
                t = make if isinstance(make, Task) else make(seed)
                told = seed + t.x_train[0, 0, 0, 0] + 2 * d.uses_labels
                want = d.sign * (t.x_test.mean((1, 2, 3)) + told).sum()
                got = result.values[list(contest).index(name), i, j]
                np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f'value of {name}')
    assert {name: d.get_params() for name, d in contest.items()} == params, 'changed'
    assert not any(hasattr(d, 'threshold_') for d in contest.values()), 'originals were fitted'
    assert torch.equal(before, torch.get_rng_state()), 'global state'
    assert (result.detectors, result.tasks) == (list(contest), list(TASKS)), 'names'
    assert (result.seconds > 0).all() and (result.seconds < 60).all(), 'seconds'


def test_compare_by_hand(): check_compare()


def fit(detector, task, seed, metric, *, task_seed=None, detector_seed=None, copy=True,
        labels=None, swapped=False, seconds=.1):
    """`_fit_once` with something else in it."""
    if not isinstance(task, Task): task = task(seed if task_seed is None else task_seed)
    d = protocol.clone(detector) if copy else detector
    d.set_params(seed=seed if detector_seed is None else detector_seed)
    labelled = d.uses_labels if labels is None else labels
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        d.fit(task.x_train, *[task.y_train] * labelled)
    scores = d.decision_function(task.x_test)
    return metric(task.y_test, -scores if swapped else scores), seconds, None


MUTANTS = {
    'value of': (dict(task_seed=0), dict(detector_seed=0), dict(labels=False), dict(swapped=True)),
    'changed|fitted': (dict(copy=False),), 'seconds': (dict(seconds=0.),)}


@each_mutant(MUTANTS)
def test_a_fit_with_a_defect_is_caught(why, broken):
    with mutant(protocol, _fit_once=functools.partial(fit, **broken)):
        assert_caught(check_compare, compare, why)


def test_the_imitation_itself_passes():
    with mutant(protocol, _fit_once=fit): check_compare()


def test_two_processes_give_the_same():
    one, two = (compare(dict(PCA=PCA()), dict(a=digits), seeds=(0, 1), n_jobs=n) for n in (1, 2))
    assert np.array_equal(one.values, two.values)


# ---------------------------------------------------------------- failures
def test_a_failure_takes_nobody_along():
    contest = dict(good=MeanImage(), bad=Fails())
    with pytest.warns(UserWarning, match='bad failed on small, seed 1: OSError: out of disk'):
        result = compare(contest, TASKS, seeds=(0, 1))
    alone = compare(dict(good=MeanImage()), TASKS, seeds=(0, 1))
    assert np.array_equal(result['good'], alone['good'])
    assert np.isnan(result['bad']).tolist() == [[False, True], [False, False]]
    assert np.isnan(result.seconds[1]).tolist() == np.isnan(result['bad']).tolist()
    assert result.errors == {('bad', 'small', 1): 'OSError: out of disk'} and not alone.errors
    head, good, bad = result.rows()
    assert bad[0] == 'bad' and bad[1] == 'failed' and bad[2] == f'{result["bad"][1].mean():.3f}'
    assert bad[3:] == ['failed'] * 3 and 'failed' not in good and len(head) == len(bad)
    assert np.isnan(result.mean('bad')) and np.isnan(result.spread('bad'))
    assert 'failed' in repr(result) and 'failed' in result._repr_markdown_()
    with pytest.raises(ValueError, match='got 1 of 4 pairs with a failed fit'):
        wins(result, 'good', 'bad')
    assert wins(result, 'good', 'good') == .5


@pytest.mark.parametrize('n_jobs', [1, 2])
def test_values_stand_in_their_places_however_the_fits_are_ordered(n_jobs):
    made = []
    def maker(name):
        return lambda seed: made.append((name, seed)) or drawn(seed)
    contest = dict(a=MeanImage(), b=PCA(), c=KNN())
    tasks = dict(t=maker('t'), fixed=drawn(5), u=maker('u'))
    result = compare(contest, tasks, seeds=(2, 0), n_jobs=n_jobs)
    # once for the check of the metric, then once for all detectors
    if n_jobs == 1: assert made == [('t', 2), ('t', 2), ('t', 0), ('u', 2), ('u', 0)]
    for i, d in enumerate(contest.values()):
        for j, task in enumerate(tasks.values()):
            for k, seed in enumerate((2, 0)):
                t = task if isinstance(task, Task) else drawn(seed)
                want = auroc(t.y_test, clone(d).fit(t.x_train).decision_function(t.x_test))
                assert result.values[i, j, k] == want


def test_a_task_or_a_metric_that_fails_later_is_kept_too():
    def once(seed):
        if seed: raise FileNotFoundError('no such split')
        return drawn(0)
    def choosy(y, scores):
        if scores.max() == scores.min(): raise ZeroDivisionError('no spread')
        return auroc(y, scores)
    with pytest.warns(UserWarning, match='no such split'):
        result = compare(dict(good=MeanImage()), dict(t=once), seeds=(0, 1))
    assert np.isfinite(result.values).tolist() == [[[True, False]]]
    class Constant(MeanImage):
        def image_score(self, xb): return 0 * super().image_score(xb)
    with pytest.warns(UserWarning, match='ZeroDivisionError: no spread'):
        result = compare(dict(a=MeanImage(), b=Constant()), dict(t=drawn(0)), (0,), choosy)
    assert np.isfinite(result.values).ravel().tolist() == [True, False]


def test_all_fail():
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match='every fit.*OSError: out of'):
        compare(dict(bad=Fails()), dict(small=drawn), seeds=(1,))


def test_an_interruption_is_no_failure():
    class Stopped(MeanImage):
        def learn(self, rows): raise SystemExit
    with pytest.raises(SystemExit): compare(dict(a=Stopped()), dict(t=drawn(0)), (0,))


@pytest.mark.parametrize('change, message', [
    (dict(detectors={}), 'got 0, 1 and 1'), (dict(tasks={}), 'got 1, 0 and 1'),
    (dict(seeds=()), 'got 1, 1 and 0'),
    (dict(detectors=dict(a=MeanImage)), "detectors must be unfitted detectors.*got 'a'"),
    (dict(detectors=dict(a=None)), 'detectors must'), (dict(tasks=dict(t=5)), "got 't': 5"),
    (dict(seeds=(0, 0)), 'seeds must be different'), (dict(seeds=(-1,)), 'seeds must'),
    (dict(seeds=(.5,)), 'seeds must'), (dict(seeds=(True,)), 'seeds must'),
    (dict(metric=oracle_f1), r'metric must give one finite number; got \('),
    (dict(metric=report), 'metric must'), (dict(metric=lambda y, s: s), 'metric must'),
    (dict(metric=lambda y, s: float('nan')), 'got nan'), (dict(metric=lambda y, s: None), 'None'),
], ids=str)
def test_what_is_wrong_from_the_start_costs_no_fit(change, message):
    class Counted(MeanImage):
        fits = 0
        def learn(self, rows): Counted.fits += 1
    settings = dict(detectors=dict(a=Counted()), tasks=dict(t=drawn(0)), seeds=(0,))
    with pytest.raises(ValueError, match=message): compare(**settings | change)
    assert not Counted.fits


class Half:
    def __call__(self, y, scores): return .5


@pytest.mark.parametrize('metric, name', [
    (auroc, 'AUROC'), (functools.partial(auroc), 'AUROC'), (Half(), 'Half'),
    (lambda y, s: 1, '<lambda>'), (lambda y, s: np.float32(.25), '<lambda>')])
def test_metrics_of_any_kind(metric, name):
    result = compare(dict(a=MeanImage()), dict(t=drawn(0)), seeds=(0,), metric=metric)
    assert result.rows()[0][0] == name and result.values.dtype == float


# ---------------------------------------------------------------- the table and its pairs
A = [[.9, .8, .7], [.6, .6, .6]]
B = [[.8, .8, .8], [.5, .5, .5]]
HAND = Comparison(['A', 'B'], ['t', 'u'], np.array([A, B]), np.full((2, 2, 3), 2.), 'auroc')


def test_the_table_by_hand():
    assert HAND.mean('A') == pytest.approx(.7) and HAND.mean('B') == pytest.approx(.65)
    assert HAND.spread('A') == pytest.approx(.05)              # .75, .7, .65 seed by seed
    assert HAND.spread('B') == 0
    assert HAND.rows() == [['AUROC', 't', 'u', 'mean', '± seeds', 's a fit'],
                           ['A', '0.800', '0.600', '0.700', '0.050', '2.0'],
                           ['B', '0.800', '0.500', '0.650', '0.000', '2.0']]
    lines = repr(HAND).splitlines()
    assert len({*map(len, lines)}) == 1 and lines[1].split() == HAND.rows()[1]
    assert HAND._repr_markdown_().splitlines()[2] == '| A | 0.800 | 0.600 | 0.700 | 0.050 | 2.0 |'


def test_wins_by_hand():
    assert wins(HAND, 'A', 'B') == (1 + .5 + 0 + 3) / 6       # .9 > .8, a tie, .7 < .8, then all
    assert wins(HAND, 'B', 'A') == 1 - wins(HAND, 'A', 'B') and wins(HAND, 'A', 'A') == .5


def test_a_single_seed_has_no_spread():
    one = Comparison(['A'], ['t'], np.full((1, 1, 1), .5), np.ones((1, 1, 1)), 'AP')
    assert np.isnan(one.spread('A')) and one.rows()[1][3] == 'nan' and one.rows()[0][0] == 'AP'


def test_names_and_shapes_are_checked():
    for f in (HAND.mean, HAND.spread, lambda name: wins(HAND, 'A', name)):
        with pytest.raises(KeyError, match="'C' was not compared, only A, B"): f('C')
    for values, seconds in (((2, 2), (2, 2)), ((1, 2, 3), (1, 2, 3)), ((2, 2, 3), (2, 2, 1))):
        with pytest.raises(ValueError, match=r'must be \(detectors, tasks, seeds\), \(2, 2\)'):
            Comparison(['A', 'B'], ['t', 'u'], np.ones(values), np.ones(seconds), 'auroc')
