"""`load` gives exactly the class that was saved, finds the course's own, or refuses by name."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ad_course import detector as spine
from ad_course.ae import AE
from ad_course.detector import Detector, _Files, known_detectors, load, read_file

from .mutants import assert_caught, changed, mutant

X = np.random.default_rng(0).random((12, 1, 6, 6), dtype='float32')
SMALL = dict(epochs=1, code_dim=2, width=2, batch_size=4, verbose=False)


def student(score=None, name='AE', module='__main__', parent=AE):
    """A class as a student writes it in a notebook, `class AE(ad_course.ae.AE)`."""
    methods = {} if score is None else dict(image_score=score)
    made = changed(parent, name, **methods)
    made.__module__, made.__qualname__ = module, name
    return made


def root(self, xb): return AE.image_score(self, xb).sqrt()


@pytest.fixture
def path(tmp_path): return tmp_path/'model'


def save(cls, path):
    d = cls(**SMALL).fit(X)
    d.save(path)
    return d


def refused(path, match, kind=Detector):
    with pytest.raises(ValueError, match=match) as caught: kind.load(path)
    assert str(path) in str(caught.value)


def rename(path, **head):
    """The file with another header, and a digest that is right."""
    found, tensors = read_file(path)
    found |= head
    found['digest'] = spine.digest(found, tensors)
    save_file(tensors, path, found)


# ---------------------------------------------------------------- the class

def test_a_students_class_does_not_come_back_as_the_courses(path):
    mine = student(root)
    save(mine, path)
    # it is an AE of the course too, of another kind
    for kind in (Detector, AE, mine): assert type(kind.load(path)) is mine
    del mine
    rename(path, module='another_notebook')   # as in a process that does not know it
    refused(path, 'AE of another_notebook: import it first.*other classes.*ad_course.ae.AE')
    refused(path, 'import it first', AE)
    rename(path, module='__main__', detector='Nobody')
    refused(path, 'run the cell or script that defines it')


def test_the_courses_class_does_not_come_back_as_a_students(path):
    mine = student(root)
    save(AE, path)
    assert type(load(path)) is type(AE.load(path)) is AE
    refused(path, 'must hold a AE of __main__; got a AE of ad_course.ae', mine)


def test_classes_of_one_name_in_two_places(path):
    """Two notebooks, two modules, or a class within a function or another class."""
    found = [student(root, 'Mine', 'one'), student(None, 'Mine', 'two'),
             student(None, 'outer.<locals>.Mine', 'two'), student(None, 'Outer.Mine', 'two')]
    for cls in found:
        save(cls, path)
        assert type(load(path)) is cls
        for other in found:
            if other is not cls: refused(path, 'must hold a', other)


def test_a_cell_that_was_run_twice(path):
    """The newest class; or the one that is asked."""
    old, new = student(root, 'Twice'), student(root, 'Twice')
    save(old, path)
    assert type(load(path)) is new and type(old.load(path)) is old


def test_a_class_that_was_edited_since(path):
    """Same module, same name, same weights: the scores of the two images tell."""
    first = student(None, 'Edited')
    d = save(first, path)
    again = student(None, 'Edited')
    np.testing.assert_array_equal(load(path).decision_function(X), d.decision_function(X))
    assert type(load(path)) is again
    for score in (root, lambda self, xb: AE.image_score(self, xb) * 1.1,
                  lambda self, xb: -AE.image_score(self, xb)):
        worse = student(score, 'Edited')
        refused(path, 'it was changed since')
        refused(path, 'it was changed since', worse)
        assert type(first.load(path)) is first
    def other_networks(self, shape):
        nets = AE.networks(self, shape)
        nets['decoder'].append(torch.nn.Tanh())   # no weights: the file would fit
        return nets
    keep = changed(AE, 'Edited', networks=other_networks)
    keep.__module__, keep.__qualname__ = '__main__', 'Edited'
    refused(path, 'it was changed since')


def test_a_file_without_scores_of_the_images_is_read(path):
    """As versions before wrote it; and a model that has no score for noise."""
    d = save(AE, path)
    head, tensors = read_file(path)
    del head['probe']
    head['digest'] = spine.digest(head, tensors)
    save_file(tensors, path, head)
    np.testing.assert_array_equal(load(path).decision_function(X), d.decision_function(X))
    def picky(self, xb):
        s = AE.image_score(self, xb)
        return s / (s < 1e6) if len(xb) > 2 else s / 0
    only = student(picky, 'Picky')
    save(only, path)
    assert json.loads(read_file(path)[0]['probe']) is None and type(load(path)) is only


@pytest.mark.parametrize('probe', ['3', '[]', '[1]', '[1, 2, 3, 4]', '"abc"', '{', '[NaN, 1, 1]',
                                   '{"a": 1}'])
def test_scores_of_the_images_that_are_none(path, probe):
    save(AE, path)
    rename(path, probe=probe)
    if probe == '[]': assert type(load(path)) is AE
    else: refused(path, 'does not fit|changed since')


# ---------------------------------------------------------------- the course finds its own

def test_the_courses_classes_are_found_without_an_import(path):
    save(AE, path)
    code = '''if 1:
        import sys; from ad_course.detector import load
        assert 'ad_course.ae' not in sys.modules
        d = load(sys.argv[1])
        print(d.__module__, type(d).__name__, 'ad_course.dae' in sys.modules)
    '''
    done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True)
    assert done.stdout.split() == ['ad_course.ae', 'AE', 'False'], done.stderr


def test_nothing_but_modules_of_the_course_is_imported(path, tmp_path, monkeypatch):
    """Names that look like the course's, those below and above it, and other programs."""
    (tmp_path/'evil.py').write_text(f'open({str(tmp_path/"ran")!r}, "w")')
    monkeypatch.syspath_prepend(str(tmp_path))
    save(AE, path)
    asked = []
    monkeypatch.setattr(spine.importlib, 'import_module', lambda name: asked.append(name))
    for module in ('evil', 'ad_course', 'ad_course.', '.ae', 'ad_course..ae', 'ad_course.evil',
                   'ad_course.ae.AE', 'ad_course.../evil', 'ad_course_evil', 'Ad_Course.ae',
                   'os', 'torch.hub', '', ' ad_course.ae', 'ad_course.ae\n', 'ad_course.__init__'):
        rename(path, module=module)
        refused(path, 'holds a AE of|must hold')
    assert not asked and not (tmp_path/'ran').exists()
    rename(path, module='ad_course.dae')
    refused(path, 'unknown to this ad_course.dae; other classes.*ad_course.ae.AE')
    assert asked == ['ad_course.dae']


def test_a_module_of_the_course_that_cannot_be_imported(path, monkeypatch):
    save(AE, path)
    rename(path, module='ad_course.dae')
    def missing(name): raise ImportError('No module named timm')
    monkeypatch.setattr(spine.importlib, 'import_module', missing)
    refused(path, 'which cannot be imported here: No module named timm')


# ---------------------------------------------------------------- the rule has teeth

def check_exact(named):
    """A `_named` must tell classes of one name apart by their modules."""
    mine = student(root, 'AE', 'somewhere')
    with mutant(spine, _named=named):
        assert spine._named('file', 'AE', 'somewhere') is mine, 'not the class of that module'
        assert spine._named('file', 'AE', 'ad_course.ae') is AE, 'not the class of the course'
        try: spine._named('file', 'AE', 'elsewhere')
        except ValueError: return
        raise AssertionError('a class of another module was taken')


def by_name(path, name, module):
    """As it was: any class of that name, of the right module if there is one."""
    named = [c for c in spine._subclasses(Detector) if c.__qualname__ == name]
    return ([c for c in named if c.__module__ == module] or named)[-1]


def test_the_old_rule_is_caught():
    check_exact(spine._named)
    assert_caught(check_exact, by_name, 'of another module was taken')


def test_without_the_two_images_an_edited_class_is_loaded(path):
    save(student(None, 'Later'), path)
    worse = student(root, 'Later')
    refused(path, 'changed since')
    with mutant(_Files, _probe=lambda self: [0., 0., 1.]):
        save(worse, path)
        better = student(None, 'Later')
        assert type(load(path)) is better


def test_known_detectors_have_names_of_their_own():
    """What a file says, module and qualified name, points at one class of the course."""
    ours = [c for c in known_detectors() if c.__module__.startswith('ad_course.')]
    for c in ours: assert spine._named('file', c.__qualname__, c.__module__) is c
