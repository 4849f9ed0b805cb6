"""Train `demo-llm`, the small Llama shipped with fips_nb, on the sources of Python's standard library.

Every Python installation carries its corpus: the modules of the standard library without their tests, and the
documentation topics of `pydoc`. Every twentieth file (in sorted order) is held out. A byte-level BPE vocabulary is
trained on the rest, then a Llama with grouped-query attention and a tied head, from a fixed seed: Muon for the matrices of
the blocks, which learn faster that way and keep a flat spectrum, AdamW for the others, both with a linear decay.
What is written: the model in bfloat16 with its tokenizer as transformers reads them, `calib.txt` (from the training
files) and `eval.txt` (from the held-out files), and `made.json` (Python, sizes, losses).

The corpus is that of the Python that runs the script, so another version of Python gives another, equally good model.
`--extra` adds the Python sources below other folders, `--width` and its like change the model.
On one CPU core the demo takes about half an hour.
"""
import argparse
import hashlib
import json
import math
import platform
import random
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from train_demo_vit import Muon

SKIP = {'test', 'tests', 'idlelib', 'lib2to3', 'site-packages', '__pycache__', 'ensurepip'}


def sources(extra, limit):
    """Texts of the standard library, then of the folders `extra` until `limit` bytes, in sorted order."""
    lib = Path(sysconfig.get_path('stdlib'))
    paths = sorted(p for p in lib.rglob('*.py') if not SKIP & set(p.relative_to(lib).parts))
    more = sorted(p for root in extra for p in Path(root).rglob('*.py') if 500 < p.stat().st_size < 200_000)
    random.Random(0).shuffle(more)
    texts, total = [], 0
    for p in paths + more:
        try:
            text = p.read_text(encoding='utf-8').strip()
        except (UnicodeDecodeError, OSError):
            continue
        if not text or max(map(len, text.splitlines())) > 400:  # tables of data, minified code
            continue
        texts.append(text)
        total += len(text)
        if total > limit:
            break
    return texts


def split(texts):
    return [t for i, t in enumerate(texts) if i % 20], [t for i, t in enumerate(texts) if not i % 20]


def train_tokenizer(texts, vocab, window):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(texts[:4000], trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<|endoftext|>', eos_token='<|endoftext|>', model_max_length=window)


def encode(tok, texts):
    """All texts as one row of tokens, each followed by the end of text."""
    ids = [t for e in tok.backend_tokenizer.encode_batch(texts) for t in [*e.ids, 0]]
    return torch.tensor(ids, dtype=torch.int32)


@torch.no_grad()
def loss_on(model, ids, window, device):
    """Mean loss per token over non-overlapping windows."""
    total = n = 0
    for i in range(0, min(len(ids) - 1, 400_000), window):
        x = ids[None, i:i + window + 1].long().to(device)
        out = model(x[:, :-1]).logits.float()
        total += F.cross_entropy(out[0], x[0, 1:], reduction='sum').item()
        n += x.shape[1] - 1
    return total / n


def head_of(texts, size, seed):
    """Whole texts in random order, `size` characters at most."""
    texts = [t for t in texts if len(t) < size / 4]
    random.Random(seed).shuffle(texts)
    out = ''
    for t in texts:
        if len(out) + len(t) < size:
            out += t + '<|endoftext|>\n'
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True)
    p.add_argument('--width', type=int, default=192)
    p.add_argument('--mlp', type=int, default=512)
    p.add_argument('--depth', type=int, default=6)
    p.add_argument('--heads', type=int, default=6)
    p.add_argument('--kv-heads', type=int, default=2)
    p.add_argument('--vocab', type=int, default=1024)
    p.add_argument('--steps', type=int, default=1500)
    p.add_argument('--batch', type=int, default=16)
    p.add_argument('--window', type=int, default=256)
    p.add_argument('--lr', type=float, default=3e-3)
    p.add_argument('--muon-lr', type=float, default=.02)
    p.add_argument('--extra', nargs='*', default=[])
    p.add_argument('--limit', type=float, default=1e9, help='characters of corpus at most')
    p.add_argument('--text', type=int, default=120_000, help='characters of eval.txt; calib.txt has twice as many')
    a = p.parse_args()
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    start = time.time()
    texts = sources(a.extra, a.limit)
    train, held = split(texts)
    tok = train_tokenizer(train, a.vocab, a.window)
    ids, eval_ids = encode(tok, train), encode(tok, held)
    print(f'{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters, {len(ids) / 1e6:.2f} M tokens, {time.time() - start:.0f} s', flush=True)
    config = LlamaConfig(vocab_size=a.vocab, hidden_size=a.width, intermediate_size=a.mlp, num_hidden_layers=a.depth, num_attention_heads=a.heads,
                         num_key_value_heads=a.kv_heads, max_position_embeddings=a.window, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    model = LlamaForCausalLM(config).to(device)
    print(f'{model.num_parameters() / 1e6:.2f} M parameters', flush=True)
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and 'layers' in n]
    others = [w for n, w in model.named_parameters() if w.ndim == 1 or 'layers' not in n]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, lr=a.lr, betas=(.9, .95), weight_decay=0.)
    gen, data, losses = torch.Generator().manual_seed(0), ids.to(device), []
    span = torch.arange(a.window + 1, device=device)
    for t in range(a.steps):
        rate = min(1, (t + 1) / 100) * max(.02, min(1, 1.5 * (1 - t / a.steps)))
        for g in adam.param_groups:
            g['lr'] = a.lr * rate
        i = torch.randint(len(ids) - a.window - 1, (a.batch,), generator=gen).to(device)
        x = data[i[:, None] + span].long()
        with torch.autocast(device, torch.bfloat16):
            logits = model(x[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        muon.step(a.muon_lr * rate)
        adam.step()
        if t % 200 == 0 or t == a.steps - 1:
            losses.append(round(loss.item(), 4))
            print(f'step {t}, loss {loss.item():.3f}, {time.time() - start:.0f} s', flush=True)
    model.eval()
    model = model.to(torch.bfloat16)
    held_loss = loss_on(model, eval_ids, a.window, device)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    model.cpu().save_pretrained(out, max_shard_size='15MB')
    tok.save_pretrained(out)
    (out / 'calib.txt').write_text(head_of(train, 2 * a.text, 1), encoding='utf-8')
    (out / 'eval.txt').write_text(head_of(held, a.text, 2), encoding='utf-8')
    made = dict(python=platform.python_version(), torch=torch.__version__, device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
                files=len(texts), characters=sum(map(len, texts)), tokens=len(ids), corpus=hashlib.sha256('\0'.join(texts).encode()).hexdigest(),
                parameters=model.num_parameters(), steps=a.steps, batch=a.batch, window=a.window, losses=losses,
                heldout_loss=round(held_loss, 4), heldout_perplexity=round(math.exp(held_loss), 3), seconds=round(time.time() - start))
    (out / 'made.json').write_text(json.dumps(made, indent=1) + '\n')
    print(made)


if __name__ == '__main__':
    main()
