"""Logits in pieces: costs, divergences and gradients are those of whole logits, and large models get windows that fit."""
import copy
from unittest.mock import patch

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fips_nb.data.text import short_windows, tokens_at_once
from fips_nb.learn.distillation import Teacher, head_of
from fips_nb.round.costs import find_parts, measure_costs

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4)
WORDS = [torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def whole(*args, **kwargs): return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("tied", [False, True])
def test_costs(tied):
    model = llama(tied)
    want = measure_costs(model, WORDS, find_parts(model))
    with patch("fips_nb.round.costs.LARGE", 0), patch("fips_nb.round.costs.PIECE", 320*7), \
         patch("fips_nb.round.costs.precision", whole):
        got = measure_costs(model, WORDS, find_parts(model))
    assert got.keys() == want.keys()
    for k, c in want.items():
        torch.testing.assert_close(got[k].C, c.C, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(got[k].g, c.g, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_divergence_and_gradients(tied):
    model = llama(tied)
    student = copy.deepcopy(model)
    for p in student.parameters(): p.data.add_(.01*torch.randn_like(p))
    found = []
    for piece in (2**25, 320*7):
        with patch("fips_nb.learn.distillation.PIECE", piece), patch("fips_nb.learn.distillation.precision", whole):
            teacher = Teacher(model, WORDS, "kl")
            loss, _ = teacher.loss(student, 1)
            loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
        student.zero_grad()
    assert teacher.head is model.lm_head and teacher.kept[1].shape[-1] == 64 # states, not logits
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_a_head_with_something_behind_it_is_none():
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=.1)).eval()
    assert head_of(capped, WORDS[0]) is None and head_of(llama(), WORDS[0]) is not None
    assert head_of(llama().model, WORDS[0]) is None


def test_windows_of_a_large_model_are_shorter():
    model = llama()
    assert short_windows(model, 2048) == 2048
    with patch("fips_nb.data.text.WORK", 2**20):
        assert tokens_at_once(model) == 2**20//(4*2*sum(m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)))
        assert short_windows(model, 2048) == 512 and short_windows(model, 256) == 256
