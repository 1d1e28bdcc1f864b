"""The promises of the data sets' chapter: nothing half-done on disk, errors that help."""
import gzip, hashlib, os, shutil, struct, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ad_course import datasets
from ad_course.data import contaminate, label_anomalies
from ad_course.datasets import *

from .tasks import check_apart, global_randomness_is_left_alone, no_smoke, pixels, same

REAL = data_root()


def real(path):
    return pytest.mark.skipif(not (REAL / path).exists(), reason=f'{path} is not in AD_COURSE_DATA')


# settings

def test_settings(monkeypatch, tmp_path):
    assert smoke(150, 1) == 150
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    assert smoke(150, 1) == 1
    monkeypatch.setenv('AD_COURSE_DATA', str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv('AD_COURSE_DATA', '')
    assert data_root() == Path.home() / '.cache/ad_course'


# torchvision's sets

def idx(a):
    """An array in MNIST's file format, packed."""
    head = struct.pack('>HBB', 0, 8, a.ndim) + struct.pack(f'>{a.ndim}I', *a.shape)
    return gzip.compress(head + a.tobytes())


@pytest.fixture
def tiny_mnist(monkeypatch, tmp_path):
    """A folder with tiny .gz files in place of MNIST's, and torchvision told of their digests.

    The network fails."""
    rng, raw, resources = np.random.default_rng(0), tmp_path / 'MNIST/raw', []
    raw.mkdir(parents=True)
    for part, n in (('train', 200), ('t10k', 100)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for what, a in (('images-idx3', images), ('labels-idx1', labels)):
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
    assert len(t.x_train) == 20 and len(t.x_test) == 100 and t.shape == (1, 28, 28)
    assert 'official split' in t.protocol and not list(tiny_mnist.glob('.part-*'))
    assert (tiny_mnist / 'MNIST/raw/train-images-idx3-ubyte').is_file()
    assert same(t, mnist('3', root=tiny_mnist))
    assert len(mnist(3, root=tiny_mnist, n_train=5).x_train) == 5
    with pytest.raises(ValueError, match='from 1 to 20, .*got 21'):
        mnist(3, root=tiny_mnist, n_train=21)
    with pytest.raises(ValueError, match='a class must be an index below 10 .*got 10'):
        mnist(10, root=tiny_mnist)


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
            raw = str(root / 'MNIST/raw')
            for word in ('MNIST', str(root), 'train-images-idx3-ubyte.gz', raw, 'AD_COURSE_DATA'):
                assert word in str(e.value)
    copy = lambda url, f, *_, **__: shutil.copyfile(source / os.path.basename(f), f)
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', copy)
    assert len(mnist(3, root=root).x_train) == 20 and not list(root.glob('.part-*'))


def test_a_wrong_digest_is_refused(tiny_mnist, monkeypatch):
    root = tiny_mnist / 'elsewhere'
    monkeypatch.setattr(torchvision.datasets.utils, '_get_redirect_url', lambda url, **_: url)
    other = lambda url, f, *_, **__: Path(f).write_bytes(b'something else')
    monkeypatch.setattr(torchvision.datasets.utils, '_urlretrieve', other)
    with pytest.raises(FileNotFoundError, match='MNIST must be under'): mnist(3, root=root)
    assert list(root.rglob('*')) == []


def test_damaged_unpacked_files_are_named(tiny_mnist):
    mnist(3, root=tiny_mnist)
    file = tiny_mnist / 'MNIST/raw/t10k-images-idx3-ubyte'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match='Damaged files there: delete them'):
        mnist(3, root=tiny_mnist)


def test_no_network_no_file(tiny_mnist):
    with pytest.raises(FileNotFoundError) as e: cifar10(root=tiny_mnist / 'empty')
    for word in ('CIFAR10', 'cifar-10-python.tar.gz', str(tiny_mnist / 'empty'), 'no network'):
        assert word in str(e.value)


def test_cifar100_families(monkeypatch):
    # The fine-to-coarse table as it is usually printed, an independent source of the same facts.
    coarse = np.array([
        4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6,
        13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
        16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
        12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13])
    x = np.random.default_rng(0).integers(0, 256, (400, 3, 4, 4), dtype=np.uint8)
    fine = np.arange(200) % 100
    monkeypatch.setattr(datasets, '_fetch', lambda which, root: (x[:200], fine, x[200:], fine))
    for i, name in enumerate(SUPERCLASSES):
        t = cifar100(i)
        assert pixels(t.x_train) == pixels(x[:200][coarse[fine] == i]) and same(t, cifar100(name))
        assert np.array_equal(t.y_test == 0, coarse[fine] == i)


@pytest.mark.parametrize('load, shape, classes', [
    (mnist, (1, 28, 28), 10), (fashion_mnist, (1, 28, 28), 10), (cifar10, (3, 32, 32), 10),
    (cifar100, (3, 32, 32), 20)])
def test_stand_ins(monkeypatch, load, shape, classes):
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    for t in (load(1, n_train=5000), load(anomalous=1)):
        assert t.shape == shape and t.x_train.dtype == np.uint8
        assert 'stand-in images, AD_COURSE_SMOKE=1' in t.protocol
        check_apart(t)
    assert len(np.unique(load(0).kinds_test)) == classes and same(load(0), load(0))
    assert contaminate(load(0), .1) and label_anomalies(load(0), 5)


# files

def test_npz(tmp_path):
    rng, k = np.random.default_rng(0), np.arange(60) % 3
    x = rng.integers(0, 256, (60, 6, 7, 3), dtype=np.uint8)
    np.savez(tmp_path / 'a.npz', images=x, labels=k, classes=np.array(['cat', 'dog', 'cow']))
    np.savez(tmp_path / 'b.npz', images=x[..., 0], labels=k, quality=np.linspace(0, 1, 3)[k])
    t = from_npz(tmp_path / 'a.npz', normal='cat', n_train=5)
    assert t.shape == (3, 6, 7) and len(t.x_train) == 5
    assert pixels(t.x_train) <= pixels(np.moveaxis(x, -1, 1))
    assert from_npz(tmp_path / 'b.npz', anomalous=2).shape == (1, 6, 7)
    graded = from_npz(tmp_path / 'b.npz', normal=0, labels='quality')
    assert set(graded.kinds_test) == {'normal', '0.5', '1'}
    np.savez(tmp_path / 'c.npz', images=255 - x, labels=k, classes=np.array(['cat', 'dog', 'cow']))
    u = from_npz(tmp_path / 'a.npz', normal='cat', test_path=tmp_path / 'c.npz')
    assert len(u.x_train) == 20 and len(u.x_test) == 60


def test_npz_errors(tmp_path):
    load = lambda name: from_npz(tmp_path / name, normal=0)
    with pytest.raises(FileNotFoundError, match='nowhere.npz'): load('nowhere.npz')
    (tmp_path / 'broken.npz').write_bytes(b'PK\x03\x04 half a file')
    with pytest.raises(ValueError, match='broken.npz must be an .npz without'): load('broken.npz')
    np.save(open(tmp_path / 'single.npz', 'wb'), np.zeros(3))
    with pytest.raises(ValueError, match='single.npz'): load('single.npz')
    objects = np.array([{}, {}, {}], dtype=object)
    np.savez(tmp_path / 'objects.npz', images=np.zeros((3, 4, 4)), labels=objects)
    with pytest.raises(ValueError, match='without pickled objects'): load('objects.npz')
    np.savez(tmp_path / 'names.npz', pictures=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(ValueError, match="array 'images'; got pictures, labels"): load('names.npz')
    np.savez(tmp_path / 'short.npz', images=np.zeros((3, 4, 4)), labels=np.zeros(2))
    with pytest.raises(ValueError, match=r'labels \(n,\); got .* and \(2,\)'): load('short.npz')


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
    half = (tmp_path / 'a.png').read_bytes()[:200]
    for name, blob in (('half.png', half), ('empty.png', b''), ('text.png', b'hello')):
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(ValueError, match=f'{name} must be a readable image; got'):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='none.png'): read_image(tmp_path / 'none.png')
    save(np.full((4, 4), 40_000, np.uint16), tmp_path / 'deep.png')
    with pytest.raises(ValueError, match='deep.png must .*got mode I;16'):
        read_image(tmp_path / 'deep.png')
    with pytest.raises(ValueError, match='must be 1 or 3; got 2'):
        read_image(tmp_path / 'a.png', channels=2)


def test_masks_are_never_lost(tmp_path):
    m = np.zeros((64, 64), np.uint8)
    m[1, 1] = 255                             # the nearest pixel of an 8x8 grid misses it
    save(m, tmp_path / 'm.png')
    mask, shape = read_mask(tmp_path / 'm.png', 8)
    assert shape == (64, 64) and mask.sum() == 1 and mask[0, 0]
    save(np.minimum(m, 127), tmp_path / 'soft.png')
    assert not read_mask(tmp_path / 'soft.png', 8)[0].any()


def test_image_files(tmp_path):
    for i in range(4): save(photo(i), tmp_path / f'{i}.png')
    files = ImageFiles(sorted(tmp_path.iterdir()), size=(8, 12))
    loader = torch.utils.data.DataLoader(files, batch_size=4, generator=torch.Generator())
    batch = next(iter(loader))
    assert batch.shape == (4, 3, 8, 12) and batch.dtype == torch.uint8
    assert np.array_equal(files[2], read_image(tmp_path / '2.png', (8, 12)))
    (tmp_path / '1.png').write_bytes(b'no')
    with pytest.raises(ValueError, match='1.png'): files[1]


@pytest.fixture
def category(tmp_path):
    """root/mvtec/nut with two kinds of defects, three each, in 20x20 gray."""
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
    assert t.kinds_test.tolist() == ['bent'] * 3 + ['cut'] * 3 + ['normal'] * 4
    assert t.masks_test.sum((1, 2)).tolist() == [12] * 6 + [0] * 4
    assert np.array_equal(t.x_test[1, 0], photo(21)) and t.masks_test[1, 1:4, 5:9].all()
    assert mvtec(category, size=(16, 10), channels=3).shape == (3, 16, 10)
    check_apart(t)


def test_mvtec_reserve(category):
    t = mvtec(category, size=20, reserve_per_kind=1, seed=3)
    assert sorted(t.kinds_reserve) == ['bent', 'cut'] and t.y_test.sum() == 4
    assert t.seen == ('bent', 'cut')
    assert same(t, mvtec(category, size=20, reserve_per_kind=1, seed=3))
    whole = mvtec(category, size=20)
    masks = {i.tobytes(): m for i, m in zip(whole.x_test, whole.masks_test)}
    assert all(np.array_equal(masks[i.tobytes()], m) for i, m in zip(t.x_test, t.masks_test))
    with pytest.raises(ValueError, match='below 3, the test images of bent; got 3'):
        mvtec(category, reserve_per_kind=3)


def test_mvtec_variants(category):
    for m in (category / 'ground_truth/cut').iterdir():
        m.rename(m.with_name(m.name.replace('_mask', '')))             # masks without the ending
    save(photo(99, 20, 30, 3), category / 'train/good/wide.jpg')       # one in color, not square
    t = mvtec(category, size=12)
    assert t.shape == (3, 12, 12) and len(t.x_train) == 6 and t.masks_test.any((1, 2)).sum() == 6
    shutil.copyfile(category / 'train/good/000.png', category / 'test/good/copy.png')
    u = mvtec(category, size=12)
    assert len(u.x_test) == len(t.x_test) and '1 removed from the test side' in u.protocol


def test_mvtec_errors(category):
    root = category.parents[1]
    with pytest.raises(FileNotFoundError) as e: mvtec('bolt', root=root)
    for word in ('bolt', str(root / 'mvtec/bolt/train/good'), 'mvtec.com', 'AD_COURSE_DATA'):
        assert word in str(e.value)
    save(np.zeros((9, 9), np.uint8), category / 'ground_truth/bent/001_mask.png')
    with pytest.raises(ValueError, match=r'001_mask.png must be \(20, 20\).*got \(9, 9\)'):
        mvtec(category)
    (category / 'ground_truth/bent/001_mask.png').unlink()
    with pytest.raises(FileNotFoundError) as e: mvtec(category)
    for file in ('test/bent/001.png', 'ground_truth/bent/001_mask.png'):
        assert str(category / file) in str(e.value)
    (category / 'train/good/002.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='002.png must be a readable image'): mvtec(category)


def test_mvtec_stand_in(monkeypatch):
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    for name, kinds in MVTEC.items():
        t = mvtec(name, size=24, reserve_per_kind=2)
        assert t.shape == (1 if name in ('grid', 'screw', 'zipper') else 3, 24, 24)
        assert set(t.kinds_test) == {'normal', *kinds} and t.seen == tuple(sorted(kinds))
        assert 'stand-in images, AD_COURSE_SMOKE=1' in t.protocol
        assert t.masks_test.any((1, 2)).tolist() == t.y_test.tolist()
    # A folder that you name is read, or missed.
    with pytest.raises(FileNotFoundError): mvtec('screw', root='nowhere')
    assert magnetic_tile(size=24).masks_test is not None
    assert mvtec('my_own', size=24).x_train.dtype == np.uint8


@pytest.fixture
def tiles(tmp_path):
    """A folder with 10 free tiles and 5 with a blowhole, three exposures each, and an Uneven one.

    The mask of the last is empty."""
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
    load = lambda path=None: magnetic_tile(path, size=16, reserve=.4)
    t = load(tiles)
    assert same(t, load(pack(tiles))) and same(t, load(pack(tiles, 'master/')))
    monkeypatch.setenv('AD_COURSE_DATA', str(tiles.parent))
    assert same(t, load())
    check_apart(t)
    assert t.shape == (1, 16, 16) and set(t.kinds_test) == {'normal', 'Blowhole'}
    assert '1 defects with an empty mask left out' in t.protocol
    assert np.array_equal(t.masks_test.any((1, 2)), t.y_test == 1)
    for side in (t.x_train, t.x_test[t.y_test == 0], t.x_test[t.y_test == 1], t.x_reserve):
        assert len(side) and len(side) % 3 == 0                # whole tiles only
    assert len(t.x_train) == 21 and len(t.x_reserve) == 6


def test_magnetic_tile_errors(tiles, tmp_path):
    with pytest.raises(FileNotFoundError, match='must be the magnetic tiles.*AD_COURSE_DATA'):
        magnetic_tile(tmp_path / 'nowhere')
    (tmp_path / 'half.zip').write_bytes(b'PK half')
    with pytest.raises(ValueError, match='half.zip must be a readable zip file; got'):
        magnetic_tile(tmp_path / 'half.zip')
    (tmp_path / 'none').mkdir()
    with pytest.raises(ValueError, match='must hold images'): magnetic_tile(tmp_path / 'none')
    name = 'MT_Blowhole/Imgs/exp1_num_20000'
    (tiles / f'{name}.png').unlink()
    lost = f'{name}.jpg in .* must have a mask, .*got no {name}.png in '
    for path in (tiles, pack(tiles)):
        with pytest.raises(FileNotFoundError, match=lost): magnetic_tile(path)
    (tiles / f'{name}.jpg').write_bytes(b'broken')
    (tiles / f'{name}.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match=f'{name}.jpg in .* must be a readable image'):
        magnetic_tile(tiles)


# the real sets, where they are

@real('MNIST/raw')
def test_real_mnist():
    t = mnist(3, root=REAL)
    assert len(t.x_train) == 6131 and len(t.x_test) == 10_000
    assert (t.y_test == 0).sum() == 1010 and len(t.x_reserve) == 2000


@real('cifar10_test.npz')
def test_real_cifar_files():
    test = REAL / 'cifar10_test.npz'
    t = from_npz(REAL / 'cifar10_train_500pc.npz', normal='cat', test_path=test)
    assert len(t.x_train) == 500 and len(t.x_test) == 10_000 and t.shape == (3, 32, 32)
    assert 'removed' not in t.protocol


@real('fashion_mnist_test.npz')
def test_real_fashion_file():
    t = from_npz(REAL / 'fashion_mnist_test.npz', anomalous=8)
    assert len(t.x_train) == 6300 and t.y_test.sum() == 800


@real('mvtec/screw')
def test_real_screw():
    t = mvtec('screw', size=64, root=REAL)
    assert len(t.x_train) == 320 and t.shape == (1, 64, 64)
    assert (t.y_test == 0).sum() == 41 and t.y_test.sum() == 119
    assert t.unseen == tuple(MVTEC['screw']) and t.masks_test.any((1, 2)).sum() == 119


@real('mvtec/hazelnut_toy')
def test_real_hazelnut_toy():
    t = mvtec('hazelnut_toy', size=64, root=REAL)
    assert len(t.x_train) == 28 and t.y_test.sum() == 17 and t.shape == (3, 64, 64)


@real('magnetic_tile_dev.zip')
def test_real_magnetic_tile():
    t = magnetic_tile(REAL / 'magnetic_tile_dev.zip', size=32)
    assert len(t.x_train) + (t.y_test == 0).sum() == 640
    assert t.y_test.sum() + len(t.x_reserve) == 274
    assert '3 defects with an empty mask' in t.protocol
    assert t.masks_test[t.y_test == 1].any((1, 2)).all()
