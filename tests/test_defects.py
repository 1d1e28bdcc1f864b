"""The promises of the labelled sets: official layouts, nothing on both sides, errors that help."""
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ad_course import defects
from ad_course.data import label_anomalies
from ad_course.datasets import data_root, from_folder
from ad_course.defects import *

from .mutants import mutant
from .tasks import check_apart, global_randomness_is_left_alone, no_smoke, quick, same

REAL = data_root()


def photo(seed, h=20, w=20, c=None):
    shape = (h, w) if c is None else (h, w, c)
    return np.random.default_rng(seed).integers(1, 255, shape, dtype=np.uint8)


def save(a, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)


def sides(task, owner):
    """The owners of the images of a task that can be learned from, and of those tested."""
    of = lambda *sets: {owner[i.tobytes()] for x in sets for i in x}
    return of(task.x_train, task.x_reserve), of(task.x_test)


@quick
@given(h=st.integers(1, 60), w=st.integers(1, 60), n=st.sampled_from([None, 1, 2, 3]))
def test_pieces_cover_the_long_side_once(h, w, n):
    boxes = defects._boxes(h, w, n)
    count = np.zeros((h, w), int)
    for left, top, right, bottom in boxes: count[top:bottom, left:right] += 1
    assert count.max() == 1 and len(boxes) == (n or max(h, w) // min(h, w))
    if n: assert (count == 1).all()
    else: assert all(r - l == b - t == min(h, w) for l, t, r, b in boxes)


# KolektorSDD

@pytest.fixture
def items(tmp_path):
    """Eight items of four images, 30 x 12; the first image of each has a mark in its middle."""
    folder = tmp_path / 'KolektorSDD'
    for i in range(8):
        for j in range(4):
            part, mask = folder / f'kos{i + 1:02}/Part{j}', np.zeros((30, 12), np.uint8)
            if j == 0: mask[12:14, 3:6] = 255
            save(photo(10 * i + j, 30, 12), part.with_suffix('.jpg'))
            save(mask, part.with_name(f'Part{j}_label.bmp'))
    return folder


def crop_owners(folder):
    x, _, names, _ = defects._read_items(folder, (10, 12))
    return {i.tobytes(): n for i, n in zip(x, names)}


def test_items_are_cut_and_kept_whole(items, monkeypatch):
    monkeypatch.setenv('AD_COURSE_DATA', str(items.parent))
    t = kolektor_sdd(size=(10, 12))
    assert same(t, kolektor_sdd(items, size=(10, 12))) and t.shape == (1, 10, 12)
    assert len(t.x_train) + len(t.x_test) + len(t.x_reserve) == 8 * 4 * 3
    assert t.y_test.sum() + len(t.x_reserve) == 8 and t.y_test.sum() == len(t.x_test) / 12
    assert t.masks_test.sum((1, 2)).tolist() == (6 * t.y_test).tolist()
    assert t.masks_test[t.y_test == 1][:, 2:4, 3:6].all()
    learned, tested = sides(t, crop_owners(items))
    assert not learned & tested and len(learned | tested) == 8
    assert 'all crops of one item on one side' in t.protocol and 'cut into three' in t.protocol
    check_apart(t)
    assert label_anomalies(t, 3).y_train.sum() == 3


def test_a_split_by_crop_leaks_and_says_so(items):
    t = kolektor_sdd(items, split='crop', size=(10, 12))
    learned, tested = sides(t, crop_owners(items))
    assert learned & tested and 'both sides, a leak' in t.protocol
    assert not same(t, kolektor_sdd(items, size=(10, 12)))
    with pytest.raises(ValueError, match="split must be 'item' or 'crop'; got 'part'"):
        kolektor_sdd(items, split='part')


@quick
@given(seed=st.integers(0, 100), share=st.floats(.15, .85))
def test_no_item_is_on_both_sides(items, seed, share):
    t = kolektor_sdd(items, size=(10, 12), seed=seed, test_fraction=share)
    learned, tested = sides(t, crop_owners(items))
    assert not learned & tested and len(learned | tested) == 8


def test_kolektor_errors(items):
    with pytest.raises(FileNotFoundError, match='nowhere must be the folder .*vicos.si') as e:
        kolektor_sdd('nowhere')
    assert 'AD_COURSE_DATA' in str(e.value)
    for share, words in ((1, 'leave images; got 1'), (2, 'be from 0 to 1; got 2')):
        with pytest.raises(ValueError, match=f'test_fraction must {words}'):
            kolektor_sdd(items, test_fraction=share)
    save(photo(1), items / 'kos01/overview.png')
    assert 'passed over: kos01/overview.png' in kolektor_sdd(items, size=8).protocol
    mask = items / 'kos02/Part1_label.bmp'
    save(np.zeros((9, 9), np.uint8), mask)
    with pytest.raises(ValueError, match=r'Part1_label.bmp must be \(30, 12\).*got \(9, 9\)'):
        kolektor_sdd(items)
    mask.unlink()
    with pytest.raises(FileNotFoundError, match='Part1.jpg must have a mask; .*Part1_label.bmp'):
        kolektor_sdd(items)
    (items / 'kos02/Part0.jpg').write_bytes(b'broken')
    with pytest.raises(ValueError, match='Part0.jpg must be a readable image'): kolektor_sdd(items)
    with pytest.raises(ValueError, match='must hold kos01/Part0.jpg'): kolektor_sdd(items / 'kos03')


# AITEX

@pytest.fixture
def strips(tmp_path):
    """Strips of four 12 x 12 squares: six good ones, the last square white; five of two kinds."""
    folder = tmp_path / 'aitex'
    for i in range(6):
        x = photo(i, 12, 50)
        x[:, 36:] = 255
        save(x, folder / f'NODefect_images/cloth{i % 2}/{i:04}_{"00" if i else "000"}_01.png')
    for i, code in enumerate(['019', '019', '019', '030', '030']):
        stem, mask = f'{40 + i:04}_{code}_01', np.zeros((12, 50), np.uint8)
        mask[3, 2 + 12 * i % 48] = 255
        save(photo(50 + i, 12, 50), folder / f'Defect_images/{stem}.png')
        save(mask, folder / f'Mask_images/{stem}_mask.png')
    return folder


def test_strips_are_cut_into_squares(strips):
    t = aitex(strips, size=12, reserve=.4)
    assert t.shape == (1, 12, 12) and len(t.x_train) + (t.y_test == 0).sum() == 18
    assert t.y_test.sum() + len(t.x_reserve) == 5
    assert set(t.kinds_test) | set(t.kinds_reserve) == {'normal', 'fuzzyball', 'nep'}
    assert t.masks_test.sum((1, 2)).tolist() == t.y_test.tolist()
    assert '6 blank squares and 15 unmarked ones of strips with a defect left out' in t.protocol
    x, _, _, names, _ = defects._read_strips(strips, 12)
    learned, tested = sides(t, {i.tobytes(): n for i, n in zip(x, names)})
    assert not learned & tested and len(learned | tested) == 11
    check_apart(t)


def test_irregular_masks(strips):
    masks = strips / 'Mask_images'
    one = masks / '0040_019_01_mask.png'
    one.rename(one.with_name('0040_019_01_mask1.png'))
    second = np.zeros((12, 50), np.uint8)
    second[5, 30] = 255                                     # in the third square
    save(second, masks / '0040_019_01_mask2.png')
    (masks / '0041_019_01_mask.png').unlink()
    save(np.zeros((12, 50), np.uint8), masks / '0043_030_01_mask.png')
    save(photo(70, 12, 50), strips / 'Defect_images/notes.png')
    t = aitex(strips, size=12, reserve=0)
    assert t.y_test.sum() == 4 and (t.kinds_test == 'nep').sum() == 1
    said = t.protocol.partition('passed over: ')[2]
    for name in ('0041_019_01.png', '0043_030_01.png', 'notes.png'): assert name in said
    shutil.copy(strips / 'Defect_images/0040_019_01.png', strips / 'Defect_images/0099_077_01.png')
    save(second, masks / '0099_077_01_mask.png')
    assert 'defect 077' in defects._read_strips(strips, 12)[2]


def test_aitex_errors(strips):
    with pytest.raises(FileNotFoundError, match='nowhere must be .*aitex.es/afid'): aitex('nowhere')
    save(np.zeros((9, 9), np.uint8), strips / 'Mask_images/0041_019_01_mask.png')
    with pytest.raises(ValueError, match=r'0041_019_01_mask.png must be \(12, 50\)'): aitex(strips)
    (strips / 'Defect_images/0041_019_01.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='0041_019_01.png must be a readable image'): aitex(strips)
    shutil.rmtree(strips / 'Mask_images')
    with pytest.raises(FileNotFoundError, match='Mask_images must hold pictures.*AD_COURSE_DATA'):
        aitex(strips)


# ELPV

@pytest.fixture
def cells(tmp_path):
    """Thirty cells, 14 of them normal, both types; with the same in one file."""
    folder, p = tmp_path / 'elpv-dataset', np.repeat([0, 1 / 3, 2 / 3, 1], [14, 4, 4, 8])
    types, x = np.array(['mono', 'poly'] * 15), np.stack([photo(i) for i in range(30)])
    for i in range(30): save(x[i], folder / f'images/cell{i:04}.png')
    rows = [f'images/cell{i:04}.png  {p[i]}   {types[i]}\n' for i in range(30)]
    (folder / 'labels.csv').write_text(''.join(rows))
    np.savez(tmp_path / 'cells.npz', images=x, defect_probability=p.astype('f4'), cell_type=types)
    return folder


def test_cells(cells, monkeypatch):
    monkeypatch.setenv('AD_COURSE_DATA', str(cells.parent))
    for at_least, odd in ((1, 8), (2 / 3, 12), (.67, 12), (.34, 12), (1 / 3, 16),
                          (.33, 16)):
        t = elpv(size=20, at_least=at_least)
        assert t.y_test.sum() + len(t.x_reserve) == odd
        assert len(t.x_train) + (t.y_test == 0).sum() == 14 and t.masks_test is None
        assert f'{16 - odd} cells between left out' in t.protocol
        packed = elpv(cells.parent / 'cells.npz', size=20, at_least=at_least)
        assert same(packed, t) and {*t.kinds_test, *t.kinds_reserve} == {'normal', 'mono', 'poly'}
    check_apart(t)
    inner = cells / 'src/elpv_dataset/data'                 # where newer releases keep it
    inner.mkdir(parents=True)
    for name in ('images', 'labels.csv'): (cells / name).rename(inner / name)
    assert same(elpv(size=20, at_least=.33), t)


def test_elpv_errors(cells):
    with pytest.raises(FileNotFoundError, match='nowhere must be .*zae-bayern'): elpv('nowhere')
    for wrong in (0, 1.1, np.nan, '1', None):
        with pytest.raises(ValueError, match=f'at_least must be .*got {wrong!r}'):
            elpv(cells, at_least=wrong)
    table = cells / 'labels.csv'
    rows = table.read_text()
    for bad in ('images/a.png 0.5', 'images/a.png half mono', 'images/a.png 1.5 mono'):
        table.write_text(rows + bad)
        with pytest.raises(ValueError, match='labels.csv must have rows .* at 30'): elpv(cells)
    table.write_text(rows + 'images/lost.png 0.0 mono')
    with pytest.raises(FileNotFoundError, match='lost.png must be an image'): elpv(cells)
    table.write_text('')
    with pytest.raises(ValueError, match='labels.csv must have rows .*got none'): elpv(cells)
    table.unlink()
    with pytest.raises(FileNotFoundError, match='labels.csv must exist'): elpv(cells)
    np.savez(cells / 'a.npz', images=np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match="array 'defect_probability'"): elpv(cells / 'a.npz')


# slices of heads

@pytest.fixture
def heads(tmp_path):
    """Thirty slices of several sizes, the first twelve with a finding, in both layouts."""
    rows = ['id, hemorrhage', *(f'{i},{int(i < 12)}' for i in range(30)), '']
    (tmp_path / 'head_ct').mkdir()
    (tmp_path / 'head_ct/labels.csv').write_text('\n'.join(rows))
    for i in range(30):
        x = photo(i, 20 + i, 24, 3)
        save(x, tmp_path / f'head_ct/head_ct/{i:03}.png')
        save(x, tmp_path / f'brain_tumor_dataset/{"yes" if i < 12 else "no"}/{i}.png')
    return tmp_path


def test_slices(heads, monkeypatch):
    monkeypatch.setenv('AD_COURSE_DATA', str(heads))
    a, b = head_ct(size=16, reserve=.25), brain_mri(size=16, reserve=.25)
    for t, kind in ((a, 'hemorrhage'), (b, 'tumor')):
        assert t.shape == (1, 16, 16) and t.seen == (kind,)
        assert set(t.kinds_test) == {'normal', kind}
        assert t.y_test.sum() == 9 and len(t.x_reserve) == 3
        assert len(t.x_train) + (t.y_test == 0).sum() == 18
        check_apart(t)
    (heads / 'brain_tumor_dataset').rename(heads / 'b')
    (heads / 'brain_tumor_dataset').mkdir()
    (heads / 'b').rename(heads / 'brain_tumor_dataset/brain_tumor_dataset')    # as it is packed
    assert same(brain_mri(size=16, reserve=.25), b)
    for p in (heads / 'head_ct/head_ct').iterdir(): p.rename(heads / 'head_ct' / p.name)
    (heads / 'head_ct/head_ct').rmdir()
    assert same(head_ct(size=16, reserve=.25), a)
    copy = heads / 'brain_tumor_dataset/brain_tumor_dataset/no'
    for i in range(12, 30): shutil.copy(copy / f'{i}.png', copy / f'copy{i}.png')
    twice = brain_mri(size=16, reserve=.25)
    assert len(twice.x_train) + (twice.y_test == 0).sum() == 36
    check_apart(twice)


def test_slices_errors(heads):
    for load, words in ((head_ct, 'felipekitamura'), (brain_mri, 'navoneel')):
        with pytest.raises(FileNotFoundError, match=f'nowhere must be .*{words}.*AD_COURSE_DATA'):
            load('nowhere')
    with pytest.raises(FileNotFoundError, match='must hold folders yes and no'):
        brain_mri(heads / 'head_ct')
    table = heads / 'head_ct/labels.csv'
    rows = table.read_text()
    for bad in ('30', '30,2', 'x,1', '30,1,1'):
        table.write_text(rows + bad)
        with pytest.raises(ValueError, match='labels.csv must have rows .*at 30'):
            head_ct(heads / 'head_ct')
    for bad in (rows.partition('\n')[2], '\n' + rows, ''):      # no names: an image would be lost
        table.write_text(bad)
        with pytest.raises(ValueError, match='labels.csv must begin with the names of its columns'):
            head_ct(heads / 'head_ct')
    table.write_text(rows + '30,1')
    with pytest.raises(FileNotFoundError, match='must name images; got no 030.png'):
        head_ct(heads / 'head_ct')
    table.unlink()
    with pytest.raises(FileNotFoundError, match='labels.csv must exist'): head_ct(heads / 'head_ct')
    (heads / 'brain_tumor_dataset/no/20.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match='20.png must be a readable image'):
        brain_mri(heads / 'brain_tumor_dataset')


# DIOR

def note(*objects, tag='bndbox'):
    box = lambda l, t, r, b: f'<xmin>{l}</xmin><ymin>{t}</ymin><xmax>{r}</xmax><ymax>{b}</ymax>'
    entry = lambda n, c: f'<object><name>{n}</name><{tag}>{box(*c)}</{tag}></object>'
    return f'<annotation>{"".join(entry(*o) for o in objects)}</annotation>'


@pytest.fixture
def photos(tmp_path):
    """Twenty photographs with two objects each and a small one, ten of them in the test."""
    folder, names = tmp_path / 'DIOR', ['dam', 'ship', 'harbor']
    places = [folder / f'Annotations/{k} Bounding Boxes' for k in ('Horizontal', 'Oriented')]
    upright, oriented = places
    for d in places: d.mkdir(parents=True)
    for i in range(20):
        a, b = names[i % 3], names[i // 3 % 3]
        part = 'JPEGImages-test' if i % 2 else 'JPEGImages-trainval'
        save(photo(i, 40, 50, 3), folder / part / f'{i:05}.jpg')
        objects = (a, (0, 0, 20, 20)), (b, (25, 10, 50, 40)), ('ship', (20, 20, 25, 25))
        (upright / f'{i:05}.xml').write_text(note(*objects))
        (oriented / f'{i:05}.xml').write_text(note(*objects, tag='robndbox'))
    return folder


def test_crops_by_class(photos, monkeypatch):
    monkeypatch.setenv('AD_COURSE_DATA', str(photos.parent))
    t = dior_crops('dam', size=(8, 10), min_side=20, reserve=.5)
    assert t.shape == (3, 8, 10) and 'official split' in t.protocol and len(t.x_test) == 20
    assert set(t.kinds_test) == {'normal', 'ship', 'harbor'} and t.seen == ('harbor', 'ship')
    x, kinds, shown, tested = defects._read_crops(photos, (8, 10), 20)
    assert len(x) == 40 and tested.sum() == 20
    picture = Image.open(photos / 'JPEGImages-trainval/00000.jpg')
    by_hand = picture.crop((25, 10, 50, 40)).resize((10, 8), Image.BILINEAR)
    assert np.array_equal(x[1], np.moveaxis(np.asarray(by_hand), -1, 0))
    owner = {i.tobytes(): s for i, s in zip(x, shown)}
    learned, tested = sides(t, owner)
    assert not learned & tested and all(int(s) % 2 for s in tested)
    assert same(t, dior_crops(0, photos, size=(8, 10), min_side=20, reserve=.5))
    other = dior_crops(anomalous='ship', size=8, min_side=20)
    assert set(other.kinds_test) == {'normal', 'ship'}
    flat = photos.parent / 'VOC'                    # one folder, split by a table or by seed
    shutil.copytree(photos / 'Annotations', flat / 'Annotations')
    (flat / 'JPEGImages').mkdir()
    for p in photos.glob('JPEGImages-*/*'): shutil.copy(p, flat / 'JPEGImages')
    for seed in range(5):
        u = dior_crops('dam', flat, size=(8, 10), min_side=20, seed=seed)
        assert 'photographs held out' in u.protocol
        learned, tested = sides(u, owner)
        assert not learned & tested and tested
    (flat / 'ImageSets/Main').mkdir(parents=True)
    (flat / 'ImageSets/Main/test.txt').write_text('\n'.join(f'{i:05}' for i in range(1, 20, 2)))
    assert same(t, dior_crops('dam', flat, size=(8, 10), min_side=20, reserve=.5))


def test_dior_errors(photos):
    load = lambda **how: dior_crops('dam', photos, size=8, **{'min_side': 20, **how})
    with pytest.raises(FileNotFoundError, match='nowhere must be .*gcheng-nwpu'):
        dior_crops('dam', 'nowhere')
    with pytest.raises(ValueError, match='a class must be .*dam, harbor, ship'):
        dior_crops('car', photos, min_side=20)
    with pytest.raises(ValueError, match='min_side must leave a box'): load(min_side=99)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match='min_side must be 1 or more'): load(min_side=wrong)
    file = photos / 'Annotations/Horizontal Bounding Boxes/00003.xml'
    for text, words in (
            ('<annotation>', 'must be readable XML'),
            (note(('', (0, 0, 30, 30))), 'must have a name'),
            (note(('dam', ('x', 0, 30, 30))), 'must have a name and corners'),
            (note(('dam', (60, 0, 90, 30))), 'must have boxes within')):
        file.write_text(text)
        with pytest.raises(ValueError, match=f'00003.xml {words}'): load()
    file.write_text(note(('dam', (20, 5, 99, 99))))         # beyond the edge: cut there
    assert len(load().x_test) == 19
    (photos / 'JPEGImages-test/00003.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='00003.xml must have its image; got no 00003.jpg'):
        load()
    shutil.rmtree(photos / 'Annotations')
    with pytest.raises(FileNotFoundError, match='must hold Annotations'): load()


# all of them

LOADERS = dict(kolektor_sdd=kolektor_sdd, aitex=aitex, elpv=elpv, head_ct=head_ct,
               brain_mri=brain_mri, dior_crops=dior_crops)


@pytest.mark.parametrize('name', LOADERS)
def test_stand_ins(monkeypatch, name):
    monkeypatch.setenv('AD_COURSE_SMOKE', '1')
    t = LOADERS[name](size=16)
    assert t.shape == (3 if name == 'dior_crops' else 1, 16, 16)
    assert 'stand-in images, AD_COURSE_SMOKE=1' in t.protocol and same(t, LOADERS[name](size=16))
    assert (t.masks_test is not None) == (name in ('kolektor_sdd', 'aitex'))
    assert label_anomalies(t, 10).y_train.sum() == 10
    # A folder that you name is read, or missed.
    with pytest.raises(FileNotFoundError): LOADERS[name](path='nowhere')


@pytest.mark.parametrize('name', LOADERS)
def test_a_set_that_is_not_there_is_asked_for(monkeypatch, tmp_path, name):
    monkeypatch.setenv('AD_COURSE_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='Get .*AD_COURSE_DATA') as e: LOADERS[name]()
    assert str(tmp_path) in str(e.value)


def test_a_folder_of_your_own_in_one_line(tmp_path):
    for i in range(12): save(photo(i), tmp_path / f'normal/{i}.png')
    for i in range(8):
        save(photo(50 + i), tmp_path / 'anomaly' / ('dent', 'rust')[i % 2] / f'{i}.png')
    t = label_anomalies(from_folder(tmp_path, size=20, reserve_per_kind=2), 2, kinds='rust')
    assert t.seen == ('rust',) and t.unseen == ('dent',) and t.y_train.sum() == 2
    assert sorted(t.kinds_reserve) == ['dent', 'dent'] and t.y_test.sum() == 4


def all_alone(index, fraction, groups, rng):
    return defects_share(index, fraction, np.arange(len(np.asarray(groups))), rng)


defects_share = defects._share


@pytest.mark.parametrize('broken, test, fixture', [
    (dict(_share=all_alone), test_items_are_cut_and_kept_whole, 'items'),
    (dict(_share=all_alone), test_crops_by_class, 'photos'),
    (dict(_small_mask=lambda full, size: np.zeros((10, 12), bool)),
     test_items_are_cut_and_kept_whole, 'items'),
    (dict(_check_mask=lambda *_: None), test_aitex_errors, 'strips'),
    (dict(_passed_over=lambda paths, folder: ''), test_irregular_masks, 'strips'),
    (dict(_boxes=lambda h, w, n=None: [(0, 0, w, h)]), test_strips_are_cut_into_squares, 'strips')],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else '')
def test_wrong_ways_are_caught(broken, test, fixture, monkeypatch, request):
    needs = test.__code__.co_varnames[:test.__code__.co_argcount]
    args = [monkeypatch if n == 'monkeypatch' else request.getfixturevalue(fixture) for n in needs]
    caught = AssertionError, ValueError, OSError, pytest.fail.Exception
    with mutant(defects, **broken), pytest.raises(caught): test(*args)


@pytest.mark.skipif(not (REAL / 'elpv_dev_100.npz').exists(), reason='no ELPV in AD_COURSE_DATA')
def test_real_elpv():
    t = elpv(REAL / 'elpv_dev_100.npz', size=100)
    assert len(t.x_train) + (t.y_test == 0).sum() == 746 and t.unseen == ()
    assert t.y_test.sum() + len(t.x_reserve) == 372 and '194 cells between left out' in t.protocol
    assert elpv(REAL / 'elpv_dev_100.npz', size=32, at_least=1 / 3).y_test.sum() > t.y_test.sum()
