"""A backbone of one's own: tasks, the training, its file, and detectors on it; mutants of each."""
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ad_course import own_backbone as module
from ad_course.backbones import features
from ad_course.detector import load
from ad_course.feature_maps import fingerprint
from ad_course.own_backbone import (TASKS, OnOwn, OwnBackbone, OwnDN2, OwnMahalanobis, class_loss,
                                    contrast_loss, load_backbone, rotation_loss, save_backbone,
                                    train_backbone, turned)
from ad_course.simclr import augment, crop_flip, nt_xent

from .mutants import assert_caught, changed, each_mutant, mutant

QUIET = dict(device='cpu', verbose=False, width=2)
X = np.random.default_rng(0).random((40, 3, 8, 8), dtype='float32')
XB = torch.tensor(X)


def rng(seed=0): return torch.Generator().manual_seed(seed)


def striped(n=48):
    """Images with stripes that lie (0) or stand (1), and which."""
    x = np.random.default_rng(1).random((n, 1, 8, 8), dtype='float32') / 4
    y = np.arange(n) % 2
    x[y == 0, :, ::2] += .7
    x[y == 1, :, :, ::2] += .7
    return x, y


# ---------------------------------------------------------------- tasks
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_turned_is_rot90_of_each_image(n, c, side, seed):
    x, turns = torch.rand(n, c, side, side, generator=rng(seed)), torch.arange(n) + seed % 7
    wanted = [np.rot90(a.numpy(), int(k), (1, 2)) for a, k in zip(x, turns)]
    np.testing.assert_array_equal(turned(x, turns), np.stack(wanted))


def borders(v):
    """How bright the upper, left, lower and right borders are, (b, 4)."""
    return torch.stack([v[:, 0, 0].mean(1), v[:, 0, :, 0].mean(1), v[:, 0, -1].mean(1),
                        v[:, 0, :, -1].mean(1)], 1)


def sure(rows): return 40. * (rows == rows.amax(1, keepdim=True))


def check_rotations(loss):
    """Who reads the turn off the image is right; all four turns are asked for, each image's own."""
    lit = torch.linspace(1, 0, 8).view(1, 1, 8, 1).expand(64, 1, 8, 8)
    asked = []
    def note(v): asked.append(borders(v).argmax(1)); return borders(v)
    assert loss(note, sure, lit, rng=rng()) < .1, 'the right answer'
    assert asked[0].unique().numel() == 4, 'four turns'
    assert loss(note, lambda rows: -sure(rows), lit, rng=rng()) > 3, 'a wrong answer costs'


def alike(net, head, xb, yb=None, rng=None):
    """All images of the batch are turned by the first one's number."""
    turns = torch.randint(4, (len(xb),), generator=rng)
    return F.cross_entropy(head(net(crop_flip(xb, rng).rot90(int(turns[0]), (2, 3)))), turns)

def clockwise(net, head, xb, yb=None, rng=None):
    turns = torch.randint(4, (len(xb),), generator=rng)
    return F.cross_entropy(head(net(turned(crop_flip(xb, rng), -turns))), turns)

def never(net, head, xb, yb=None, rng=None):
    turns = torch.zeros(len(xb), dtype=torch.long)
    return F.cross_entropy(head(net(turned(crop_flip(xb, rng), turns))), turns)


def test_rotations_are_told_by_the_right_answer(): check_rotations(rotation_loss)


@each_mutant({'the right answer': (alike, clockwise), 'four turns': (never,)})
def test_wrong_rotations_are_caught(why, broken): assert_caught(check_rotations, broken, why)


def test_class_loss_is_the_cross_entropy_of_the_view():
    net, head, y = nn.Flatten(), nn.Linear(192, 3), torch.arange(40) % 3
    seen = head(crop_flip(XB, rng()).flatten(1)).log_softmax(1)
    wanted = -seen[range(40), y].mean()
    torch.testing.assert_close(class_loss(net, head, XB, y, rng()), wanted)
    assert not torch.allclose(class_loss(net, head, XB, y.roll(1), rng()), wanted)


def test_contrast_is_nt_xent_of_two_new_views():
    g = rng()
    first, second = augment(XB, g), augment(XB, g)
    wanted = nt_xent(first.flatten(1), second.flatten(1))
    found = contrast_loss(nn.Flatten(), nn.Identity(), XB, rng=rng())
    torch.testing.assert_close(found, wanted)
    assert wanted > nt_xent(first.flatten(1), first.flatten(1))       # one view twice is too easy


# ---------------------------------------------------------------- the network
@settings(deadline=None, max_examples=8)
@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 40), st.sampled_from([32, 40]))
def test_any_image_gives_rows(width, c, side, size):
    b = OwnBackbone(width, size)
    x = np.random.default_rng(side).random((2, c, side, side), dtype='float32')
    rows = features(b, x)
    assert rows.shape == (2, b.dim) == (2, 4 * width)
    one = features(b, x[1:])
    np.testing.assert_allclose(rows[1:], one, atol=1e-5)            # alone as in a batch
    if c == 1: np.testing.assert_allclose(rows, features(b, x.repeat(3, 1)), atol=1e-5)


def statistics(b): return {k: v.clone() for k, v in b.state_dict().items()}


def check_frozen(cls):
    """No parameter learns, no statistic moves, whatever is asked of it."""
    b = cls(2)
    before = statistics(b)
    assert not any(p.requires_grad for p in b.parameters()), 'parameters'
    b.train()
    b(XB)
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items()), 'statistics'
    x = XB.clone().requires_grad_()
    b(x).sum().backward()
    assert x.grad.abs().sum() > 0, 'images get their gradient'


def test_it_is_frozen(): check_frozen(OwnBackbone)


class Thawed(OwnBackbone):
    def __init__(self, *args): super().__init__(*args); self.requires_grad_(True)

usual = changed(OwnBackbone, train=nn.Module.train)


@each_mutant({'parameters': (Thawed,), 'statistics': (usual,)})
def test_what_is_not_frozen_is_caught(why, broken): assert_caught(check_frozen, broken, why)


# ---------------------------------------------------------------- the training
@functools.cache
def learned(task='classes', **params):
    x, y = striped()
    y = y if task == 'classes' else None
    return train_backbone(x, y, task, width=2, batch_size=16, **dict(epochs=6) | params)


def told(b, head):
    x, y = striped()
    return float((head(torch.tensor(features(b, x))).argmax(1).numpy() == y).mean())


def test_it_learns_what_an_untrained_one_cannot():
    assert told(*learned()) > .9 > told(*learned(epochs=0))


@pytest.mark.parametrize('task', TASKS)
def test_training_is_the_seed_s_and_leaves_all_else_alone(task):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    make = lambda **p: train_backbone(XB[:20], np.arange(20) % 3 if task == 'classes' else None,
                                      task, width=2, epochs=1, batch_size=8, **p)[0]
    a, b, other, start = make(), make(), make(seed=1), make(lr=1e-12)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert fingerprint(a) == fingerprint(b) != fingerprint(other)
    assert fingerprint(a) != fingerprint(start)
    assert not a.training and not any(p.requires_grad for p in a.parameters())


def test_kinds_may_have_any_names():
    x, y = striped()
    named, _ = train_backbone(x, np.array(['lies', 'stands'])[y], width=2, epochs=1, batch_size=16)
    numbered, _ = train_backbone(x, 7 * y, width=2, epochs=1, batch_size=16)
    assert fingerprint(named) == fingerprint(numbered)


@pytest.mark.parametrize('wrong, says', [
    (dict(task='jigsaw'), 'task'), (dict(task='classes'), 'without y'),
    (dict(task='rotations', y=np.zeros(40)), 'with y'),
    (dict(task='contrast', width=0), 'width')])
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): train_backbone(X, **wrong)


def test_only_squares_are_turned():
    with pytest.raises(ValueError, match='square'):
        train_backbone(X[..., :6], task='rotations')


# ---------------------------------------------------------------- the file
def test_file_and_back_bit_by_bit(tmp_path):
    b, path = learned()[0], tmp_path/'b.safetensors'
    save_backbone(b, path)
    again = load_backbone(path)
    assert np.array_equal(features(again, X), features(b, X)) and again.width == b.width
    assert load_backbone(path, 64).size == 64


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path/'b.safetensors'
    with pytest.raises(FileNotFoundError): load_backbone(path)
    path.write_bytes(b'no such thing')
    with pytest.raises(ValueError, match='damaged'): load_backbone(path)
    save_file(dict(a=torch.zeros(2)), path)
    with pytest.raises(ValueError, match='save_backbone'): load_backbone(path)
    save_backbone(OwnBackbone(2), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='digest'): load_backbone(path)


# ---------------------------------------------------------------- detectors
@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('own')/'b.safetensors')
    save_backbone(learned()[0], path)
    return path


def check_rows(cls, file):
    """The rows of a fitted detector are the file's features, at length one; the file's own, too."""
    d = cls(file=file, **QUIET).fit(X)
    wanted = F.normalize(torch.tensor(features(learned()[0], X)))
    with torch.no_grad(): found = d.rows(XB)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, msg='rows')
    d.decision_function(X)
    kept = d.nets_.own.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in learned()[0].state_dict().items()), 'still'


class Forgetful(OwnDN2):
    """Never reads the file."""
    def train(self, data): super(OnOwn, self).train(data)

class Long(OwnDN2):
    def rows(self, xb): return self.nets_.own(xb)

class Drifting(OwnDN2):
    """Statistics follow the images that are scored."""
    def image_score(self, xb):
        nn.Module.train(self.nets_.own)
        self.nets_.own(xb)
        nn.Module.train(self.nets_.own, False)
        return super().image_score(xb)


@pytest.mark.parametrize('cls', [OwnDN2, OwnMahalanobis])
def test_rows_are_those_of_the_file(cls, file): check_rows(cls, file)


@each_mutant({'rows': (Forgetful, Long), 'still': (Drifting,)})
def test_wrong_rows_are_caught(why, broken, file):
    assert_caught(lambda cls: check_rows(cls, file), broken, why)


@pytest.mark.parametrize('cls', [OwnDN2, OwnMahalanobis])
def test_a_saved_detector_needs_the_file_no_more(cls, tmp_path):
    path = tmp_path/'b.safetensors'
    save_backbone(learned()[0], path)
    d = cls(file=str(path), **QUIET).fit(X)
    d.save(tmp_path/'d.safetensors')
    path.unlink()
    later = load(tmp_path/'d.safetensors')
    assert np.array_equal(later.decision_function(X), d.decision_function(X))
    with pytest.raises(ValueError, match='file'): cls(file=str(path), **QUIET).fit(X)


def test_without_a_file_the_network_is_the_seed_s():
    scores = lambda seed: OwnDN2(seed=seed, **QUIET).fit(X).decision_function(X[:5])
    assert np.array_equal(scores(1), scores(1)) and not np.array_equal(scores(1), scores(2))


def test_a_file_of_another_width_is_refused(file):
    with pytest.raises(ValueError, match='width must be 2'):
        OwnDN2(file=file, width=4, verbose=False).fit(X)


def test_training_helps_the_neighbors_tell_stripes(file):
    x, y = striped(80)
    score = lambda **p: OwnDN2(**QUIET, **p).fit(x[:40][y[:40] == 0]).score(x[40:], y[40:])
    assert score(file=file) > .95


def test_equations_are_those_of_the_tasks():
    assert TASKS == dict(classes=class_loss, rotations=rotation_loss, contrast=contrast_loss)
    called = []
    with mutant(module, TASKS=dict(contrast=lambda *a: called.append(a) or XB.sum() * 0 +
                                   sum(p.sum() for p in a[1].parameters()))):
        train_backbone(X, task='contrast', width=1, epochs=1, batch_size=20)
    assert len(called) == 2                                             # two batches of twenty
