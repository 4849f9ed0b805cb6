"""Wanda and SparseGPT of llm-compressor on the small language models of notebook 06, at equal stored bytes.

    pip install llmcompressor          # in an environment of its own: it pins torch and transformers
    python scripts/rivals_llmcompressor.py stories260k .8 .6 --out results/06_llmcompressor.json

The MLP weights are pruned to the density at which values in 16 bits and the places of the non-zeros (at the entropy of the mask) take
the same share of the whole model's bytes as in the rows of `results/06_frontier.json`; windows and held-out text are the same.
"""
import argparse, json, os, time
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, default_data_collator

import llmcompressor
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

from fips_nb.blockwise_opt import budget_for_bytes, configure
from fips_nb.demo import demo_llm, demo_text
from fips_nb.grouping import factor_bytes, find_mlps
from fips_nb.llm_experiments import TextBatches, open_tokenizer, perplexity

METHODS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def subject(name):
    "Model in float32, tokenizer, calibration and held-out text."
    if name == "demo-llm": m, tok = demo_llm(); return m.float(), tok, demo_text("calib"), demo_text("eval")
    d = Path(os.environ["FIPS_NB_DATA"])
    return AutoModelForCausalLM.from_pretrained(d/name).eval(), open_tokenizer(d/name), d/"text/tinystories_calib.txt", d/"text/tinystories_eval.txt"


def prune(name, ratio, method, seed):
    "One row, as in results/06_frontier.json."
    model, tok, calib, text = subject(name); dense = subject(name)[0]
    linears = [l for part in find_mlps(model) for l in part.linears]; ours = sum(l.d*l.h for l in linears); total = sum(p.numel() for p in model.parameters())
    density = budget_for_bytes(model, 1 - (1 - ratio)*total/ours, configure("sparse"))
    windows = TextBatches(calib, tok, 256, 4, 256, seed, model).windows
    data = DataLoader(Dataset.from_dict(dict(input_ids=windows.tolist(), attention_mask=torch.ones_like(windows).tolist())).with_format("torch"), batch_size=4, collate_fn=default_data_collator)
    recipe = METHODS[method](sparsity=1 - density, mask_structure="0:0", targets=[f"re:.*{l.name.rpartition('.')[2]}$" for l in linears[:3]])
    t = time.perf_counter(); oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=len(windows), max_seq_length=256, pipeline="sequential"); seconds = round(time.perf_counter() - t, 2)
    ws = [model.get_submodule(l.name).weight.detach().half() for l in linears]
    for l, w in zip(linears, ws): model.get_submodule(l.name).weight.data.copy_(w)
    nnz = [int((w != 0).sum()) for w in ws]; nbytes = sum(factor_bytes(0, 0, [n], [w.numel()]) for n, w in zip(nnz, ws))
    key = dict(model=name, ratio=ratio, preset=method, seed=seed, match=0, by=f"llm-compressor {llmcompressor.__version__}")
    return dict(key=key, bytes=nbytes/(2*ours), model_ratio=(total - ours + sum(nnz))/total, budget=sum(nnz)/ours, seconds=seconds, threads=torch.get_num_threads(), **perplexity(model, tok, text, dense=dense))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=("stories260k", "demo-llm")); p.add_argument("ratios", type=float, nargs="+"); p.add_argument("--seeds", type=int, nargs="+", default=[0]); p.add_argument("--out", required=True)
    a = p.parse_args(); out = Path(a.out); rows = json.loads(out.read_text()) if out.exists() else []
    for ratio in a.ratios:
        for method in METHODS:
            for seed in a.seeds:
                rows.append(prune(a.model, ratio, method, seed)); r = rows[-1]
                print(r["key"], "bytes", round(r["bytes"], 4), "perplexity", round(r["perplexity"]/r["dense_perplexity"], 4), "x dense", flush=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")
