"""The spine under stress: any input, any interruption, any file.

What `check_detector` cannot ask of every method is asked here of a few."""
import _thread
import copy
import importlib
import itertools
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from ad_course import detector as spine
from ad_course.ae import AE
from ad_course.baselines import KNN, PCA, MeanImage
from ad_course.data import digits
from ad_course.batches import Memory
from ad_course.check import BrokenPromise, PROMISES, check_detector, global_state
from ad_course.detector import Detector, from_json, isolated, load, read_file, to_json, total_loss
from ad_course.metrics import auroc

PACKAGE = Path(spine.__file__).parents[1]


def small_one(cls, **defaults):
    """A function from hyper-parameters to a detector; those not given are `defaults`."""
    defaults |= dict(batch_size=4, verbose=False)
    return lambda **given: cls(**defaults | given)


SMALL = dict(AE=small_one(AE, epochs=1, code_dim=2, width=2), MeanImage=small_one(MeanImage),
             PCA=small_one(PCA), KNN=small_one(KNN, k=1))
each_detector = pytest.mark.parametrize('small', SMALL.values(), ids=SMALL)


@pytest.fixture(autouse=True, scope='module')
def on_the_cpu():
    """Bit by bit is a promise for the CPU; a machine with a GPU must not run these tests there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, 'is_available', lambda: False)
        yield


def images(n, c=1, h=6, w=6, seed=0):
    return np.random.default_rng(seed).random((n, c, h, w), dtype='float32')


def learned(d): return {k: v for k, v in vars(d).items() if k.endswith('_')}


def same_model(a, b):
    """Bit by bit: weights, learned attributes, and history (but for the seconds)."""
    one, two = learned(a), learned(b)
    of_terms = lambda history: [(k, v) for k, v in history.items() if k != 'seconds']
    assert one.keys() == two.keys()
    for name in one:
        if name == 'nets_':
            p, q = one[name].state_dict(), two[name].state_dict()
            assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
        elif name == 'history_': assert of_terms(one[name]) == of_terms(two[name])
        elif torch.is_tensor(one[name]): assert torch.equal(one[name], two[name])
        else: assert one[name] == two[name]


class refused:
    """The body fails with a ValueError or TypeError that says something.

    Afterwards the detectors are as they were."""
    def __init__(self, *detectors, kinds=(ValueError, TypeError), match=''):
        self.detectors, self.kinds, self.match = detectors, kinds, match

    def __enter__(self): self.before = [dict(vars(d)) for d in self.detectors]
    def __exit__(self, kind, error, trace):
        assert kind, 'no error'
        if not issubclass(kind, self.kinds): return False
        says = len(str(error)) > 10 and re.search(self.match, str(error))
        assert says, f'the error says too little: {error!r}'
        for d, before in zip(self.detectors, self.before):
            now = vars(d)
            same = now.keys() == before.keys() and all(now[k] is v for k, v in before.items())
            assert same, 'a failed call changed the detector'
        return True


# ---------------------------------------------------------------- any form of input

class Items(Dataset):
    """A Dataset of given items."""
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


def tensor(x):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'The given NumPy array is not writable')
        return torch.from_numpy(np.ascontiguousarray(x, x.dtype.newbyteorder('=')))


def reversed_strides(x): return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
def every_second(x): return np.repeat(x, 2, axis=-1)[..., ::2]
def transposed(x): return np.ascontiguousarray(x.T).T
def read_only(x): x = x.copy(); x.flags.writeable = False; return x
def big_endian(x): return x.astype(x.dtype.newbyteorder('>'))
def from_bytes(x): return np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape)


ARRAYS = [np.copy, reversed_strides, every_second, transposed, read_only, big_endian, from_bytes,
          np.asfortranarray]
FORMS = dict(array=lambda x: x, lists=lambda x: x.tolist(), tensor=tensor,
             grad=lambda x: tensor(x).requires_grad_() if x.dtype.kind == 'f' else tensor(x),
             channels_last=lambda x: tensor(x).contiguous(memory_format=torch.channels_last),
             expanded=lambda x: tensor(x)[:, None].expand(-1, 2, -1, -1, -1)[:, 1],
             tensors=lambda x: TensorDataset(tensor(x)), arrays=lambda x: Items(list(x)),
             pairs=lambda x: Items([(a, 7) for a in x]),
             triples=lambda x: Items([[a, None, 'path'] for a in x]),
             grad_items=lambda x: Items(list(FORMS['grad'](x))),
             stack=lambda x: x[:, 0] if x.shape[1] == 1 else x,
             flat_items=lambda x: Items([a[0] if len(a) == 1 else a for a in x]))
sides, channels = st.one_of(st.integers(1, 12), st.integers(1, 40)), st.sampled_from([1, 3])


def test_all_forms_are_tried():
    """The strategies below draw from these; an array that only looks special would test nothing."""
    x = images(3, 3, 4, 5)
    for f in ARRAYS: np.testing.assert_array_equal(f(x), x)
    assert reversed_strides(x).strides[-1] < 0 and big_endian(x).dtype.byteorder == '>'
    assert not read_only(x).flags.writeable and not from_bytes(x).flags.writeable
    assert not every_second(x).flags.c_contiguous and transposed(x).flags.f_contiguous
    assert not FORMS['channels_last'](x).is_contiguous() and FORMS['grad'](x).requires_grad


@each_detector
@given(data=st.data(), shape=st.tuples(st.integers(2, 10), channels, sides, sides),
       dtype=st.sampled_from(['uint8', 'float16', 'float32', 'float64']),
       layout=st.sampled_from(ARRAYS), form=st.sampled_from(list(FORMS)), seed=st.integers(0, 99))
def test_every_form_of_the_same_images_gives_the_same_model_and_scores(
        small, data, shape, dtype, layout, form, seed):
    rng, n, of_bytes = np.random.default_rng(seed), shape[0], dtype == 'uint8'
    x = (rng.integers(0, 256, shape) if of_bytes else rng.random(shape)).astype(dtype)
    if form == 'lists': x = x.astype('float64') / (255 if of_bytes else 1)  # a list has no bytes
    plain = (x.astype('float32') / np.float32(255) if x.dtype == np.uint8 else x.astype('float32'))
    given_x = FORMS[form](layout(x))
    before = x.copy()
    try: d = small().fit(plain)
    except ValueError: return refused_too(small, given_x)
    s = d.decision_function(plain)
    assert s.shape == (n,) and s.dtype == np.float32 and np.isfinite(s).all()
    np.testing.assert_array_equal(d.decision_function(given_x), s)
    other = small().fit(given_x)
    same_model(other, d)
    np.testing.assert_array_equal(other.predict(given_x), d.predict(plain))
    np.testing.assert_array_equal(x, before)


def refused_too(small, x):
    with refused(kinds=ValueError): small().fit(x)


@pytest.fixture(scope='module')
def fitted():
    """One fitted detector of each kind, on twelve images of 6x6."""
    return {name: make().fit(images(12)) for name, make in SMALL.items()}


@pytest.mark.parametrize('name', SMALL)
@given(where=st.integers(0, 12 * 36 - 1),
       value=st.sampled_from([np.nan, np.inf, -np.inf, -.01, 1.01, 255, -1e30, 1e30]),
       dtype=st.sampled_from(['float16', 'float32', 'float64']), form=st.sampled_from(list(FORMS)))
def test_values_that_are_no_intensities_are_refused(fitted, name, where, value, dtype, form):
    d, x = fitted[name], images(12).astype(dtype)
    with np.errstate(over='ignore'): x.ravel()[where] = value
    x = FORMS[form](x)
    s = d.decision_function(images(5))
    with refused(d): d.fit(x)
    with refused(d): d.decision_function(x)
    np.testing.assert_array_equal(d.decision_function(images(5)), s)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('wrong', [
    lambda x: x.astype(int), lambda x: x > .5, lambda x: x.astype(object),
    lambda x: x.astype(complex), lambda x: x.astype(str), lambda x: (x * 100).astype('int8'),
    lambda x: (x * 100).astype('uint16'), lambda x: torch.from_numpy(x) > .5,
    lambda x: tensor(x).to(torch.complex64), lambda x: None, lambda x: 3, lambda x: 'images',
    lambda x: [], lambda x: {}, lambda x: [None] * 12, lambda x: [x[0], x[0, :, :3]],
    lambda x: x[0, 0], lambda x: x[None], lambda x: x[:, :0], lambda x: x[..., :0],
    lambda x: x.ravel(), lambda x: np.zeros((12, 6, 6, 3), 'float32'),
    lambda x: np.zeros((12, 0, 6), 'float32')])
def test_what_cannot_be_images_is_refused(fitted, name, wrong):
    d, x = fitted[name], wrong(images(12))
    with refused(d): d.fit(x)
    with refused(d): d.decision_function(x)


FLOATS, BYTES = images(1)[0], np.ones((1, 6, 6), 'uint8')


@pytest.mark.parametrize('items', [
    [None] * 5, ['a'] * 5, [{'image': 1}] * 5, [()] * 5, [[]] * 5, [1.] * 5, [object()] * 5, [],
    [np.zeros((1, 6, 6), int)] * 5, [np.zeros((1, 1, 6, 6), 'float32')] * 5,
    [np.zeros((6, 6, 3), 'uint8')] * 5, [FLOATS] * 5 + [FLOATS[:, :5]],
    [FLOATS] * 4 + [FLOATS[:, :, :5]] * 4, [FLOATS] * 4 + [BYTES] * 4, [BYTES] * 4 + [FLOATS] * 4])
def test_items_that_cannot_be_images_are_refused(fitted, items):
    for d in fitted.values():
        with refused(d): d.fit(Items(items))
        with refused(d): d.decision_function(Items(items))


def test_a_dataset_without_order_or_length_is_refused(fitted):
    class Stream(IterableDataset):
        def __iter__(self): return iter(images(5))
    class NoLength(Dataset):
        def __getitem__(self, i): return images(5)[i]
    for x in (Stream(), NoLength()):
        with refused(fitted['AE']): fitted['AE'].fit(x)
        with refused(fitted['AE']): fitted['AE'].decision_function(x)


def test_the_image_at_fault_is_named():
    """By its place in the data, shuffled or not."""
    x = images(50)
    x[37, 0, 2, 2] = np.nan
    for form in (x, Items(list(x))):
        with refused(match=r'image 37\b'): SMALL['AE']().fit(form)
        with refused(match=r'image 37\b'): SMALL['AE']().fit(x[:30]).decision_function(form)
    ragged = Items([*images(30), images(1)[0, :, :5]])
    with refused(match=r'\b30\b'): SMALL['MeanImage']().fit(ragged)


@each_detector
@pytest.mark.parametrize('n', [2, 3, 4, 5, 8, 9])
def test_any_number_of_images(small, n):
    """Batches of four: one, exactly one, one and a single image, two, two and a single image."""
    d, x = small().fit(images(n)), images(11, seed=1)
    assert isinstance(d.threshold_, float) and np.isfinite(d.threshold_)
    whole = d.decision_function(x)
    for k in range(len(x) + 1):
        s = d.decision_function(x[:k])
        assert s.shape == (k,) and s.dtype == np.float32
        np.testing.assert_allclose(s, whole[:k], rtol=1e-5, atol=1e-7)
        assert d.predict(x[:k]).dtype == np.int64
    with refused(d, kinds=ValueError): d.fit(images(1))
    with refused(d, kinds=ValueError): d.fit(images(0))


def test_batches_of_one():
    for arch in ('mlp', 'conv'):
        d = SMALL['AE'](batch_size=1, arch=arch, epochs=2).fit(images(5, 3, 9, 7))
        assert np.isfinite(d.decision_function(images(3, 3, 9, 7))).all()


def test_no_images_give_empty_answers_of_the_right_shape(fitted):
    x = images(0)
    for d in fitted.values():
        assert d.decision_function(x).shape == d.predict(x).shape == (0,)
        if type(d) is not KNN: assert d.anomaly_map(x).shape == (0, 6, 6)
    ae = fitted['AE']
    assert ae.encode(x).shape == (0, 2) and ae.reconstruct(x).shape == (0, 1, 6, 6)


@each_detector
@given(fit=st.tuples(channels, sides, sides), score=st.tuples(channels, sides, sides),
       n=st.integers(0, 3))
@example(fit=(1, 1, 1), score=(3, 1, 1), n=2)
@example(fit=(1, 4, 4), score=(1, 2, 8), n=2)
@example(fit=(3, 5, 5), score=(1, 5, 5), n=2)
def test_images_of_another_size_are_refused(small, fit, score, n):
    assume(fit != score)
    d = small().fit(images(4, *fit))
    x = images(n, *score)
    with refused(d, kinds=ValueError, match='must have the shape'): d.decision_function(x)
    with refused(d, kinds=ValueError): d.calibrate(x)


@dataclass(kw_only=True, eq=False, repr=False)
class Labelled(AE):
    """An autoencoder that reads labels: anomalies do not count."""
    uses_labels = True
    def loss(self, xb, yb):
        errors = self.errors(xb).flatten(1).mean(1)
        return dict(reconstruction=(1 - yb) * errors)


LABELS = [0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize('y', [
    LABELS, tuple(LABELS), np.array(LABELS, bool), np.array(LABELS, '>f8'), torch.tensor(LABELS),
    torch.tensor(LABELS, dtype=torch.float64, requires_grad=True), np.repeat(LABELS, 2)[::2],
    np.array(LABELS, object)])
def test_labels_in_every_form(y):
    small = lambda: Labelled(epochs=2, code_dim=2, width=2, batch_size=4, verbose=False)
    d = small().fit(images(12), LABELS)
    same_model(small().fit(images(12), y), d)
    same_model(small().fit(Items(list(images(12))), y), d)
    same_model(small().fit(Items([(a, label) for a, label in zip(images(12), LABELS)])), d)
    same_model(small().fit(TensorDataset(tensor(images(12)), torch.tensor(LABELS))), d)
    scores = d.decision_function(images(12))[np.array(LABELS) == 0]
    from_normal = pytest.approx(np.quantile(scores, .95))
    assert d.threshold_ == from_normal, 'the threshold comes from the normal images alone'


@pytest.mark.parametrize('y', [
    LABELS[:-1], LABELS + [0], [LABELS], [[v] for v in LABELS], 0, 1, 'abcdefghijkl', [1] * 12, [],
    *([first] + LABELS[1:] for first in (2, -1, np.nan, .5, None, '1')),
    [[1], [1, 2]] + LABELS[2:], {}, object()])
def test_labels_that_are_none_are_refused(y):
    for d in (Labelled(epochs=1, verbose=False), SMALL['AE'](), SMALL['KNN']()):
        with refused(d): d.fit(images(12), y)
        with refused(d): d.fit(Items(list(images(12))), y)


@pytest.mark.parametrize('label', [2, -1, .5, np.nan, None, 'normal', '1', [1]])
def test_labels_within_a_dataset_are_checked(label):
    items = [(a, 0) for a in images(11)] + [(images(1)[0], label)]
    d = Labelled(epochs=1, batch_size=4, verbose=False)
    with refused(d): d.fit(Items(items))
    SMALL['AE']().fit(Items(items))  # without labels there is nothing to check


def test_a_dataset_of_anomalies_alone_is_refused():
    d = Labelled(epochs=1, batch_size=4, verbose=False)
    with refused(d, kinds=ValueError): d.fit(Items([(a, 1) for a in images(8)]))


def test_labels_without_effect_are_a_warning():
    for name in SMALL:
        with pytest.warns(UserWarning, match='does not use labels'):
            d = SMALL[name]().fit(images(12), LABELS)
        same_model(d, SMALL[name]().fit(images(12)))


OUT_OF_RANGE = dict(
    epochs=[-1, 1., None, 'a', True, np.nan], batch_size=[0, -1, 2., None, 10**30],
    lr=[0, -1e-3, np.nan, np.inf, None, 'a'], seed=[-1, .5, None, 2**64, 2**70],
    contamination=[0, 1, -.1, np.nan, None, 'a'], workers=[-1, 'a', None, .5],
    precision=['float16', None, ['a'], torch.float32], code_dim=[0, -1, 2., None, 'a', True],
    width=[0, 1.5, None], arch=['x', None, ['mlp']], weight_decay=[-1, np.nan, np.inf, None, 'a'],
    device=['no such device', 'cuda:99', 3.5])
BAD = [('AE', name, v) for name, values in OUT_OF_RANGE.items() for v in values]
BAD += [('PCA', 'components', v) for v in (0, -1, 5.5, np.nan, np.inf, None, 'a', 13)]
BAD += [('KNN', 'k', v) for v in (0, -1, 2., None, 'a', 12, True)]


@pytest.mark.parametrize('name, parameter, value', BAD)
def test_hyper_parameters_out_of_range_are_refused(name, parameter, value):
    d = SMALL[name](**{parameter: value})
    with refused(d): d.fit(images(12))
    if parameter != 'device': assert not learned(d)
    with refused(d): d.fit(Items(list(images(12))))


@pytest.mark.parametrize('name, parameter, value', [
    ('AE', 'seed', np.int64(3)), ('AE', 'epochs', np.int32(2)), ('AE', 'code_dim', np.int64(4)),
    ('AE', 'width', np.uint8(2)), ('AE', 'lr', np.float32(.01)), ('AE', 'batch_size', np.int64(5)),
    ('AE', 'weight_decay', np.float64(.1)), ('KNN', 'k', np.int64(2)),
    ('PCA', 'components', np.int64(2)), ('PCA', 'components', np.float32(.5)),
    ('AE', 'workers', np.int64(0))])
def test_numbers_of_numpy_are_numbers(tmp_path, name, parameter, value):
    """A search over np.arange gives such."""
    d, plain = (SMALL[name](**{parameter: v}).fit(images(12)) for v in (value, value.item()))
    same_model(d, plain)
    d.save(tmp_path/'model')
    same_model(type(d).load(tmp_path/'model'), plain)


# ---------------------------------------------------------------- interruptions and errors

def trap(d, hook, call, error=KeyboardInterrupt):
    """The hook of this detector raises at its call number `call`, once."""
    real, calls = getattr(d, hook), itertools.count()
    def sprung(*args):
        if next(calls) == call: raise error
        return real(*args)
    setattr(d, hook, sprung)
    return d


def free(d, hook): vars(d).pop(hook, None); return d


def usable(d, x, path):
    """Scores, predicts, saves, loads, and is tidy."""
    s = d.decision_function(x)
    assert s.shape == (len(x),) and np.isfinite(s).all() and np.isfinite(d.threshold_)
    assert not hasattr(d, 'optimizers_') and not any(net.training for net in d.nets_.values())
    d.save(path)
    again = type(d).load(path)
    np.testing.assert_array_equal(again.decision_function(x), s)
    same_model(again, d)


EPOCHS_DONE = {('loss', 1): 0, ('loss', 3): 1, ('loss', 4): 1, ('loss', 6): 2, ('step', 9): 3,
               ('after_epoch', 0): 1, ('after_epoch', 1): 2, ('after_epoch', 3): 4}


@pytest.mark.parametrize('hook, call', EPOCHS_DONE)
def test_interrupted_training_keeps_the_model_so_far(tmp_path, hook, call):
    """Ten images in batches of four: three updates an epoch.

    At the end of an epoch the model is that of so many epochs."""
    x, done = images(10), EPOCHS_DONE[hook, call]
    d = trap(SMALL['AE'](epochs=4), hook, call)
    with pytest.warns(UserWarning, match='interrupted'): assert d.fit(x) is d
    assert len(d.history_.get('reconstruction', [])) == len(d.history_.get('seconds', [])) == done
    usable(d, x, tmp_path/'model')
    so_far = SMALL['AE'](epochs=done).fit(x)
    if (hook, call) not in {('loss', 1), ('loss', 4)}: same_model(d, so_far)
    else:
        assert d.history_.get('reconstruction') == so_far.history_.get('reconstruction')
        pairs = zip(d.nets_.parameters(), so_far.nets_.parameters())
        moved = any(not torch.equal(p, q) for p, q in pairs)
        assert moved, 'the update before the interruption is lost'
    same_model(free(d, hook).fit(x), SMALL['AE'](epochs=4).fit(x))


@pytest.mark.parametrize('call', [0, 1, 2])
@pytest.mark.parametrize('small', [SMALL['AE'], SMALL['MeanImage'], SMALL['PCA']])
def test_interrupted_threshold_keeps_the_model(tmp_path, small, call):
    x = images(10)
    d, whole = trap(small(), 'image_score', call), small().fit(x)
    with pytest.warns(UserWarning, match='interrupted'): d.fit(x)
    usable(free(d, 'image_score'), x, tmp_path/'model')
    np.testing.assert_array_equal(d.decision_function(x), whole.decision_function(x))
    scored = d.decision_function(x)[:4 * call or None]
    assert d.threshold_ == pytest.approx(np.quantile(scored, .95))


def test_interrupted_twice(tmp_path):
    d = trap(trap(SMALL['AE'](epochs=4), 'loss', 4), 'image_score', 1)
    with pytest.warns(UserWarning) as caught: d.fit(images(10))
    assert len(caught) == 2 and len(d.history_['seconds']) == 1
    usable(d, images(10), tmp_path/'model')


def test_interrupted_threshold_of_a_labelled_method_needs_a_normal_image():
    y = np.repeat([1, 0], 5)
    make = lambda: Labelled(epochs=1, batch_size=4, verbose=False)
    d = trap(make(), 'image_score', 1)  # the first batch holds anomalies alone
    with pytest.warns(UserWarning, match='interrupted'): d.fit(images(10), y)
    assert d.threshold_ == make().fit(images(10), y).threshold_


@pytest.mark.parametrize('hook', ['networks', 'optimizers', 'loss', 'learn', 'check_params',
                                  'threshold_rule'])
def test_interrupted_before_there_is_anything_to_keep(hook):
    """The interruption goes through, and the earlier model stays."""
    small = SMALL['PCA'] if hook == 'learn' else SMALL['AE']
    for d in (small(), small().fit(images(10))):
        before = dict(vars(d))
        with pytest.raises(KeyboardInterrupt): trap(d, hook, 0).fit(images(8, h=7))
        assert vars(free(d, hook)) == before


@pytest.mark.parametrize('hook, call', [
    ('loss', 0), ('loss', 8), ('step', 8), ('after_epoch', 2), ('image_score', 0),
    ('image_score', 1), ('networks', 0), ('threshold_rule', 0), ('optimizers', 0)])
@pytest.mark.parametrize('error', [
    ValueError('a fault of the method'), RuntimeError('out of memory'), SystemExit(3),
    GeneratorExit()])
def test_an_error_in_fit_leaves_everything_as_it_was(hook, call, error):
    fresh, old = SMALL['AE'](epochs=4), SMALL['AE'](epochs=4).fit(images(10))
    s, state = old.decision_function(images(10)), global_state()
    for d in (fresh, old):
        before = dict(vars(d))
        with pytest.raises(type(error)): trap(d, hook, call, error).fit(images(10, h=7, seed=1))
        free(d, hook)
        assert vars(d).keys() == before.keys() and all(vars(d)[k] is v for k, v in before.items())
    assert global_state() == state
    np.testing.assert_array_equal(old.decision_function(images(10)), s)
    with pytest.raises(NotFittedError): fresh.decision_function(images(10))


class Signals(AE):
    """Raises a real SIGINT in its own process while it learns."""
    def loss(self, xb):
        if len(self.history_.get('seconds', [])) == 2: signal.raise_signal(signal.SIGINT)
        return super().loss(xb)


def test_a_real_signal(tmp_path):
    """As Ctrl-C: through Python's signal handler, in this thread and from another."""
    x = images(10)
    # a shell's background job is born deaf to it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.warns(UserWarning, match='interrupted'):
            d = Signals(epochs=9, batch_size=4, verbose=False).fit(x)
        assert len(d.history_['seconds']) == 2
        usable(d, x, tmp_path/'model')
        threading.Timer(.3, _thread.interrupt_main).start()
        with pytest.warns(UserWarning, match='interrupted'): d = SMALL['AE'](epochs=10**6).fit(x)
    except KeyboardInterrupt: pytest.fail('fit did not catch the interruption')
    finally: signal.signal(signal.SIGINT, before)
    assert len(d.history_['seconds']) > 0
    usable(d, x, tmp_path/'model')


CHILD = """
import signal, sys, time, warnings
# a shell's background job is born deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np
from torch.utils.data import Dataset
from ad_course.ae import AE

class Images(Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return np.random.default_rng(i).random((1, 9, 9), dtype='float32')

class Telling(AE):
    def loss(self, xb):
        if len(self.history_.get('seconds', [])) == 3:
            print('learning', flush=True)
            time.sleep(60)  # in the midst of an epoch, its workers alive; the signal ends the sleep
        return super().loss(xb)

if __name__ == '__main__':
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        d = Telling(epochs=10**6, batch_size=8, width=2, code_dim=3, workers=2, verbose=False)
        d.fit(Images())
    Telling.__module__ = sys.argv[2]   # as if it had been imported from there
    assert any('interrupted' in str(w.message) for w in caught), [str(w.message) for w in caught]
    d.save(sys.argv[1])
    scores = d.decision_function(Images()).tobytes()
    print(len(d.history_['seconds']), d.threshold_.hex(), scores.hex(), flush=True)
"""


def run_child(code, *args, **kw):
    apart = {'PYTHONPATH': str(PACKAGE), 'PYTHONDONTWRITEBYTECODE': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **apart}, **kw)


@dataclass(kw_only=True, eq=False, repr=False)
class Telling(AE):
    """Stands for the class of the other process."""


@pytest.mark.skipif(os.name != 'posix', reason='a signal to a group of processes is of POSIX')
def test_control_c_in_another_process_and_bit_equal_scores_in_this_one(tmp_path):
    """As a terminal sends it: to the process and to the workers that read its Dataset."""
    child = run_child(CHILD, tmp_path/'model', Telling.__module__, start_new_session=True)
    try:
        assert child.stdout.readline().strip() == 'learning', child.stderr.read()
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        if child.poll() is None: os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, err
    epochs, threshold, scores = out.split()
    d = load(tmp_path/'model')
    assert type(d) is Telling and len(d.history_['seconds']) == int(epochs) == 3
    assert d.threshold_.hex() == threshold
    x = np.stack([np.random.default_rng(i).random((1, 9, 9), dtype='float32') for i in range(40)])
    assert d.decision_function(x).tobytes().hex() == scores


# ---------------------------------------------------------------- saving and loading

@pytest.fixture
def file(tmp_path, fitted):
    """A saved AE."""
    fitted['AE'].save(tmp_path/'model')
    return tmp_path/'model'


def fails(error):
    def f(*args, **kw): raise error
    return f


@pytest.mark.parametrize('step', ['replace', 'fsync'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_saving_is_all_or_nothing(file, monkeypatch, step, error):
    before, other = file.read_bytes(), SMALL['AE']().fit(images(12, seed=1))
    monkeypatch.setattr(spine.os, step, fails(error))
    with pytest.raises(type(error)): other.save(file)
    with pytest.raises(type(error)): other.save(file.with_name('new'))
    assert os.listdir(file.parent) == [file.name] and file.read_bytes() == before
    monkeypatch.undo()
    other.save(file)
    same_model(AE.load(file), other)
    assert os.listdir(file.parent) == [file.name]


def test_saving_where_nothing_can_be_saved(file, fitted):
    nowhere = file.parent/'no_such_folder'/'model'
    with pytest.raises(OSError, match='no_such_folder'): fitted['AE'].save(nowhere)
    with pytest.raises(OSError): fitted['AE'].save(file/'model')
    with pytest.raises(OSError): fitted['AE'].save(file.parent)
    with pytest.raises(NotFittedError): AE().save(file)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize('value', [
    object(), np.zeros(3), {1, 2}, torch.nn.Linear(2, 2), lambda: 0, b'bytes', 1j, [object()],
    {'a': object()}, ((object(),),)])
def test_what_cannot_be_saved_is_an_error_and_the_old_file_stays(file, value):
    before = file.read_bytes()
    d = SMALL['AE']().fit(images(12))
    d.extra_ = value
    with refused(d, kinds=TypeError, match='cannot be saved'): d.save(file)
    del d.extra_
    with refused(kinds=TypeError, match='cannot be saved'): d.set_params(verbose=value).save(file)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_parameters_changed_after_fit_cannot_make_a_file_that_nobody_can_load(file):
    d, before = SMALL['AE']().fit(images(12)), file.read_bytes()
    s = d.decision_function(images(12))
    d.set_params(epochs=7, batch_size=5, lr=1., contamination=.5).save(file.with_name('other'))
    same_model(AE.load(file.with_name('other')), d)
    with refused(kinds=ValueError): d.set_params(code_dim=3).save(file)
    assert file.read_bytes() == before
    np.testing.assert_array_equal(d.decision_function(images(12)), s)   # those of fit


single = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers())


def groups(inner):
    """Lists, tuples and dicts of these."""
    lists = st.lists(inner, max_size=3)
    return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=3)


plain = st.recursive(single, groups, max_leaves=8)


@given(value=plain)
@example(value={'tuple': [1]})
@example(value={'dict': [['a', 1]]})
@example(value=(({},), [[]], {(1, 'a'): {'tuple': ()}}))
@example(value=[np.inf, -np.inf, -0., 5e-324, 2**70])
def test_tuples_and_dicts_survive(value):
    assert repr(from_json(json.loads(json.dumps(to_json(value))))) == repr(value)


@dataclass(kw_only=True, eq=False, repr=False)
class Rich(AE):
    """Hyper-parameters and learned attributes of every kind that a file can hold."""
    sizes: tuple = (1, (2, 3))
    words: dict = field(default_factory=lambda: {'a': (1,), 2: [None, True, .1]})

    def after_epoch(self, data, epoch):
        self.center_, self.count_ = torch.arange(3.), np.int64(7)
        self.flags_ = torch.tensor([True, False])
        self.notes_ = {'by epoch': (1, [2, (np.float32(.5),)]), 'nan': float('nan')}
        self.nothing_, self.half_ = torch.zeros(0, 3), torch.ones(2, dtype=torch.bfloat16)
        self.scalar_ = torch.tensor(2.5, dtype=torch.float64)


def test_everything_learned_survives(tmp_path):
    d = Rich(epochs=1, verbose=False, sizes=(4, (5, (6,)))).fit(images(8))
    d.save(tmp_path/'model')
    again = load(tmp_path/'model')
    assert type(again) is Rich and again.sizes == (4, (5, (6,)))
    assert repr(again.get_params()) == repr(d.get_params())
    assert again.words == {'a': (1,), 2: [None, True, .1]} and again.count_ == 7
    notes = {'by epoch': (1, [2, (.5,)]), 'nan': float('nan')}
    assert repr(again.notes_) == repr(notes)
    for name in ('center_', 'flags_', 'nothing_', 'half_', 'scalar_'):
        a, b = getattr(again, name), getattr(d, name)
        assert torch.equal(a, b) and a.dtype == b.dtype
    x = images(8)
    np.testing.assert_array_equal(again.decision_function(x), d.decision_function(x))


@each_detector
def test_a_loaded_detector_lives_on_without_its_file(tmp_path, small):
    # large enough for convolutions and the buffers of their normalizations
    train, x = images(12, 3, 18, 17), images(9, 3, 18, 17, seed=1)
    d = small().fit(train)
    d.save(tmp_path/'model')
    again = load(tmp_path/'model')
    size = (tmp_path/'model').stat().st_size
    (tmp_path/'model').write_bytes(b'\0' * size)  # in place: a memory map of the file would see it
    np.testing.assert_array_equal(again.decision_function(x), d.decision_function(x))
    again.save(tmp_path/'model')
    same_model(load(tmp_path/'model'), d)
    same_model(again.fit(train), d)


def not_loaded(path, kind=AE, match=''):
    """A ValueError that names the file."""
    state, match = global_state(), f'{re.escape(str(path))}.*{match}'
    with refused(kinds=ValueError, match=match): kind.load(path)
    with refused(kinds=ValueError, match=match): load(path)
    assert global_state() == state


def test_truncated_files(file):
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], 'little')
    some = range(0, len(content), len(content) // 40)
    ends = 0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1
    for n in sorted({*ends, *some}):
        file.write_bytes(content[:n])
        not_loaded(file)
    file.write_bytes(content + b'\0')
    not_loaded(file)
    file.write_bytes(content)
    AE.load(file)


@settings(max_examples=150)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7),
       part=st.sampled_from(['length', 'header', 'body']))
def test_flipped_bits(tmp_path_factory, fitted, where, bit, part):
    path = tmp_path_factory.getbasetemp()/'flipped'
    if not path.exists(): fitted['AE'].save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], 'little')
    low, high = dict(length=(0, 8), header=(8, header), body=(header, len(content)))[part]
    content[low + int(where * (high - low))] ^= 1 << bit
    damaged = path.with_name('damaged')
    damaged.write_bytes(content)
    not_loaded(damaged)


class Bomb:
    """A pickle that writes a file when it is read."""
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return open, (str(self.marker), 'w')


def test_foreign_files_are_refused_and_nothing_executes(tmp_path):
    marker, path = tmp_path/'executed', tmp_path/'model'
    rng = np.random.default_rng(0)
    size = lambda n: n.to_bytes(8, 'little')
    pickles = [pickle.dumps(Bomb(marker), *protocol) for protocol in ((), (0,))]
    short = [b'', b'\0', b'\0' * 8, b'\0' * 100, b'{}', b'text, not tensors']
    sized = [size(2**40) + b'{}', size(2) + b'{}', size(1000) + b'[' * 1000]
    noise = [rng.bytes(n) for n in (1, 8, 9, 100, 5000)]
    for content in [*short, *pickles, *sized, *noise]:
        path.write_bytes(content)
        not_loaded(path)
    torch.save(dict(a=torch.zeros(3), bomb=Bomb(marker)), path)
    not_loaded(path)
    joblib.dump(Bomb(marker), path)
    not_loaded(path)
    save_file({'a': torch.zeros(3)}, path)
    not_loaded(path, match="written by a detector's save")
    save_file({'a': torch.zeros(3)}, path, {'format': 'pt'})
    not_loaded(path, match="written by a detector's save")
    save_file({'a': torch.zeros(3)}, path, {'format': spine.FORMAT})
    not_loaded(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists(), 'the bomb is a real one'


def test_no_file():
    for kind in (AE, Detector):
        with pytest.raises(FileNotFoundError, match='nowhere'): kind.load('nowhere/model')
    with pytest.raises(FileNotFoundError): load(PACKAGE)


def forge(path, change):
    """Rewrites a saved file after `change(head, tensors)`, with a digest that is right."""
    head, tensors = read_file(path)
    change(head, tensors)
    if 'digest' in head: head['digest'] = spine.digest(head, tensors)
    save_file(tensors, path, head)


def in_json(part, **values):
    def change(head, tensors):
        content = json.loads(head[part])
        for k, v in values.items(): content.pop(k) if v is None else content.update({k: v})
        head[part] = json.dumps(content)
    return change


def in_head(**values):
    def change(head, tensors):
        for k, v in values.items(): head.pop(k) if v is None else head.update({k: v})
    return change


def in_tensors(f):
    def change(head, tensors):
        new = f(dict(tensors))
        tensors.clear(); tensors.update(new)
    return change


WEIGHT = 'nets_.encoder.1.weight'
FORGERIES = dict(
    no_detector=in_head(detector=None), no_params=in_head(params=None),
    no_learned=in_head(learned=None), other_format=in_head(format='ad_course detector, format 1'),
    unknown_class=in_head(detector='NoSuchDetector'), base_class=in_head(detector='Detector'),
    not_a_class=in_head(detector='to_json'), params_no_json=in_head(params='{'),
    params_list=in_head(params='[1]'), params_number=in_head(params='3'),
    learned_list=in_head(learned='[]'), learned_text=in_head(learned='"a"'),
    deep=in_head(learned='[' * 100_000),
    deep_value=in_head(learned='{"a_":' + '[' * 5000 + ']' * 5000 + '}'),
    unknown_parameter=in_json('params', no_such=1), init=in_json('params', self=1),
    wrong_type=in_json('params', code_dim='many'), out_of_range=in_json('params', code_dim=-1),
    no_batches=in_json('params', batch_size=0), huge_network=in_json('params', code_dim=10**15),
    mangled=in_json('params', arch={'no': 1}), bad_seed=in_json('params', seed=2**80),
    no_threshold=in_json('learned', threshold_=None), no_shape=in_json('learned', shape_=None),
    wrong_shape=in_json('learned', shape_={'tuple': [1, 5, 5]}),
    text_shape=in_json('learned', shape_='abc'),
    negative_shape=in_json('learned', shape_={'tuple': [1, -6, 6]}),
    number_shape=in_json('learned', shape_=6),
    huge_shape=in_json('learned', shape_={'tuple': [1, 10**9, 10**9]}),
    a_method=in_json('learned', score=3), a_magic_name=in_json('learned', __class__='AE'),
    a_parameter=in_json('learned', epochs=9),
    unhashable=in_json('learned', history_={'dict': [[[1], 2]]}),
    weight_missing=in_tensors(lambda t: {k: v for k, v in t.items() if k != WEIGHT}),
    weight_renamed=in_tensors(lambda t: {k.replace('encoder', 'coder'): v for k, v in t.items()}),
    weight_reshaped=in_tensors(lambda t: {**t, WEIGHT: t[WEIGHT].T.contiguous()}),
    weight_extra=in_tensors(lambda t: {**t, 'nets_.extra': torch.zeros(3)}),
    no_tensors=in_tensors(lambda t: {'a_': torch.zeros(1)}),
    tensor_over_method=in_tensors(lambda t: {**t, 'predict': torch.zeros(3)}))


@pytest.mark.parametrize('name', FORGERIES)
def test_files_that_lie_are_refused(file, name):
    forge(file, lambda head, tensors: None)
    AE.load(file)  # the forger's own hand is not what is refused
    forge(file, FORGERIES[name])
    not_loaded(file)


def test_a_file_of_another_class(file):
    for kind in (KNN, PCA, Rich):
        why = f'must hold a {kind.__name__}; got a AE'
        with refused(kinds=ValueError, match=why): kind.load(file)
    assert type(load(file)) is type(Detector.load(file)) is AE


def test_no_module_is_imported_by_a_file(file, tmp_path, monkeypatch):
    (tmp_path/'evil_module.py').write_text(f'open({str(tmp_path/"imported")!r}, "w")')
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    for detector_name in ('Evil', 'AE', 'evil_module.Evil', 'os.system'):
        forge(file, in_head(module='evil_module', detector=detector_name))
        try: load(file)  # AE is known: its own class is taken
        except ValueError as e: assert 'import' in str(e)
        else: assert detector_name == 'AE'
        forge(file, in_head(module='ad_course.ae', detector='AE'))
    evil = {name for name in set(sys.modules) - before if 'evil' in name}
    assert not (tmp_path/'imported').exists() and not evil


def test_a_large_header_is_read_or_refused(file):
    forge(file, in_json('learned', notes_='a' * 3_000_000))
    assert len(load(file).notes_) == 3_000_000
    forge(file, in_json('params', no_such='a' * 3_000_000))
    not_loaded(file)


def test_a_file_with_settings_that_this_machine_lacks(tmp_path):
    """The device of a file is where it was trained; the device of `load` is where it goes."""
    d = SMALL['AE']().fit(images(8))
    d.set_params(device='cuda:99').save(tmp_path/'model')
    assert load(tmp_path/'model', device='cpu').device == 'cpu'
    with refused(kinds=ValueError): load(tmp_path/'model', device='no such device')


# ---------------------------------------------------------------- a Dataset too big for memory

MEMORY = """
import resource, sys
import numpy as np
import torch
from torch.utils.data import Dataset
from ad_course.ae import AE

MIB, SHAPE = 2**20, (3, 64, 64)

class MadeUp(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if not 0 <= i < self.n: raise IndexError(i)
        return torch.rand(SHAPE, generator=torch.Generator().manual_seed(i))

def peak():
    # Linux hands ru_maxrss of a large parent down to its child; VmHWM is this process alone
    try:
        lines = [line.split() for line in open('/proc/self/status')]
        return next(int(words[1]) for words in lines if words[0] == 'VmHWM:') / 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == 'darwin' else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB

n, sizes = int(sys.argv[1]), dict(arch='mlp', width=1, code_dim=4, batch_size=20)
ae = AE(epochs=1, verbose=False, **sizes)
ae.fit(MadeUp(60)).decision_function(MadeUp(60))  # warm-up
try: open('/proc/self/clear_refs', 'w').write('5')  # Linux: the peak counts anew from here on
except OSError: pass
start = peak()
scores = ae.fit(MadeUp(n)).decision_function(MadeUp(n))
disk = peak()
x = np.stack([image.numpy() for image in MadeUp(n)])
same = np.array_equal(ae.decision_function(x), scores)
print(disk - start, peak() - start, x.nbytes / MIB, len(scores), same)
"""


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no resource.getrusage')
def test_a_dataset_larger_than_the_memory_budget(capsys):
    """Peak growth of the process, after a warm-up.

    Below a budget that the images as an array exceed several times."""
    n, budget = 4500, 64
    out, err = (child := run_child(MEMORY, n)).communicate(timeout=400)
    assert child.returncode == 0, err
    disk, array, total, scored, same = out.split()
    grew = f'as a Dataset the peak grew by {float(disk):.1f}, as an array {float(array):.0f} MiB'
    with capsys.disabled():
        print(f'\n  {n} images, {float(total):.0f} MiB: {grew} (budget {budget} MiB)', end='')
    assert int(scored) == n and same == 'True'
    assert float(disk) < budget < float(total) / 3 and float(array) > 2 * budget


@each_detector
@pytest.mark.parametrize('workers', [0, 2])
def test_a_dataset_and_an_array_give_the_same_model(small, workers):
    for x in (images(30, 3, 9, 8), (images(30, 1, 5, 5) * 255).astype('uint8')):
        a, b = small(workers=workers).fit(TensorDataset(torch.from_numpy(x))), small().fit(x)
        same_model(a, b)
        scores = a.decision_function(TensorDataset(torch.from_numpy(x)))
        np.testing.assert_array_equal(scores, b.decision_function(x))


class Counting(Items):
    """Counts how often each item is read."""
    def __init__(self, items): super().__init__(items); self.reads = []
    def __getitem__(self, i): self.reads.append(i); return super().__getitem__(i)


def test_a_dataset_is_read_a_batch_at_a_time():
    data = Counting(list(images(10)))
    d = SMALL['AE'](epochs=3).fit(data)
    # once for the shape, once an epoch, once for the threshold
    assert sorted(data.reads) == sorted([0] + 4 * list(range(10)))
    epochs = [data.reads[1 + 10 * i:11 + 10 * i] for i in range(4)]
    assert epochs[0] != epochs[1] != epochs[2] and epochs[3] == list(range(10))
    data.reads.clear()
    d.decision_function(data)
    assert data.reads == [0, *range(10)]


# ---------------------------------------------------------------- the state of the world

def everything():
    modes = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'),
             torch.get_default_device())
    others = np.random.get_state()[2:], warnings.filters[:3], os.environ.get('TQDM_DISABLE')
    return *global_state(), *modes, *others


@each_detector
def test_no_global_state_is_changed(small, tmp_path):
    importlib.import_module('sympy')   # torch does at its first step; it adds a filter of warnings
    x = images(12)
    np.random.seed(5); random.seed(5); torch.manual_seed(5); torch.randn(1)
    before = everything()
    def unchanged(f, what):
        out = f()
        assert everything() == before, what
        return out
    d = unchanged(lambda: small().fit(x), 'fit')
    unchanged(lambda: d.decision_function(x), 'score')
    unchanged(lambda: d.predict(x), 'predict')
    unchanged(lambda: d.calibrate(x), 'calibrate')
    unchanged(lambda: d.save(tmp_path/'model'), 'save')
    unchanged(lambda: load(tmp_path/'model'), 'load')
    for workers in (0, 2):
        d.set_params(workers=workers)
        items, which = Items(list(x)), f'a Dataset, {workers} workers'
        unchanged(lambda: d.decision_function(items), f'scoring {which}')
        unchanged(lambda: d.fit(items), f'fitting {which}')
    if type(d) is not KNN: unchanged(lambda: d.anomaly_map(x), 'map')
    unchanged(lambda: pytest.raises(ValueError, d.fit, x * 2), 'refused')
    trapped = lambda: trap(d, 'threshold_rule', 0, ValueError)
    unchanged(lambda: pytest.raises(ValueError, trapped().fit, x), 'failed')


@each_detector
def test_the_callers_modes_neither_matter_nor_change(small):
    x = images(12, 1, 20, 20)
    d = small().fit(x)
    s = d.decision_function(x)
    def under(mode):
        with mode:
            before = everything()
            again = small().fit(x)
            assert everything() == before
            np.testing.assert_array_equal(d.decision_function(x), s)
            np.testing.assert_array_equal(again.decision_function(x), s)
            assert everything() == before
        np.testing.assert_array_equal(again.decision_function(x), s)
        same_model(again.fit(x), d)
    autocast = torch.autocast('cpu', torch.bfloat16)
    for mode in (torch.no_grad(), torch.inference_mode(), autocast): under(mode)
    torch.set_default_dtype(torch.float64)
    try: under(torch.enable_grad())
    finally: torch.set_default_dtype(torch.float32)


def test_bfloat16_within_another_autocast():
    """An outer autocast keeps a cache of the cast weights.

    Training must not go on with those of the first batch."""
    make = lambda: SMALL['AE'](epochs=20, precision='bfloat16', lr=.01)
    with torch.autocast('cpu', torch.bfloat16): d = make().fit(images(12))
    same_model(d, make().fit(images(12)))


# ---------------------------------------------------------------- equations

def hand_mlp(net, x):
    """A stack of linear layers with ReLU between, in numpy and float64."""
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        x = x @ layer.weight.detach().numpy().astype('float64').T + layer.bias.detach().numpy()
        if i < len(layers) - 1: x = np.maximum(x, 0)
    return x


def test_autoencoder_against_numpy():
    x = images(7, 3, 4, 5)
    d = SMALL['AE'](code_dim=3, weight_decay=.01, epochs=3).fit(x)
    code = hand_mlp(d.nets_.encoder, x.reshape(7, -1).astype('float64'))
    rebuilt = 1 / (1 + np.exp(-hand_mlp(d.nets_.decoder, code)))
    errors = (x.reshape(7, -1) - rebuilt)**2                                     # (n, c*h*w)
    np.testing.assert_allclose(d.encode(x), code, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d.reconstruct(x), rebuilt.reshape(x.shape), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d.decision_function(x), errors.mean(1), rtol=1e-4)
    maps = errors.reshape(x.shape).sum(1)
    np.testing.assert_allclose(d.anomaly_map(x), maps, rtol=1e-3, atol=1e-6)
    terms = d.loss(torch.from_numpy(x))
    assert terms['reconstruction'].item() == pytest.approx(errors.mean(), rel=1e-4)
    matrices = [p.detach().numpy().astype('float64') for p in d.nets_.parameters() if p.ndim > 1]
    decay = sum((p**2).sum() for p in matrices)
    assert set(terms) == {'reconstruction', 'decay'}
    assert terms['decay'].item() == pytest.approx(.01 * decay, rel=1e-5)
    assert total_loss(terms, 7).item() == pytest.approx(errors.mean() + .01 * decay, rel=1e-5)


def test_autoencoder_by_hand():
    """Two pixels, one code, all weights 1, all biases 0.

    (1, 0) has the code relu(1) = 1 and comes back as sigmoid(1) twice."""
    x = np.array([[[[1., 0.]]], [[[0., 0.]]]])
    d = AE(epochs=0, code_dim=1, width=1, verbose=False, weight_decay=.5).fit(x)
    with torch.no_grad():
        for p in d.nets_.parameters(): p.fill_(1. if p.ndim > 1 else 0.)
    hidden = d.nets_.encoder[1].out_features
    out = 1 / (1 + np.exp(-float(hidden**2)))  # `hidden` units of value 1, summed; and again
    expected = ((1 - out)**2 + out**2) / 2
    assert d.decision_function(np.array([[[[1., 0.]]]]))[0] == pytest.approx(expected, rel=1e-6)
    assert d.decision_function(np.array([[[[0., 0.]]]]))[0] == pytest.approx(.25)
    decay = .5 * (2 * hidden + hidden + hidden + 2 * hidden)
    assert d.loss(torch.zeros(1, 1, 1, 2))['decay'].item() == pytest.approx(decay)


@pytest.mark.parametrize('arch', ['mlp', 'conv'])
def test_gradient_of_the_loss_in_float64(arch):
    """torch.autograd against finite differences, for every weight of a tiny network."""
    tiny = dict(width=1, code_dim=2, weight_decay=.1, epochs=0)
    d = SMALL['AE'](arch=arch, **tiny).fit(images(4, 1, 5, 6))
    if arch == 'mlp':  # eight hidden units each way are enough, but every one must be alive
        with torch.no_grad():
            for name, p in d.nets_.named_parameters(): p.add_(.1) if name.endswith('bias') else p
    d.nets_.double().train()
    class Total(torch.nn.Module):
        def __init__(self): super().__init__(); self.nets = d.nets_
        def forward(self, xb): return total_loss(d.loss(xb), len(xb))
    total, xb = Total(), torch.from_numpy(images(4, 1, 5, 6, seed=3)).double()
    names, weights = zip(*total.named_parameters())
    weights = tuple(p.detach().clone().requires_grad_() for p in weights)
    of = lambda *w: torch.func.functional_call(total, dict(zip(names, w)), (xb,))
    assert torch.autograd.gradcheck(of, weights)


def test_gradient_of_weight_decay():
    """2 lambda W for every matrix and filter; nothing for biases and normalizations."""
    d = SMALL['AE'](arch='conv', weight_decay=.3, epochs=0).fit(images(4, 1, 9, 9))
    d.nets_.train()
    parameters = dict(d.nets_.named_parameters())
    decay = d.loss(torch.from_numpy(images(4, 1, 9, 9)))['decay']
    grads = torch.autograd.grad(decay, parameters.values(), allow_unused=True)
    layer_of = lambda name: d.nets_.get_submodule(name.rpartition('.')[0])
    kinds = {name: type(layer_of(name)).__name__ for name in parameters}
    seen = set()
    for (name, p), g in zip(parameters.items(), grads):
        if name.endswith('weight') and not kinds[name].startswith('BatchNorm'):
            torch.testing.assert_close(g, .6 * p.detach())
            seen.add(kinds[name])
        else: assert g is None
    assert seen == {'Conv2d', 'Linear', 'ConvTranspose2d'}
    assert any(k.startswith('BatchNorm') for k in kinds.values())


def test_weight_decay_shrinks_weights_and_zero_is_no_term():
    def squares(d):
        return sum(float(p.detach().square().sum()) for p in d.nets_.parameters() if p.ndim > 1)

    a, b = (SMALL['AE'](epochs=30, weight_decay=w, lr=.01).fit(images(20)) for w in (0., .1))
    assert squares(b) < squares(a) / 2
    assert 'decay' not in a.history_ and len(b.history_['decay']) == 30


def test_baselines_against_numpy():
    x, new = images(12, 3, 4, 5), images(5, 3, 4, 5, seed=1)
    rows, others = x.reshape(12, -1).astype('float64'), new.reshape(5, -1).astype('float64')
    mean = rows.mean(0)
    scores = lambda d: d.fit(x).decision_function(new)
    from_mean = ((others - mean)**2).mean(1)
    np.testing.assert_allclose(scores(SMALL['MeanImage']()), from_mean, rtol=1e-4)
    axes = np.linalg.svd(rows - mean)[2][:4]
    rest = others - mean - (others - mean) @ axes.T @ axes
    off_plane = (rest**2).mean(1)
    np.testing.assert_allclose(scores(SMALL['PCA'](components=4)), off_plane, rtol=1e-3)
    away = np.sqrt(((others[:, None] - rows[None])**2).mean(2))               # (m, n)
    nearest = np.sort(away, 1)[:, :3].mean(1)
    np.testing.assert_allclose(scores(SMALL['KNN'](k=3)), nearest, rtol=1e-4)
    among = np.sqrt(((rows[:, None] - rows[None])**2).mean(2))
    leave_one_out = np.sort(among, 1)[:, 1:4].mean(1)
    threshold = SMALL['KNN'](k=3, contamination=.25).fit(x).threshold_
    assert threshold == pytest.approx(np.quantile(leave_one_out, .75), rel=1e-4)


# ---------------------------------------------------------------- loop, thresholds, scikit-learn

def test_fit_equals_the_loop_by_hand():
    """The one training loop against the plain one: same weights, same history, same threshold."""
    x = images(11, 1, 20, 20)
    d = SMALL['AE'](epochs=3, weight_decay=.01, arch='mlp', seed=3).fit(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(d.seed)
        nets = torch.nn.ModuleDict(d.networks((1, 20, 20))).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(nets.parameters(), lr=d.lr)
    order = torch.Generator().manual_seed(d.seed)
    xs, history = torch.from_numpy(x), dict(reconstruction=[], decay=[])
    for _ in range(3):
        nets.train()
        sums = dict(reconstruction=0., decay=0.)
        for index in torch.randperm(11, generator=order).split(4):
            xb = xs[index]
            error = (nets.decoder(nets.encoder(xb)) - xb).square().mean()
            decay = .01 * sum((p**2).sum() for p in nets.parameters() if p.ndim > 1)
            optimizer.zero_grad()
            (error + decay).backward()
            optimizer.step()
            for name, value in (('reconstruction', error), ('decay', decay)):
                sums[name] += value.item() * len(xb)
        for name in history: history[name].append(sums[name] / 11)
    nets.eval()
    for (name, p), q in zip(d.nets_.state_dict().items(), nets.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    assert set(d.history_) == {'reconstruction', 'decay', 'seconds'}
    assert len(d.history_['seconds']) == 3
    for name in history: np.testing.assert_allclose(d.history_[name], history[name], rtol=1e-5)
    with torch.no_grad(): rebuilt = nets.decoder(nets.encoder(xs))
    scores = (rebuilt - xs).square().flatten(1).mean(1).numpy()
    np.testing.assert_allclose(d.decision_function(x), scores, rtol=1e-3)
    assert d.threshold_ == pytest.approx(np.quantile(scores, .95), rel=1e-3)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_loss_that_is_no_number_stops_the_training(value):
    class Explodes(AE):
        def loss(self, xb):
            factor = value if len(self.history_.get('seconds', [])) == 2 else 1.
            penalty = factor * self.code(xb).square().mean(1)
            return dict(reconstruction=self.errors(xb).mean(), penalty=penalty)
    d = Explodes(epochs=5, verbose=False)
    with refused(d, kinds=FloatingPointError, match="'penalty'.*epoch 3.*lr"): d.fit(images(9))
    wild = SMALL['AE'](lr=1e40, epochs=3)
    with refused(wild, kinds=FloatingPointError): wild.fit(images(9))


@pytest.mark.parametrize('loss', [
    dict(), dict(a=0.), dict(a=None), [1], torch.zeros(()), None, dict(a=torch.zeros(4, 1)),
    dict(a=torch.zeros(3)), dict(a=torch.zeros(4, 4)), dict(a=np.zeros(4))])
def test_a_loss_of_the_wrong_form_is_named(loss):
    with refused(): total_loss(loss, 4)
    d = SMALL['AE']()
    d.loss = lambda xb: loss
    with refused(d): d.fit(images(4))


def test_total_loss_values():
    terms = dict(a=torch.tensor([1., 2., 3.]), b=torch.tensor(.5))
    assert float(total_loss(terms, 3)) == 2.5
    assert float(total_loss(dict(a=torch.tensor([4.])), 1)) == 4.


@pytest.mark.parametrize('score', [
    lambda xb: torch.zeros(len(xb), 1), lambda xb: torch.zeros(len(xb) + 1),
    lambda xb: torch.zeros(())[None], lambda xb: torch.zeros(1, len(xb))])
def test_a_score_of_the_wrong_shape_is_an_error(score):
    d = SMALL['AE']()
    d.image_score = score
    with refused(d, kinds=ValueError): d.fit(images(9))


def test_a_score_that_is_no_number_is_an_error():
    for value in (np.nan, np.inf):
        d = SMALL['AE']()
        d.image_score = lambda xb: torch.full((len(xb),), value)
        with refused(d, kinds=FloatingPointError): d.fit(images(9))


def test_calibrate():
    d, x = SMALL['AE'](contamination=.2).fit(images(20)), images(15, seed=4)
    s = d.decision_function(x)
    assert d.calibrate(x) is d and d.threshold_ == pytest.approx(np.quantile(s, .8))
    assert d.predict(x).sum() == 3
    np.testing.assert_array_equal(d.decision_function(x), s)
    assert d.calibrate(Items(list(x))).threshold_ == pytest.approx(np.quantile(s, .8))
    assert d.calibrate(x[:1]).threshold_ == pytest.approx(s[0])
    for bad in (x[:0], x * 2, images(3, h=7)):
        with refused(d, kinds=ValueError): d.calibrate(bad)
    with pytest.raises(NotFittedError): AE().calibrate(x)


class OwnRule(AE):
    """A threshold of its own: the mean and two standard deviations."""
    def threshold_rule(self, scores):
        assert scores.dtype == np.float32 and scores.ndim == 1
        return scores.mean() + 2 * scores.std()


def share_rule(share):
    """A detector whose own rule flags that share of its training images."""
    return type('Own', (MeanImage,), dict(
        threshold_rule=lambda self, scores: np.quantile(scores, 1 - share)))(verbose=False)


@pytest.mark.parametrize('share, told', [(.5, '50 of its 100.*50%.*is 5%'), (.3, '30 of its 100'),
                                         (.25, None), (.01, None)])
def test_a_rule_that_flags_far_more_than_contamination_says_so(share, told):
    x, d = images(100), share_rule(share)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert np.isclose(d.fit(x).predict(x).mean(), share, atol=.011)
    assert len(caught) == bool(told) and all(re.search(told, str(w.message)) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # asked for: calibrate has nothing to add
        d.calibrate(x)


@pytest.mark.parametrize('n', [2, 3, 7, 40])
@pytest.mark.parametrize('contamination', [.001, .05, .5])
def test_the_quantile_has_nothing_to_say(n, contamination):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        MeanImage(contamination=contamination, verbose=False).fit(images(n))


def test_threshold_rule(tmp_path):
    d = OwnRule(epochs=1, verbose=False).fit(images(20))
    s = d.decision_function(images(20))
    assert type(d.threshold_) is float and d.threshold_ == pytest.approx(s.mean() + 2 * s.std())
    other = d.decision_function(images(9, seed=2))
    expected = other.mean() + 2 * other.std()
    assert d.calibrate(images(9, seed=2)).threshold_ == pytest.approx(expected)
    d.save(tmp_path/'model')
    assert load(tmp_path/'model').threshold_ == d.threshold_
    d.threshold_rule = lambda scores: float('nan')
    with refused(d, kinds=ValueError, match='NaN'): d.calibrate(images(9))
    with refused(d, kinds=ValueError, match='NaN'): d.fit(images(9))
    d.threshold_rule = lambda scores: np.inf
    assert not d.fit(images(9)).predict(images(9)).any(), 'a rule may say that nothing is anomalous'


@pytest.mark.parametrize('contamination, called', [
    (1e-300, 0), (1e-9, 1), (.05, 1), (.5, 10), (1 - 1e-9, 19), (np.nextafter(1, 0), 19)])
def test_extremes_of_contamination(contamination, called):
    d = SMALL['AE'](contamination=contamination).fit(images(20))
    s = d.decision_function(images(20))
    assert s.min() <= d.threshold_ <= s.max() + 1e-6
    assert abs(int(d.predict(images(20)).sum()) - called) <= 1


def test_no_epochs_leave_the_networks_as_they_were_made():
    d = SMALL['AE'](epochs=0, seed=4).fit(images(9))
    with isolated(4): nets = torch.nn.ModuleDict(AE(code_dim=2, width=2).networks((1, 6, 6)))
    pairs = zip(d.nets_.parameters(), nets.parameters())
    assert all(torch.equal(p, q) for p, q in pairs) and d.history_ == {}
    assert np.isfinite(d.threshold_) and len(d.predict(images(9))) == 9


@each_detector
def test_a_second_fit_on_images_of_another_size(small):
    d = small().fit(images(9))
    d.left_over_ = 1
    d.fit(images(7, 3, 18, 17))
    assert not any(net.training for net in d.nets_.values())
    same_model(d, small().fit(images(7, 3, 18, 17)))
    with refused(d): d.decision_function(images(9))


@each_detector
def test_copies(small, tmp_path):
    x = images(9)
    d = small(contamination=.2).fit(x)
    joblib.dump(d, tmp_path/'joblib')
    pickled, dumped = pickle.loads(pickle.dumps(d)), joblib.load(tmp_path/'joblib')
    for again in (copy.deepcopy(d), pickled, dumped, copy.copy(d)):
        assert again is not d and again.get_params() == d.get_params()
        same_model(again, d)
        np.testing.assert_array_equal(again.predict(x), d.predict(x))
    deep = copy.deepcopy(d)
    deep.fit(images(9, seed=3))
    assert deep.threshold_ != d.threshold_
    assert not learned(clone(d)) and clone(d).get_params() == d.get_params()
    with pytest.raises(NotFittedError): clone(d).predict(x)
    same_model(clone(d).fit(x), d)
    same_model(pickle.loads(pickle.dumps(clone(d))).fit(x), d)


def test_repr_shows_what_differs_from_the_defaults():
    fitted = AE(code_dim=3, epochs=1, verbose=False).fit(images(4))
    fitted.set_params(epochs=50, verbose=True)
    assert repr(AE(code_dim=3)) == repr(fitted) == 'AE(code_dim=3)'
    assert eval(repr(SMALL['AE']())).get_params() == SMALL['AE']().get_params()
    with pytest.raises(TypeError): AE(3)
    with pytest.raises(TypeError): AE(no_such=3)
    with pytest.raises(ValueError, match='no_such'): AE().set_params(no_such=3)


def test_set_params_after_fit():
    d, x = SMALL['AE']().fit(images(9)), images(9)
    s, threshold = d.decision_function(x), d.threshold_
    d.set_params(code_dim=5, epochs=2, contamination=.5)
    np.testing.assert_array_equal(d.decision_function(x), s)
    assert d.threshold_ == threshold, 'only fit and calibrate move the threshold'
    assert d.calibrate(x).threshold_ == pytest.approx(np.median(s))
    same_model(d.fit(x), SMALL['AE'](code_dim=5, epochs=2, contamination=.5).fit(x))


def test_bfloat16_on_the_cpu():
    task = digits(normal=3)
    make = lambda precision: AE(epochs=30, precision=precision, verbose=False)
    a, b = (make(precision).fit(task.x_train) for precision in ('float32', 'bfloat16'))
    scores = [d.decision_function(task.x_test) for d in (a, b)]
    one, two = (auroc(task.y_test, s) for s in scores)
    assert abs(one - two) < .02, (one, two)
    assert scores[1].dtype == np.float32
    assert all(p.dtype == torch.float32 for p in b.nets_.parameters())
    assert not np.array_equal(*scores), 'bfloat16 changed nothing: was it used?'
    last = [d.history_['reconstruction'][-1] for d in (a, b)]
    assert last[1] == pytest.approx(last[0], rel=.05)


def test_progress_bar_only_where_wanted(capfd, monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '0')
    SMALL['AE'](epochs=2).fit(images(5))
    assert capfd.readouterr().err == ''
    SMALL['AE'](epochs=2, verbose=True).fit(images(5))
    assert 'AE' in capfd.readouterr().err


def test_hooks_get_batches_that_are_theirs():
    """In [0, 1], float32, of the images' shape; writing into them changes nothing outside."""
    seen = []
    class Scribbles(AE):
        def loss(self, xb):
            seen.append((xb.dtype, tuple(xb.shape), float(xb.min()) >= 0, float(xb.max()) <= 1))
            terms = super().loss(xb.clone())
            xb.fill_(7.)
            return terms
        def image_score(self, xb):
            return super().image_score(xb.clone()) + 0 * xb.fill_(7.).flatten(1).mean(1)
    last = torch.from_numpy(images(4, 3, 6, 6)).contiguous(memory_format=torch.channels_last)
    several = images(9), (images(9, 3) * 255).astype('uint8'), torch.from_numpy(images(9, 3)), last
    for x in several:
        before = x.copy() if isinstance(x, np.ndarray) else x.clone()
        d = Scribbles(epochs=2, batch_size=4, verbose=False).fit(x)
        np.testing.assert_array_equal(d.decision_function(x), d.decision_function(before))
        np.testing.assert_array_equal(x, before)
        data = Items(list(x))
        d.decision_function(data)
        items = np.stack([np.asarray(a) for a in data.items])
        np.testing.assert_array_equal(items, np.asarray(before))
    assert all(low and high for _, _, low, high in seen)
    assert {dtype for dtype, *_ in seen} == {torch.float32}
    assert {shape[1:] for _, shape, *_ in seen} == {(1, 6, 6), (3, 6, 6)}


def test_memory_does_not_copy_what_it_can_share():
    x = images(9)
    for same in (x, torch.from_numpy(x)): assert np.shares_memory(Memory(same).x.numpy(), x)
    x8 = (x * 255).astype('uint8')
    assert np.shares_memory(Memory(x8).x.numpy(), x8), 'bytes stay bytes'


class RaisesInFit(AE):
    def loss(self, xb): raise IndexError('index 3 is out of bounds for dimension 0 with size 3')


def test_broken_promises_are_readable():
    with pytest.raises(BrokenPromise) as caught: check_detector(RaisesInFit(epochs=1))
    lines = str(caught.value).splitlines()
    assert re.fullmatch(r'RaisesInFit breaks \d+ of its promises:', lines[0])
    assert len(lines) - 1 == len(caught.value.broken) <= len(PROMISES)
    assert all(re.match(r'  \w+: .{10,250}$', line) for line in lines[1:]), str(caught.value)
    assert 'index 3 is out of bounds' in str(caught.value) and 'IndexError' in str(caught.value)
    assert set(caught.value.broken) <= set(PROMISES) and 'fit_returns_self' in caught.value.broken


def test_after_epoch_can_end_a_run():
    @dataclass(kw_only=True, eq=False, repr=False)
    class Stops(AE):
        answer: object = True
        def after_epoch(self, data, epoch):
            return self.answer if epoch == 2 else None
    assert len(Stops(epochs=5, verbose=False).fit(images(8)).history_['reconstruction']) == 2
    other = Stops(epochs=5, verbose=False, answer=1).fit(images(8))   # true, but not True
    assert len(other.history_['reconstruction']) == 5


def test_a_default_without_the_decorator_is_no_default():
    """Else it would be ignored in silence: the generated __init__ knows the parent's only."""
    class Wider(AE):
        width: int = 64
    @dataclass(kw_only=True, eq=False, repr=False)
    class Sure(Wider): pass
    x = np.random.default_rng(0).random((8, 1, 4, 4), dtype='float32')
    for cls in (Wider, Sure):
        with pytest.raises(TypeError, match='Wider: the value of width would be ignored; write'):
            cls(epochs=0, verbose=False).fit(x)
    class Plain(AE): pass
    assert Plain(epochs=0, verbose=False).fit(x).width == AE().width
