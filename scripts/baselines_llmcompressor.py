"""Wanda and SparseGPT of llm-compressor on the language models of notebook 06, at equal bytes.

    pip install llmcompressor      # in an environment of its own: it pins torch and transformers
    python scripts/baselines_llmcompressor.py stories260k .8 .6

The weights of the MLPs are pruned to the density at which their non-zeros in 16 bits and the
entropy of the masks take the same share of the whole model's bytes as the rows of
`results/06_frontier.json`. Windows and held-out text are the same, and the rows go to
`results/06_llmcompressor.json`.
"""
import argparse
import os
import time
from pathlib import Path

import llmcompressor
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from notebooks import definitions
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, default_data_collator

from fips_nb.share.budgets import budget_for_bytes, budget_for_ratio, configure
from fips_nb.data.demo import demo_llm, demo_text
from fips_nb.grouping import factor_bytes, find_mlps
from fips_nb.measure.records import record
from fips_nb.data.text import open_tokenizer
from fips_nb.measure.perplexity import perplexity

ENTRY = ["scripts/baselines_llmcompressor:measure", "nbs/06_llm_experiments:Subject"]
Subject = definitions("06_llm_experiments").Subject
METHODS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def subject(name, seed):
    "The model `name` in float32 and its texts; one that may be changed."
    if name == "demo-llm":
        model, tokenizer = demo_llm()
        texts = demo_text("calib"), demo_text("eval")
        return Subject(name, model.float(), tokenizer, *texts, seed=seed)
    data = Path(os.environ["FIPS_NB_DATA"])
    model = AutoModelForCausalLM.from_pretrained(data/name).eval()
    texts = data/"text/tinystories_calib.txt", data/"text/tinystories_eval.txt"
    return Subject(name, model, open_tokenizer(data/name), *texts, seed=seed)


def loader(windows):
    "Windows (n, t) as llm-compressor takes them."
    rows = dict(input_ids=windows.tolist(), attention_mask=torch.ones_like(windows).tolist())
    data = Dataset.from_dict(rows).with_format("torch")
    return DataLoader(data, batch_size=4, collate_fn=default_data_collator)


def prune(model, linears, method, density, windows):
    "Prune the weights of `linears` in place, and round what is left to 16 bits."
    names = dict.fromkeys(l.name.rpartition(".")[2] for l in linears)
    recipe = METHODS[method](sparsity=1 - density, mask_structure="0:0",
                             targets=[f"re:.*{name}$" for name in names])
    oneshot(model=model, recipe=recipe, dataset=loader(windows), max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows), pipeline="sequential")
    for l in linears:
        weight = model.get_submodule(l.name).weight.data
        weight.copy_(weight.half())


def sizes(model, linears):
    "What the pruned weights keep of parameters and bytes, as notebook 06 counts them."
    total = sum(p.numel() for p in model.parameters())
    ours = sum(l.d*l.h for l in linears)
    kept = [int((model.get_submodule(l.name).weight != 0).sum()) for l in linears]
    nbytes = sum(factor_bytes(0, 0, [n], [l.d*l.h]) for n, l in zip(kept, linears))
    return dict(bytes=nbytes/(2*ours), model_bytes=1 - (1 - nbytes/(2*ours))*ours/total,
                budget=sum(kept)/ours, model_ratio=1 - (1 - sum(kept)/ours)*ours/total)


def measure(name, ratio, method, seed):
    "The figures of one row."
    changed, dense = subject(name, seed), subject(name, seed)
    linears = [l for module in find_mlps(dense.model) for l in module.linears]
    share = budget_for_ratio(dense.model, ratio)
    density = budget_for_bytes(dense.model, share, configure("pruning"))
    start = time.perf_counter()
    prune(changed.model, linears, method, density, dense.batches.windows)
    phases = dict(pruning=round(time.perf_counter() - start, 1))
    found = perplexity(changed.model, None, dense.tokens, dense=dense.model)
    by = f"llm-compressor {llmcompressor.__version__}"
    return dict(**sizes(changed.model, linears), **found, phases=phases, by=by)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=("stories260k", "demo-llm"))
    p.add_argument("ratios", type=float, nargs="+")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    a = p.parse_args()
    tasks = [(r, m, s) for r in a.ratios for m in METHODS for s in a.seeds]
    for ratio, method, seed in tasks:
        key = dict(model=a.model, windows=256, length=256, seed=seed, ratio=ratio, preset=method,
                   plan=False, distilled=0)
        make = lambda: measure(a.model, ratio, method, seed)
        row = record("06_llmcompressor", key, make, ENTRY, seed)
        more = row["perplexity"]/row["dense_perplexity"]
        print(f"{key}: {row['model_bytes']:.4f} of the bytes, {more:.4f} x the dense perplexity")


if __name__ == "__main__":
    main()
