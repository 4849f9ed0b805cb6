"""Train small networks sparse from the first step, and write `results/05a_sparse_training.json`.

    python scripts/sparse_training.py mlp vit llm

`mlp` is a perceptron (64-300-100-10) and `vit` a transformer of three blocks, 40 wide; both learn scikit-learn's digits
from drawn weights: the 1000 images of `train`, jittered, and the 797 of `test` judge. `llm` is the demo language model
with its trained weights, whose MLPs are sparsified; it reads 1500 windows of the sources that it was trained on (those of
the Python that runs this), and the `eval` text, which it has never seen, judges. All schedules of a task share the steps,
the batches and the learning rate. The learning rate and the steps between updates were chosen on a fifth of the images or
windows of training that was held out for it, with static masks and RigL only. One thread.
"""
import argparse
import functools
import time

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fips_nb.data.demo import demo_images, demo_llm, demo_text
from fips_nb.learn.finetuning import label_loss, next_tokens
from fips_nb.measure.records import record
from fips_nb.sparse_factors import Schedule
from fips_nb.research.sparse_training import sparsify
from fips_nb.learn.training import Course, train
from train_demo_llm import encode, sources, split

NAME = "05a_sparse_training"
SPARSITIES = (.8, .9, .95)


def mlp():
    sizes = (64, 300, 100, 10)
    layers = [o for i, h in zip(sizes, sizes[1:]) for o in (nn.Linear(i, h), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def vit():
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=40, depth=3, num_heads=4)
    nn.init.normal_(model.pos_embed, std=.5)
    return model


TASKS = dict(mlp=dict(make=mlp, steps=1200, batch=100, gammas=(0., .3, .6, .95)),
             vit=dict(make=vit, steps=700, batch=50, gammas=(0., .3, .95)),
             llm=dict(steps=150, batch=8, gammas=(0., .3)))


def jitter(x, gen):
    "Images turned, stretched and shifted a little, with noise."
    draw = lambda *shape: 2*torch.rand(len(x), *shape, generator=gen) - 1
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, :2] += .15*draw(2, 2)
    theta[:, :, 2] = .2*draw(2)
    x = F.grid_sample(x + 1, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False) - 1
    return x + .1*torch.randn(x.shape, generator=gen)


def fit(model, loss, moves, course, lr):
    "Train, moving the masks if there are any; the loss of the last epoch and the seconds."
    opt, start = torch.optim.AdamW(model.parameters(), lr=lr), time.perf_counter()
    losses = train(model, loss, opt, course, moves=[moves] if moves else [])
    return dict(train_loss=losses[-1], training=time.perf_counter() - start)


def masks(moves):
    "What the masks are at the end."
    if moves is None: return {}
    live, total = (sum(int(o) for o in os) for os in (map(torch.sum, moves.masks), map(torch.numel, moves.masks)))
    rows = [m.any(1) for m in moves.masks]
    return dict(density=live/total, ablated=1 - sum(int(r.sum()) for r in rows)/sum(len(r) for r in rows))


def schedule(method, sparsity, steps, gamma=0., every=100):
    return Schedule(sparsity, steps, method, every=every, fraction=.3, gamma=gamma)


def digits(task, method, sparsity=0., gamma=0., densities="uniform", fresh=True, seed=0):
    "One run on the digits."
    steps, batch = (TASKS[task][k] for k in ("steps", "batch"))
    torch.manual_seed(seed)
    model, moves = TASKS[task]["make"]().train(), None
    if method != "dense":
        plan = schedule(method, sparsity, steps, gamma)
        moves = sparsify(model, plan, densities=densities, fresh=fresh, seed=seed)
    x, y = demo_images("train")

    def loss(model, j, epoch):
        gen = torch.Generator().manual_seed(10**6*seed + 10**3*epoch + j)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(10**3*seed + epoch))
        i = order[j*batch:(j + 1)*batch]
        return F.cross_entropy(model(jitter(x[i], gen)), y[i]), {}

    figures = fit(model, loss, moves, Course(list(range(len(x)//batch)), steps=steps, seed=seed), lr=3e-3)
    with torch.no_grad(): (xt, yt), out = demo_images("test"), model.eval()(demo_images("test")[0])
    top1 = (out.argmax(1) == yt).float().mean().item()
    return dict(top1=top1, loss=F.cross_entropy(out, yt).item(), n=len(xt)) | figures | masks(moves)


def windows(tok, files, length=128):
    "Texts as windows of tokens (n, length)."
    ids = encode(tok, files).long()
    return ids[:len(ids)//length*length].view(-1, length)


def next_loss(model, x):
    "Loss of every next token, and whether it is the likeliest one."
    out, y = model(input_ids=x).logits, next_tokens(x)
    return label_loss(out, y), (out[:, :-1].argmax(-1) == y).float().mean()


@functools.cache
def texts(n=1500):
    "Windows of the files that the demo was trained on, drawn once, and those of its held-out text."
    tok, files = demo_llm()[1], split(sources([], 1e9))[0]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    return windows(tok, [files[i] for i in order])[:n], windows(tok, demo_text("eval"))


def text(task, method, sparsity=0., gamma=0., seed=0, lr=3e-3, every=50, judge=0):
    "One run on text; with `judge`, so many windows of training are held out and judge in place of the test."
    steps, batch = (TASKS[task][k] for k in ("steps", "batch"))
    model, moves = demo_llm()[0].float(), None
    if method != "dense":
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in n]
        moves = sparsify(model, schedule(method, sparsity, steps, gamma, every), names, seed=seed)
    x, held = texts()
    if judge: x, held = x[:-judge], x[-judge:]

    def loss(model, j, epoch):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(10**3*seed + epoch))
        return next_loss(model, x[order[j*batch:(j + 1)*batch]])[0], {}

    figures = fit(model.train(), loss, moves, Course(list(range(len(x)//batch)), steps=steps, seed=seed), lr=lr)
    with torch.no_grad(): nats, right = (torch.stack(o).mean().item() for o in zip(*(
        next_loss(model.eval(), b) for b in held.split(50))))
    return dict(top1=right, loss=nats, n=held[:, 1:].numel()) | figures | masks(moves)


def runs(task):
    "What is compared: settings of a task."
    yield dict(method="dense")
    for s in SPARSITIES:
        yield from (dict(method=m, sparsity=s) for m in ("static", "set", "rigl", "gmp") if (task, m) != ("llm", "set"))
        yield from (dict(method="srigl", sparsity=s, gamma=g) for g in TASKS[task]["gammas"])
    if task == "llm": return
    for s in SPARSITIES[1:] if task == "mlp" else SPARSITIES[2:]:
        yield dict(method="rigl", sparsity=s, densities="erk")
        yield dict(method="srigl", sparsity=s, gamma=.3, densities="erk")
    if task == "mlp": yield dict(method="static", sparsity=.95, fresh=False)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tasks", nargs="+", choices=list(TASKS))
    p.add_argument("--seeds", type=int, default=3)
    a = p.parse_args()
    torch.set_num_threads(1)
    for task in a.tasks:
        for seed in range(a.seeds):
            for how in runs(task):
                one = text if task == "llm" else digits
                run = functools.partial(one, task, seed=seed, **how)
                row = record(NAME, dict(task=task, **how), run, f"scripts/sparse_training:{one.__name__}", seed)
                print(task, seed, how, {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}, flush=True)


if __name__ == "__main__":
    main()
