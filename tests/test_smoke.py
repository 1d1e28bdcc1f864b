"""The runner of cells for a GPU or for long minutes (`#| cuda`, `#| slow`), shrunk, on the CPU.

`python -m tests` runs those of every notebook, in a fork of the notebook's own run."""
import json
import subprocess
import sys

import pytest

from .project import QUIET, ROOT, environment, write_notebook
from .smoke import SHRUNK


def smoke(path):
    """What `python -m tests.smoke` says of a notebook, run in a process of its own."""
    done = subprocess.run([sys.executable, '-m', 'tests.smoke', str(path)], cwd=ROOT, text=True,
                          capture_output=True, encoding='utf8', timeout=600,
                          env=environment(**QUIET, **SHRUNK))
    said = done.stdout.strip()
    assert said, f'{path} ended without a word (exit {done.returncode}):\n{done.stderr[-3000:]}'
    return done.returncode, json.loads(said.splitlines()[-1])


def test_runner_runs_the_flagged_cell_and_what_it_needs_alone(tmp_path):
    flagged = '#| cuda\nassert a == [1, 2] and os.environ["AD_COURSE_SMOKE"] == "1"'
    nb = write_notebook(tmp_path/'a.ipynb', 'import os', 'a = [1]', 'b = 1/0', 'a.append(2)',
                        '#| eval: false\nraise SystemExit', flagged, '#| notest\n1/0')
    code, result = smoke(nb)
    assert code == 0 and result['ran'] == [0, 1, 3, 5] and result['targets'] == [5]


@pytest.mark.parametrize('flag', ['cuda', 'slow'])
def test_runner_fails_where_the_flagged_cell_fails(tmp_path, flag):
    nb = write_notebook(tmp_path/'a.ipynb', 'a = 1', f'#| {flag}\nraise ValueError("rotten")')
    code, result = smoke(nb)
    assert code == 1 and result['cell'] == 1 and 'rotten' in result['error']


def test_runner_runs_the_whole_notebook_where_reading_it_was_too_short(tmp_path):
    sets, reads = 'globals()["hidden"] = 3', '#| slow\nassert hidden == 3'
    nb = write_notebook(tmp_path/'a.ipynb', sets, reads)
    code, result = smoke(nb)
    assert code == 0 and result['ran'] == [0, 1] and 'hidden' in result['whole']


def test_no_gpu_is_visible_to_the_runner(tmp_path):
    looks = '#| cuda\nassert not torch.cuda.is_available()'
    code, result = smoke(write_notebook(tmp_path/'a.ipynb', 'import torch', looks))
    assert code == 0, result
