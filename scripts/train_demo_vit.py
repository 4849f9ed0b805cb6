"""Train `demo-vit`, the demo model shipped with fips_nb, and write it with its images.

A narrow, deep timm VisionTransformer learns scikit-learn's 8x8 handwritten digits (1000 training
images, which also serve as calibration images; 797 held out; both splits fixed and stratified).
It runs on one CPU thread from a fixed seed.

The model is made so that compressing its MLPs is not trivially easy.  The MLP weights start as
scaled orthogonal matrices (flat spectrum, gain MLP_GAIN) and all block matrices are trained with
Muon, whose orthogonalised updates have a flat spectrum too; no spectral penalty is used.  So the
MLP weights keep close to full rank, and low rank is a bad fit for them.

Measured with seed 0 (2 minutes on one thread; PyTorch 2.15, timm 1.0.31): held-out top-1 98.62 %,
the same after rounding the weights to fp16.  Held-out top-1 with every MLP weight compressed in one
shot, without any refit:

    MLP budget   truncated SVD   SVD whitened by the inputs   magnitude pruning
       50 %          33.50 %               91.22 %                 96.86 %
       25 %          16.56 %               38.27 %                 70.89 %

Width, depth, gain and length of training were picked, among eight settings tried and by these same
held-out numbers, to make this contrast large: it is a property of the demo, not of ViTs at large.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer

KWARGS = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=40, depth=20,
              num_heads=4, mlp_ratio=4.0)
EPOCHS, BATCH, MUON_LR, ADAM_LR, DECAY, MLP_GAIN = 50, 125, 0.02, 2e-3, 0.05, 3.0


def preprocess(images):
    """uint8 (n, 8, 8), values 0..16 -> float (n, 1, 8, 8) in [-1, 1]."""
    return (images.float()[:, None] / 16 - 0.5) / 0.5


def digits():
    data = load_digits()
    x, y = torch.tensor(data.images).to(torch.uint8), torch.tensor(data.target).to(torch.uint8)
    train, test = train_test_split(range(len(y)), train_size=1000, stratify=data.target, random_state=0)
    return dict(train_images=x[train], train_labels=y[train], test_images=x[test], test_labels=y[test])


def augment(x):
    """Random rotation, scale, shear and shift; noise; cutout of 2x2 squares (x in [-1, 1])."""
    n = len(x)
    angle, shear = (torch.rand(2, n) - 0.5) * torch.tensor([[math.radians(30)], [0.4]])
    scale = torch.exp((torch.rand(n, 2) - 0.5) * 0.3)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale[:, 0] * angle.cos(), shear - scale[:, 0] * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale[:, 1] * angle.sin(), scale[:, 1] * angle.cos()
    theta[:, :, 2] = (torch.rand(n, 2) - 0.5) * 0.5
    x = F.grid_sample(x + 1, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = x + 0.2 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    return x * F.interpolate((torch.rand(n, 1, 4, 4) > 0.12).float(), scale_factor=2) - 1


class Muon:
    """Nesterov momentum with orthogonalised (Newton-Schulz) updates, batched over equal shapes."""

    def __init__(self, weights):
        self.groups = {}
        for w in weights:
            self.groups.setdefault(w.shape, []).append(w)
        self.momentum = {shape: torch.zeros(len(ws), *shape) for shape, ws in self.groups.items()}

    @torch.no_grad()
    def step(self, lr):
        for (rows, cols), weights in self.groups.items():
            grad, buf = torch.stack([w.grad for w in weights]), self.momentum[rows, cols]
            buf.lerp_(grad, 0.05)
            u = grad.lerp(buf, 0.95)
            u = u.mT if rows > cols else u
            u = u / (u.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = u @ u.mT
                u = 3.4445 * u + (2.0315 * a @ a - 4.775 * a) @ u
            u = u.mT if rows > cols else u
            for w, update in zip(weights, u):
                w.mul_(1 - lr * DECAY).add_(update, alpha=-lr * math.sqrt(max(1, rows / cols)))


def mlp_layers(model):
    return [layer for block in model.blocks for layer in (block.mlp.fc1, block.mlp.fc2)]


def build():
    model = VisionTransformer(**KWARGS)
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    for layer in mlp_layers(model):
        torch.nn.init.orthogonal_(layer.weight, gain=MLP_GAIN)
    return model


def train(model, data):
    x, y = preprocess(data["train_images"]), data["train_labels"].long()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    muon = Muon(matrices)
    adam = torch.optim.Adam([p for p in model.parameters() if id(p) not in chosen])
    steps, step = EPOCHS * (len(x) // BATCH), 0
    for epoch in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            step += 1
            factor = min(1, step / 100, (steps - step + 1) / (0.6 * steps))
            loss = F.cross_entropy(model(augment(x[batch])), y[batch], label_smoothing=0.1)
            model.zero_grad()
            loss.backward()
            adam.param_groups[0]["lr"] = ADAM_LR * factor
            adam.step()
            muon.step(MUON_LR * factor)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, top-1 {top1(model, data):.2f} %", flush=True)


@torch.no_grad()
def top1(model, data):
    prediction = model.eval()(preprocess(data["test_images"])).argmax(1)
    return 100 * (prediction == data["test_labels"]).float().mean().item()


def svd(w, x, budget):
    """Truncated SVD, rank r = floor(budget * d * h / (d + h))."""
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    r = int(budget * w.numel() / sum(w.shape))
    return (u[:, :r] * s[:r]) @ v[:r]


def whitened_svd(w, x, budget):
    """Truncated SVD that is optimal for the layer's inputs x (rows)."""
    e, q = torch.linalg.eigh((x.T @ x / len(x)).double())
    root = e.clamp_min(e.max() * 1e-6).sqrt()
    return (svd(w.double() @ (q * root) @ q.T, x, budget) @ ((q / root) @ q.T)).float()


def prune(w, x, budget):
    """Keep the largest entries of the matrix; one shot, no refit."""
    return w * (w.abs() > w.abs().flatten().kthvalue(int((1 - budget) * w.numel())).values)


@torch.no_grad()
def top1_with(model, data, compress, budget):
    """Held-out top-1 after `compress` on every MLP weight (inputs: the training images)."""
    model, inputs = copy.deepcopy(model).eval(), {}
    hooks = [layer.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].flatten(0, 1)}))
             for layer in mlp_layers(model)]
    model(preprocess(data["train_images"]))
    for hook, layer in zip(hooks, mlp_layers(model)):
        hook.remove()
        layer.weight.copy_(compress(layer.weight, inputs[layer], budget))
    return top1(model, data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "fips_nb" / "assets")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    start, data, model = time.time(), digits(), build()
    train(model, data)
    print(f"trained in {time.time() - start:.0f} s; held-out top-1 in fp32 {top1(model, data):.2f} %")
    half = {name: p.detach().half().contiguous() for name, p in model.state_dict().items()}
    model.load_state_dict(half)  # from here on: what a user will load
    score = top1(model, data)
    print(f"held-out top-1 after rounding to fp16 {score:.2f} %")
    for budget in (0.5, 0.25):
        for method in (svd, whitened_svd, prune):
            print(f"MLP budget {budget:.0%}, {method.__name__}: {top1_with(model, data, method, budget):.2f} %")
    args.out.mkdir(parents=True, exist_ok=True)
    metadata = dict(kwargs=json.dumps(KWARGS), seed=str(args.seed), top1=f"{score:.2f}")
    save_file(half, args.out / "demo_vit.safetensors", metadata=metadata)
    save_file({name: t.contiguous() for name, t in data.items()}, args.out / "demo_digits.safetensors")


if __name__ == "__main__":
    main()
