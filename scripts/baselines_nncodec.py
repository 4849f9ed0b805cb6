"""NNCodec, the ISO standard's codec for neural networks, on the models of notebooks 05 and 06: bits against loss.

    pip install nncodec      # in an environment of its own: it pins NumPy below 2 and brings OpenCV and pandas
    python scripts/baselines_nncodec.py vit_tiny_patch16_224
    python scripts/baselines_nncodec.py demo-llm --qp -40 -36 -32

Every tensor of the model is coded with one quantisation parameter, by its defaults (dependent quantisation and
adaptive coding, no data), decoded again, and measured as the coded models of this package are. The rows go to
`results/05_nncodec.json`; their bits are those of the whole stream for each parameter.
"""
import argparse
import copy
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from nncodec.nn import decode, encode
from notebooks import definitions
from transformers import AutoModelForCausalLM

from fips_nb.data.demo import demo_llm, demo_text
from fips_nb.measure.evaluation import evaluate
from fips_nb.data.images import ImageBatches, find_images, transform_for
from fips_nb.data.models import open_model
from fips_nb.measure.records import record
from fips_nb.data.text import open_tokenizer
from fips_nb.measure.perplexity import perplexity

Subject = definitions("06_llm_experiments").Subject
DATA = Path(os.environ.get("FIPS_NB_DATA", "."))
FIGURES = ("top1", "difference", "difference_stderr", "kl", "n", "perplexity", "dense_perplexity")


def vision():
    "ViT-Tiny, and a function that measures a copy of it."
    model = open_model("vit_tiny_patch16_224", DATA/"vit_tiny/vit_tiny_patch16_224.safetensors")
    val = list(ImageBatches(find_images(DATA/"imagenet_val"), transform_for(model), batch_size=25))
    return model, lambda net: evaluate(net, val, model)


def language(name):
    "A language model in float32, and a function that measures a copy of it."
    if name == "demo-llm": (model, tokenizer), texts = demo_llm(), (demo_text("calib"), demo_text("eval"))
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(DATA/name).eval(), open_tokenizer(DATA/name)
        texts = DATA/"text/tinystories_calib.txt", DATA/"text/tinystories_eval.txt"
    subject = Subject(name, model.float(), tokenizer, *texts)
    return subject.model, lambda net: perplexity(net, None, subject.tokens, dense=subject.dense)


def measure(model, figures, qp):
    "The figures of one row."
    own = {k: p.detach().clone() for k, p in model.named_parameters()}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stream = encode({k: p.numpy() for k, p in own.items()}, dict(qp=qp, results=folder, verbose=False))
    took, net = time.perf_counter() - start, copy.deepcopy(model)
    found = decode(bytearray(stream))
    with torch.no_grad():
        for k, p in net.named_parameters(): p.copy_(torch.from_numpy(found[k]).view(p.shape))
    e = figures(net)
    return dict(bits=8*len(stream)/sum(p.numel() for p in own.values()), seconds=took, by=f"nncodec {version('nncodec')}",
                **{k: e[k] for k in FIGURES if k in e})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=("vit_tiny_patch16_224", "stories260k", "demo-llm"))
    p.add_argument("--qp", type=int, nargs="+", default=[-32, -30, -28, -26, -24, -22, -20])
    a = p.parse_args()
    seen = a.model.startswith("vit")
    model, figures = vision() if seen else language(a.model)
    entry = [f"scripts/baselines_nncodec:{k}" for k in ("measure", "vision" if seen else "language")]
    if not seen: entry.append("nbs/06_llm_experiments:Subject")
    for qp in a.qp:
        row = record("05_nncodec", dict(model=a.model, qp=qp), lambda: measure(model, figures, qp), entry)
        print(f"qp {qp}: {row['bits']:.3f} bits, divergence {row['kl']:.4f}, {row['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
