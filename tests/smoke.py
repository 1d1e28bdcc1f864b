"""Runs the cells of a notebook that `nbdev_test` leaves out, and only what they need.

  python -m tests.smoke NOTEBOOK

Cells flagged `#| cuda` or `#| slow` take a GPU or long minutes at full size. Here AD_COURSE_SMOKE=1
asks them to shrink (few images, one epoch) and no GPU is visible. `make test` runs them in a fork
of the notebook's own run, at the first such cell, so that what they use is there already; the
command runs before them the cells that define the names they use, found by reading the code. Where
that reading was too short, the whole notebook runs, and what happens then is the verdict. Prints
one line of JSON."""
import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .project import QUIET, ROOT, SMOKE_FLAGS, Notebook, environment

SHRUNK = dict(AD_COURSE_SMOKE='1', CUDA_VISIBLE_DEVICES='', IN_TEST='1')


def flagged(notebook):
    """The cells to be proven."""
    return [c for c in notebook.code_cells if c.evaluated
            and c.flags.keys() & set(SMOKE_FLAGS) and 'notest' not in c.flags]


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp,
          ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names(tree):
    """The names that a cell sets at its top level, and the names that it reads anywhere."""
    sets, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load): sets.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            sets |= {(a.asname or a.name).split('.')[0] for a in node.names}
        elif isinstance(node, SCOPES): sets |= {getattr(node, 'name', None)} - {None}
        if not isinstance(node, SCOPES): todo += ast.iter_child_nodes(node)
    named = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    return sets, {n.id for n in named if isinstance(n.ctx, ast.Load)}


def changes(tree):
    """The names whose values a cell may change in place: `model.fit(x)`, `a[0] = 1`."""
    found = set()
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            targets = [statement.value.func]
        elif isinstance(statement, ast.Assign): targets = statement.targets
        elif isinstance(statement, ast.AugAssign): targets = [statement.target]
        else: continue
        for target in targets:
            if not isinstance(target, (ast.Attribute, ast.Subscript)): continue
            while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
                target = getattr(target, 'value', getattr(target, 'func', None))
            if isinstance(target, ast.Name): found.add(target.id)
    return found


def imports_all(tree):
    """Whether a cell imports a star: no reading says what that gives."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return any(n.names[0].name == '*' for n in found)


def needed(notebook):
    """The indices of the flagged cells, and of those before the last of them that they need."""
    targets = {c.index for c in flagged(notebook)}
    last = max(targets, default=0)
    before = [c for c in notebook.code_cells
              if c.index in targets or (c.runs() and c.index < last)]
    reads, gives = {}, {}
    for c in before:
        sets, reads[c.index] = names(c.tree)
        gives[c.index] = sets | changes(c.tree)
    wanted = targets | {c.index for c in before if imports_all(c.tree)}
    # Again until nothing new comes in: a function may use a name that a later cell defines.
    while True:
        used = set().union(*(reads[i] for i in wanted))
        more = {i for i in gives if i not in wanted and gives[i] & used}
        if not more: return wanted
        wanted |= more


def run(shell, nb, notebook, only=None, start=0):
    """Runs the cells `only` from `start` on, as nbdev runs them; what happened.

    only: indices; None stands for all that run or are flagged."""
    targets, result = {c.index for c in flagged(notebook)}, dict(ran=[], seconds={}, error=None)
    for cell in notebook.code_cells:
        able = cell.index in targets or cell.runs()
        asked = cell.index >= start and (only is None or cell.index in only)
        if not (able and asked): continue
        since = time.process_time()
        shell.cell(nb.cells[cell.index])
        result['ran'].append(cell.index)
        result['seconds'][cell.index] = time.process_time() - since
        if shell.exc is None: continue
        error = f'{type(shell.exc).__name__}: {shell.exc}'[:3000]
        missing = isinstance(shell.exc, FileNotFoundError)
        return result | dict(cell=cell.index, source=cell.source[:2000], error=error,
                             missing_data=missing)
    return result


def shrink():
    """From here on this process asks for small cells and sees no GPU."""
    os.environ.update(SHRUNK)


def beside(shell, nb, notebook, only):
    """`run` in a fork of the notebook's run: the cells before the first flagged one have run."""
    shrink()
    return run(shell, nb, notebook, only, start=min(c.index for c in flagged(notebook)))


def verdict(attempt, notebook):
    """What `attempt` says of the needed cells; where that was too short, of all (None)."""
    result = attempt(needed(notebook))
    if not result['error'] or result.get('missing_data'): return result | dict(whole=False)
    return attempt(None) | dict(whole=result['error'][:300])


def main(path):
    """One notebook; the result as JSON, the exit status 1 where a cell failed."""
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    notebook = Notebook(path, path.parent)
    targets = [c.index for c in flagged(notebook)]
    os.chdir(path.parent)
    def attempt(only):
        return run(CaptureShell(), NBProcessor(path, process=True).nb, notebook, only)
    result = verdict(attempt, notebook) if targets else dict(ran=[], error=None, whole=False)
    print('\n' + json.dumps(dict(targets=targets) | result))
    return result['error'] is not None


def apart(path, limit=1200):
    """What the command says of a notebook, from a process of its own."""
    command = [sys.executable, '-m', 'tests.smoke', str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding='utf8',
                          timeout=limit, env=environment(**QUIET, **SHRUNK))
    lines = done.stdout.strip().splitlines()
    if lines: return json.loads(lines[-1])
    error = f'ended without a word (exit {done.returncode}):\n{done.stderr[-3000:]}'
    return dict(ran=[], cell=-1, error=error)


if __name__ == '__main__':
    os.environ.update(QUIET)
    shrink()
    sys.exit(main(Path(sys.argv[1]).resolve()))
