"""The machinery of `make test` and `make notebooks`, on tiny projects: it must fail where something is wrong, and lose nothing."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from . import __main__ as stages
from . import execute, sync
from .project import ROOT, Notebook, environment, notebook_paths, project_files, settings, write_notebook


@pytest.fixture
def project(tmp_path):
    """A project of one notebook, in sync."""
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'ad_course').mkdir()
    (tmp_path/'ad_course'/'__init__.py').touch()
    write_notebook(tmp_path/'nbs'/'01_one.ipynb', '# One', '#| default_exp one', '#| exports\ndef one():\n    "One."\n    return 1', 'assert one() == 1', 'print(one())')
    write_notebook(tmp_path/'nbs'/'index.ipynb', '# Top', 'x = 1')
    sync.run_nbdev(tmp_path)
    sync.readme.write(tmp_path)
    return tmp_path


def digests(root): return {p: p.read_bytes() for p in root.rglob('*') if p.is_file()}


def edit(path, old, new): path.write_text(path.read_text(encoding='utf8').replace(old, new), encoding='utf8')


# ---------------------------------------------------------------- sync
def test_in_sync_changes_nothing(project):
    before = digests(project)
    assert sync.differences(project) == {} and stages.sync(project) == '2 notebooks in sync'
    assert digests(project) == before


@pytest.mark.parametrize('name, old, new', [('ad_course/one.py', 'return 1', 'return 2'), ('nbs/01_one.ipynb', 'return 1', 'return 3'),
    ('nbs/01_one.ipynb', '"execution_count": null', '"execution_count": 7'), ('README.md', 'Top', 'Bottom')])
def test_out_of_sync_is_named_and_nothing_is_lost(project, name, old, new, capsys):
    edit(project/name, old, new)
    before = digests(project)
    with pytest.raises(stages.Failed, match='make sync'): stages.sync(project)
    assert digests(project) == before
    expected = 'ad_course/one.py' if 'return' in old else name
    assert list(sync.differences(project)) == [expected] and expected in capsys.readouterr().out


def test_a_module_that_was_never_exported_is_named(project):
    (project/'ad_course'/'one.py').unlink()
    assert sync.differences(project)['ad_course/one.py'] == 'would be new'


def test_line_ends_of_windows_are_no_difference(project):
    path = project/'ad_course'/'one.py'
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    assert sync.differences(project) == {}


def test_a_damaged_notebook_is_an_error(project):
    (project/'nbs'/'02_bad.ipynb').write_text('{"cells": [', encoding='utf8')
    with pytest.raises(ValueError): sync.differences(project)


def test_sync_without_notebooks_has_failed(project):
    shutil.rmtree(project/'nbs')
    (project/'nbs').mkdir()
    with pytest.raises(RuntimeError, match='no notebook'): sync.differences(project)


# ---------------------------------------------------------------- notebooks
def test_notebooks_run_once_and_are_counted(project, capfd):
    assert stages.notebooks(project) == '2 notebooks ran'
    said = capfd.readouterr().out
    assert said.count('nbs/01_one.ipynb') == 1 and 'Success.' in said


def test_a_failing_notebook_fails_and_is_named(project, capfd):
    write_notebook(project/'nbs'/'02_two.ipynb', 'assert 1 == 2, "no"')
    with pytest.raises(stages.Failed): stages.notebooks(project)
    assert 'Failed On The Following Notebooks' in (said := capfd.readouterr().out) and '02_two.ipynb' in said and 'no' in said


def test_a_notebook_that_nbdev_leaves_out_is_a_failure(project):
    write_notebook(project/'nbs'/'part'/'02_two.ipynb', 'x = 1')
    (project/'nbs'/'part'/'.notest').touch()
    with pytest.raises(stages.Failed, match='02_two'): stages.notebooks(project)


def test_no_notebook_is_a_failure(project):
    for p in notebook_paths(project): p.unlink()
    with pytest.raises(stages.Failed, match='no notebook'): stages.notebooks(project)


def test_a_notebook_that_hangs_is_stopped_and_named(project):
    write_notebook(project/'nbs'/'02_two.ipynb', 'import time; time.sleep(600)')
    with pytest.raises(stages.Failed, match='02_two'): stages.notebooks(project, limit=6)


# ---------------------------------------------------------------- pytest
@pytest.mark.parametrize('body, outcome', [('def test_a(): pass', None), ('def test_a(): assert 0', 'pytest failed'), ('x = 1', 'found no test'),
    ('import pytest\ndef test_a(): pytest.skip("why")', 'skipped')])
def test_pytest_stage(tmp_path, body, outcome):
    (tmp_path/'tests').mkdir()
    (tmp_path/'tests'/'test_a.py').write_text(body, encoding='utf8')
    if outcome is None: assert stages.tests(tmp_path) == '1 tests passed'
    else:
        with pytest.raises(stages.Failed, match=outcome): stages.tests(tmp_path)


# ---------------------------------------------------------------- make notebooks
def test_executing_keeps_outputs_of_cells_left_out(tmp_path):
    path = write_notebook(tmp_path/'a.ipynb', 'print("new")', '#| cuda\nprint("on a GPU")', '#| eval: false\n1/0', 'import os; print(os.getcwd())')
    raw = json.loads(path.read_text(encoding='utf8'))
    raw['cells'][1]['outputs'] = [dict(output_type='stream', name='stdout', text='on a GPU\n')]
    path.write_text(json.dumps(raw), encoding='utf8')
    execute.execute(path)
    outputs = [[''.join(o['text']).strip() for o in c.outputs] for c in Notebook(path, tmp_path).cells]
    assert outputs[:3] == [['new'], ['on a GPU'], []] and os.path.samefile(outputs[3][0], tmp_path)
    assert 'widgets' not in json.loads(path.read_text(encoding='utf8'))['metadata'] and os.listdir(tmp_path) == ['a.ipynb']


def test_a_notebook_that_fails_stays_as_it_was(tmp_path):
    path = write_notebook(tmp_path/'a.ipynb', 'print(1)', '1/0')
    before = digests(tmp_path)
    with pytest.raises(Exception, match='ZeroDivisionError'): execute.execute(path)
    assert digests(tmp_path) == before


# ---------------------------------------------------------------- the tree
def test_project_files_with_and_without_git(tmp_path):
    for name in ('settings.ini', '.ci/run', 'nbs/a.ipynb', '.venv/x', '_proc/y', 'tests/__pycache__/z'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    expected = ['.ci/run', 'nbs/a.ipynb', 'settings.ini']
    assert [p.as_posix() for p in project_files(tmp_path)] == expected
    if not shutil.which('git'): return
    (tmp_path/'.gitignore').write_text('.venv/\n_proc/\n__pycache__/\n', encoding='utf8')
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True, env=environment(GIT_DIR=None, GIT_WORK_TREE=None))
    assert [p.as_posix() for p in project_files(tmp_path)] == ['.ci/run', '.gitignore', 'nbs/a.ipynb', 'settings.ini']


def test_the_command_says_what_it_does():
    done = subprocess.run([sys.executable, '-m', 'tests', '--help'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'sync' in done.stdout and settings()['lib_name']
