"""How fast is `fit`, and how much memory does it take?

The AE against a plain PyTorch loop, a plain autoencoder, and PyOD.

    python tests/benchmarks/train_ae.py --images 3000 --epochs 10 --rounds 3 --threads 1 2

Every measurement is a process of its own; the contestants take turns."""
import json
import statistics
import time

import bench

CODE_DIM, WIDTH, BATCH, SEED = 16, 16, 128, 0

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
PEERS = {'PyOD AutoEncoder': ('pyod.models.auto_encoder', "pip install -e '.[peers]'")}


# ---------------------------------------------------------------- what is measured
def data(n):
    """(training images, test images, test labels, what they are)."""
    task, name = bench.mnist_task(3), 'MNIST, the digit 3 is normal'
    if not task: task, name = bench.made_up(n)
    x, x_test = bench.as_floats(task.x_train[:n]), bench.as_floats(task.x_test[:2000])
    return x, x_test, task.y_test[:2000], name


def plain_autoencoder():
    """A convolutional autoencoder as people write it."""
    from torch import nn
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            twice = dict(stride=2, padding=1, output_padding=1)   # as large
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
                nn.ConvTranspose2d(32, 16, 3, **twice),     # (b, 16, 14, 14)
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.ConvTranspose2d(16, 1, 3, **twice),      # (b, 1, 28, 28)
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
        errors = lambda b: (b - model(b)).square().flatten(1).mean(1)
        with torch.no_grad():
            return torch.cat([errors(b) for b in torch.from_numpy(images).split(BATCH)]).numpy()
    np.quantile(score(x), .95)  # a detector needs a threshold: the others' fit sets one too
    return seconds, score


def train_ours(arch, x, epochs, precision='float32'):
    """`fit` of the course."""
    from ad_course.ae import AE
    sizes = dict(code_dim=CODE_DIM, width=WIDTH, arch=arch, batch_size=BATCH)
    d = AE(epochs=epochs, seed=SEED, device='cpu', precision=precision, verbose=False, **sizes)
    d.fit(x)
    return d.history_['seconds'], d.decision_function


def train_pyod(x, epochs):
    """PyOD's AutoEncoder, its hidden layers as near to our MLP as it allows.

    Its code passes a ReLU, its output no sigmoid."""
    from pyod.models.auto_encoder import AutoEncoder
    class Timed(AutoEncoder):
        def epoch_update(self): self.ticks.append(time.perf_counter())
        def train(self, loader):
            self.ticks = [time.perf_counter()]
            super().train(loader)
    layers = dict(hidden_neuron_list=[8 * WIDTH, CODE_DIM], batch_norm=False, dropout_rate=0.)
    d = Timed(epoch_num=epochs, batch_size=BATCH, preprocessing=False, optimizer_params={},
              device='cpu', random_state=SEED, verbose=0, **layers).fit(bench.flat(x))
    seconds = [b - a for a, b in zip(d.ticks, d.ticks[1:])]
    return seconds, lambda images: d.decision_function(bench.flat(images))


def train(network, who, x, epochs):
    """One contestant."""
    if who == 'pyod': return train_pyod(x, epochs)
    if who == 'plain': return train_plainly(plain_autoencoder, x, epochs)
    if who == 'loop': return train_plainly(lambda: our_networks(network, x.shape[1:]), x, epochs)
    return train_ours(network, x, epochs, *who.split()[1:])


def measure(contestant, n, epochs, threads):
    """All numbers of one contestant, as a dict."""
    import torch
    torch.set_num_threads(threads)
    from ad_course.metrics import auroc
    network, who = CONTESTANTS[contestant]
    x, x_test, y_test, name = data(n)
    import ad_course.ae                         # imports count for nobody
    if contestant in PEERS: __import__(PEERS[contestant][0])
    one = lambda images, passes: train(network, who, images, passes)
    (seconds, score), out = bench.measured(one, x, epochs, few=2 * BATCH)
    quality = auroc(y_test, score(x_test))
    return out | dict(seconds=seconds, auroc=quality, data=f'{name}: {len(x)} images')


# ---------------------------------------------------------------- the table
def has_bfloat16():
    """Whether the processor computes in bfloat16; elsewhere it is emulated, and slow."""
    import torch
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def present(args):
    """The contestants that can take part; a line about each that cannot."""
    out = bench.without_missing(CONTESTANTS, PEERS, args.no_peers)
    if not has_bfloat16():
        print('ours, bfloat16: left out, this processor does not compute in it')
        del out['ours, bfloat16']
    return out


HEAD = ['threads', 'contestant', 's an epoch, median', 'min', 'ratio', 'whole fit, s',
        'its CPU s, min', 'peak, MiB', 'AUROC']


def table(results, contestants):
    """Markdown. results: (threads, contestant) -> measurements, one a round."""
    rows, of_epochs = [], lambda found: [s for m in found for s in m['seconds']]
    for (threads, name), found in results.items():
        base = next(n for n, (net, _) in contestants.items() if net == contestants[name][0])
        seconds, of_base = of_epochs(found), of_epochs(results[threads, base])
        middle, cpu = statistics.median(seconds), min(m['cpu'] for m in found)
        whole, memory, auroc = (bench.median(found, k) for k in ('whole', 'memory', 'auroc'))
        ratio = middle / statistics.median(of_base)
        rows.append([threads, name, f'{middle:.3f}', f'{min(seconds):.3f}', f'{ratio:.2f}',
                     f'{whole:.2f}', f'{cpu:.2f}', f'{memory:.0f}', f'{auroc:.3f}'])
    return bench.markdown(HEAD, rows)


def main():
    """The command line."""
    parser = bench.arguments(__doc__, rounds=3)
    parser.add_argument('--images', type=int, default=3000, help='training images')
    parser.add_argument('--epochs', type=int, default=10, help='after three, nobody has learned')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    args = parser.parse_args()
    if args.measure:
        found = measure(args.measure, args.images, args.epochs, args.threads[0])
        return print(json.dumps(found))
    contestants = present(args)
    fresh = lambda threads, name: bench.in_a_process_of_its_own(
        __file__, name, threads, images=args.images, epochs=args.epochs)
    say = lambda found: f'{statistics.median(found["seconds"]):.3f} s an epoch'
    keys = [(threads, name) for threads in args.threads for name in contestants]
    results = bench.rounds(args.rounds, keys, fresh, say)
    what = results[keys[-1]][-1]['data']
    import torch
    print(f'\n{what}, batches of {BATCH}, {args.epochs} epochs, {args.rounds} rounds, '
          f'code of {CODE_DIM}; torch {torch.__version__}\n')
    print(table(results, contestants))


if __name__ == '__main__': main()
