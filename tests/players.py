"""Single moves in a game between networks, and mutants of its losses.

    d = ready(GAN(epochs=0).fit(X))               # optimizers anew, for steps of single players
    moved(d, 'critic', d.critic_loss, XB, 30)     # names of the networks that 30 steps change
    altered(GAN, 'critic_loss', without('fake'))  # a class whose loss has lost a term"""
import numpy as np
import pytest
import torch
from torch import nn

from ad_course.detector import _Progress, isolated


class Scale(nn.Module):
    """A network that multiplies three pixels or numbers by its weights, in some shape."""
    def __init__(self, w, *shape):
        super().__init__()
        self.w, self.shape = nn.Parameter(torch.tensor(w)), shape
    def forward(self, x): return (x.flatten(1) * self.w).reshape(len(x), *self.shape)


def ready(d):
    """A fitted detector with new optimizers, ready for single steps."""
    d.optimizers_ = d.optimizers()
    d._progress = _Progress(d)
    return d


def weights(d, name):
    """All weights of a network in a row."""
    return torch.cat([p.detach().flatten() for p in d.nets_[name].parameters()])


def moved(d, player, loss, xb, steps=1):
    """Names of the networks that so many moves of one player change."""
    before = {name: weights(d, name).clone() for name in d.nets_}
    with isolated(0):
        for _ in range(steps): d.descend(player, loss, xb)
    return {name for name in d.nets_ if not torch.equal(before[name], weights(d, name))}


def altered(cls, hook, change, name=None):
    """A class of which one loss has other terms: change(terms) -> terms."""
    def loss(self, xb): return change(getattr(cls, hook)(self, xb))
    loss.__name__ = hook
    return type(name or f'{cls.__name__}_{hook}', (cls,), {hook: loss})


SHAPES = (1, 1), (2, 9), (3, 5), (28, 28), (33, 32)      # images that a game must fit


def check_any_image(cls, shape, **params):
    """Both kinds of networks rebuild, encode and score color images of this shape."""
    x = np.random.default_rng(0).random((5, 3, *shape), dtype='float32')
    for arch in ('mlp', 'conv'):
        d = cls(**params, arch=arch, epochs=1, batch_size=4).fit(x)
        assert d.reconstruct(x).shape == x.shape and d.encode(x).shape == (5, 3), arch
        assert np.isfinite(d.decision_function(x)).all(), arch


def check_refused(cls, message, error=ValueError, **params):
    """`fit` ends in an error that says so, and leaves nothing behind."""
    d = cls(**params)
    with pytest.raises(error, match=message):
        d.fit(np.random.default_rng(0).random((40, 1, 4, 4), dtype='float32'))
    assert not [name for name in vars(d) if name.endswith('_')]


def check_explosion(cls, message, **params):
    """A game that explodes names player, term, epoch and rates."""
    check_refused(cls, message, FloatingPointError, **params, epochs=3, batch_size=8)


def without(term):
    """A change that loses a term: it is recorded, and zero."""
    return lambda terms: {k: v * (k != term) for k, v in terms.items()}
