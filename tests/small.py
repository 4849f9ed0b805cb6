"""Small models of many architectures, and settings that make every preset fast, for all tests."""
import timm
import torch
from PIL import Image
from timm.layers import GluMlp, SwiGLUPacked
from timm.models import ConvNeXt, Eva, MlpMixer, SwinTransformer, VisionTransformer
from timm.models.vision_transformer import ParallelThingsBlock

from fips_nb.data.demo import demo_vit
from fips_nb.share.budgets import PRESETS
from fips_nb.round.costs import find_parts
from fips_nb.round.entropy import encode
from fips_nb.round.rounding import Codes

SMALL = dict(embed_dim=16, depth=2, num_heads=2, num_classes=5)
PLAIN = SMALL | dict(img_size=8, patch_size=4)
SWIN = dict(img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2),
            num_heads=(2, 2), num_classes=5)
MIXER = dict(img_size=16, patch_size=4, embed_dim=16, num_blocks=2, num_classes=5)
CONVNEXT = dict(depths=(1, 1, 1, 2), dims=(8, 8, 16, 16), num_classes=5)


def create(name, **kw): return timm.create_model(name, **(PLAIN | kw))


ARCHS = dict(
    vit=lambda: VisionTransformer(**PLAIN),
    deit3=lambda: create("deit3_small_patch16_224", drop_path_rate=.3), # layer scale, drop path
    beit=lambda: create("beit_base_patch16_224", drop_path_rate=.3),
    swin=lambda: SwinTransformer(**SWIN), # stages of widths 8 and 16
    swinv2=lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN),
    eva=lambda: Eva(**PLAIN, swiglu_mlp=True, mlp_ratio=2), # gate and value in one linear
    # gate and value apart, with a norm inside the MLP
    eva_gated=lambda: Eva(**PLAIN, swiglu_mlp=True, scale_mlp=True, mlp_ratio=2),
    glu=lambda: VisionTransformer(**PLAIN, mlp_layer=GluMlp),
    swiglu=lambda: VisionTransformer(**PLAIN, mlp_layer=SwiGLUPacked),
    mixer=lambda: MlpMixer(**MIXER),
    cait=lambda: create("cait_xxs24_224"),
    convnext=lambda: ConvNeXt(**CONVNEXT),
    parallel=lambda: VisionTransformer(**PLAIN, block_fn=ParallelThingsBlock), # two MLPs a block
)
SIDE = dict(swin=16, swinv2=16, mixer=16, convnext=32)


def make(name="vit", seed=0):
    "A small model with biases and scales that are not trivial."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHS[name]().eval()
        with torch.no_grad():
            for k, p in model.named_parameters():
                if p.dim() == 1 and k.endswith("bias"): p.normal_(0, .1)
                elif p.dim() == 1: p.uniform_(.5, 1.)
    return model


def vit(**kw):
    "A small vision transformer with other arguments."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(**(PLAIN | kw)).eval()


def images(name="vit", n=2, size=2, seed=1):
    "`n` batches of `size` random images."
    side, g = SIDE.get(name, 8), torch.Generator().manual_seed(seed)
    return list(torch.randn(n, size, 3, side, side, generator=g))


def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def quick(preset, **kw):
    "Settings that make `preset` fast."
    cfg = PRESETS[preset]
    fast = dict(als=dict(levels=2), blocks=dict(block_steps=3), svd={})[cfg.fit]
    return fast | (dict(distill_epochs=1) if cfg.distill_epochs else {}) | kw


def put_codes(model, step=-20):
    "Codes for all parts of `model` with steps of 2^(step/4), put into it."
    model.fips_codes = {}
    for part in find_parts(model):
        p = model.get_parameter(part.name)
        W = p.detach().float().view(part.shape)
        q = (W/2.**(step/4)).round().clamp(-30000, 30000).to(torch.int16)
        rows, columns = torch.full((len(q),), step, dtype=torch.int16), torch.zeros(q.shape[1], dtype=torch.int16)
        p.data.copy_((c := Codes(q, rows, columns)).weight().view(p.shape))
        model.fips_codes[part.name] = encode(c)
    model.fips_codes = dict(sorted(model.fips_codes.items()))
    return model.eval()


def first_blocks(n):
    "The demo's first `n` blocks and its head, with notes on how it was made as timm writes them."
    model = demo_vit()
    model.blocks = model.blocks[:n]
    model._model_args = dict(depth=n)
    model.pretrained_cfg = dict(architecture="demo-vit", input_size=(1, 8, 8), fixed_input_size=True, crop_pct=1.,
                                interpolation="bilinear", mean=(.5,), std=(.5,), num_classes=10)
    return model


def blank_picture(report, to, *args, **how):
    "What stands for plot_layers where the picture of a folder does not matter: drawing takes longer than the rest."
    Image.new("RGB", (1, 1)).save(to, "png")
