"""Which notebooks and tests a change concerns, and which jobs are long."""
import ast
import json
from functools import lru_cache
from pathlib import Path

from .project import ROOT, Notebook, modules, notebook_paths, own_imports

SECONDS = Path(__file__).with_name('seconds.json')
ALWAYS = ('test_layout',)


@lru_cache
def known_seconds():
    """Seconds of the processor of each job when they were last written down.

    That is done by `python -m tests --times tests/seconds.json`."""
    return json.loads(SECONDS.read_text(encoding='utf8')) if SECONDS.exists() else {}


def expected_seconds(name):
    """How long a job may take; one that nobody has measured counts as long."""
    return known_seconds().get(name, 1e3)


def read(path):
    """The syntax tree of a file of Python."""
    return ast.parse(path.read_text(encoding='utf8'))


def importers(names, root=ROOT):
    """The modules `names` and all that import them, directly or through others."""
    graph = {name: own_imports(read(path)) for name, path in modules(root).items()}
    found = set(names)
    while more := {name for name, own in graph.items() if own & found} - found: found |= more
    return found


def uses(path, root=ROOT):
    """The modules that a file of tests imports; test_benchmarks uses those of its scripts too."""
    scripts = (root/'tests'/'benchmarks').glob('*.py') if path.stem == 'test_benchmarks' else ()
    return set().union(*(own_imports(read(p)) for p in (path, *scripts)))


def concerned(names, root=ROOT):
    """What a change in the notebooks `names` concerns.

    (notebooks, files of tests, file -> an expression for -k): the notebooks themselves, what
    imports their modules, and the tests of all these modules.
    Raises SystemExit where a name is no notebook."""
    root, wanted = Path(root), [Path(n).resolve() for n in names]
    books = {p.resolve(): Notebook(p, root) for p in notebook_paths(root)}
    if missing := [str(p) for p in wanted if p not in books]:
        raise SystemExit(f'FAILED: no such notebook: {", ".join(missing)}')
    found = importers({books[p].module for p in wanted} - {None}, root)
    imported_by = lambda nb: set().union(*(own_imports(c.tree) for c in nb.code_cells))
    chosen = [nb.path for p, nb in books.items()
              if p in wanted or nb.module in found or imported_by(nb) & found]
    files, words = [], {}
    for file in sorted((root/'tests').glob('test_*.py')):
        if file.stem == 'test_conformance' and found:
            words[file] = ' or '.join(f'{name}.' for name in sorted(found))
        if file in words or file.stem in ALWAYS or uses(file, root) & found: files.append(file)
    return chosen, files, words
