"""Shared by all tests: one thread, no windows, and examples that are the same in every run."""
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ.setdefault(name, '1')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('TQDM_DISABLE', '1')
os.environ.setdefault('AD_COURSE_STATIC', '1')

from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

matplotlib.use('agg')
expected = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
hypothesis_settings.register_profile('course', derandomize=True, deadline=None, max_examples=25,
                                     database=None, suppress_health_check=expected)
hypothesis_settings.load_profile('course')
if torch.get_num_threads() != 1: torch.set_num_threads(1)


@pytest.fixture
def data_root():
    """A function from a name, such as 'MNIST' or 'mvtec/screw', to its path among the real data.

    Skips where it is absent."""
    root = Path(os.environ.get('AD_COURSE_DATA', Path.home()/'.cache'/'ad_course'))
    def find(name):
        if not (root/name).exists():
            advice = 'set AD_COURSE_DATA to the folder that holds it'
            reason = f'{name} is not among the real data ({advice})'
            if os.environ.get('AD_COURSE_NEED_DATA'): pytest.fail(reason)
            pytest.skip(reason)
        return root/name
    return find


@pytest.fixture(autouse=True)
def no_figures_left():
    """Closes the figures that a test drew."""
    yield
    import matplotlib.pyplot as plt
    plt.close('all')
