"""Whether notebooks, package and README agree, and making them agree.

  python -m tests.sync           clean the notebooks, export the modules, make the README
  python -m tests.sync --check   only look, at a copy, and name the files that differ"""
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import readme
from .project import ROOT, command, environment, notebook_paths, raw_notebook, settings

ADVICE = 'run `make sync`, or nbdev_clean && nbdev_export && python -m tests.readme'


def copy_project(target, root=ROOT):
    """The part of the project that nbdev reads and writes, copied."""
    ignore = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__', '.last_checked')
    for name in ('settings.ini', 'setup.py', '_quarto.yml', 'README.md'):
        if (root/name).exists(): shutil.copy2(root/name, target/name)
    for name in (settings(root)['nbs_path'], settings(root)['lib_path']):
        if (root/name).exists(): shutil.copytree(root/name, target/name, ignore=ignore)
    return target


def check_notebooks(root):
    """ValueError that names every file which is no notebook, before any is touched."""
    wrong = []
    for path in notebook_paths(root):
        try: raw_notebook(path, path.relative_to(root).as_posix())
        except ValueError as e: wrong.append(str(e))
    if wrong: raise ValueError('\n'.join(wrong))


def run_nbdev(root):
    """nbdev_clean, then nbdev_export: the first gives a cell the id that the second writes down."""
    check_notebooks(root)
    quiet = dict(PYTHONUTF8='1', PYTHONWARNINGS='ignore::DeprecationWarning')
    env = environment(**quiet, IN_TEST=None)
    for name in ('nbdev_clean', 'nbdev_export'):
        done = subprocess.run([command(name)], cwd=root, capture_output=True, text=True,
                              encoding='utf8', env=env)
        said = (done.stdout + done.stderr).strip()
        # nbdev_clean only warns where it cannot read a notebook
        if done.returncode or 'Failed to clean' in said or 'without `#| default_exp`' in said:
            raise RuntimeError(f'{name} failed:\n{said}')


def text(path):
    """A file's bytes with line ends as git stores them: nbdev writes those of the system."""
    return path.read_bytes().replace(b'\r\n', b'\n') if path.exists() else None


def made_files(root):
    """Notebooks, modules and the README's pictures, as paths from the root."""
    tops = [root/settings(root)[key] for key in ('nbs_path', 'lib_path')]
    patterns = '*.ipynb', '*.py', 'images/index_*.png'
    paths = [p for top in tops for pattern in patterns for p in top.rglob(pattern)]
    found = {p.relative_to(root) for p in paths}
    return {p for p in found if not {'.ipynb_checkpoints', '__pycache__'} & set(p.parts)}


def differences(root=ROOT):
    """The files that nbdev or the README's maker would change, each with a few lines of why."""
    if not notebook_paths(root):
        raise RuntimeError(f'no notebook in {root/settings(root)["nbs_path"]}')
    check_notebooks(root)
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(Path(folder), root)
        run_nbdev(copy)
        if (copy/settings(root)['nbs_path']/'index.ipynb').exists(): readme.write(copy)
        watched = made_files(root) | made_files(copy)
        watched |= {Path(n) for n in ('README.md', 'pyproject.toml') if (copy/n).exists()}
        pairs = {name: (text(root/name), text(copy/name)) for name in sorted(watched)}
    return {name.as_posix(): why(old, new) for name, (old, new) in pairs.items() if old != new}


def why(old, new, lines=6):
    """The first lines in which two versions of a file differ."""
    if old is None: return 'would be new'
    if new is None: return 'would be gone'
    try: old, new = old.decode('utf8').splitlines(), new.decode('utf8').splitlines()
    except UnicodeDecodeError: return 'differs'
    compared = difflib.unified_diff(old, new, n=0, lineterm='')
    changed = [line[:120] for line in compared if not line.startswith(('---', '+++', '@@'))]
    return '\n'.join(changed[:lines])


def main(arguments):
    """The command line."""
    if arguments == ['--check']:
        found = differences()
        for name, reason in found.items(): print(f'{name}\n    ' + reason.replace('\n', '\n    '))
        if found: sys.exit(f'{len(found)} file(s) are out of sync: {ADVICE}')
        return print('In sync.')
    if arguments: sys.exit(__doc__)
    run_nbdev(ROOT)
    if (ROOT/settings()['nbs_path']/'index.ipynb').exists(): readme.write()
    print('Cleaned, exported, README made.')


if __name__ == '__main__':
    try: main(sys.argv[1:])
    except (RuntimeError, ValueError) as e: sys.exit(str(e))
