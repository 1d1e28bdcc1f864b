"""The surfaces chapter's promises: masks that are exact, defects that are what their names say."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ad_course.surfaces import *

from .tasks import check_apart, global_randomness_is_left_alone, no_smoke, quick, same


@quick
@given(h=st.integers(8, 70), w=st.integers(8, 70), channels=st.sampled_from([1, 3]),
       texture=st.sampled_from(list(TEXTURES)), noise=st.sampled_from([0, .03, .2]),
       seed=st.integers(0, 999))
def test_masks_are_exact(h, w, channels, texture, noise, seed):
    kinds = np.array([*DEFECTS, 'normal'] * 2)
    look = dict(size=(h, w), channels=channels, texture=texture, noise=noise, seed=seed)
    x, clean, masks = draw_surfaces(kinds, **look)
    twin = draw_surfaces(['normal'] * len(kinds), **look)[0]   # drawn again without any defect
    assert x.shape == (len(kinds), channels, h, w) and x.dtype == np.float32
    assert 0 <= x.min() <= x.max() <= 1
    assert np.array_equal(clean, twin) and np.array_equal(masks, (x != twin).any(1))
    assert np.array_equal(masks.any((1, 2)), kinds != 'normal'), kinds[~masks.any((1, 2))]
    assert masks.mean((1, 2)).max() < .7                       # a defect is a part of an image


@pytest.mark.parametrize('size', [8, 256, (8, 256), (200, 24)])
def test_surfaces_of_any_size(size):
    t = surfaces(3, 16, size=size)
    assert np.array_equal(t.masks_test.any((1, 2)), t.y_test == 1)
    assert set(t.kinds_test) == {'normal', *DEFECTS}


def test_shift_is_a_permutation_and_blur_keeps_the_mean():
    for texture in TEXTURES:
        x, clean, masks = draw_surfaces(['shift'] * 10, size=40, texture=texture, noise=0)
        assert np.array_equal(np.sort(x.reshape(10, -1)), np.sort(clean.reshape(10, -1)))
        x, clean, masks = draw_surfaces(['blur'] * 10, size=40, texture='weave', noise=0)
        pixels = (1, 2, 3)
        assert np.allclose(x.mean(pixels), clean.mean(pixels), atol=1e-5)
        assert (x.std(pixels) < clean.std(pixels)).all()


def test_surfaces_task():
    t = surfaces()
    check_apart(t)
    assert same(t, surfaces()) and not same(t, surfaces(seed=1)) and 'not real' in t.protocol
    assert t.seen == ('scratch', 'spot') and set(t.unseen) == set(DEFECTS) - {'scratch', 'spot'}
    assert (t.y_test == 0).sum() == 50 and len(np.unique(t.x_train, axis=0)) == 200
    counts = np.unique(t.kinds_test[t.y_test == 1], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(surfaces(7).x_test, t.x_test)
    assert len(surfaces(8, seen=()).x_reserve) == 0
    assert surfaces(8, kinds='bend').unseen == ('bend',)


@pytest.mark.parametrize('options, words', [
    (dict(size=7), 'size must be 8 or more a side'), (dict(size=(9, 7)), r'got \(9, 7\)'),
    (dict(kinds=['rust']), "a kind must be one of normal, scratch, .*got 'rust'"),
    (dict(texture='silk'), "texture must be one of weave, grain, speckle; got 'silk'"),
    (dict(channels=2), 'channels must be one of 1, 3; got 2')])
def test_surfaces_say_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words): surfaces(4, 4, **options)


@pytest.mark.parametrize('size, n_test, seed', [(16, 400, 1), (16, 800, 2), (8, 300, 0)])
def test_every_defect_changes_a_pixel(size, n_test, seed):
    """A thread that is missing where none stood out is drawn again; the others stay as they are."""
    task = surfaces(size=size, n_test=n_test, texture='grain', seed=seed)
    assert task.masks_test[task.y_test == 1].any((1, 2)).all()
    look = dict(size=size, texture='grain', seed=[seed, 1])
    x, _, masks = draw_surfaces(task.kinds_test, **look)
    kept = masks.any((1, 2)) | (task.y_test == 0)
    np.testing.assert_array_equal(task.x_test[kept], x[kept])
    assert not kept.all() and (task.kinds_test[~kept] == 'thread').all()
