"""The data chapter's promises: nothing in two places, exact rates, errors that say why."""
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from ad_course import backbones, data, pictures
from ad_course.baselines import PCA
from ad_course.batches import as_tensor
from ad_course.data import *
from ad_course.wrapping import ImageWrapper

from .mutants import mutant
from .tasks import check_apart, global_randomness_is_left_alone, no_smoke, pixels, quick, same, toy


# arrays

@quick
@given(shape=st.lists(st.integers(0, 5), min_size=0, max_size=6),
       dtype=st.sampled_from(['u1', 'f2', 'f4', 'f8', 'i8', 'bool', 'c8', 'U3']),
       scale=st.sampled_from([0, .5, 1, 2, -1, np.nan]))
def test_as_images_gives_one_form_or_an_error(shape, dtype, scale):
    x = np.ones(shape) * (scale if dtype[0] == 'f' else 1)
    x = x.astype(dtype)
    channels_last = len(shape) == 4 and shape[1] > 4 and shape[-1] in (1, 3, 4)
    good = (len(shape) in (3, 4) and 0 not in shape[1:] and not channels_last
            and (dtype == 'u1' or dtype[0] == 'f' and (x.size == 0 or scale in (0, .5, 1))))
    if not good:
        with pytest.raises(ValueError, match='mine'): as_images(x, 'mine')
    else:
        y = as_images(x, 'mine')
        assert y.ndim == 4 and y.dtype in (np.uint8, np.float32) and not y.flags.writeable
        assert x.flags.writeable and not np.shares_memory(x, y)


# what arithmetic adds

def noted(x):
    _, note = pictures._images(x)
    if note: raise ValueError(note)


GRAYS = np.random.default_rng(0).random((30, 1, 8, 8), dtype='float32')
# All that asks for pixels in [0, 1].
DOORS = {
    'arrays': as_images, 'tensors': lambda x: as_tensor(torch.tensor(x)),
    'tasks': lambda x: one_class(x, np.repeat([0, 1], [20, 10]), normal=0),
    'fit': lambda x: PCA(verbose=False).fit(x),
    'scores': lambda x: PCA(verbose=False).fit(GRAYS).decision_function(x),
    'datasets': lambda x: PCA(verbose=False).fit(TensorDataset(torch.tensor(x))),
    'backbones': lambda x: backbones._check_batch(torch.tensor(x)),
    'wrapping': ImageWrapper(clip=True).fit, 'pictures': noted,
}


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('side', [0, 1])
def test_one_rounding_is_forgiven_everywhere(door, side):
    """A resize ends at 1.0000001; ten times as much as is forgiven is a mistake."""
    outside = lambda much: np.where(GRAYS > .5, side + much * (2 * side - 1), GRAYS)
    for much in (1e-7, data.ROUNDING / 2): DOORS[door](outside(much).astype('float32'))
    with pytest.raises(ValueError): DOORS[door](outside(10 * data.ROUNDING).astype('float32'))


def test_what_is_forgiven_is_taken_off():
    x = np.linspace(-5e-4, 1 + 5e-4, 64, dtype='float32').reshape(1, 1, 8, 8)
    before = x.copy()
    for found in (as_images(x), as_tensor(x).numpy(), as_tensor(torch.tensor(x)).numpy()):
        np.testing.assert_array_equal(found, x.clip(0, 1))
    np.testing.assert_array_equal(x, before)
    inside = x.clip(0, 1)
    assert data.check_images(inside) is inside and data.ROUNDING < 1 / 255 / 2


# the value

def small_task(**changes):
    x, _ = toy(12)
    fields = dict(name='t', x_train=x[:4], x_test=x[4:8], y_test=[0, 0, 1, 1], protocol='p')
    return Task(**{**fields, **changes})


def test_task_defaults_and_repr():
    t = small_task()
    assert t.shape == (1, 5, 4)
    assert t.y_train.tolist() == [0] * 4 and t.kinds_train.tolist() == ['normal'] * 4
    assert t.kinds_test.tolist() == ['normal'] * 2 + ['anomaly'] * 2
    assert t.masks_test is None and len(t.x_reserve) == 0
    assert t.y_test.dtype == t.y_train.dtype == np.int64
    assert t.seen == () and t.unseen == ('anomaly',)
    assert len(repr(t)) < 500 and '2 normal, 2 anomalous' in repr(t)


def test_task_is_immutable_and_owns_its_arrays():
    x, _ = toy(12)
    t = small_task(x_train=x[:4])
    with pytest.raises(FrozenInstanceError): t.name = 'other'
    for a in (t.x_train, t.x_test, t.y_test, t.y_train, t.kinds_train, t.kinds_test, t.x_reserve,
              t.kinds_reserve):
        with pytest.raises(ValueError): a[:] = a
    x[:] = 0
    assert t.x_train.any()


@pytest.mark.parametrize('changes, words', [
    (dict(x_train=np.zeros((0, 5, 4), 'u1')), 'x_train must hold an image or more; got none'),
    (dict(x_test=np.zeros((4, 6, 4), 'u1')),
     r'x_test must hold uint8 images of \(1, 5, 4\).*got uint8 images of \(1, 6, 4\)'),
    (dict(x_test=np.zeros((4, 5, 4), 'f4')), 'x_test must hold uint8 .*got float32'),
    (dict(y_test=[0, 1]), r'y_test must be 4 labels.*got shape \(2,\)'),
    (dict(y_test=[0, 0, 1, -1]), '1 = anomaly.*got .*-1'),
    (dict(y_train=[0, 0, 0, 2]), 'y_train must be 4 labels'),
    (dict(kinds_test=['normal'] * 4), 'kinds_test must be .* y_test is 0; got normal at 2'),
    (dict(kinds_test=['a', 'b']), r'kinds_test must be 4 names.*got shape \(2,\)'),
    (dict(y_train=[1, 0, 0, 0], kinds_train=['normal'] * 4), "'normal'; got 1 at 0"),
    (dict(masks_test=np.zeros((4, 5, 5), bool)),
     r'masks_test must be \(4, 5, 4\); got \(4, 5, 5\)'),
    (dict(masks_test=np.ones((4, 5, 4), bool)), 'must mark 0 pixels; got 20 at 0'),
    (dict(masks_test=np.zeros((4, 5, 4), bool)), 'of an anomaly must mark a pixel.*got 0 at 2'),
    (dict(masks_test=np.full((4, 5, 4), np.nan)), 'masks_test must be finite'),
    (dict(kinds_test=['normal', 'normal', 'a', np.nan]), r'kinds_test\[3\] must be a name.*nan'),
    (dict(x_reserve=np.full((1, 5, 4), 7, 'u1'), kinds_reserve=['normal']), 'anomalies only'),
    (dict(x_test=toy(12)[0][3:7]),
     r'x_test must share no image with x_train; got 1, the first is x_test\[0\]'),
    (dict(x_reserve=toy(12)[0][7:8]), 'x_reserve must share no image with x_test'),
    (dict(x_reserve=toy(12)[0][:1]), 'x_reserve must share no image with x_train')])
def test_task_refuses(changes, words):
    with pytest.raises(ValueError, match=words): small_task(**changes)


@pytest.mark.parametrize('as_given', [bool, np.uint8, np.float32, np.uint16])
def test_whatever_is_not_zero_is_painted(as_given):
    marks = np.zeros((4, 5, 4), as_given)
    marks[2, 1, 1], marks[3, 2, 3] = 1, 100
    assert small_task(masks_test=marks).masks_test.sum((1, 2)).tolist() == [0, 0, 1, 1]


def test_digests_are_of_pixels():
    x = np.zeros((1, 1, 2, 2), 'f4')
    assert digests(x) == digests(-x) == digests(np.asfortranarray(x))
    with pytest.raises(ValueError, match='x must share no image|x_test must share no image'):
        small_task(x_train=x, x_test=np.concatenate([-x] * 4))
    with pytest.raises(ValueError, match='x must hold float32 .*like others; got uint8'):
        overlap((x * 255).astype('u1'), x)
    for wrong in (np.array(['a']), np.array([{}]), np.array(1.)):
        with pytest.raises(ValueError, match='x must be numbers'): digests(wrong)


# kinds

@quick
@given(kinds=st.lists(st.one_of(st.integers(-2**62, 2**62), st.floats(allow_nan=False,
                      allow_infinity=False)), min_size=2, max_size=9, unique=True))
def test_no_two_numbers_have_one_name(kinds):
    x, k = toy(3 * len(kinds), len(kinds))
    t = one_class(x, [kinds[i] for i in k], normal=kinds[0], test_fraction=0)
    assert np.array_equal(t.x_train, as_images(x[k == 0]))


def test_the_million_and_first_is_another_kind():
    x, k = toy()
    ids = np.array([1000001, 1000002, 7])[k]
    t = one_class(x, ids, normal=1000001, test_fraction=0)
    assert len(t.x_train) == 20 and set(t.kinds_test) == {'1000002', '7'}
    assert same(t, one_class(x, ids.astype('f8'), normal=1000001., test_fraction=0))


def test_rounded_names_are_caught():
    rounded = lambda kind, what='': kind if isinstance(kind, str) else f'{float(kind):g}'
    with mutant(data, _name=rounded), pytest.raises(AssertionError):
        test_the_million_and_first_is_another_kind()


@pytest.mark.parametrize('bad', [np.nan, np.inf, None, 1j, [1]])
def test_what_is_no_kind_is_refused(bad):
    x, k = toy(6)
    kinds = [bad, *k[1:].tolist()]
    with pytest.raises(ValueError, match=r'kinds\[0\] must be a name or a finite number'):
        one_class(x, kinds, normal=1)
    with pytest.raises(ValueError, match='must be a name or a finite number'):
        one_class(x, k, normal=[1, bad])


def test_kinds_come_in_any_array():
    x, k = toy()
    names = np.array(['cat', 'dog', 'cow'])[k]
    t = one_class(x, names, normal='cat')
    for given in (names.astype('S'), names.astype(object), names.tolist()):
        assert same(t, one_class(x, given, normal=['cat', 'cat']))
    with pytest.raises(ValueError, match=r'kinds must be \(n,\), one an image'):
        one_class(x, names[:, None], normal='cat')


# splits

@quick
@given(n=st.integers(12, 60), kinds=st.integers(2, 5),
       side=st.sampled_from(['normal', 'anomalous']), test_fraction=st.floats(.1, .6),
       reserve=st.floats(0, .7), copies=st.integers(0, 8),
       floats=st.booleans(), seed=st.integers(0, 99))
def test_one_class_keeps_images_apart(n, kinds, side, test_fraction, reserve, copies, floats, seed):
    x, k = toy(n, kinds, seed)
    x = np.concatenate([x, x[:copies]])         # the same pixels once more, under the same kind
    k = np.concatenate([k, k[:copies]])
    if floats: x = x / 255
    shares = {side: 0, 'test_fraction': test_fraction, 'reserve': reserve}
    make = lambda s: one_class(x, k, **shares, seed=s)
    t = make(seed)
    check_apart(t)
    assert same(t, make(seed))
    assert len(t.x_train) + len(t.x_test) + len(t.x_reserve) == len(x)
    anomaly = (k != 0) if side == 'normal' else (k == 0)
    assert len(t.x_train) + (t.y_test == 0).sum() == (~anomaly).sum()
    assert ((t.kinds_test != 'normal') == t.y_test).all() and not t.y_train.any()
    lookup = {i.tobytes(): str(j) for i, j in zip(as_images(x), k)}
    assert all(lookup[i.tobytes()] == j for i, j in zip(t.x_reserve, t.kinds_reserve))
    assert all(j == 'normal' or lookup[i.tobytes()] == j for i, j in zip(t.x_test, t.kinds_test))


def test_seeds_give_other_splits():
    x, k = toy(200)
    assert not same(one_class(x, k, normal=0, seed=0), one_class(x, k, normal=0, seed=1))


def test_several_kinds_on_one_side():
    x, k = toy(60, 4)
    t = one_class(x, k, normal=[0, 1])
    assert set(t.kinds_test) == {'normal', '2', '3'} and '2 classes normal (0, 1)' in t.protocol
    names = np.array(['a', 'b', 'c', 'd'])[k]
    assert np.array_equal(one_class(x, names, normal=('a', 'b')).x_train, t.x_train)


def test_official_copies_leave_the_test_side():
    x, k = toy(60)
    x_test, k_test = toy(30, seed=1)
    x_test[0], x_test[1] = x[0], x[3]         # two normal training images, once mislabelled
    t = one_class(x, k, normal=0, x_test=x_test, kinds_test=k_test)
    check_apart(t)
    assert len(t.x_train) == 20 and len(t.x_test) == 28
    assert '2 removed from the test side' in t.protocol
    aside = t.x_reserve[0, 0]
    x_test[2], k_test[2] = aside, 1
    u = one_class(x, k, normal=0, x_test=x_test, kinds_test=k_test)
    assert len(u.x_test) == 28 and len(u.x_reserve) == len(t.x_reserve) - 1
    assert '1 removed from the reserve side' in u.protocol


def test_reserve_has_a_limit_and_comes_from_training():
    x, k = toy(300)
    x_test, k_test = toy(30, seed=1)
    official = dict(x_test=x_test, kinds_test=k_test)
    t = one_class(x, k, normal=0, **official, reserve=.5, max_reserve=7)
    assert len(t.x_reserve) == 7 and set(t.kinds_reserve) <= {'1', '2'}
    assert pixels(t.x_reserve) <= pixels(as_images(x))


@quick
@given(size=st.integers(1, 5), seed=st.integers(0, 50))
def test_groups_never_come_apart(size, seed):
    x, _ = toy(80, seed=seed)
    group, kind = np.arange(80) // size, (np.arange(80) // size) % 2
    t = one_class(x, kind, normal=0, groups=group, seed=seed)
    where = {i.tobytes(): g for i, g in zip(as_images(x), group)}
    a, b, c = ({where[i.tobytes()] for i in part} for part in (t.x_train, t.x_test, t.x_reserve))
    assert not a & b and not a & c and not b & c


@quick
@given(size=st.integers(1, 8), seed=st.integers(0, 50), reserve=st.sampled_from([0., .3, 1.]))
def test_an_object_with_good_and_bad_images_stays_together(size, seed, reserve):
    x, kind = toy(80, 4, seed)                      # a kind has nothing to do with its group
    group = np.random.default_rng(seed).permutation(80) // size
    try: t = one_class(x, kind, normal=[0, 1, 2], groups=group, seed=seed, reserve=reserve)
    except ValueError as e:
        assert 'left to train on' in str(e)
        return
    where = {i.tobytes(): g for i, g in zip(as_images(x), group)}
    a, b, c = ({where[i.tobytes()] for i in part} for part in (t.x_train, t.x_test, t.x_reserve))
    assert not (a | c) & b and len(t.x_train) + len(t.x_test) + len(t.x_reserve) == 80


@pytest.mark.parametrize('call, words', [
    (lambda x, k: one_class(x, k), 'exactly one .*got neither'),
    (lambda x, k: one_class(x, k, normal=0, anomalous=1), 'exactly one .*got both'),
    (lambda x, k: one_class(x, k, normal=9), "normal must be among the kinds 0, 1, 2; got '9'"),
    (lambda x, k: one_class(x, k, anomalous=9), "anomalous must be among the kinds.*got '9'"),
    (lambda x, k: one_class(x, k, normal=[0, 1, 2]), 'leave a kind that is anomalous; got all 3'),
    (lambda x, k: one_class(x, k, anomalous=[0, 1, 2]), 'leave a kind that is normal; got all 3'),
    (lambda x, k: one_class(x, k[:5], normal=0), 'one for each of 60 images; got 5'),
    (lambda x, k: one_class(x, k, normal=[]), 'normal must name a kind or more; got none'),
    (lambda x, k: one_class(x, k, normal=0, groups=k[:5]), 'groups must be one for .*got 5'),
    (lambda x, k: one_class(x, k, normal=0, x_test=x), 'given together'),
    (lambda x, k: one_class(x, k, normal=0, kinds_test=k), 'given together'),
    (lambda x, k: one_class(x, k, normal=0, x_test=x, kinds_test=k[:5]), 'kinds_test must .*got 5'),
    (lambda x, k: one_class(x, k, normal=0, test_fraction=1.2), 'test_fraction must .*got 1.2'),
    (lambda x, k: one_class(x, k, normal=0, reserve=np.nan), 'reserve must be from 0 .*got nan'),
    (lambda x, k: one_class(x, k, normal=0, max_reserve=-1), 'max_reserve must be .*got -1'),
    (lambda x, k: one_class(x, k, normal=0, test_fraction=1.), 'left to train on; got none')])
def test_one_class_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words): call(*toy())


@pytest.mark.parametrize('side', ['normal', 'anomalous'])
def test_digits(side):
    seen = 0
    for d in range(10):
        t = digits(d) if side == 'normal' else digits(anomalous=d)
        check_apart(t)
        assert len(t.x_train) + len(t.x_test) + len(t.x_reserve) == 1797
        assert t.x_train.dtype == np.float32 and t.shape == (1, 8, 8)
        assert t.x_train.max() == 1 and (t.x_train * 16 % 1 == 0).all()
        seen += len(t.x_train) + (t.y_test == 0).sum()
    assert seen == (1797 if side == 'normal' else 9 * 1797)
    assert same(digits(3), digits('3')) and not same(digits(3), digits(3, seed=1))
    assert same(digits(), digits(0))


@pytest.mark.parametrize('normal, anomalous, words', [
    (0, 5, 'exactly one .*got both'), ([0], [5], 'exactly one .*got both'),
    (2.5, None, 'a class must be an index .*got 2.5'), (np.nan, None, 'got nan'),
    ([1, None], None, 'got None'), (-1, None, 'got -1'), (None, 10, 'got 10')])
def test_digits_refuses(normal, anomalous, words):
    with pytest.raises(ValueError, match=words): digits(normal, anomalous=anomalous)


# contamination and labels

@quick
@given(rate=st.floats(0, .45), again=st.floats(0, .45), labelled=st.integers(0, 9),
       seed=st.integers(0, 9))
def test_contamination_is_exact(rate, again, labelled, seed):
    t = clean = one_class(*toy(200, 2), normal=0, reserve=.9, seed=seed)
    if labelled: t = label_anomalies(t, labelled, seed=seed)
    for r in sorted((rate, again)):                           # once, and then up to a higher rate
        t = contaminate(t, r, seed)
        hidden = ((t.kinds_train != 'normal') & (t.y_train == 0)).sum()
        assert abs(hidden / len(t.x_train) - r) <= .5 / len(t.x_train) + 1e-12
    check_apart(t)
    assert t.y_train.sum() == labelled and np.array_equal(t.x_test, clean.x_test)
    both = lambda t: pixels(t.x_train) | pixels(t.x_reserve)
    assert both(t) == both(clean)
    assert same(t, contaminate(t, max(rate, again), seed)) or 'contaminated' in t.protocol


def test_contamination_errors():
    t = one_class(*toy(60, 2), normal=0)
    for rate in (-.1, 1, 2):
        with pytest.raises(ValueError, match='rate must be from 0 to below 1'): contaminate(t, rate)
    r, n = len(t.x_reserve), len(t.x_train)
    highest = f'at most {r / (n + r):.3f}, since the reserve holds {r} .*got 0.6'
    with pytest.raises(ValueError, match=highest): contaminate(t, .6)
    with pytest.raises(ValueError, match='at least 0.192.* already; got 0.05'):
        contaminate(contaminate(t, .2), .05)


@quick
@given(k=st.integers(1, 20), seed=st.integers(0, 9), some=st.booleans())
def test_labels(k, seed, some):
    clean = one_class(*toy(300, 4), normal=0, reserve=.3)
    dirty = contaminate(clean, .05, seed)
    label = lambda: label_anomalies(dirty, k, kinds=[1, 2] if some else None, seed=seed)
    t = label()
    kinds, counts = np.unique(t.kinds_train[t.y_train == 1], return_counts=True)
    assert counts.sum() == k and counts.max() - counts.min() <= 1
    assert len(t.x_reserve) == len(dirty.x_reserve) - k
    assert set(kinds) <= ({'1', '2'} if some else {'1', '2', '3'}) and t.seen == tuple(kinds)
    assert set(t.unseen) == {'1', '2', '3'} - set(kinds)
    hidden = lambda t: ((t.kinds_train != 'normal') & (t.y_train == 0)).sum()
    assert hidden(t) == hidden(dirty) and same(t, label())
    check_apart(t)


def test_label_errors():
    t = one_class(*toy(60, 3), normal=0)
    with pytest.raises(ValueError, match="in the reserve, which offers 1, 2; got '7'"):
        label_anomalies(t, 1, kinds=7)
    for k in (0, -1, 1000, 1.5):
        with pytest.raises(ValueError, match=f'what the reserve holds .*got {k}'):
            label_anomalies(t, k)
    with pytest.raises(ValueError, match='must have a reserve .*got none: load .*per_kind='):
        label_anomalies(small_task(), 1)


@pytest.mark.parametrize('share, times', [(.5, 5), (.2, 1), (.75, 15), (.01, 1)])
def test_balanced_repeats_whole_images(share, times):
    x, y = toy(72)[0], np.arange(72) >= 60
    more, labels = balanced(x, y, share)
    assert (labels == 0).sum() == 60 and (labels == 1).sum() == 12 * times
    assert np.array_equal(more[labels == 0], x[:60])
    assert np.array_equal(more[labels == 1], np.repeat(x[60:], times, 0))


@pytest.mark.parametrize('args, match', [
    ((np.zeros(9),), '9 zeros and 0 ones'), ((np.ones(9),), '0 zeros and 9 ones'),
    ((np.arange(9) % 3,), 'y must be 9 labels, 1 = anomaly'),
    ((np.arange(9) % 2, 1.), 'share must be'), ((np.arange(9) % 2, 0), 'share must be'),
    ((np.arange(3) % 2,), r'one label for each of 9 images; got shape \(3,\)')])
def test_balanced_refuses(args, match):
    with pytest.raises(ValueError, match=match): balanced(toy(9)[0], *args)


def test_expose_keeps_the_task_honest():
    clean, outside = digits(3), np.random.default_rng(0).random((7, 1, 8, 8), dtype='float32')
    task = expose(clean, outside, 'noise')
    assert task.y_train.sum() == 7 and len(task.x_train) == len(clean.x_train) + 7
    assert task.seen == ('noise',) and '7 outside' in task.protocol
    assert np.array_equal(task.x_train[task.y_train == 1], outside)
    with pytest.raises(ValueError, match='x_test'): expose(clean, clean.x_test[:1])
    assert len(expose(clean, clean.x_reserve[:5]).x_reserve) <= len(clean.x_reserve) - 5
    assert len(expose(clean, outside[:0]).x_train) == len(clean.x_train)


# points

@pytest.mark.parametrize('name', ['disc', 'moon', 'two'])
def test_flat_sets_have_their_shapes(name):
    p = flat_set(name, 2000)
    r, x = np.hypot(*p.T), p[:, 0]
    assert p.shape == (2000, 2) and np.array_equal(p, flat_set(name, 2000))
    assert not np.array_equal(p, flat_set(name, 2000, seed=1))
    if name == 'disc': assert r.max() <= 1 and abs((r < .5).mean() - .25) < .03         # evenly
    if name == 'moon': assert .8 <= r.min() and r.max() <= 1.2 and p[:, 1].min() >= 0
    if name == 'two':
        assert (np.hypot(abs(x) - .8, p[:, 1]) <= .4).all() and abs((x > 0).mean() - .5) < .05


def test_there_is_no_other_flat_set():
    with pytest.raises(ValueError, match="'disc', 'moon' or 'two'; got 'ring'"): flat_set('ring')
    for n in (-1, 2.5):
        with pytest.raises(ValueError, match=f'n must be a whole number.*got {n}'):
            flat_set('disc', n)


def test_the_ring_has_eight_dots():
    assert np.allclose(np.hypot(*(DOTS - .5).T), .35) and len(np.unique(DOTS.round(6), axis=0)) == 8
    x = ring(4000)
    assert x.shape == (4000, 1, 1, 2) and x.dtype == np.float32 and len(ring(0)) == 0
    assert np.array_equal(x, ring(4000)) and not np.array_equal(x, ring(4000, seed=1))
    near = np.linalg.norm(x.reshape(-1, 1, 2) - DOTS, axis=2).argmin(1)
    assert abs(np.bincount(near) / 4000 - 1 / 8).max() < .02
    assert abs((x.reshape(-1, 2) - DOTS[near]).std() - .02) < .001
    with pytest.raises(ValueError, match=r'n must be a whole number.*got 2\.5'): ring(2.5)


@pytest.mark.parametrize('covered', range(9))
def test_dots_are_counted_by_hand(covered):
    at = lambda dots, n: np.tile(dots, (n, 1)).reshape(-1, 1, 1, 2)
    away = at(DOTS[:1] * 0, 10)                                 # a corner, near no dot
    number, good = dots_found(np.concatenate([at(DOTS[:covered], 10), away]))
    assert number == covered and np.isclose(good, covered / (covered + 1))


def test_where_a_dot_begins_and_when_it_is_found():
    beside = lambda far: DOTS[:1] + [[far, 0]]
    assert dots_found(beside(.0599)) == (1, 1) and dots_found(beside(.0601)) == (0, 0)
    for n, number in ((2, 0), (3, 1)):                          # more than 2 % of 100 images
        x = np.concatenate([np.repeat(DOTS[:1], n, 0), np.full((100 - n, 2), .5)])
        assert dots_found(x) == (number, n / 100)
    with pytest.raises(ValueError, match='an image or more; got none'): dots_found(ring(0))


def test_digits_are_read_once_and_belong_to_their_task(monkeypatch):
    first = digits(3)
    monkeypatch.setattr(data, 'load_digits', lambda: pytest.fail('read again'))
    again = digits(3)
    assert same(first, again)
    assert not np.shares_memory(first.x_train, again.x_train)
