"""What tests of detectors that need labelled anomalies share."""
import numpy as np
import pytest


def check_labels_needed(cls, x, **settings):
    """Without a labelled anomaly, and with wrong labels, `fit` says so and leaves nothing."""
    n, nothing = len(x), f'{cls.__name__} learns from labelled anomalies.*AE'
    for y, message in ((None, nothing), (np.zeros(n, int), nothing),
                       (np.ones(n, int), 'must mark some image as normal'),
                       (np.full(n, 2), 'must be 0'), (np.zeros(n - 1, int), 'one label for each')):
        d = cls(**settings)
        with pytest.raises(ValueError, match=message): d.fit(x, y)
        assert not [name for name in vars(d) if name.endswith('_')]
