"""What a student sees who asks for help: the parameters with their comments, on two screens."""
import pydoc
import re
from dataclasses import dataclass, fields

import pytest

from ad_course.achc import ACHC
from ad_course.ae import AE
from ad_course.detector import Detector, known_detectors


def shown(cls): return pydoc.plain(pydoc.render_doc(cls))


@pytest.mark.parametrize('cls', [AE, ACHC])
def test_help_explains_each_parameter(cls):
    text = shown(cls)
    for field in fields(cls):
        line = re.search(rf'{field.name} = {re.escape(repr(field.default))} +(\S.*)', text)
        assert line, f'{field.name} has no line with its default and a comment'
    assert cls.__doc__.splitlines()[0] in text


def test_help_fits_on_two_screens():
    assert len(shown(ACHC).splitlines()) <= 150   # the widest of all: 36 parameters


def test_help_shows_the_class_and_the_contract_and_nothing_of_scikit_learn():
    found = re.findall(r'^ \|  (\w+)\(', shown(ACHC), re.M)
    assert {'turns', 'adversarial_terms', 'fit', 'predict', 'calibrate', 'load'} <= set(found)
    assert not {'get_params', 'get_metadata_routing', 'sphere_terms', 'require_number'} & set(found)
    assert {'networks', 'loss', 'image_score', 'turns', 'fit'} <= set(dir(Detector))


def test_a_students_own_class_is_shown_with_its_own_words():
    @dataclass(kw_only=True, eq=False, repr=False)
    class Mine(AE):
        """Mine.

        More of it.
        """
        knob: int = 3   # how far to turn

        def turn_it(self):
            """Turns."""
    text = shown(Mine)
    assert 'Mine.' in text and 'More of it.' in text and 'turn_it' in text
    assert re.search(r'knob = 3 +how far to turn', text) and Mine.__doc__.startswith('Mine.\n')


def test_every_known_parameter_has_a_comment():
    ours = [c for c in known_detectors() if c.__module__.startswith('ad_course.')]
    silent = {f'{c.__name__}.{f.name}' for c in ours for f in fields(c)
              if not re.search(rf'^    {f.name} = \S.*  \S', c.__doc__ or '', re.M)}
    assert not silent, f'parameters without a comment: {sorted(silent)}'
