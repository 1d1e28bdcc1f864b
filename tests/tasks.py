"""What the tests of the data rooms share: small tasks, judges apart from the library's own."""
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

quick = settings(max_examples=25, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
FIELDS = ('x_train', 'x_test', 'y_test', 'y_train', 'kinds_train', 'kinds_test',
          'x_reserve', 'kinds_reserve', 'masks_test')


@pytest.fixture(autouse=True)
def no_smoke(monkeypatch): monkeypatch.delenv('AD_COURSE_SMOKE', raising=False)


@pytest.fixture(autouse=True)
def global_randomness_is_left_alone():
    of_numpy, of_torch = np.random.get_state()[1].copy(), torch.get_rng_state()
    own = random.getstate()
    yield
    assert (np.random.get_state()[1] == of_numpy).all() and random.getstate() == own
    assert torch.equal(torch.get_rng_state(), of_torch)


def pixels(x): return {i.tobytes() for i in np.ascontiguousarray(x)}


def check_apart(task):
    """Independent of the library's digests: sets of raw bytes."""
    a, b, c = map(pixels, (task.x_train, task.x_test, task.x_reserve))
    assert not a & b and not a & c and not b & c


def same(a, b):
    """Whether two tasks agree in every array, in name and in protocol."""
    for field in FIELDS:
        p, q = getattr(a, field), getattr(b, field)
        if (p is None) != (q is None) or p is not None and not np.array_equal(p, q): return False
    return a.protocol == b.protocol and a.name == b.name


def toy(n=60, kinds=3, seed=0):
    """Distinct random images of several kinds."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 5, 4), dtype=np.uint8), np.arange(n) % kinds
