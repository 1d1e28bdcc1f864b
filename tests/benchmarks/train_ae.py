"""How fast is `fit`, and how much memory does it take? The AE against a plain PyTorch loop, a plain autoencoder, and PyOD.

    python tests/benchmarks/train_ae.py --images 3000 --epochs 10 --rounds 3 --threads 1 2

Every measurement is a process of its own; the contestants take turns, round by round, so that a busy minute hits all alike."""
import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE_DIM, WIDTH, BATCH, SEED = 16, 16, 128, 0
INSTALL = "pip install -e '.[peers]'"

# Name -> (network, who trains it). The first of each network is what the others are compared with.
CONTESTANTS = {
    'plain loop, our networks': ('conv', 'loop'),
    'ours, float32': ('conv', 'fit'),
    'ours, bfloat16': ('conv', 'fit bfloat16'),
    'plain loop, plain autoencoder': ('conv', 'plain'),
    'plain loop, our MLP': ('mlp', 'loop'),
    'ours, MLP': ('mlp', 'fit'),
    'PyOD AutoEncoder': ('mlp', 'pyod'),
}


# ---------------------------------------------------------------- what is measured, in a process of its own

def data(n):
    """(training images, test images, test labels, what they are): MNIST where it lies, one digit normal, else made-up surfaces."""
    if (data_root()/'MNIST').exists(): task, name = mnist(normal=3), 'MNIST, the digit 3 is normal'
    else: task, name = surfaces(n, 200, size=28), 'surfaces of 28x28 (MNIST is not in AD_COURSE_DATA)'
    x, x_test = ((a / 255 if a.dtype == 'uint8' else a).astype('float32') for a in (task.x_train[:n], task.x_test[:2000]))
    return x, x_test, task.y_test[:2000], name


def plain_autoencoder():
    """A convolutional autoencoder as people write it."""
    from torch import nn
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Conv2d(1, 16, 3, stride=2, padding=1),   # (b, 16, 14, 14)
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),  # (b, 32, 7, 7)
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * 7 * 7, CODE_DIM),            # (b, 16)
            )
            self.decoder = nn.Sequential(
                nn.Linear(CODE_DIM, 32 * 7 * 7),
                nn.ReLU(),
                nn.Unflatten(1, (32, 7, 7)),
                nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),  # (b, 16, 14, 14)
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1),   # (b, 1, 28, 28)
                nn.Sigmoid(),
            )

        def forward(self, x): return self.decoder(self.encoder(x))
    return Autoencoder()


def our_networks(arch, shape):
    """The networks of `AE`, as a plain module."""
    from torch import nn
    from ad_course.ae import AE
    nets = AE(code_dim=CODE_DIM, width=WIDTH, arch=arch).networks(shape)
    return nn.Sequential(nets['encoder'], nets['decoder'])


def train_plainly(make, x, epochs):
    """The loop as people write it; (seconds of each epoch, a function from images to scores)."""
    import numpy as np
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    torch.manual_seed(SEED)
    model = make()
    loader = DataLoader(TensorDataset(torch.from_numpy(x)), batch_size=BATCH, shuffle=True)
    criterion = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = []
    for epoch in range(epochs):
        start, running = time.perf_counter(), 0.
        model.train()
        for (batch,) in loader:
            optimizer.zero_grad()
            loss = criterion(model(batch), batch)
            loss.backward()
            optimizer.step()
            running += loss.item() * len(batch)
        seconds.append(time.perf_counter() - start)
    def score(images):
        model.eval()
        with torch.no_grad(): return torch.cat([(b - model(b)).square().flatten(1).mean(1) for b in torch.from_numpy(images).split(BATCH)]).numpy()
    np.quantile(score(x), .95)  # a detector needs a threshold: the others' fit sets one too
    return seconds, score


def train_ours(arch, x, epochs, precision='float32'):
    """`fit` of the course."""
    from ad_course.ae import AE
    from ad_course.datasets import data_root, mnist
    d = AE(epochs=epochs, code_dim=CODE_DIM, width=WIDTH, arch=arch, batch_size=BATCH, seed=SEED, device='cpu', precision=precision, verbose=False).fit(x)
    return d.history_['seconds'], d.decision_function


def train_pyod(x, epochs):
    """PyOD's AutoEncoder, its hidden layers as near to our MLP as it allows (its code passes a ReLU, its output no sigmoid)."""
    from pyod.models.auto_encoder import AutoEncoder
    class Timed(AutoEncoder):
        def epoch_update(self): self.ticks.append(time.perf_counter())
        def train(self, loader):
            self.ticks = [time.perf_counter()]
            super().train(loader)
    d = Timed(epoch_num=epochs, batch_size=BATCH, hidden_neuron_list=[8 * WIDTH, CODE_DIM], batch_norm=False, dropout_rate=0., preprocessing=False,
              optimizer_params={}, device='cpu', random_state=SEED, verbose=0).fit(x.reshape(len(x), -1))
    return [b - a for a, b in zip(d.ticks, d.ticks[1:])], lambda images: d.decision_function(images.reshape(len(images), -1))


def train(network, who, x, epochs):
    """One contestant."""
    if who == 'pyod': return train_pyod(x, epochs)
    if who == 'plain': return train_plainly(plain_autoencoder, x, epochs)
    if who == 'loop': return train_plainly(lambda: our_networks(network, x.shape[1:]), x, epochs)
    return train_ours(network, x, epochs, *who.split()[1:])


def forget_peak():
    """Gives back what the process holds but does not use; from here on its peak counts anew. Where the system can do that (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass


def peak():
    """The largest resident size of this process so far, in MiB; NaN on Windows."""
    try: import resource
    except ImportError: return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def measure(contestant, n, epochs, threads):
    """All numbers of one contestant, as a dict."""
    import torch
    torch.set_num_threads(threads)
    from ad_course.metrics import auroc
    from ad_course.surfaces import surfaces
    network, who = CONTESTANTS[contestant]
    x, x_test, y_test, name = data(n)
    import ad_course.ae                         # imports count for nobody
    if who == 'pyod': import pyod.models.auto_encoder
    forget_peak()
    before = peak()
    train(network, who, x[:2 * BATCH], 1)       # warm-up: kernels are chosen and buffers made at the first use
    start, cpu = time.perf_counter(), time.process_time()
    seconds, score = train(network, who, x, epochs)
    whole, cpu, memory = time.perf_counter() - start, time.process_time() - cpu, peak() - before
    return dict(seconds=seconds, whole=whole, cpu=cpu, memory=memory, auroc=auroc(y_test, score(x_test)), data=f'{name}: {len(x)} images')


# ---------------------------------------------------------------- the rounds and the table

def run(contestant, args, threads):
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, '--measure', contestant, '--images', str(args.images), '--epochs', str(args.epochs), '--threads', str(threads)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONPATH': path, 'CUDA_VISIBLE_DEVICES': ''})
    if done.returncode: raise SystemExit(f'{contestant} failed:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def has_bfloat16():
    """Whether the processor computes in bfloat16; elsewhere it is emulated, and slow."""
    import torch
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def present(args):
    """The contestants that can take part; a line about each that cannot."""
    out = dict(CONTESTANTS)
    if not has_bfloat16():
        print('ours, bfloat16: left out, this processor does not compute in it')
        del out['ours, bfloat16']
    if args.no_peers: del out['PyOD AutoEncoder']
    elif subprocess.run([sys.executable, '-c', 'import pyod.models.auto_encoder'], capture_output=True).returncode:
        print(f'PyOD AutoEncoder: left out, it is not installed ({INSTALL})')
        del out['PyOD AutoEncoder']
    return out


def table(results, contestants):
    """Markdown. results: (threads, contestant) -> measurements, one a round."""
    lines = ['| threads | contestant | s an epoch, median | min | ratio | whole fit, s | its CPU s, min | peak, MiB | AUROC |', '|--:|:--|--:|--:|--:|--:|--:|--:|--:|']
    middle = lambda found: statistics.median(s for m in found for s in m['seconds'])
    for (threads, name), found in results.items():
        base = next(n for n, (network, _) in contestants.items() if network == contestants[name][0])
        ratio = middle(found) / middle(results[threads, base])
        lines.append(f'| {threads} | {name} | {middle(found):.3f} | {min(s for m in found for s in m["seconds"]):.3f} | {ratio:.2f} | {statistics.median(m["whole"] for m in found):.2f} '
                     f'| {min(m["cpu"] for m in found):.2f} | {statistics.median(m["memory"] for m in found):.0f} | {statistics.median(m["auroc"] for m in found):.3f} |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=3000, help='training images')
    parser.add_argument('--epochs', type=int, default=10, help='with three, nobody has learned yet')
    parser.add_argument('--rounds', type=int, default=3, help='measurements of each contestant')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--no-peers', action='store_true', help='leave PyOD out')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: return print(json.dumps(measure(args.measure, args.images, args.epochs, args.threads[0])))
    contestants = present(args)
    results = {(threads, name): [] for threads in args.threads for name in contestants}
    for turn in range(args.rounds):
        for threads, name in results:
            found = run(name, args, threads)
            results[threads, name].append(found)
            print(f'round {turn + 1}, {threads} thread{"s" * (threads > 1)}, {name}: {statistics.median(found["seconds"]):.3f} s an epoch', file=sys.stderr, flush=True)
    import torch
    print(f'\n{found["data"]}, batches of {BATCH}, {args.epochs} epochs, {args.rounds} rounds, code of {CODE_DIM}; torch {torch.__version__}\n')
    print(table(results, contestants))


if __name__ == '__main__': main()
