"""GPTQ of llm-compressor, and int8 and int4 of torchao, on the language models of notebook 06.

    # in an environment of its own
    pip install llmcompressor==0.14.0.1 torchao==0.18.0 mslk-cuda==1.1.0
    MSLK_PYTHON_ONLY=1 python scripts/baselines_fixed.py stories260k --seeds 0 1 2

Each program makes its own safetensors file by its defaults, which is read back, and its weights are
measured in float32 as the coded models of this package are. Bits are those of the whole file for each
parameter. Both programs leave the embedding, which is the head as well, in 16 bits. GPTQ gets the
windows of calibration of notebook 06. It refuses groups that do not divide a layer's width: such
layers have one step per row here. torchao's int4 leaves them in 16 bits, without a word. No model has
layers that groups of 128 divide, but the last of each MLP of `demo-llm`. torchao takes the arithmetic
of int4 from mslk, whose kernels need a GPU and are not loaded. The rows go to
`results/06_fixed_rivals.json`.
"""
import argparse
import tempfile
import time
from pathlib import Path

import llmcompressor
import torch
import torchao
from baselines_llmcompressor import loader, subject
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import nn
from torchao.quantization import Int4Tensor, Int4WeightOnlyConfig, Int8Tensor, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from fips_nb.measure.records import record
from fips_nb.measure.perplexity import perplexity

GPTQ = [("gptq", bits, group) for bits in (8, 4, 3) for group in (32, 64)]
ENTRY = ["scripts/baselines_fixed:measure", "nbs/06_llm_experiments:Subject"]
TORCHAO = [("torchao", 8, None), ("torchao", 4, 32), ("torchao", 4, 64)]


def linears(model):
    "Linear layers but the head, by name."
    head = model.get_output_embeddings()
    return {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def gptq(model, bits, group, windows, folder):
    "Quantise `model` in place by GPTQ, and save it."
    model, step = model.half(), dict(num_bits=bits, type="int", symmetric=True)
    divided = [k for k, m in linears(model).items() if m.in_features % group == 0]
    others = [k for k in linears(model) if k not in divided]
    weights = dict(step, strategy="group", group_size=group)
    groups = dict(groups=dict(targets=divided, weights=weights))
    if others: groups["rows"] = dict(targets=others, weights=dict(step, strategy="channel"))
    oneshot(model=model, recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
            dataset=loader(windows), max_seq_length=windows.shape[1],
            num_calibration_samples=len(windows), pipeline="sequential")
    model.save_pretrained(folder, save_compressed=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain(weight):
    "A tensor of torchao in float32."
    if not isinstance(weight, Int4Tensor): return weight.dequantize(torch.float32)
    low, high = weight.qdata << 4 >> 4, weight.qdata >> 4  # two signed codes in a byte
    codes = torch.stack([low, high], -1).flatten(-2).float()
    step, zero = (t.t().float().repeat_interleave(weight.block_size[-1], 1)
                  for t in (weight.scale, weight.zero_point))
    return codes*step + zero


def by_torchao(model, bits, group, folder):
    "Save `model`, quantised by torchao through transformers, and read it back into float32."
    dtype = torch.bfloat16 if bits == 4 else torch.float16  # its kernels of int4 take bfloat16 alone
    how = Int4WeightOnlyConfig(group_size=group) if bits == 4 else Int8WeightOnlyConfig()
    with tempfile.TemporaryDirectory() as dense:
        model.to(dtype).save_pretrained(dense)
        net = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype,
                                                   quantization_config=TorchAoConfig(quant_type=how))
    net.save_pretrained(folder)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model, left = model.float(), 0
    with torch.no_grad():
        for k, p in made.named_parameters():
            quantised = isinstance(p, (Int4Tensor, Int8Tensor))
            left += k.removesuffix(".weight") in linears(model) and not quantised
            model.get_parameter(k).copy_(plain(p) if quantised else p.float())
    return model, left


def measure(shared, name, method, bits, group, seed):
    "The figures of one row; `shared` holds the dense model and the held-out text."
    own = subject(name, seed or 0)
    n = sum(p.numel() for p in own.model.parameters())
    embedding = 2*own.model.get_input_embeddings().weight.numel()
    start, left = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        if method == "gptq": net = gptq(own.model, bits, group, own.batches.windows, folder)
        else: net, left = by_torchao(own.model, bits, group, folder)
        took, file = time.perf_counter() - start, (Path(folder)/"model.safetensors").read_bytes()
        found = perplexity(net, None, shared.tokens, dense=shared.dense)
    by = dict(gptq=f"llm-compressor {llmcompressor.__version__}",
              torchao=f"torchao {torchao.__version__}")[method]
    return dict(bits=8*len(file)/n, bytes=len(file), header=8 + int.from_bytes(file[:8], "little"),
                embedding=embedding, parameters=n, left=left, **found, seconds=took, by=by)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=("stories260k", "demo-llm"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="draws of the windows of GPTQ")
    a = p.parse_args()
    shared = subject(a.model, 0)
    tasks = [(*how, None) for how in TORCHAO] + [(*how, s) for s in a.seeds for how in GPTQ]
    for method, bits, group, seed in tasks:
        key = dict(model=a.model, seed=seed, method=method, bits=bits, group=group)
        if method == "gptq": key |= dict(windows=shared.windows, length=shared.length)
        make = lambda: measure(shared, a.model, method, bits, group, seed)
        row = record("06_fixed_rivals", key, make, ENTRY, seed or 0)
        more = 100*(row["perplexity"]/row["dense_perplexity"] - 1)
        print(f"{key}: {row['bits']:.3f} bits, {more:.2f} % above dense", flush=True)


if __name__ == "__main__":
    main()
