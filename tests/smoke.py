"""Runs the cells of a notebook that `nbdev_test` leaves out, and only what they need.   python -m tests.smoke NOTEBOOK

Cells flagged `#| cuda` or `#| slow` take a GPU or long minutes at full size. Here AD_COURSE_SMOKE=1 asks them to shrink (few
images, one epoch) and no GPU is visible. Before them run the cells that define the names they use, found by reading the code;
where that reading was too short, the whole notebook runs, and what happens then is the verdict. Prints one line of JSON."""
import ast
import json
import os
import sys
from pathlib import Path

from .project import QUIET, SMOKE_FLAGS, Notebook


def flagged(notebook):
    """The cells to be proven."""
    return [c for c in notebook.code_cells if c.evaluated and c.flags.keys() & set(SMOKE_FLAGS) and 'notest' not in c.flags]


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names(tree):
    """The names that a cell sets at its top level, and the names that it reads anywhere."""
    sets, todo = set(), [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load): sets.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)): sets |= {(a.asname or a.name).split('.')[0] for a in node.names}
        elif isinstance(node, SCOPES): sets |= {getattr(node, 'name', None)} - {None}
        if not isinstance(node, SCOPES): todo += ast.iter_child_nodes(node)
    return sets, {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def changes(tree):
    """The names whose values a cell's statements may change in place: `model.fit(x)`, `rows.append(1)`, `a[0] = 1`."""
    found = set()
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call): targets = [statement.value.func]
        elif isinstance(statement, ast.Assign): targets = statement.targets
        elif isinstance(statement, ast.AugAssign): targets = [statement.target]
        else: continue
        for target in targets:
            if not isinstance(target, (ast.Attribute, ast.Subscript)): continue
            while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)): target = getattr(target, 'value', getattr(target, 'func', None))
            if isinstance(target, ast.Name): found.add(target.id)
    return found


def needed(notebook):
    """The indices of the flagged cells and of the cells before the last of them that give what they use."""
    targets = {c.index for c in flagged(notebook)}
    before = [c for c in notebook.code_cells if c.index in targets or (c.runs() and c.index < max(targets, default=0))]
    read = {c.index: names(c.tree) for c in before}
    gives = {c.index: read[c.index][0] | changes(c.tree) for c in before}
    star = {c.index for c in before for n in ast.walk(c.tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == '*'}
    wanted = targets | star
    # Again until nothing new comes in: a function may use a name that a later cell defines.
    while more := {i for i in gives if i not in wanted and gives[i] & set().union(*(read[j][1] for j in wanted))}: wanted |= more
    return wanted


def run(path, only=None):
    """Runs the cells `only` (all runnable and flagged ones where None) as nbdev runs them; the indices run, and the error."""
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    notebook = Notebook(path, Path(path).parent)
    targets = {c.index for c in flagged(notebook)}
    ran, shell, nb = [], CaptureShell(), NBProcessor(Path(path), process=True).nb
    os.chdir(Path(path).parent)
    for cell in notebook.code_cells:
        if not (cell.index in targets or cell.runs()) or (only is not None and cell.index not in only): continue
        shell.cell(nb.cells[cell.index])
        ran.append(cell.index)
        if shell.exc: return ran, cell, shell.exc
    return ran, None, None


def main(path):
    """One notebook; the result as JSON, the exit status 1 where a cell failed."""
    notebook = Notebook(path, Path(path).parent)
    targets = [c.index for c in flagged(notebook)]
    ran, cell, error = run(path, needed(notebook)) if targets else ([], None, None)
    whole = False
    if isinstance(error, Exception):
        short = error
        ran, cell, error = run(path)
        whole = error is None and f'{type(short).__name__}: {short}'[:300]
    result = dict(targets=targets, ran=ran, whole=whole)
    if error is not None: result |= dict(cell=cell.index, source=cell.source[:2000], error=f'{type(error).__name__}: {error}'[:3000],
                                         missing_data=isinstance(error, FileNotFoundError))
    print('\n' + json.dumps(result))
    return error is not None


if __name__ == '__main__':
    os.environ.update(QUIET, AD_COURSE_SMOKE='1', CUDA_VISIBLE_DEVICES='', IN_TEST='1')
    sys.exit(main(Path(sys.argv[1]).resolve()))
