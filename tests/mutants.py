"""Mutants: a method broken on purpose, to see that a test notices.

    with mutant(DAE, corrupt=lambda self, x: x): ...      # one method of a class, for a while
    @each_mutant({'the decay': (NoDecay, Doubled), ...})   # pairs of a reason and a broken class
    def test_wrong_losses_are_caught(why, broken):
        assert_caught(check_loss, broken, why)

A check is a function of a class (or of whatever is broken) that raises AssertionError, with a
reason, where something is wrong. It must pass for the real thing, and for a mutant fail for the
reason that belongs to it."""
import contextlib
import re
from unittest import mock

import pytest


@contextlib.contextmanager
def mutant(owner, **changes):
    """Inside, these attributes of a class or module are others; each must exist already."""
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        yield owner


def each_mutant(table):
    """Decorator: runs a test with (why, broken) for each broken thing in a table why -> several."""
    pairs = [(why, broken) for why, several in table.items() for broken in several]
    return pytest.mark.parametrize('why, broken', pairs, ids=lambda v: getattr(v, '__name__', ''))


def changed(parent, name=None, **methods):
    """A class like `parent` with other methods."""
    return type(name or f'{parent.__name__}_with_other_{"_".join(methods)}', (parent,), methods)


def assert_caught(check, broken, why='', kinds=AssertionError):
    """`check` fails for the broken thing, and says why (a regular expression)."""
    try: check(broken)
    except kinds as e:
        assert re.search(why, str(e)), f'caught for another reason than {why!r}: {e}'
    else: raise AssertionError(f'{getattr(broken, "__name__", broken)} was not noticed')
