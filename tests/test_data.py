"""The data chapter's promises: nothing in two places, exact masks and rates, errors that say which, where and how."""
import gzip, hashlib, io, os, random, shutil, struct, zipfile
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from ad_course import datasets
from ad_course.data import *
from ad_course.datasets import *
from ad_course.surfaces import *

REAL = data_root()
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
real = lambda path: pytest.mark.skipif(not (REAL / path).exists(), reason=f'{path} is not in AD_COURSE_DATA')


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch): monkeypatch.delenv('AD_COURSE_SMOKE', raising=False)


@pytest.fixture(autouse=True)
def global_randomness_is_left_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()
    yield
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]


def pixels(x): return {i.tobytes() for i in np.ascontiguousarray(x)}


def check_apart(task):
    "Independent of the library's digests: sets of raw bytes."
    a, b, c = map(pixels, (task.x_train, task.x_test, task.x_reserve))
    assert not a & b and not a & c and not b & c


def same(a, b):
    for field in ('x_train', 'x_test', 'y_test', 'y_train', 'kinds_train', 'kinds_test', 'x_reserve', 'kinds_reserve', 'masks_test'):
        p, q = getattr(a, field), getattr(b, field)
        if (p is None) != (q is None) or p is not None and not np.array_equal(p, q): return False
    return a.protocol == b.protocol and a.name == b.name


def toy(n=60, kinds=3, seed=0):
    "Distinct random images of several kinds."
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 5, 4), dtype=np.uint8), np.arange(n) % kinds


# settings and arrays

def test_settings(monkeypatch, tmp_path):
    assert smoke(150, 1) == 150
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    assert smoke(150, 1) == 1
    monkeypatch.setenv('AD_COURSE_DATA', str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv('AD_COURSE_DATA', '')
    assert data_root() == Path.home() / '.cache/ad_course'


@quick
@given(shape=st.lists(st.integers(0, 5), min_size=0, max_size=6), dtype=st.sampled_from(['u1', 'f2', 'f4', 'f8', 'i8', 'bool', 'c8', 'U3']),
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


# the value

def small_task(**changes):
    x, _ = toy(12)
    fields = dict(name='t', x_train=x[:4], x_test=x[4:8], y_test=[0, 0, 1, 1], protocol='p')
    return Task(**{**fields, **changes})


def test_task_defaults_and_repr():
    t = small_task()
    assert t.shape == (1, 5, 4) and t.y_train.tolist() == [0] * 4 and t.kinds_train.tolist() == ['normal'] * 4
    assert t.kinds_test.tolist() == ['normal'] * 2 + ['anomaly'] * 2 and t.masks_test is None and len(t.x_reserve) == 0
    assert t.y_test.dtype == t.y_train.dtype == np.int64 and t.seen == () and t.unseen == ('anomaly',)
    assert len(repr(t)) < 500 and '2 normal, 2 anomalous' in repr(t)


def test_task_is_immutable_and_owns_its_arrays():
    x, _ = toy(12)
    t = small_task(x_train=x[:4])
    with pytest.raises(FrozenInstanceError): t.name = 'other'
    for a in (t.x_train, t.x_test, t.y_test, t.y_train, t.kinds_train, t.kinds_test, t.x_reserve, t.kinds_reserve):
        with pytest.raises(ValueError): a[:] = a
    x[:] = 0
    assert t.x_train.any()


@pytest.mark.parametrize('changes, words', [
    (dict(x_train=np.zeros((0, 5, 4), 'u1')), 'x_train is empty'),
    (dict(x_test=np.zeros((4, 6, 4), 'u1')), r'x_test holds uint8 images of \(1, 6, 4\)'),
    (dict(x_test=np.zeros((4, 5, 4), 'f4')), 'x_test holds float32'),
    (dict(y_test=[0, 1]), 'y_test has shape'), (dict(y_test=[0, 0, 1, -1]), '1 = anomaly'),
    (dict(y_train=[0, 0, 0, 2]), 'y_train'), (dict(kinds_test=['normal'] * 4), 'disagrees'),
    (dict(kinds_test=['a', 'b']), 'kinds_test has shape'), (dict(y_train=[1, 0, 0, 0], kinds_train=['normal'] * 4), 'kind is normal'),
    (dict(masks_test=np.zeros((4, 5, 5), bool)), 'masks_test has shape'), (dict(masks_test=np.ones((4, 5, 4), bool)), 'not empty'),
    (dict(x_reserve=np.full((1, 5, 4), 7, 'u1'), kinds_reserve=['normal']), 'anomalies only'),
    (dict(x_test=toy(12)[0][3:7]), r'1 image\(s\) of x_test also stand in x_train \(the first is x_test\[0\]\)'),
    (dict(x_reserve=toy(12)[0][7:8]), 'x_reserve also stand in x_test'), (dict(x_reserve=toy(12)[0][:1]), 'x_reserve also stand in x_train')])
def test_task_refuses(changes, words):
    with pytest.raises(ValueError, match=words): small_task(**changes)


# splits

@quick
@given(n=st.integers(12, 60), kinds=st.integers(2, 5), side=st.sampled_from(['normal', 'anomalous']), test_fraction=st.floats(.1, .6),
       reserve=st.floats(0, .7), copies=st.integers(0, 8), floats=st.booleans(), seed=st.integers(0, 99))
def test_one_class_keeps_images_apart(n, kinds, side, test_fraction, reserve, copies, floats, seed):
    x, k = toy(n, kinds, seed)
    x = np.concatenate([x, x[:copies]])                       # the same pixels once more, under the same kind
    k = np.concatenate([k, k[:copies]])
    if floats: x = x / 255
    make = lambda s: one_class(x, k, **{side: 0}, test_fraction=test_fraction, reserve=reserve, seed=s)
    t = make(seed)
    check_apart(t)
    assert same(t, make(seed)) and len(t.x_train) + len(t.x_test) + len(t.x_reserve) == len(x)
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
    x_test[0], x_test[1] = x[0], x[3]                         # two normal training images, once as normal, once mislabelled
    t = one_class(x, k, normal=0, x_test=x_test, kinds_test=k_test)
    check_apart(t)
    assert len(t.x_train) == 20 and len(t.x_test) == 28 and '2 removed from the test side' in t.protocol
    aside = t.x_reserve[0, 0]
    x_test[2], k_test[2] = aside, 1
    u = one_class(x, k, normal=0, x_test=x_test, kinds_test=k_test)
    assert len(u.x_test) == 28 and len(u.x_reserve) == len(t.x_reserve) - 1 and '1 removed from the reserve side' in u.protocol


def test_reserve_has_a_limit_and_comes_from_training():
    x, k = toy(300)
    x_test, k_test = toy(30, seed=1)
    t = one_class(x, k, normal=0, x_test=x_test, kinds_test=k_test, reserve=.5, max_reserve=7)
    assert len(t.x_reserve) == 7 and pixels(t.x_reserve) <= pixels(as_images(x)) and set(t.kinds_reserve) <= {'1', '2'}


@quick
@given(size=st.integers(1, 5), seed=st.integers(0, 50))
def test_groups_never_come_apart(size, seed):
    x, _ = toy(80, seed=seed)
    group, kind = np.arange(80) // size, (np.arange(80) // size) % 2
    t = one_class(x, kind, normal=0, groups=group, seed=seed)
    where = {i.tobytes(): g for i, g in zip(as_images(x), group)}
    a, b, c = ({where[i.tobytes()] for i in part} for part in (t.x_train, t.x_test, t.x_reserve))
    assert not a & b and not a & c and not b & c


@pytest.mark.parametrize('call, words', [
    (lambda x, k: one_class(x, k), 'exactly one'), (lambda x, k: one_class(x, k, normal=0, anomalous=1), 'exactly one'),
    (lambda x, k: one_class(x, k, normal=9), "'9'; there are 0, 1, 2"), (lambda x, k: one_class(x, k, normal=[0, 1, 2]), 'nothing is left'),
    (lambda x, k: one_class(x, k[:5], normal=0), '60 images, but 5 kinds'),
    (lambda x, k: one_class(x, k, normal=0, test_fraction=1.), 'no normal image is left')])
def test_one_class_says_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words): call(*toy())


@pytest.mark.parametrize('side', ['normal', 'anomalous'])
def test_digits(side):
    seen = 0
    for d in range(10):
        t = digits(d) if side == 'normal' else digits(anomalous=d)
        check_apart(t)
        assert len(t.x_train) + len(t.x_test) + len(t.x_reserve) == 1797 and t.x_train.dtype == np.float32 and t.shape == (1, 8, 8)
        assert t.x_train.max() == 1 and (t.x_train * 16 % 1 == 0).all()
        seen += len(t.x_train) + (t.y_test == 0).sum()
    assert seen == (1797 if side == 'normal' else 9 * 1797)
    assert same(digits(3), digits('3')) and not same(digits(3), digits(3, seed=1))


# contamination and labels

@quick
@given(rate=st.floats(0, .45), again=st.floats(0, .45), labelled=st.integers(0, 9), seed=st.integers(0, 9))
def test_contamination_is_exact(rate, again, labelled, seed):
    t = clean = one_class(*toy(200, 2), normal=0, reserve=.9, seed=seed)
    if labelled: t = label_anomalies(t, labelled, seed=seed)
    for r in sorted((rate, again)):                           # once, and then up to a higher rate
        t = contaminate(t, r, seed)
        hidden = ((t.kinds_train != 'normal') & (t.y_train == 0)).sum()
        assert abs(hidden / len(t.x_train) - r) <= .5 / len(t.x_train) + 1e-12
    check_apart(t)
    assert t.y_train.sum() == labelled and np.array_equal(t.x_test, clean.x_test)
    assert pixels(t.x_train) | pixels(t.x_reserve) == pixels(clean.x_train) | pixels(clean.x_reserve)
    assert same(t, contaminate(t, max(rate, again), seed)) or 'contaminated' in t.protocol


def test_contamination_errors():
    t = one_class(*toy(60, 2), normal=0)
    for rate in (-.1, 1, 2):
        with pytest.raises(ValueError, match='give a share'): contaminate(t, rate)
    r, n = len(t.x_reserve), len(t.x_train)
    with pytest.raises(ValueError, match=f'holds {r}: up to {r / (n + r):.3f} is possible'): contaminate(t, .6)
    with pytest.raises(ValueError, match='already'): contaminate(contaminate(t, .2), .05)


@quick
@given(k=st.integers(1, 20), seed=st.integers(0, 9), some=st.booleans())
def test_labels(k, seed, some):
    clean = one_class(*toy(300, 4), normal=0, reserve=.3)
    dirty = contaminate(clean, .05, seed)
    t = label_anomalies(dirty, k, kinds=[1, 2] if some else None, seed=seed)
    kinds, counts = np.unique(t.kinds_train[t.y_train == 1], return_counts=True)
    assert counts.sum() == k and counts.max() - counts.min() <= 1 and len(t.x_reserve) == len(dirty.x_reserve) - k
    assert set(kinds) <= ({'1', '2'} if some else {'1', '2', '3'}) and t.seen == tuple(kinds)
    assert set(t.unseen) == {'1', '2', '3'} - set(kinds)
    hidden = lambda t: ((t.kinds_train != 'normal') & (t.y_train == 0)).sum()
    assert hidden(t) == hidden(dirty) and same(t, label_anomalies(dirty, k, kinds=[1, 2] if some else None, seed=seed))
    check_apart(t)


def test_label_errors():
    t = one_class(*toy(60, 3), normal=0)
    with pytest.raises(ValueError, match="no '7' in the reserve, which offers 1, 2"): label_anomalies(t, 1, kinds=7)
    for k in (0, -1, 1000):
        with pytest.raises(ValueError, match='the reserve holds'): label_anomalies(t, k)
    with pytest.raises(ValueError, match='reserve holds 0'): label_anomalies(small_task(), 1)


# surfaces

@quick
@given(h=st.integers(8, 70), w=st.integers(8, 70), channels=st.sampled_from([1, 3]), texture=st.sampled_from(list(TEXTURES)),
       noise=st.sampled_from([0, .03, .2]), seed=st.integers(0, 999))
def test_masks_are_exact(h, w, channels, texture, noise, seed):
    kinds = np.array([*DEFECTS, 'normal'] * 2)
    look = dict(size=(h, w), channels=channels, texture=texture, noise=noise, seed=seed)
    x, clean, masks = draw_surfaces(kinds, **look)
    twin = draw_surfaces(['normal'] * len(kinds), **look)[0]   # drawn again without any defect
    assert x.shape == (len(kinds), channels, h, w) and x.dtype == np.float32 and 0 <= x.min() <= x.max() <= 1
    assert np.array_equal(clean, twin) and np.array_equal(masks, (x != twin).any(1))
    assert np.array_equal(masks.any((1, 2)), kinds != 'normal'), kinds[~masks.any((1, 2))]
    assert masks.mean((1, 2)).max() < .7                       # a defect is a part of an image


@pytest.mark.parametrize('size', [8, 256, (8, 256), (200, 24)])
def test_surfaces_of_any_size(size):
    t = surfaces(3, 16, size=size)
    assert np.array_equal(t.masks_test.any((1, 2)), t.y_test == 1) and set(t.kinds_test) == {'normal', *DEFECTS}


def test_shift_is_a_permutation_and_blur_keeps_the_mean():
    for texture in TEXTURES:
        x, clean, masks = draw_surfaces(['shift'] * 10, size=40, texture=texture, noise=0)
        assert np.array_equal(np.sort(x.reshape(10, -1)), np.sort(clean.reshape(10, -1)))
        x, clean, masks = draw_surfaces(['blur'] * 10, size=40, texture='weave', noise=0)
        assert np.allclose(x.mean((1, 2, 3)), clean.mean((1, 2, 3)), atol=1e-5) and (x.std((1, 2, 3)) < clean.std((1, 2, 3))).all()


def test_surfaces_task():
    t = surfaces()
    check_apart(t)
    assert same(t, surfaces()) and not same(t, surfaces(seed=1)) and 'not real' in t.protocol
    assert t.seen == ('scratch', 'spot') and set(t.unseen) == set(DEFECTS) - {'scratch', 'spot'}
    assert (t.y_test == 0).sum() == 50 and len(np.unique(t.x_train, axis=0)) == 200
    counts = np.unique(t.kinds_test[t.y_test == 1], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(surfaces(7).x_test, t.x_test)
    assert len(surfaces(8, seen=()).x_reserve) == 0 and surfaces(8, kinds='bend').unseen == ('bend',)


@pytest.mark.parametrize('options, words', [(dict(size=7), 'at least 8'), (dict(kinds=['rust']), "'rust' is no defect: choose from scratch"),
    (dict(texture='silk'), 'choose from weave'), (dict(channels=2), 'choose 1 or 3')])
def test_surfaces_say_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words): surfaces(4, 4, **options)


# torchvision's sets

def idx(a):
    "An array in MNIST's file format, packed."
    return gzip.compress(struct.pack('>HBB', 0, 8, a.ndim) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes())


@pytest.fixture
def tiny_mnist(monkeypatch, tmp_path):
    "A folder with tiny .gz files in place of MNIST's, and torchvision told of their digests; the network fails."
    rng, raw, resources = np.random.default_rng(0), tmp_path / 'MNIST/raw', []
    raw.mkdir(parents=True)
    for part, n in (('train', 200), ('t10k', 100)):
        for what, a in (('images-idx3', rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)), ('labels-idx1', (np.arange(n) % 10).astype(np.uint8))):
            blob = idx(a)
            (raw / f'{part}-{what}-ubyte.gz').write_bytes(blob)
            resources.append((f'{part}-{what}-ubyte.gz', hashlib.md5(blob).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, 'resources', resources)
    def dead(*_, **__): raise OSError('no network')
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', dead)
    monkeypatch.setattr(torchvision.datasets.utils, '_get_redirect_url', dead)
    return tmp_path


def test_packed_files_that_lie_there_are_used(tiny_mnist):
    t = mnist(3, root=tiny_mnist)
    assert len(t.x_train) == 20 and len(t.x_test) == 100 and t.shape == (1, 28, 28) and 'official split' in t.protocol
    assert not list(tiny_mnist.glob('.part-*')) and (tiny_mnist / 'MNIST/raw/train-images-idx3-ubyte').is_file()
    assert same(t, mnist('3', root=tiny_mnist)) and len(mnist(3, root=tiny_mnist, n_train=5).x_train) == 5
    with pytest.raises(ValueError, match='there are 20 normal'): mnist(3, root=tiny_mnist, n_train=21)
    with pytest.raises(ValueError, match='10 is no class'): mnist(10, root=tiny_mnist)


@pytest.mark.skipif(os.name == 'nt', reason='Windows folders have no write bit')
def test_a_read_only_folder_is_read_and_left_alone(tiny_mnist):
    before = sorted(tiny_mnist.rglob('*'))
    tiny_mnist.chmod(0o555)
    try: t = mnist(3, root=tiny_mnist)
    finally: tiny_mnist.chmod(0o755)
    assert len(t.x_train) == 20 and sorted(tiny_mnist.rglob('*')) == before


def test_a_download_that_fails_midway_leaves_nothing(tiny_mnist, monkeypatch):
    source, root = tiny_mnist / 'MNIST/raw', tiny_mnist / 'elsewhere'
    def half(url, fpath, *_, **__):
        name = os.path.basename(fpath)
        if 't10k' in name:
            Path(fpath).write_bytes(b'half a f')
            raise error
        shutil.copyfile(source / name, fpath)
    monkeypatch.setattr(torchvision.datasets.utils, '_get_redirect_url', lambda url, **_: url)
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', half)
    for error in (OSError('connection lost'), KeyboardInterrupt()):
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FileNotFoundError
        with pytest.raises(expected) as e: mnist(3, root=root)
        assert list(root.rglob('*')) == []
        if expected is FileNotFoundError:
            for word in ('MNIST', str(root), 'train-images-idx3-ubyte.gz', str(root / 'MNIST/raw'), 'AD_COURSE_DATA'): assert word in str(e.value)
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', lambda url, f, *_, **__: shutil.copyfile(source / os.path.basename(f), f))
    assert len(mnist(3, root=root).x_train) == 20 and not list(root.glob('.part-*'))


def test_a_wrong_digest_is_refused(tiny_mnist, monkeypatch):
    root = tiny_mnist / 'elsewhere'
    monkeypatch.setattr(torchvision.datasets.utils, '_get_redirect_url', lambda url, **_: url)
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', lambda url, f, *_, **__: Path(f).write_bytes(b'something else'))
    with pytest.raises(FileNotFoundError, match='MNIST is not under'): mnist(3, root=root)
    assert list(root.rglob('*')) == []


def test_damaged_unpacked_files_are_named(tiny_mnist):
    mnist(3, root=tiny_mnist)
    file = tiny_mnist / 'MNIST/raw/t10k-images-idx3-ubyte'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match='Damaged files there: delete them'): mnist(3, root=tiny_mnist)


def test_no_network_no_file(tiny_mnist):
    with pytest.raises(FileNotFoundError) as e: cifar10(root=tiny_mnist / 'empty')
    for word in ('CIFAR10', 'cifar-10-python.tar.gz', str(tiny_mnist / 'empty'), 'no network'): assert word in str(e.value)


def test_cifar100_families(monkeypatch):
    # The fine-to-coarse table as it is usually printed, an independent source of the same facts.
    coarse = np.array([4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9,
        11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15,
        13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13])
    x = np.random.default_rng(0).integers(0, 256, (400, 3, 4, 4), dtype=np.uint8)
    fine = np.arange(200) % 100
    monkeypatch.setattr(datasets, '_fetch', lambda which, root: (x[:200], fine, x[200:], fine))
    for i, name in enumerate(SUPERCLASSES):
        t = cifar100(i)
        assert pixels(t.x_train) == pixels(x[:200][coarse[fine] == i]) and same(t, cifar100(name))
        assert np.array_equal(t.y_test == 0, coarse[fine] == i)


@pytest.mark.parametrize('load, shape, classes', [(mnist, (1, 28, 28), 10), (fashion_mnist, (1, 28, 28), 10), (cifar10, (3, 32, 32), 10), (cifar100, (3, 32, 32), 20)])
def test_stand_ins(monkeypatch, load, shape, classes):
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    for t in (load(1, n_train=5000), load(anomalous=1)):
        assert t.shape == shape and t.x_train.dtype == np.uint8 and 'stand-in images, AD_COURSE_SMOKE=1' in t.protocol
        check_apart(t)
    assert len(np.unique(load(0).kinds_test)) == classes and same(load(0), load(0))
    assert contaminate(load(0), .1) and label_anomalies(load(0), 5)


# files

def test_npz(tmp_path):
    x, k = np.random.default_rng(0).integers(0, 256, (60, 6, 7, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / 'a.npz', images=x, labels=k, classes=np.array(['cat', 'dog', 'cow']))
    np.savez(tmp_path / 'b.npz', images=x[..., 0], labels=k, quality=np.linspace(0, 1, 3)[k])
    t = from_npz(tmp_path / 'a.npz', normal='cat', n_train=5)
    assert t.shape == (3, 6, 7) and len(t.x_train) == 5 and pixels(t.x_train) <= pixels(np.moveaxis(x, -1, 1))
    assert from_npz(tmp_path / 'b.npz', anomalous=2).shape == (1, 6, 7)
    assert set(from_npz(tmp_path / 'b.npz', normal=0, labels='quality').kinds_test) == {'normal', '0.5', '1'}
    np.savez(tmp_path / 'c.npz', images=255 - x, labels=k, classes=np.array(['cat', 'dog', 'cow']))
    u = from_npz(tmp_path / 'a.npz', normal='cat', test_path=tmp_path / 'c.npz')
    assert len(u.x_train) == 20 and len(u.x_test) == 60


def test_npz_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.npz'): from_npz(tmp_path / 'nowhere.npz', normal=0)
    (tmp_path / 'broken.npz').write_bytes(b'PK\x03\x04 half a file')
    with pytest.raises(ValueError, match='broken.npz cannot be read'): from_npz(tmp_path / 'broken.npz', normal=0)
    np.save(open(tmp_path / 'single.npz', 'wb'), np.zeros(3))
    with pytest.raises(ValueError, match='single.npz'): from_npz(tmp_path / 'single.npz', normal=0)
    np.savez(tmp_path / 'objects.npz', images=np.zeros((3, 4, 4)), labels=np.array([{}, {}, {}], dtype=object))
    with pytest.raises(ValueError, match='without pickled objects'): from_npz(tmp_path / 'objects.npz', normal=0)
    np.savez(tmp_path / 'names.npz', pictures=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(ValueError, match="no array 'images', only pictures, labels"): from_npz(tmp_path / 'names.npz', normal=0)
    np.savez(tmp_path / 'short.npz', images=np.zeros((3, 4, 4)), labels=np.zeros(2))
    with pytest.raises(ValueError, match='do not fit'): from_npz(tmp_path / 'short.npz', normal=0)


def save(a, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)


def photo(seed, h=20, w=20, c=1):
    x = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return x if c == 3 else x[..., 0]


def test_read_image(tmp_path):
    save(photo(0, 10, 16, 3), tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png'), np.moveaxis(photo(0, 10, 16, 3), -1, 0))
    assert read_image(tmp_path / 'a.png', (5, 9), 1).shape == (1, 5, 9)
    for name, blob in (('half.png', (tmp_path / 'a.png').read_bytes()[:200]), ('empty.png', b''), ('text.png', b'hello')):
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(ValueError, match=f'{name} is not a readable image'): read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='none.png'): read_image(tmp_path / 'none.png')
    save(np.full((4, 4), 40_000, np.uint16), tmp_path / 'deep.png')
    with pytest.raises(ValueError, match='deep.png: mode I;16'): read_image(tmp_path / 'deep.png')
    with pytest.raises(ValueError, match='choose 1 or 3'): read_image(tmp_path / 'a.png', channels=2)


def test_masks_are_never_lost(tmp_path):
    m = np.zeros((64, 64), np.uint8)
    m[1, 1] = 255                                             # the nearest pixel of an 8x8 grid misses it
    save(m, tmp_path / 'm.png')
    mask, shape = read_mask(tmp_path / 'm.png', 8)
    assert shape == (64, 64) and mask.sum() == 1 and mask[0, 0]
    save(np.minimum(m, 127), tmp_path / 'soft.png')
    assert not read_mask(tmp_path / 'soft.png', 8)[0].any()


def test_image_files(tmp_path):
    for i in range(4): save(photo(i), tmp_path / f'{i}.png')
    files = ImageFiles(sorted(tmp_path.iterdir()), size=(8, 12))
    batch = next(iter(torch.utils.data.DataLoader(files, batch_size=4, generator=torch.Generator())))
    assert batch.shape == (4, 3, 8, 12) and batch.dtype == torch.uint8
    assert np.array_equal(files[2], read_image(tmp_path / '2.png', (8, 12)))
    (tmp_path / '1.png').write_bytes(b'no')
    with pytest.raises(ValueError, match='1.png'): files[1]


@pytest.fixture
def category(tmp_path):
    "root/mvtec/nut with two kinds of defects, three each, in 20x20 gray."
    folder = tmp_path / 'mvtec/nut'
    for i in range(5): save(photo(i), folder / f'train/good/{i:03}.png')
    for i in range(4): save(photo(10 + i), folder / f'test/good/{i:03}.png')
    for j, kind in enumerate(('bent', 'cut')):
        for i in range(3):
            save(photo(20 + 3 * j + i), folder / f'test/{kind}/{i:03}.png')
            m = np.zeros((20, 20), np.uint8)
            m[i:i + 3, 5:9] = 255
            save(m, folder / f'ground_truth/{kind}/{i:03}_mask.png')
    (folder / 'readme.txt').write_text('not an image')
    return folder


def test_mvtec_layout(category):
    t = mvtec('nut', root=category.parents[1], size=20)
    assert same(t, mvtec(category, size=20)) and t.shape == (1, 20, 20) and len(t.x_train) == 5
    assert t.kinds_test.tolist() == ['bent'] * 3 + ['cut'] * 3 + ['normal'] * 4 and t.masks_test.sum((1, 2)).tolist() == [12] * 6 + [0] * 4
    assert np.array_equal(t.x_test[1, 0], photo(21)) and t.masks_test[1, 1:4, 5:9].all()
    assert mvtec(category, size=(16, 10), channels=3).shape == (3, 16, 10)
    check_apart(t)


def test_mvtec_reserve(category):
    t = mvtec(category, size=20, reserve_per_kind=1, seed=3)
    assert sorted(t.kinds_reserve) == ['bent', 'cut'] and t.y_test.sum() == 4 and t.seen == ('bent', 'cut') and same(t, mvtec(category, size=20, reserve_per_kind=1, seed=3))
    whole = mvtec(category, size=20)
    masks = {i.tobytes(): m for i, m in zip(whole.x_test, whole.masks_test)}
    assert all(np.array_equal(masks[i.tobytes()], m) for i, m in zip(t.x_test, t.masks_test))
    with pytest.raises(ValueError, match='only 3 images of bent'): mvtec(category, reserve_per_kind=3)


def test_mvtec_variants(category):
    for m in (category / 'ground_truth/cut').iterdir(): m.rename(m.with_name(m.name.replace('_mask', '')))   # masks without the ending
    save(photo(99, 20, 30, 3), category / 'train/good/wide.jpg')                                              # one in color, and not square
    t = mvtec(category, size=12)
    assert t.shape == (3, 12, 12) and len(t.x_train) == 6 and t.masks_test.any((1, 2)).sum() == 6
    shutil.copyfile(category / 'train/good/000.png', category / 'test/good/copy.png')
    u = mvtec(category, size=12)
    assert len(u.x_test) == len(t.x_test) and '1 removed from the test side' in u.protocol


def test_mvtec_errors(category):
    root = category.parents[1]
    with pytest.raises(FileNotFoundError) as e: mvtec('bolt', root=root)
    for word in ('bolt', str(root / 'mvtec/bolt/train/good'), 'mvtec.com', 'AD_COURSE_DATA'): assert word in str(e.value)
    save(np.zeros((9, 9), np.uint8), category / 'ground_truth/bent/001_mask.png')
    with pytest.raises(ValueError, match=r'001_mask.png is \(9, 9\)'): mvtec(category)
    (category / 'ground_truth/bent/001_mask.png').unlink()
    with pytest.raises(FileNotFoundError) as e: mvtec(category)
    assert str(category / 'test/bent/001.png') in str(e.value) and str(category / 'ground_truth/bent/001_mask.png') in str(e.value)
    (category / 'train/good/002.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='002.png is not a readable image'): mvtec(category)


def test_mvtec_stand_in(monkeypatch):
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    for name, kinds in MVTEC.items():
        t = mvtec(name, size=24, reserve_per_kind=2)
        assert t.shape == (1 if name in ('grid', 'screw', 'zipper') else 3, 24, 24) and set(t.kinds_test) == {'normal', *kinds} and t.seen == tuple(sorted(kinds))
        assert 'stand-in images, AD_COURSE_SMOKE=1' in t.protocol and t.masks_test.any((1, 2)).tolist() == t.y_test.tolist()
    with pytest.raises(FileNotFoundError): mvtec('screw', root='nowhere')   # a folder that you name is read, or missed
    assert magnetic_tile(size=24).masks_test is not None and mvtec('my_own', size=24).x_train.dtype == np.uint8


@pytest.fixture
def tiles(tmp_path):
    "Folder with 10 free tiles and 5 with a blowhole, three exposures each, and one Uneven whose mask is empty."
    folder = tmp_path / 'magnetic_tile'
    for tile in range(16):
        for e in range(3 if tile < 15 else 1):
            kind = 'Free' if tile < 10 else 'Blowhole' if tile < 15 else 'Uneven'
            stem = folder / f'MT_{kind}/Imgs/exp{e + 1}_num_{2000 * tile + 20 * e}'
            save(photo(100 * tile + e, 20 + tile, 31), stem.with_suffix('.jpg'))
            m = np.zeros((20 + tile, 31), np.uint8)
            if kind == 'Blowhole': m[3:8, 4:9] = 200
            save(m, stem.with_suffix('.png'))
    return folder


def pack(folder, prefix=''):
    path = folder.parent / 'packed.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for p in folder.rglob('*.*'): z.write(p, prefix + p.relative_to(folder).as_posix())
    return path


def test_magnetic_tile_folder_and_zip(tiles, monkeypatch):
    t = magnetic_tile(tiles, size=16, reserve=.4)
    assert same(t, magnetic_tile(pack(tiles), size=16, reserve=.4)) and same(t, magnetic_tile(pack(tiles, 'master/'), size=16, reserve=.4))
    monkeypatch.setenv('AD_COURSE_DATA', str(tiles.parent))
    assert same(t, magnetic_tile(size=16, reserve=.4))
    check_apart(t)
    assert t.shape == (1, 16, 16) and '1 defects with an empty mask left out' in t.protocol and set(t.kinds_test) == {'normal', 'Blowhole'}
    assert np.array_equal(t.masks_test.any((1, 2)), t.y_test == 1)
    for side in (t.x_train, t.x_test[t.y_test == 0], t.x_test[t.y_test == 1], t.x_reserve):
        assert len(side) and len(side) % 3 == 0                # whole tiles only
    assert len(t.x_train) == 21 and len(t.x_reserve) == 6


def test_magnetic_tile_errors(tiles, tmp_path):
    with pytest.raises(FileNotFoundError, match='no magnetic tiles at .*AD_COURSE_DATA'): magnetic_tile(tmp_path / 'nowhere')
    (tmp_path / 'half.zip').write_bytes(b'PK half')
    with pytest.raises(ValueError, match='half.zip is not a readable zip'): magnetic_tile(tmp_path / 'half.zip')
    (tmp_path / 'none').mkdir()
    with pytest.raises(ValueError, match='holds no images'): magnetic_tile(tmp_path / 'none')
    name = 'MT_Blowhole/Imgs/exp1_num_20000'
    (tiles / f'{name}.png').unlink()
    for path in (tiles, pack(tiles)):
        with pytest.raises(FileNotFoundError, match=f'{name}.jpg in .* has no mask: {name}.png in .* is missing'): magnetic_tile(path)
    (tiles / f'{name}.jpg').write_bytes(b'broken')
    (tiles / f'{name}.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match=f'{name}.jpg in .* is not a readable image'): magnetic_tile(tiles)


# the real sets, where they are

@real('MNIST/raw')
def test_real_mnist():
    t = mnist(3, root=REAL)
    assert len(t.x_train) == 6131 and len(t.x_test) == 10_000 and (t.y_test == 0).sum() == 1010 and len(t.x_reserve) == 2000


@real('cifar10_test.npz')
def test_real_cifar_files():
    t = from_npz(REAL / 'cifar10_train_500pc.npz', normal='cat', test_path=REAL / 'cifar10_test.npz')
    assert len(t.x_train) == 500 and len(t.x_test) == 10_000 and t.shape == (3, 32, 32) and 'removed' not in t.protocol


@real('fashion_mnist_test.npz')
def test_real_fashion_file():
    t = from_npz(REAL / 'fashion_mnist_test.npz', anomalous=8)
    assert len(t.x_train) == 6300 and t.y_test.sum() == 800


@real('mvtec/screw')
def test_real_screw():
    t = mvtec('screw', size=64, root=REAL)
    assert len(t.x_train) == 320 and (t.y_test == 0).sum() == 41 and t.y_test.sum() == 119 and t.shape == (1, 64, 64)
    assert t.unseen == tuple(MVTEC['screw']) and t.masks_test.any((1, 2)).sum() == 119


@real('mvtec/hazelnut_toy')
def test_real_hazelnut_toy():
    t = mvtec('hazelnut_toy', size=64, root=REAL)
    assert len(t.x_train) == 28 and t.y_test.sum() == 17 and t.shape == (3, 64, 64)


@real('magnetic_tile_dev.zip')
def test_real_magnetic_tile():
    t = magnetic_tile(REAL / 'magnetic_tile_dev.zip', size=32)
    assert len(t.x_train) + (t.y_test == 0).sum() == 640 and t.y_test.sum() + len(t.x_reserve) == 274
    assert '3 defects with an empty mask' in t.protocol and t.masks_test[t.y_test == 1].any((1, 2)).all()
