"""A warning shows the name of what was called, and no file of ours."""
import threading
import warnings

import numpy as np
import pytest

from ad_course import detector as spine
from ad_course.ae import AE
from ad_course.baselines import KNN, MeanImage
from ad_course.data import Task
from ad_course.deepsad import DeepSAD
from ad_course.protocol import compare

X = np.random.default_rng(0).random((12, 1, 8, 8), dtype='float32')
SMALL = dict(epochs=1, batch_size=8, verbose=False)


def fits_beside_another():
    """A fit that has to wait for a moment, while another thread holds the lock."""
    at_once, inside, done = spine._OneAtATime(patience=.01), threading.Event(), threading.Event()
    def hold():
        with at_once:
            inside.set()
            done.wait(5)
    other = threading.Thread(target=hold)
    other.start()
    inside.wait(5)
    threading.Timer(.1, done.set).start()
    with at_once: pass
    other.join()


def interrupted():
    d = AE(**SMALL)
    def stop(data, epoch): raise KeyboardInterrupt
    d.after_epoch = stop
    d.fit(X)


def one_image_two_labels():
    DeepSAD(epochs=1, pretrain_epochs=0, width=2, code_dim=4, verbose=False).fit(
        np.concatenate([X, X[:1]]), np.repeat([0, 1], [len(X), 1]))


def one_fit_fails():
    task = Task(name='t', x_train=X, x_test=X[:2] / 2, y_test=[0, 1], protocol='p')
    compare(dict(good=MeanImage(), bad=KNN(k=99)), dict(t=task), seeds=(0,))


WORDS = {'AE.fit': [interrupted, lambda: AE(**SMALL).fit(X, np.arange(len(X)) == 0)],
         'DeepSAD.fit': [one_image_two_labels], 'compare': [one_fit_fails],
         'fit': [fits_beside_another]}


@pytest.mark.parametrize('who, f', [(who, f) for who in WORDS for f in WORDS[who]])
def test_a_warning_shows_a_name_and_no_file(who, f):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        f()
    texts = [warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in caught]
    assert texts, 'no warning'
    for text in texts: assert text.startswith(f'{who}:') and '/' not in text and '.py' not in text
