"""Metrics against hand-worked values, scikit-learn, brute force and their invariances."""
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.ndimage import label
from scipy.stats import energy_distance as scipy_energy
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from ad_course.metrics import (auroc, average_precision, bootstrap, energy_distance, f1, iou,
                               oracle_f1, pixel_auroc, pixel_threshold, pro, pro_curve, report)

HAND = [  # y, scores, AUROC, AP
    ([0, 0, 0, 1, 1], [.1, .3, .5, .2, .9], 4/6, .75),
    ([0, 0, 0, 1, 1], [.1, .3, .5, .3, .9], 4.5/6, .75),           # a tie counts one half
    ([0, 1], [0, 1], 1, 1), ([0, 1], [1, 0], 0, .5), ([0, 1], [7, 7], .5, .5),
]


@pytest.mark.parametrize('y, scores, area, ap', HAND)
def test_by_hand(y, scores, area, ap):
    assert auroc(y, scores) == pytest.approx(area)
    assert average_precision(y, scores) == pytest.approx(ap)


# Few distinct values, so that ties are the rule; both classes present.
ranked = st.integers(2, 30).flatmap(lambda n: st.tuples(
    st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda y: 0 < sum(y) < len(y)),
    st.lists(st.integers(-6, 6), min_size=n, max_size=n)))


@given(ranked)
def test_auroc_is_the_probability_of_ranking(case):
    y, s = map(np.array, case)
    a, n = s[y == 1][:, None], s[y == 0][None]
    assert auroc(y, s) == pytest.approx(((a > n) + .5 * (a == n)).mean())
    assert auroc(y, -s) == pytest.approx(1 - auroc(y, s)) == pytest.approx(auroc(1 - y, s))


RISING = [np.exp, lambda s: s**3, lambda s: 2. * s - 100, lambda s: s.astype('f4'), np.arctan]


@given(ranked, st.sampled_from(RISING))
def test_only_the_order_counts(case, rising):
    y, s = map(np.array, case)
    for metric in (auroc, average_precision, lambda y, s: oracle_f1(y, s)[0]):
        assert metric(y, rising(s)) == pytest.approx(metric(y, s))


@given(ranked, st.integers(2, 9))
def test_base_rate_moves_ap_only(case, times):
    y, s = map(np.array, case)
    many = np.repeat(np.arange(len(y)), np.where(y == 0, times, 1))
    assert auroc(y[many], s[many]) == pytest.approx(auroc(y, s))
    assert average_precision(y[many], s[many]) <= average_precision(y, s) + 1e-12


@given(ranked, st.randoms())
def test_the_order_of_images_does_not_matter(case, random):
    pairs = list(zip(*case)); random.shuffle(pairs)
    y, s = zip(*pairs)
    for metric in (auroc, average_precision, oracle_f1):
        assert metric(y, s) == pytest.approx(metric(*case))


@given(ranked, st.integers(-7, 7))
def test_f1_is_scikit_learns(case, t):
    y, s = map(np.array, case)
    assert f1(y, s, t) == pytest.approx(f1_score(y, s > t, zero_division=0))


@given(ranked)
def test_oracle_f1_is_the_best_of_all_thresholds(case):
    y, s = map(np.array, case)
    best, where = oracle_f1(y, s)
    tried = {t: f1(y, s, t) for t in [-np.inf, *map(float, s)]}
    assert best == pytest.approx(max(tried.values())) == f1(y, s, where)
    assert where == max(t for t, v in tried.items() if v >= best - 1e-12)   # the highest
    assert best >= 2 * y.mean() / (1 + y.mean()) - 1e-12         # everything is an anomaly


def test_oracle_threshold_is_exact_for_float32():
    s = np.nextafter(np.float32(.1), np.float32(1), dtype=np.float32)
    y, scores = np.array([0, 1]), np.array([.1, s], np.float32)
    best, where = oracle_f1(y, scores)
    assert best == 1 and ((scores > np.float64(where)) == [False, True]).all()
    assert ((scores > where) == [False, True]).all()


def test_trivial_baseline():
    y = np.r_[np.zeros(100), np.ones(900)]
    assert round(f1(y, np.arange(1000.), -np.inf), 3) == .947
    assert oracle_f1(y, np.zeros(1000)) == (pytest.approx(1.8 / 1.9), -np.inf)


def test_like_scikit_learn_at_size():
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 5000), rng.normal(size=5000).round(2)
    assert auroc(y, s) == roc_auc_score(y, s)
    assert average_precision(y, s) == average_precision_score(y, s)


WRONG = [  # y, scores, message
    ([0, 0], [1, 2], 'both normal images and anomalies; got 2 normal, 0 anomalies'),
    ([1, 1], [1, 2], 'both normal'), ([], [], 'both normal'),
    ([0, 1], [1, np.nan], 'got NaN or infinity in 1 of 2 values, first at 1'),
    ([0, 1], [1, np.inf], 'NaN or infinity'), ([0, 1], [1, None], 'NaN'),
    ([0, 1], [1, 2, 3], 'shape'), ([0, 1], [[1], [2]], r'shape \(2, 1\)'), (1, 2., 'shape'),
    *((y, [1, 2], '0 .normal. or 1') for y in ([-1, 1], [1, 2], ['a', 'b'], [0, np.nan])),
]
METRICS = dict(auroc=auroc, ap=average_precision, oracle=oracle_f1, report=report,
               f1=lambda y, s: f1(y, s, 0))


@pytest.mark.parametrize('y, scores, message', WRONG)
@pytest.mark.parametrize('metric', METRICS.values(), ids=METRICS)
def test_wrong_input_is_named(metric, y, scores, message):
    with pytest.raises(ValueError, match=message): metric(y, scores)


@pytest.mark.parametrize('threshold', [float('nan'), 'high', None, [0, 1], np.zeros(2), True])
def test_wrong_threshold(threshold):
    with pytest.raises(ValueError, match='threshold must be a number'):
        f1([0, 1], [1, 2], threshold)


def test_threshold_of_any_numeric_type():
    for t in (1, 1., np.float32(1), np.float64(1), np.int64(1)): assert f1([0, 1], [1, 2], t) == 1


def test_tensors_bools_and_input_left_alone():
    y, s = torch.tensor([False, False, True, True]), torch.tensor([.1, .1, .2, .05])
    before = s.clone()
    assert auroc(y, s) == .5 and bootstrap(auroc, y, s, n=5) and torch.equal(s, before)
    for value in (auroc(y, s), average_precision(y, s), f1(y, s, .1)): assert type(value) is float


def test_report():
    found = report([0, 0, 0, 1, 1], [.1, .3, .5, .2, .9], .25)
    assert found == pytest.approx({'AUROC': 4/6, 'AP': .75, 'share of anomalies': .4, 'F1': .4})
    assert 'F1' not in report([0, 1], [0, 1])


# --- bootstrap

def test_bootstrap_is_stratified_seeded_and_leaves_global_state_alone():
    y, s = np.repeat([0, 1], [30, 5]), np.arange(35.)
    shares = []
    before = np.random.get_state()[1].copy()
    bootstrap(lambda y, s: shares.append(y.sum()) or 0., y, s, n=20)
    left_out = 35   # the acceleration leaves out each image once
    drawn = [share for share in shares if share == 5]
    assert len(shares) == 20 + 1 + left_out and len(drawn) == 20 + 1 + 30
    assert (np.random.get_state()[1] == before).all()
    s = np.random.default_rng(0).normal(size=35)
    one, again, other = (bootstrap(auroc, y, s, n=40, seed=seed) for seed in (3, 3, 4))
    assert one == again != other


def test_bootstrap_covers():
    """The 90 % interval of a mean holds the mean in about 90 % of repetitions; wider is wider."""
    rng, inside = np.random.default_rng(0), []
    mean = lambda y, s: s.mean()
    y = np.repeat([0, 1], 40)
    for i in range(200):
        s = rng.normal(size=80)
        low, high = bootstrap(mean, y, s, n=200, level=.9, seed=i)
        inside.append(low <= 0 <= high)
    assert .83 < np.mean(inside) < .96
    narrow, wide = (bootstrap(mean, y, s, level=v) for v in (.5, .99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_is_scipys_and_corrects_what_percentiles_do_not():
    """Normal scores and anomalies drawn so that the AUROC is .98 in theory, 25 of each."""
    rng, missed = np.random.default_rng(1), dict(bca=0, percentile=0)
    y, shift, n = np.repeat([0, 1], 25), np.sqrt(2) * stats.norm.ppf(.98), 150
    for i in range(n):
        s = rng.normal(size=50) + shift * y
        low, high = bootstrap(wins, y, s, n=99, level=.8, seed=i)
        plain = [wins(y, s[pick]) for pick in (drawn(rng) for _ in range(99))]
        missed['bca'] += not low <= .98 <= high
        missed['percentile'] += not np.quantile(plain, .1) <= .98 <= np.quantile(plain, .9)
    assert missed['bca'] < missed['percentile'] and abs(missed['bca'] / n - .2) < .1, missed


def wins(y, s):
    """The AUROC, in the fewest steps."""
    return (s[y == 1][:, None] > s[y == 0]).mean()


def drawn(rng):
    """Positions of 25 normal images and 25 anomalies, with replacement."""
    return np.concatenate([rng.integers(0, 25, 25), rng.integers(25, 50, 25)])


def test_bootstrap_of_a_perfect_ranking_is_a_point():
    assert bootstrap(auroc, [0, 0, 1, 1], [.1, .2, .8, .9], n=20) == (1, 1)
    with pytest.raises(ValueError, match='two images of each kind.*got 1'):
        bootstrap(auroc, [0, 0, 1], [0, 1, 2])


def test_bootstrap_lets_a_metric_warn():
    def doubtful(y, s):
        warnings.warn('the metric has a doubt')
        return auroc(y, s)
    with pytest.warns(UserWarning, match='has a doubt'):
        bootstrap(doubtful, [0, 0, 1, 1], [.1, .3, .2, .9], n=5)


def test_bootstrap_errors():
    wrong = dict(level=[95, 0, 1, float('nan'), '.9', True], n=[0, -1, 2.5, None])
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f'^{name} must be'):
                bootstrap(auroc, [0, 1], [0, 1], **{name: value})
    with pytest.raises(ValueError, match='got 2, 3'): bootstrap(auroc, [0, 1], [0, 1, 2])
    for metric in (auroc, lambda y, s: 0.):   # checked before the metric is asked
        with pytest.raises(ValueError, match='both normal'): bootstrap(metric, [0, 0], [0, 1])
        with pytest.raises(ValueError, match='0 .normal. or 1'): bootstrap(metric, [1, 2], [0, 1])


# --- maps

def brute_pro(masks, maps, max_fpr):
    """Every threshold, every region, and the area by exact trapezoids."""
    found = [label(m, np.ones((3, 3))) for m in masks]
    regions = [(a, r == i) for (r, k), a in zip(found, maps) for i in range(1, k + 1)]
    points = [(0., 0.)]
    for t in np.unique(maps)[::-1]:
        overlap = [(a[region] >= t).mean() for a, region in regions]
        points.append(((maps[masks == 0] >= t).mean(), np.mean(overlap)))
    area = 0.
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= max_fpr or x1 == x0: continue
        end = min(x1, max_fpr)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / max_fpr


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.sampled_from([.05, .3, .5, 1.]), st.integers(2, 40))
def test_pro_is_brute_force(seed, max_fpr, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 5, 6)) < rng.uniform(.05, .6)
    if masks.all() or not masks.any(): return
    maps = rng.integers(0, levels, masks.shape).astype(float)
    assert pro(masks, maps, max_fpr) == pytest.approx(brute_pro(masks, maps, max_fpr), abs=1e-12)
    risen = np.exp(maps / levels)
    assert pro(masks, risen, max_fpr) == pytest.approx(pro(masks, maps, max_fpr))
    assert pixel_auroc(masks, maps) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()))


def test_pro_by_hand():
    mask = np.array([[[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]])
    maps = np.array([[[9., 9, 4, 4, 4], [9, 9, 4, 4, 4], [4, 4, 4, 4, 1]]])
    assert pro(mask, maps) == .5           # one region of two
    assert pixel_auroc(mask, maps) == .8   # four pixels of five
    assert pro(mask, mask) == 1 and pro(mask, -mask) == 0
    for limit in (.1, .3, 1):
        assert pro(mask, 0 * maps, limit) == pytest.approx(limit / 2)   # chance


def test_pro_regions():
    """Corners connect, images do not, and a region counts once whatever its size."""
    mask = np.zeros((2, 4, 4), int)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[1, 0, 0] = 1          # 2 regions, of 2 and 1 pixels
    maps = np.zeros((2, 4, 4)); maps[0, 0, 0] = 1
    _, overlap = pro_curve(mask, maps)
    assert overlap[1] == .25                                            # half of one region of two


def test_pro_curve_is_monotone_from_corner_to_corner():
    rng = np.random.default_rng(0)
    fpr, overlap = pro_curve(rng.random((4, 16, 16)) < .1, rng.random((4, 16, 16)))
    assert (fpr[0], overlap[0], fpr[-1]) == (0, 0, 1) and overlap[-1] == pytest.approx(1)
    assert (np.diff(fpr) >= 0).all() and (np.diff(overlap) >= 0).all() and overlap.max() <= 1


def test_pro_is_fast():
    rng = np.random.default_rng(0)
    masks = np.kron(rng.random((100, 16, 16)) < .05, np.ones((1, 4, 4)))
    maps = rng.random((100, 64, 64))
    def seconds():
        start = time.perf_counter(); pro(masks, maps)
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < 1


DIAGONAL, ONES = np.eye(2)[None], np.ones((1, 2, 2))
WRONG_MAPS = [  # masks, maps, message
    (DIAGONAL[0], ONES[0], r'\(n, h, w\)'), (DIAGONAL[None], ONES[None], r'\(n, h, w\)'),
    (DIAGONAL, np.ones((1, 2, 3)), r'\(1, 2, 2\) and \(1, 2, 3\)'),
    (DIAGONAL * 255, ONES, 'masks > 0; got values from 0 to 255'),
    (DIAGONAL * .5, ONES, '0 .normal. or 1'),
    (0 * ONES, ONES, 'both defect pixels'), (ONES, ONES, 'both defect pixels'),
    (ONES[:0], ONES[:0], 'no pixels'), (DIAGONAL, np.nan * ONES, 'in 4 of 4 values'),
]


@pytest.mark.parametrize('masks, maps, message', WRONG_MAPS)
@pytest.mark.parametrize('metric', [pro, pixel_auroc, pro_curve])
def test_wrong_maps_are_named(metric, masks, maps, message):
    with pytest.raises(ValueError, match=message): metric(masks, maps)


@pytest.mark.parametrize('limit', [0, -1, 30, float('nan'), '.3', True])
def test_pro_limit(limit):
    with pytest.raises(ValueError, match='max_fpr'): pro(DIAGONAL, ONES, limit)


# --- a line, and what lies above it

def test_iou_by_hand():
    masks, called = np.array([[[1, 1, 0, 0]]]), np.array([[[0, 1, 1, 0]]])
    assert iou(masks, called) == 1 / 3 and iou(masks, masks) == 1 and iou(masks, 1 - masks) == 0
    assert iou(masks, 0 * called) == iou(0 * masks, called) == 0
    assert iou(masks > 0, torch.tensor(called)) == iou(1. * masks, called > 0) == 1 / 3
    two = iou(np.concatenate([masks, masks]), np.concatenate([called, masks]))
    assert two == 3 / 5                                      # pixels of all images together


@given(st.integers(0, 10**6))
def test_iou_is_f1_on_another_scale(seed):
    rng = np.random.default_rng(seed)
    masks, called = rng.random((2, 2, 4, 5)) < rng.uniform(.1, .9)
    if not 0 < masks.sum() < masks.size or not called.any(): return
    f = f1(masks.ravel(), called.ravel(), .5)
    assert iou(masks, called) == pytest.approx(f / (2 - f))
    assert iou(called, masks) == iou(masks, called)


@pytest.mark.parametrize('masks, called, message', [
    (DIAGONAL, DIAGONAL[0], r'\(n, h, w\)'), (DIAGONAL[0], DIAGONAL[0], r'\(n, h, w\)'),
    (DIAGONAL, np.ones((1, 2, 3)), r'\(1, 2, 2\) and \(1, 2, 3\)'),
    (DIAGONAL, DIAGONAL * .7, 'called pixels must be 0 .normal. or 1 .*got values from 0 to 0.7'),
    (DIAGONAL, ONES * np.nan, 'called pixels must be 0'), (DIAGONAL, -DIAGONAL, 'called pixels'),
    (DIAGONAL * 255, DIAGONAL, '^masks must be 0'), (ONES[:0], ONES[:0], 'no pixels'),
    (0 * ONES, 0 * ONES, 'neither'),
])
def test_iou_refuses(masks, called, message):
    with pytest.raises(ValueError, match=message): iou(masks, called)


def test_pixel_threshold_keeps_its_promise():
    maps = np.arange(1000.).reshape(10, 10, 10)
    for share in (.01, .1, .5): assert (maps > pixel_threshold(maps, share)).mean() == share
    assert pixel_threshold(maps) == pixel_threshold(torch.tensor(maps), .01) == 989.01


@pytest.mark.parametrize('maps, share, message', [
    *((ONES, bad, 'false_alarms must be a number') for bad in (0, 1, -1, float('nan'), '.1', True)),
    (np.array([[[1, np.nan]]]), .1, 'maps must be finite.*1 of 2 values, first at 1'),
    (ONES * np.inf, .1, 'maps must be finite'), (ONES[0], .1, r'\(n, h, w\).*got shape \(2, 2\)'),
    (ONES[:0], .1, 'at least one pixel'), (float('nan'), .1, r'got shape \(\)'),
])
def test_pixel_threshold_refuses(maps, share, message):
    with pytest.raises(ValueError, match=message): pixel_threshold(maps, share)


# --- two samples

@pytest.mark.parametrize('shift, scale', [(0, 1), (1, 1), (0, 3), (-2, .5)])
def test_energy_distance_is_that_of_scipy(shift, scale):
    g = np.random.default_rng(3)
    a, b = g.normal(size=60), g.normal(shift, scale, 45)
    ours, theirs = energy_distance(a[:, None], b[:, None]), scipy_energy(a, b)**2
    assert np.isclose(ours, theirs, rtol=1e-6, atol=1e-12)


def test_energy_distance_is_blind_to_rotation_and_order():
    g = np.random.default_rng(4)
    a, b = g.normal(size=(50, 3)), g.normal(.3, 1.2, size=(40, 3))
    turn = np.linalg.qr(g.normal(size=(3, 3)))[0]
    assert np.isclose(energy_distance(a, b), energy_distance(a[::-1].copy() @ turn, b @ turn))
    assert np.isclose(energy_distance(a, b), energy_distance(b, a))


def test_energy_distance_in_the_plane_by_a_loop():
    g = np.random.default_rng(5)
    a, b = g.normal(size=(7, 2)), g.normal(1, 1, size=(5, 2))
    mean = lambda u, v: np.mean([np.sqrt(((p - q)**2).sum()) for p in u for q in v])
    assert np.isclose(energy_distance(a, b), 2 * mean(a, b) - mean(a, a) - mean(b, b))
    assert np.isclose(energy_distance(torch.tensor(a), b), energy_distance(a, b))


@pytest.mark.parametrize('a, b, message', [
    ([[1, 2]], [[1, 2, 3]], r'got \(1, 2\) and \(1, 3\)'), ([1, 2], [[1, 2]], r'\(n, d\)'),
    (np.ones((0, 2)), [[1, 2]], r'got \(0, 2\)'), ([[1, np.nan]], [[1, 2]], '^a must be finite'),
    ([[1, 2]], [[1, np.inf]], '^b must be finite'),
])
def test_energy_distance_refuses(a, b, message):
    with pytest.raises(ValueError, match=message): energy_distance(a, b)
