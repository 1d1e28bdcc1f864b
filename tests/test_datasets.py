"""The promises of the data sets' chapter: nothing half-done on disk, errors that help."""
import gzip, hashlib, io, os, shutil, struct, unicodedata, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ad_course import datasets
from ad_course.batches import Disk
from ad_course.data import contaminate, label_anomalies
from ad_course.datasets import *

from .mutants import mutant
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
    with pytest.raises(ValueError, match='exactly one .*got both'):
        mnist(0, anomalous=5, root=tiny_mnist)
    assert same(mnist(root=tiny_mnist), mnist(0, root=tiny_mnist))


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
    words = r'must have labels, one each .*got \(2,\)'
    with pytest.raises(ValueError, match=words): load('short.npz')


@pytest.mark.parametrize('shape, hint', [
    ((9, 3, 28, 28), 'channels come last; save images.transpose'), ((9, 1, 8, 8), 'channels come'),
    ((9, 3, 5, 3), 'channels come last'), ((9, 28, 28, 28), 'up to 4 channels'), ((9, 784), 'got'),
    ((9,), 'got'), ((), 'got')])
def test_npz_of_another_order_is_refused(tmp_path, shape, hint):
    np.savez(tmp_path / 'a.npz', images=np.zeros(shape), labels=np.arange(9))
    with pytest.raises(ValueError, match=f'a.npz must have images .*{hint}'):
        from_npz(tmp_path / 'a.npz', normal=0)


@pytest.mark.parametrize('labels, words', [
    ([0, 1, -1], 'labels in .*a.npz must be from 0 to 1, .*got -1 at 2'), ([0, 1, 2], 'got 2 at 2'),
    ([0, 1, .5], 'got 0.5 at 2'), ([0, 1, np.nan], 'got nan at 2'),
    (['cat', 'dog', 'cow'], 'must be one of cat, dog, .*got cow at 2'),
    ([[0], [1], [0]], r'a.npz must have labels, one each .*got \(3, 1\)')])
def test_npz_labels_are_of_a_class(tmp_path, labels, words):
    x = np.random.default_rng(0).random((3, 5, 5))
    np.savez(tmp_path / 'a.npz', images=x, labels=labels, classes=['cat', 'dog'])
    with pytest.raises(ValueError, match=words): from_npz(tmp_path / 'a.npz', normal='cat')


def test_npz_labels_of_any_type(tmp_path):
    x, k = np.random.default_rng(0).random((40, 5, 5)), np.arange(40) % 2
    names = np.array(['cat', 'dog'])
    def load(labels, **more):
        np.savez(tmp_path / 'a.npz', images=x, labels=labels, **more)
        return from_npz(tmp_path / 'a.npz', normal='cat')
    tasks = [load(labels, classes=names) for labels in (k, k == 1, k / 1., names[k])]
    tasks += [load(names[k]), load(names[k].astype('S'))]
    assert all(same(t, tasks[0]) for t in tasks) and set(tasks[0].kinds_test) == {'normal', 'dog'}
    with pytest.raises(ValueError, match=r'labels in .*a.npz\[3\] must be a name .*got .*nan'):
        load(np.where(np.arange(40) == 3, np.nan, k))
    with pytest.raises(ValueError, match="classes in .*must be different names; got 'cat' twice"):
        load(k, classes=['cat', 'cat'])
    with pytest.raises(ValueError, match=r'images in .*a.npz must be in \[0, 1\]'):
        np.savez(tmp_path / 'a.npz', images=255 * x, labels=k)
        from_npz(tmp_path / 'a.npz', normal=1)


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


@pytest.mark.parametrize('tag', range(1, 9))
@pytest.mark.parametrize('ending', ['jpg', 'png', 'tif', 'webp'])
def test_a_picture_is_turned_with_its_mask(tmp_path, ending, tag):
    """The mask is painted on what people see; the camera stored it in another way."""
    seen = np.zeros((24, 32), np.uint8)
    seen[2:9, 3:12] = 255
    how = Image.Transpose
    back = {6: how.ROTATE_90, 8: how.ROTATE_270, 5: how.TRANSPOSE, 7: how.TRANSVERSE,
            3: how.ROTATE_180, 2: how.FLIP_LEFT_RIGHT, 4: how.FLIP_TOP_BOTTOM}
    stored, exif = Image.fromarray(seen), Image.Exif()
    if tag in back: stored = stored.transpose(back[tag])
    exif[0x0112] = tag
    folder = tmp_path / 'set'
    for part in ('train/good', 'test/bad', 'ground_truth/bad'): (folder / part).mkdir(parents=True)
    stored.save(folder / f'test/bad/0.{ending}', exif=exif)
    save(photo(0, 24, 32), folder / 'train/good/0.png')
    save(seen // 255, folder / 'ground_truth/bad/0_mask.png')
    x = read_image(folder / f'test/bad/0.{ending}', channels=1)[0]
    assert np.abs(x.astype(int) - seen).mean() < 3
    assert datasets._header(folder / f'test/bad/0.{ending}')[1] == (24, 32)
    t = from_folder(folder, size=(24, 32), channels=1)
    assert (t.x_test[0, 0] > 127)[t.masks_test[0]].mean() > .9
    assert read_mask(folder / f'test/bad/0.{ending}')[1] == (24, 32)


def deep_png(a):
    """An array `(h, w, c)` of 16 bits as the bytes of a PNG file, which Pillow cannot write."""
    part = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    head = struct.pack('>IIBBBBB', a.shape[1], a.shape[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[a.shape[2]],
                       0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in a)
    return (b'\x89PNG\r\n\x1a\n' + part(b'IHDR', head) + part(b'IDAT', zlib.compress(rows))
            + part(b'IEND', b''))


def deep_tif(a):
    """The same as a TIFF file without compression."""
    h, w, c = a.shape
    tags = [(256, 3, 1, w), (257, 3, 1, h), (258, 3, c, 8), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 200), (277, 3, 1, c), (278, 3, 1, h), (279, 4, 1, a.size * 2)]
    bits = struct.pack(f'<{c}H', *[16] * c)
    head = b'II*\0' + struct.pack('<I', 8 + len(bits)) + bits
    body = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', *t) for t in tags)
    return (head + body + b'\0' * 4).ljust(200, b'\0') + a.astype('<u2').tobytes()


@pytest.mark.parametrize('name, blob', [
    *((f'{c}.png', deep_png(np.full((4, 4, c), 700))) for c in (1, 2, 3, 4)),
    ('color.tif', deep_tif(np.full((4, 4, 3), 700))),
    ('color.ppm', b'P6 4 4 65535\n' + b'\2' * 96), ('gray.pgm', b'P5 4 4 65535\n' + b'\2' * 32)])
def test_sixteen_bits_are_refused(tmp_path, name, blob):
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(ValueError, match=f'{name} must have 8 bits a channel; got .*cut off'):
        read_image(tmp_path / name)


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'TIFF', 'BMP', 'GIF', 'WEBP', 'PPM', 'ICO', 'DDS'])
@pytest.mark.filterwarnings('ignore')
def test_damaged_files_are_read_or_named(form):
    """Cut off anywhere, or with a few bytes of the head changed."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(photo(0, c=3)).save(file, form)
    for i in range(40):
        damaged = bytearray(file.getvalue())
        for _ in range(4): damaged[rng.integers(min(400, len(damaged)))] = rng.integers(256)
        if i % 2: damaged = file.getvalue()[:rng.integers(len(damaged))]
        for read in (read_image, read_mask):
            try: read(io.BytesIO(bytes(damaged)), name='mine')
            except ValueError as e: assert str(e).startswith('mine must')


def test_what_pillow_would_cut_is_refused(tmp_path):
    first, second = (Image.fromarray(photo(i, c=3)) for i in range(2))
    for name in ('a.tif', 'a.gif', 'a.webp', 'a.png'):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        for read in (read_image, read_mask):
            with pytest.raises(ValueError, match=f'{name} must hold one picture; got 2 pages'):
                read(tmp_path / name)
    first.save(tmp_path / 'phone.jpg', 'MPO', save_all=True, append_images=[second])
    assert read_image(tmp_path / 'phone.jpg').shape == (3, 20, 20)      # a preview is no page
    clear = photo(0, 4, 4, 3)
    clear = np.dstack([clear, np.full((4, 4), 255, np.uint8)])
    save(clear, tmp_path / 'opaque.png')
    assert np.array_equal(read_image(tmp_path / 'opaque.png'), np.moveaxis(clear[..., :3], -1, 0))
    clear[0, 0, 3] = 0
    save(clear, tmp_path / 'clear.png')
    with pytest.raises(ValueError, match='clear.png must be opaque; got transparent'):
        read_image(tmp_path / 'clear.png')


@pytest.mark.parametrize('limit', [100, 180])       # an error, and a warning that a program raises
@pytest.mark.filterwarnings('error')
def test_a_huge_picture_is_named(tmp_path, monkeypatch, limit):
    save(photo(0), tmp_path / 'good/huge.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match='huge.png must be smaller; .*MAX_IMAGE_PIXELS'):
            read(tmp_path / 'good/huge.png')
    with pytest.raises(ValueError, match='huge.png must be smaller'): from_folder(tmp_path)


# masks

SPOT = np.zeros((16, 16), bool)
SPOT[4:9, 6:12] = True


def painted(how):
    """The spot as people store it."""
    spot, zero = SPOT.astype(np.uint8), np.zeros_like(SPOT, np.uint8)
    stack = lambda *a: Image.fromarray(np.stack(a, -1))
    if how == 'palette':
        image = Image.fromarray(spot)
        image.putpalette([0, 0, 0, 128, 0, 0])
        return image
    if how == 'white first':                # a palette in which the paint is number 0
        image = Image.fromarray(1 - spot)
        image.putpalette([255, 255, 255, 0, 0, 0])
        return image
    return {'one bit': Image.fromarray(SPOT), 'ones': Image.fromarray(spot),
            'gray': Image.fromarray(spot * 100), 'white': Image.fromarray(spot * 255),
            '16 bits': Image.fromarray(spot.astype(np.uint16)), 'float': Image.fromarray(spot / 2),
            '32 bits': Image.fromarray(spot.astype(np.int32) * 70_000),
            'blue': stack(zero, zero, spot), 'opaque': stack(spot, zero, zero, zero + 255),
            'on nothing': stack(zero + 255, zero, zero, spot * 255),
            'black on nothing': stack(zero, zero, zero, spot * 255),
            'gray and alpha': stack(zero, spot * 9)}[how]


@pytest.mark.parametrize('how, ending', [
    *((how, 'png') for how in ('palette', 'white first', 'one bit', 'ones', 'gray', 'white',
      '16 bits', 'blue', 'opaque', 'on nothing', 'black on nothing', 'gray and alpha')),
    *((how, 'tif') for how in ('float', '32 bits', 'ones', '16 bits')),
    ('white', 'jpg'), ('gray', 'jpg'), ('white', 'webp'), ('ones', 'bmp'), ('palette', 'gif'),
    ('gray', 'pgm')])
def test_whatever_is_painted_counts(tmp_path, how, ending):
    image, file = painted(how), tmp_path / f'mask.{ending}'
    image.save(file, **({'compression': None} if ending == 'tif' and how == 'float' else {}))
    assert np.array_equal(read_mask(file)[0], SPOT)


def test_two_grays_are_two_defects_and_an_edge_is_a_choice(tmp_path):
    m = SPOT * np.uint8(255)
    m[0, 0], m[12:, 12:] = 1, 60
    save(m, tmp_path / 'm.png')
    assert read_mask(tmp_path / 'm.png')[0].sum() == SPOT.sum() + 1 + 16
    assert read_mask(tmp_path / 'm.png', above=127)[0].sum() == SPOT.sum()
    both = np.zeros((4, 4, 4), np.uint8)
    both[0], both[1] = (0, 0, 0, 255), (255, 0, 0, 255)
    save(both, tmp_path / 'both.png')
    with pytest.raises(ValueError, match='both.png must be painted on black or on a transparent'):
        read_mask(tmp_path / 'both.png')
    (tmp_path / 'deep.png').write_bytes(deep_png(np.full((4, 4, 3), 7)))
    with pytest.raises(ValueError, match='must have 8 bits'): read_mask(tmp_path / 'deep.png')


def test_masks_are_never_lost(tmp_path):
    m = np.zeros((64, 64), np.uint8)
    m[1, 1] = 255                             # the nearest pixel of an 8x8 grid misses it
    save(m, tmp_path / 'm.png')
    mask, shape = read_mask(tmp_path / 'm.png', 8)
    assert shape == (64, 64) and mask.sum() == 1 and mask[0, 0]
    save(np.minimum(m, 1), tmp_path / 'faint.png')
    assert read_mask(tmp_path / 'faint.png', 8)[0].sum() == 1


def test_image_files(tmp_path):
    for i in range(4): save(photo(i), tmp_path / f'{i}.png')
    files = ImageFiles(sorted(tmp_path.iterdir()), size=(8, 12))
    loader = torch.utils.data.DataLoader(files, batch_size=4, generator=torch.Generator())
    batch = next(iter(loader))
    assert batch.shape == (4, 3, 8, 12) and batch.dtype == torch.uint8
    assert np.array_equal(files[2], read_image(tmp_path / '2.png', (8, 12)))
    assert ImageFiles(tmp_path).paths == ImageFiles(str(tmp_path)).paths == files.paths
    (tmp_path / '1.png').write_bytes(b'no')
    with pytest.raises(ValueError, match='1.png'): ImageFiles(files.paths)[1]
    for paths in ('/nowhere', tmp_path / '0.png', []):
        with pytest.raises(FileNotFoundError): ImageFiles(paths)
    for wrong in (dict(size=0), dict(channels=2)):
        with pytest.raises(ValueError, match='must be'): ImageFiles(tmp_path, **wrong)


@pytest.mark.parametrize('room, workers, decoded', [(0, 0, 12), (0, 1, 12), (1, 0, 4), (1, 1, 4)])
def test_an_image_is_decoded_once_where_all_fit(tmp_path, monkeypatch, room, workers, decoded):
    if workers and torch.multiprocessing.get_start_method() != 'fork': pytest.skip('no copy of us')
    for i in range(4): save(photo(i), tmp_path / f'{i}.png')
    log, read = tmp_path / 'log', datasets.read_image

    def said(path, *rest):
        with open(log, 'a') as out: out.write('x')
        return read(path, *rest)

    monkeypatch.setattr(datasets, 'read_image', said)
    paths = sorted(tmp_path.glob('*.png'))
    source = Disk(ImageFiles(paths, 8, 1, keep=4 * 64 - 1 + room), workers=workers)
    log.write_text('')                                   # the source has looked at the first
    if not workers: source.dataset.held.clear()
    first, *others = (torch.cat([x for x, _ in source.batches(2)]) for _ in range(3))
    assert len(log.read_text()) == decoded - (room and workers), 'a copy of us holds the first'
    for x in others: assert torch.equal(x, first)


def test_what_is_held_cannot_be_changed_from_outside(tmp_path):
    save(photo(0), tmp_path / '0.png')
    files = ImageFiles([tmp_path / '0.png'], 8, 1)
    want = files[0].clone()
    for _ in range(2): files[0].zero_()
    assert torch.equal(files[-1], want) and torch.equal(files[np.int64(0)], want)
    with pytest.raises(IndexError): files[1]


# folders

def test_what_is_a_picture(tmp_path):
    names = ['a.PNG', 'b.webp', 'c.ppm', 'd.pgm', 'e.gif', 'f.jfif', 'g.Tif', 'h.bmp', 'i.jpeg']
    for i, name in enumerate(names):
        Image.fromarray(photo(i)).save(tmp_path / name, name == 'f.jfif' and 'jpeg' or None)
    for name in ('._a.PNG', '.DS_Store', 'notes.txt', 'table.h5'): (tmp_path / name).touch()
    for name in ('.ipynb_checkpoints', '__MACOSX'):
        save(photo(99), tmp_path / name / 'a.png')
    t = from_folder(tmp_path, size=20, test_fraction=0)
    assert len(t.x_train) == 9 == len(ImageFiles(tmp_path)) and t.shape[0] in (1, 3)
    assert t.protocol.endswith('passed over: notes.txt, table.h5; seed 0')


def test_hidden_files_are_passed_over_everywhere(category):
    whole = mvtec(category, size=20)
    truth = 'ground_truth', 'ground_truth/bent'
    for part in ('', 'train', 'train/good', 'test', 'test/bent', *truth):
        for hidden in ('.ipynb_checkpoints', '__MACOSX'):
            save(photo(1), category / part / hidden / '000.png')
        for hidden in ('._000.png', '.DS_Store', '._000_mask.png'):
            (category / part / hidden).write_bytes(b'x')
    assert same(mvtec(category, size=20), whole)


def test_names_of_masks_are_compared_as_seen(category):
    one, two = (unicodedata.normalize(form, 'é') for form in ('NFC', 'NFD'))
    (category / 'test/bent/000.png').rename(category / f'test/bent/{one}.png')
    mask = category / 'ground_truth/bent/000_mask.png'
    mask.rename(mask.with_name(f'{two}_mask.PNG'))
    for part, name in (('test', one), ('ground_truth', two)):
        (category / part / 'cut').rename(category / part / name)
    t = mvtec(category, size=20)
    assert t.masks_test.any((1, 2)).sum() == 6 and set(t.kinds_test) == {'normal', 'bent', one}
    save(np.ones((20, 20), np.uint8), category / f'ground_truth/bent/{one}_mask.bmp')
    with pytest.raises(ValueError, match='.png must have one mask; got .*_mask'): mvtec(category)


def test_an_empty_mask_is_an_error(category):
    file = category / 'ground_truth/cut/001_mask.png'
    save(np.zeros((20, 20), np.uint8), file)
    with pytest.raises(ValueError, match='001_mask.png must mark a pixel.*cut/001.png is cut'):
        mvtec(category)
    save(np.ones((20, 20), np.uint8), file)
    save(np.zeros((20, 20), np.uint8), category / 'ground_truth/good/001_mask.png')
    assert mvtec(category).masks_test.any((1, 2)).sum() == 6
    save(np.ones((20, 20), np.uint8), category / 'ground_truth/good/001_mask.png')
    with pytest.raises(ValueError, match='001_mask.png must be empty, as .*001.png is normal'):
        mvtec(category)


def test_a_split_without_masks_or_test(category):
    whole = mvtec(category, size=20)
    shutil.rmtree(category / 'ground_truth')
    bare = from_folder(category, size=20)
    assert bare.masks_test is None and np.array_equal(bare.x_test, whole.x_test)
    (category / 'test/good').rename(category / 'test/OK')
    assert pixels(from_folder(category, size=20).x_test) == pixels(whole.x_test)
    shutil.rmtree(category / 'test/OK')
    t = from_folder(category, size=20)
    assert (t.y_test == 0).sum() + len(t.x_train) == 5 and t.y_test.sum() == 6
    assert '0.3 of the normal images held out' in t.protocol
    shutil.rmtree(category / 'test')
    t = from_folder(category, size=20)
    assert len(t.x_train) + len(t.x_test) == 5 and len(t.x_test) and not t.y_test.any()
    check_apart(t)
    for file in (category / 'train/good').iterdir(): file.rename(category / 'train' / file.name)
    (category / 'train/good').rmdir()
    assert same(from_folder(category, size=20), t)


def test_kinds_side_by_side(category, tmp_path):
    whole, own = mvtec(category, size=20), tmp_path / 'own'
    own.mkdir()
    (category / 'train/good').rename(own / 'Normal')
    (category / 'test/bent').rename(own / 'bent')
    t = from_folder(own, size=20)
    assert t.unseen == ('bent',) and t.masks_test is None and 'side by side' in t.protocol
    assert len(t.x_train) + (t.y_test == 0).sum() == 5 and t.y_test.sum() == 3
    check_apart(t)
    (category / 'test/cut').rename(own / 'cut')
    (own / 'anomaly').mkdir()
    for kind in ('bent', 'cut'): (own / kind).rename(own / 'anomaly' / kind)
    assert from_folder(own, size=20).unseen == ('bent', 'cut')
    truth = category / 'ground_truth'
    for kind in ('bent', 'cut'):            # beside their pictures, and then in a folder
        for file in sorted((truth / kind).iterdir()): shutil.copy(file, own / 'anomaly' / kind)
    beside = from_folder(own, size=20)
    for file in (own / 'anomaly').rglob('*_mask.png'): file.unlink()
    truth.rename(own / 'masks')
    for t in (beside, from_folder(own, size=20)):
        marks = {i.tobytes(): m for i, m in zip(whole.x_test, whole.masks_test)}
        anomalies = zip(t.x_test[t.y_test == 1], t.masks_test[t.y_test == 1])
        assert t.y_test.sum() == 6 and all((marks[i.tobytes()] == m).all() for i, m in anomalies)
    assert same(beside, from_folder(own, size=20))
    (own / 'Normal').rename(own / 'fine')
    assert len(from_folder(own, size=20, normal='fine').x_test) == len(beside.x_test)
    (own / 'masks/bent/000_mask.png').unlink()
    with pytest.raises(FileNotFoundError, match='bent/000.png must have a mask.*no .*masks/bent'):
        from_folder(own, normal='fine')


def test_what_is_passed_over_is_said(category):
    save(photo(50), category / 'validation/good/0.png')
    save(photo(51), category / 'train/bad/0.png')
    save(np.ones((20, 20), np.uint8), category / 'ground_truth/cut/lost_mask.png')
    (category / 'test/cut/notes.txt').write_text('')
    said = mvtec(category, size=20).protocol.partition('passed over: ')[2]
    for name in ('validation/', 'train/bad/0.png', 'test/cut/notes.txt'): assert name in said
    assert 'and 1 more' in said


@pytest.mark.parametrize('paths, words', [
    ([], 'got nothing. Understood are'), (['notes.txt'], 'got notes.txt. Understood'),
    (['cat/a.png', 'dog/b.png'], 'got 0 normal folders among cat/, dog/. Understood'),
    (['good/a.png', 'OK/b.png'], 'got 2 normal folders among OK/, good/'),
    (['a.png', 'bad/b.png'], 'got a.png, bad/. Understood'),
    (['test/good/a.png', 'test/bad/b.png'], 'got test/. Understood'),
    (['train/good/a.png', 'test/a.png'], 'test must have a layout .* got a.png'),
    (['train/a.png', 'train/good/b.png'], 'train must have a layout .*got a.png, good/'),
    (['train/cat/a.png'], 'train must have .*got 0 normal folders among cat/'),
    (['train/good/a.png', 'test/good/b.png', 'test/ok/c.png'], 'test must .*got 2 normal folders'),
    (['good/a.png', 'bad/normal/b.png'], 'must have another name, as a kind of anomaly')])
def test_other_layouts_are_refused_with_those_understood(tmp_path, paths, words):
    for i, path in enumerate(paths):
        if path.endswith('png'): save(photo(i), tmp_path / path)
        else: (tmp_path / path).touch()
    with pytest.raises(ValueError, match=words): from_folder(tmp_path)


@pytest.mark.parametrize('how, words', [
    (dict(size=0), 'size must be'), (dict(channels=2), 'channels must be 1 or 3; got 2'),
    (dict(test_fraction=-1), 'test_fraction must be from 0 to 1'),
    (dict(reserve_per_kind=-1), 'reserve_per_kind must be a whole number'),
    (dict(reserve_per_kind=.5), 'got 0.5'), (dict(normal='fine'), 'got 0 normal folders')])
def test_from_folder_checks_its_arguments(category, how, words):
    with pytest.raises(ValueError, match=words): from_folder(category, **how)
    with pytest.raises(FileNotFoundError, match='nowhere must be a folder'): from_folder('nowhere')


def test_one_folder_of_pictures_is_split_by_pixels(tmp_path):
    for i in range(10): save(photo(i // 2), tmp_path / f'{i}.png')      # each picture twice
    tasks = [from_folder(tmp_path, size=20, seed=seed) for seed in (0, 0, 1)]
    assert same(*tasks[:2]) and not same(*tasks[1:])
    for t in tasks:
        check_apart(t)
        assert len(t.x_train) + len(t.x_test) == 10 and len(t.x_test) % 2 == 0
    with pytest.raises(ValueError, match='test_fraction must leave images; got 1'):
        from_folder(tmp_path, test_fraction=1)


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


def dark_is_empty(picture, name):
    gray = np.asarray(picture.convert('L'))
    return gray * (gray > 127)


@pytest.mark.parametrize('broken, test, args', [
    (dict(_paint=dark_is_empty), test_whatever_is_painted_counts, ('ones', 'png')),
    (dict(_paint=dark_is_empty), test_whatever_is_painted_counts, ('palette', 'png')),
    (dict(_sixteen_bits=lambda f: False), test_sixteen_bits_are_refused,
     ('c.png', deep_png(np.full((4, 4, 3), 700)))),
    (dict(_opaque=lambda picture: True), test_what_pillow_would_cut_is_refused, ()),
    (dict(_suffixes=lambda: {'.png', '.jpg'}), test_what_is_a_picture, ()),
    (dict(_hidden=lambda name: False), test_hidden_files_are_passed_over_everywhere, None),
    (dict(_seen_name=lambda name: name), test_names_of_masks_are_compared_as_seen, None),
    (dict(_own_mask=lambda image, path, size, kind: read_mask(path, size)[0]),
     test_an_empty_mask_is_an_error, None),
    (dict(_passed_over=lambda paths, folder: ''), test_what_is_passed_over_is_said, None),
    (dict(_check_order=lambda x, path: None), test_npz_of_another_order_is_refused,
     ((9, 3, 28, 28), 'channels come last')),
    (dict(_named=lambda y, classes, path: classes[y]), test_npz_labels_are_of_a_class,
     ([0, 1, -1], 'got -1 at 2'))], ids=lambda v: next(iter(v)) if isinstance(v, dict) else '')
def test_the_old_ways_are_caught(broken, test, args, tmp_path, request):
    args = (request.getfixturevalue('category'),) if args is None else (tmp_path, *args)
    caught = AssertionError, ValueError, OSError, pytest.fail.Exception
    with mutant(datasets, **broken), pytest.raises(caught): test(*args)


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
    (tiles / '__MACOSX/MT_Free/Imgs').mkdir(parents=True)
    for name in ('__MACOSX/MT_Free/Imgs/a.jpg', 'MT_Free/Imgs/._exp1_num_0.jpg'):
        (tiles / name).write_bytes(b'x')
    one = tiles / 'MT_Blowhole/Imgs/exp1_num_20000.jpg'
    for ending in ('.jpg', '.png'): one.with_suffix(ending).rename(one.with_suffix(ending.upper()))
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
    files, _, x, _ = datasets._read_tiles(REAL / 'magnetic_tile_dev.zip', 32)
    tile = dict(zip((i.tobytes() for i in x), datasets._tiles(files)))
    learned, tested = ({tile[i.tobytes()] for i in s} for s in (t.x_train, t.x_test))
    assert not learned & tested, 'eleven groups of frames hold good and bad photographs'
