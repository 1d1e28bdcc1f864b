"""Runs the cells of a notebook that `nbdev_test` leaves out, and only what they need.

  python -m tests.smoke NOTEBOOK

Cells flagged `#| cuda` or `#| slow` take a GPU or long minutes at full size. Here AD_COURSE_SMOKE=1
asks them to shrink (few images, one epoch) and no GPU is visible. `make test` runs them in forks
of the notebook's own run, so that what they use is there already; the command runs before them the
cells that define the names they use, found by reading the code. Where that reading was too short,
the whole notebook runs, and what happens then is the verdict. Prints one line of JSON."""
import ast
import json
import os
import subprocess
import symtable
import sys
import time
from pathlib import Path

from .project import QUIET, ROOT, SMOKE_FLAGS, Notebook, environment

SHRUNK = dict(AD_COURSE_SMOKE='1', CUDA_VISIBLE_DEVICES='', IN_TEST='1')


def flagged(notebook):
    """The cells to be proven."""
    return [c for c in notebook.code_cells if c.evaluated
            and c.flags.keys() & set(SMOKE_FLAGS) and 'notest' not in c.flags]


def proven(notebook):
    """All cells that `make test` runs, flagged or not."""
    marked = {c.index for c in flagged(notebook)}
    return [c for c in notebook.code_cells if c.runs() or c.index in marked]


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


AT_ONCE = ('listcomp', 'dictcomp', 'setcomp')


def globals_of(tree):
    """The names that Python looks up outside of functions: (at once, when something is called)."""
    at_once, later = set(), set()
    def look(table, inside):
        for s in table.get_symbols():
            if s.is_referenced() and (s.is_global() or table.get_type() == 'module'):
                (later if inside else at_once).add(s.get_name())
        for child in table.get_children():
            look(child, inside or child.get_name() not in AT_ONCE)
    look(symtable.symtable(ast.unparse(tree), 'cell', 'exec'), False)
    return at_once, later


SETS = (ast.Assign, ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
BLOCKS = {ast.For: 'iter', ast.If: 'test', ast.While: 'test'}   # and what is read before their body


def reading(statements, known=()):
    """What statements read and surely set: (names from before them, names of calls, names set).

    A name from before is read at the top level where no statement above has surely set it: not in
    a branch, not in a loop. What functions and classes read may have any value of its name,
    whenever it was set."""
    before, called, known = set(), set(), set(known)
    for statement in statements:
        if head := BLOCKS.get(type(statement)):
            at_once, called_here = globals_of(getattr(statement, head))
            own = names(statement.target)[0] if isinstance(statement, ast.For) else set()
            for block, also in ((statement.body, own), (statement.orelse, set())):
                more, more_called, _ = reading(block, known | also)
                at_once, called_here = at_once | more, called_here | more_called
        else: at_once, called_here = globals_of(statement)
        if isinstance(statement, ast.AugAssign): at_once |= names(statement.target)[0]
        before, called = before | (at_once - known), called | called_here
        if isinstance(statement, SETS): known |= names(statement)[0]
    return before, called, known


def needed(notebook, targets=None):
    """The indices of `targets`, or all flagged cells, and of those above that they need."""
    targets = targets or {c.index for c in flagged(notebook)}
    last, able = max(targets, default=0), {c.index for c in proven(notebook)}
    before = [c for c in notebook.code_cells
              if c.index in targets or (c.index < last and c.index in able)]
    found = {c.index: reading(c.tree.body) for c in before}
    gives = {c.index: names(c.tree)[0] | changes(c.tree) for c in before}

    def giving(name, index):
        """The cells above that gave a name its value: the last to set it, and those after it."""
        above = [i for i in gives if i < index and name in gives[i]]
        anew = [n for n, i in enumerate(above) if name in found[i][2] - found[i][0]]
        return above[anew[-1]:] if anew else above

    wanted, todo = set(), [*targets, *(c.index for c in before if imports_all(c.tree))]
    while todo:
        if (index := todo.pop()) in wanted: continue
        wanted.add(index)
        reads, called, _ = found[index]
        todo += [i for name in reads for i in giving(name, index)]
        # A function may use a name that a later cell defines.
        todo += [i for i in gives if gives[i] & called]
    return wanted


def forks(notebook):
    """Where to fork a run of the notebook, and which flagged cells to run there: {index: indices}.

    A cell joins those before it, unless it needs something that was made since their fork."""
    plan, place = {}, None
    marked = {c.index for c in flagged(notebook)}
    for index in sorted(marked):
        wanted = needed(notebook, {index})
        if place is None or any(i > place for i in wanted - marked): place = index
        plan[place] = sorted({*plan.get(place, ()), *wanted & marked})
    return plan


def run(shell, nb, notebook, only=None):
    """Runs the cells `only`, as nbdev runs them; what happened.

    only: indices; None stands for all that run or are flagged."""
    result = dict(ran=[], seconds={}, error=None)
    for cell in proven(notebook):
        if only is not None and cell.index not in only: continue
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
    """`run` in a fork of the notebook's run: the cells above have run."""
    shrink()
    return run(shell, nb, notebook, only)


def together(results):
    """What happened in several forks, as one result; an error that is no missing file wins."""
    worst = sorted(results, key=lambda r: (not r['error'], r.get('missing_data', False)))[0]
    seconds = {}
    for r in results:
        for k, spent in r['seconds'].items(): seconds[k] = seconds.get(k, 0) + spent
    return worst | dict(ran=sorted({k for r in results for k in r['ran']}), seconds=seconds)


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
