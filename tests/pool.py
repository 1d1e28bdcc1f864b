"""Jobs in processes of their own, as many at once as there are cores, their outputs kept apart.

On Linux every process is forked from one that has already imported the large libraries (a
`forkserver`), which saves seconds a job; elsewhere it starts from nothing. A job that dies, hangs,
or answers nothing has failed."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

# What nearly every notebook and test imports; a name that is not installed is passed over.
WARM = ['torch', 'torchvision', 'scipy.stats', 'sklearn.datasets', 'sklearn.ensemble',
        'sklearn.svm', 'matplotlib.pyplot', 'nbdev.test', 'pytest', 'hypothesis']


@dataclass
class Job:
    """A function of a module, its arguments, and the seconds that it may take."""
    name: str
    work: object
    args: tuple = ()
    limit: float = 1200


@dataclass
class Done:
    """How a job ended."""
    job: Job
    value: object    # what it returned; None where it failed
    seconds: float
    cpu: float       # seconds of the processor
    said: str        # what it printed
    why: str = ''    # why it failed


def cores():
    """How many jobs can run at once: the cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'): return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_time():
    """User seconds of this process and of its children that have ended; waiting counts nothing."""
    t = os.times()
    return t.user + t.children_user


def begin(work, args, folder):
    """In the new process: output to a file, a process group of its own, and the answer as JSON."""
    if os.name == 'posix': os.setsid()
    log = os.open(Path(folder)/'log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(log, number)
        stream.reconfigure(encoding='utf8', errors='replace', line_buffering=True)
    # A process inherits how it was started; a job starts its own as any program does.
    multiprocessing.set_start_method(None, force=True)
    start = processor_time()
    answer = dict(value=work(*args))
    answer['cpu'] = processor_time() - start
    (Path(folder)/'part').write_text(json.dumps(answer), encoding='utf8')
    os.replace(Path(folder)/'part', Path(folder)/'answer')
    # Without waiting for processes that it has left behind: joblib's stay for minutes.
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(0)


def kill(process):
    """Ends a process and those that it started; it may have ended itself and left some behind."""
    if os.name != 'posix':
        return subprocess.run(['taskkill', '/F', '/T', '/PID', str(process.pid)],
                              capture_output=True)
    try: os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): process.kill()   # not yet a group, or gone


def context():
    """How processes are started: forked from a warm one where that is safe."""
    if not sys.platform.startswith('linux'): return multiprocessing.get_context('spawn')
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(WARM)
    return found


def run(jobs, workers=None):
    """Runs the jobs in their order, several at once, and yields each as Done when it ends."""
    start, todo, running = context(), list(jobs), {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        try:
            while todo or running:
                while todo and len(running) < (workers or cores()):
                    folder = Path(tempfile.mkdtemp(dir=home))
                    job = todo.pop(0)
                    process = start.Process(target=begin, args=(job.work, job.args, folder))
                    process.start()
                    running[process.sentinel] = job, process, folder, time.time()
                ended = wait(list(running), timeout=1)
                late = [sentinel for sentinel, (job, *_, since) in running.items()
                        if time.time() > since + job.limit]
                for sentinel in dict.fromkeys([*ended, *late]):
                    yield finish(*running.pop(sentinel), stopped=sentinel not in ended)
        finally:
            for _, process, *_ in running.values(): kill(process)


def finish(job, process, folder, since, stopped):
    """What became of a job whose process has ended, or is to be stopped."""
    kill(process)
    process.join()

    def read(name):
        path = folder/name
        return path.read_text(encoding='utf8', errors='replace') if path.exists() else ''

    answer, why = json.loads(read('answer') or '{}'), ''
    if not answer: why = f'ended without an answer (exit {process.exitcode})'
    if not answer and stopped: why = f'stopped after {job.limit:.0f} s'
    seconds, cpu = time.time() - since, answer.get('cpu', 0.)
    return Done(job, answer.get('value'), seconds, cpu, read('log'), why)
