"""The command line on language models: a small Llama in a folder as transformers writes it."""
import json
from pathlib import Path

import pytest
import torch
import transformers as tf

import fips_nb
from fips_nb.data.models import in_transformers
from fips_nb.data.text import enough_windows
from fips_nb.round import code
from fips_nb.run import compress as run_compress
from fips_nb.run.reports import evaluate_text, info_text
from fips_nb.share import pipeline
from fips_nb.share.budgets import configure
from folders import TEXT, without_news

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = {"fips-als": ":levels=2", "fips-paper": ":block_steps=3", "svd": "", "basis-sharing": "", "aafm": "", "pruning": ":levels=2"}


@pytest.fixture
def made(home, fips, short):
    "A compressed Llama in `small`, and what was said of it."
    return fips.json(f"compress {home/'llama'} --out small --data {home/'text.txt'} --n 12 --epochs 1 --method fips-als:levels=3")


@pytest.fixture
def llama(home): return f"compress {home/'llama'} --data {home/'text.txt'} --n 8"


def same_bytes(*folders):
    "The weights in all folders are one file."
    first, *others = (Path(f, "model.safetensors").read_bytes() for f in folders)
    assert all(o == first for o in others)


# ---- factors ----

def test_compress_eval_info(home, made, fips):
    assert made["n"] == 12 and made["targets"] == "mlp" and abs(made["mlp_budget"] - .5) < .02
    data = f"--data {home/'text.txt'}"
    ev = fips.json(f"eval small {data} --dense {home/'llama'}")
    assert ev["window"] == 32 and ev["n_tokens"] > 500 and ev["perplexity"] > 1 and ev["bytes"] == made["bytes"]
    dense = fips.json(f"eval {home/'llama'} {data}")
    assert abs(dense["perplexity"] - ev["dense"]["perplexity"]) < 1e-6 and dense["n_tokens"] == ev["n_tokens"]
    status, text, err = fips(f"eval small {data}")
    assert (status, err) == (0, "") and f"{ev['perplexity']:.4f}" in text and f"{ev['n_tokens']:,} tokens" in text
    text = evaluate_text(ev)
    assert f"dense {home/'llama'}  " in text and f"{ev['dense']['dense_bytes_16']:,}" in text
    said = fips.json("info small")
    assert said["arch"] == "LlamaForCausalLM" and len(said["layers"]) == 9 and said["bytes"] == ev["bytes"]
    assert all(name in info_text(said) for name in ("gate_proj", "up_proj", "down_proj"))


def test_perplexity_is_that_of_a_loop_by_hand(home, made, fips):
    "Windows of 32 tokens that do not overlap, each of whose tokens but the first is predicted."
    model, tok = (c.from_pretrained("small") for c in (tf.AutoModelForCausalLM, tf.AutoTokenizer))
    ids = [i for d in TEXT for i in tok(d.strip())["input_ids"] + [tok.eos_token_id]][:-1]
    windows = [torch.tensor([ids[i:i + 32]]) for i in range(0, len(ids), 32)]
    with torch.no_grad(): losses = [(model(w, labels=w).loss.double(), w.numel() - 1) for w in windows if w.numel() > 1]
    ev = fips.json(f"eval small --data {home/'text.txt'}")
    assert ev["n_tokens"] == (n := sum(k for _, k in losses))
    assert ev["perplexity"] == pytest.approx(torch.exp(sum(loss*k for loss, k in losses)/n).item(), rel=1e-6)


def test_what_was_written_opens_with_transformers(home, made, fips):
    "And runs; exported, its weights are plain, and it computes the same."
    model, tok = (c.from_pretrained("small") for c in (tf.AutoModelForCausalLM, tf.AutoTokenizer))
    x = torch.tensor([tok(TEXT[0])["input_ids"][:16]])
    a, b = model(x).logits, tf.AutoModelForCausalLM.from_pretrained(home/"llama")(x).logits
    assert a.shape == b.shape and not torch.equal(a, b)
    assert model.generate(x, max_new_tokens=4, do_sample=False).shape == (1, 20)
    assert fips.json("export small --out dense")["bytes"] >= 4*3*3*32*80
    assert "quantization_config" not in json.loads(Path("dense/config.json").read_text())
    torch.testing.assert_close(a, tf.AutoModelForCausalLM.from_pretrained("dense")(x).logits, rtol=1e-4, atol=1e-4)
    assert fips(f"eval dense --data {home/'text.txt'}")[0] == 0  # the tokenizer came along


@pytest.mark.parametrize("share, targets", [(.8, "mlp"), (.7, "all")])
def test_a_share_of_the_parameters_is_met(fips, short, llama, monkeypatch, share, targets):
    "By a plan for each layer, which a dry run shows, and which Python makes too."
    monkeypatch.setattr(run_compress, "LEVELS", 2)
    line = f"{llama} --params {share} --method fips-als:targets={targets},levels=2 --epochs 0"
    plan = fips.json(f"{line} --dry-run")
    assert plan["plan"]["size"] <= plan["plan"]["budget"]*plan["plan"]["dense_size"] and not list(Path().iterdir())
    assert "pruning" in plan["plan"]["trials"] and len(plan["layers"]) == (9 if targets == "mlp" else 21)
    made = fips.json(f"{line} --out x")
    assert share - .02 < made["model_ratio"] <= share + 1e-6 and made["targets"] == targets
    assert made["plan"]["trials"] == plan["plan"]["trials"]
    how = line.split()
    fips_nb.compress(how[1], how[3], n=8, params=share, method=how[-3], epochs=0, out="y")
    same_bytes("x", "y")


def test_a_planned_run_resumes_with_its_plan(fips, short, llama, monkeypatch):
    monkeypatch.setattr(run_compress, "LEVELS", 2)
    line = f"{llama} --params {{}} --method fips-als:levels=2 --epochs 1 --out {{}}"
    assert fips(line.format(.8, "whole"))[0] == 0
    with monkeypatch.context() as m:
        m.setattr(pipeline, "distill_outputs", interrupt)
        status, _, err = fips(line.format(.8, "cut"))
    assert status == 130 and "--resume" in err and Path("cut.state/plan.json").exists()
    monkeypatch.setattr(run_compress, "make_plan", lambda *a, **k: 1/0)  # not planned again
    status, _, err = fips(line.format(.9, "cut") + " --resume")
    assert status == 2 and "budget differ" in err
    assert fips(line.format(.8, "cut") + " --resume")[0] == 0
    same_bytes("cut", "whole")
    assert not Path("cut.state").exists()


def interrupt(*a, **k): raise KeyboardInterrupt


# ---- codes ----

def test_bits(fips, short, llama, monkeypatch):
    "Rounded to a size, by bits; or by bytes, interrupted, and finished in Python: the same file, which transformers opens."
    monkeypatch.setattr("fips_nb.round.sizes.SPARE_BYTES", .02)
    made = fips.json(f"{llama} --bits 7 --epochs 1 --out coded")
    assert 6.85 < made["bits"] <= 7 and made["method"] == "rounding" and "factors" not in made and made["notes"] == []
    assert made["bytes"] == Path("coded/model.safetensors").stat().st_size
    nbytes, words = fips.json("info coded")["target_bytes"], llama.split()
    with monkeypatch.context() as m:
        m.setattr(code, "distill_codes", interrupt)
        status, _, err = fips(f"{llama} --bytes {nbytes} --epochs 1 --out cut")
    assert status == 130 and "--resume" in err and Path("cut.state/codes.safetensors").exists()
    fips_nb.compress(words[1], words[3], n=8, bytes=nbytes, epochs=1, out="cut", resume=True)
    same_bytes("coded", "cut")
    net = tf.AutoModelForCausalLM.from_pretrained("coded")
    said = fips.json("info coded --plot bits.png")
    assert said["bits"] == made["bits"] and Path("bits.png").stat().st_size > 10_000
    shapes = {la["name"]: la["shape"] for la in said["layers"]}
    assert shapes["model.layers.0.mlp.up_proj.weight"] == list(net.model.layers[0].mlp.up_proj.weight.shape)


@pytest.mark.parametrize("preset, few", FORMS.items())
def test_bits_of_factors(preset, few, fips, short, llama):
    "Codes of factors of every form (other presets differ in the metric): a file no larger than asked for, everything counted."
    status, out, err = fips(f"{llama} --method {preset}{few} --bits 7 --params .85 --epochs 0 --out m --json")
    assert status == 0 and f"by {preset}{few} to" in err and without_news(err) == "", err
    made, n = json.loads(out), 52_960
    size = Path("m/model.safetensors").stat().st_size
    assert 3 < 8*size/n <= 7 and made["bytes"] == size and made["bits"] == pytest.approx(8*size/n)
    said = fips.json("info m")
    assert said["preset"] == preset and said["bits"] == made["bits"] and said["model_params"] == n
    kept = {"budget", "mlp_budget", "mlp_params", "model_ratio", "config", "layers"}
    assert kept <= said["factors"].keys() and said["factors"]["config"]["distill_epochs"] == 0
    assert made["factors"]["model_ratio"] <= .85 + 1e-4
    assert {"name", "shape", "bits", "bytes", "zeros", "step"} == said["layers"][0].keys()
    assert {"name", "rank", "density", "error", "bytes"} <= said["factors"]["layers"][0].keys()
    text = info_text(said, every=True)
    assert "bits per weight" in text and "The factors before they were rounded" in text
    assert "model.layers.0.mlp.up_proj.V" in text and "  up  " in text
    names, net = {la["name"] for la in said["layers"]}, tf.AutoModelForCausalLM.from_pretrained("m")
    assert names == set(net.fips_codes) and {"U", "V"} >= {k[-1] for k in names if ".mlp." in k}


def test_options_of_coded_factors(fips, short, llama):
    settings = dict(targets="all", group_size=1, sparsity=.6, levels=3)
    method = "fips-als:" + ",".join(f"{k}={v}" for k, v in settings.items())
    status, text, err = fips(f"{llama} --method {method} --bits 8 --epochs 0 --out m")
    assert status == 0 and " 21 linears" in err and "no distillation" in err, err
    assert "compressed by fips-als" in text and "and rounded into m" in text and "of the MLPs and attentions" in text
    assert "Distillation took" not in text
    said = fips.json("info m")["factors"]
    assert {k: said["config"][k] for k in settings} == settings
    assert len(said["layers"]) == 21 and said["budget"] == .5


def test_coded_factors_resume(fips, short, llama, monkeypatch):
    "After an interruption in each stage, one after the other, nothing is made again, and the file is the same."
    line = f"{llama} --bits 7 --method fips-als:group_size=1,levels=2 --epochs 1 --out"
    assert fips(f"{line} whole")[0] == 0
    resume = ""
    for at in (pipeline, "fit_plan"), (code, "round_to_bytes"), (code, "distill_codes"):
        with monkeypatch.context() as m:
            m.setattr(*at, interrupt)
            status, _, err = fips(f"{line} cut{resume}")
        assert status == 130 and "--resume" in err, err
        resume = " --resume"
        status, _, err = fips(f"{line} cut --resume --seed 1")
        assert status == 2 and "differ" in err
    assert list(Path("cut.state/factors").glob("group-*.safetensors"))
    with monkeypatch.context() as m:
        for again in (pipeline, "fit_plan"), (code, "round_to_bytes"): m.setattr(*again, lambda *a, **k: 1/0)
        assert fips(f"{line} cut --resume")[0] == 0
    same_bytes("cut", "whole")
    assert not Path("cut.state").exists() and "is complete" in fips(f"{line} cut --resume")[2]


def test_an_old_state_of_stages_is_dropped_when_asked(fips, short, llama, monkeypatch):
    line = f"{llama} --bits 7 --epochs 1 --out m --method"
    with monkeypatch.context() as m:
        m.setattr(code, "distill_codes", interrupt)
        assert fips(f"{line} svd")[0] == 130 and Path("m.state/factors").is_dir()
        assert "holds an interrupted run" in fips(f"{line} rounding")[2]
        assert fips(f"{line} rounding --overwrite")[0] == 130
    assert not list(Path("m.state/factors").glob("*.safetensors"))
    assert fips(f"{line} rounding --resume")[0] == 0
    assert [p.name for p in Path().iterdir()] == ["m"]


# ---- what can be computed, and what a name is ----

def test_a_large_model_is_given_what_can_be_computed():
    "The modules below decide it, so Python and the command line agree."
    shape = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                 num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"): big = tf.LlamaForCausalLM(tf.LlamaConfig(**shape))
    n = enough_windows(big, 2048)
    assert 8 <= n < 32 and n*2048 > 16_000  # a CPU has hours, not days
    assert enough_windows(big, 2048, "cuda") == 128
    cfg = configure()
    with pytest.warns(UserWarning, match="who asks for 3 by number gets them"):
        left, notes = pipeline.limit_distillation(big, cfg, n*2048, "cpu")
    assert cfg.distill_epochs == 3 and left.distill_epochs == 0 and len(notes) == 1
    assert pipeline.limit_distillation(big, cfg, n*2048, "cuda") == (cfg, [])


def test_distillation_that_is_left_out_is_said(fips, short, llama, monkeypatch):
    monkeypatch.setattr("fips_nb.share.forecast.can_distill", lambda *a: False)
    status, out, err = fips(f"{llama} --method fips-als:levels=2 --out x")
    lines = err.splitlines()
    assert status == 0 and "Note: distillation is left out" in out
    assert len(lines) == 2 and "no distillation" in lines[0]
    assert lines[1].startswith("fips: warning: distillation is left out") and "who asks for 3 by number gets them" in lines[1]
    status, out, err = fips(f"{llama} --method fips-als:levels=2 --out y --epochs 1")
    assert status == 0 and "1 epoch of distillation;" in err and "left out" not in out + err


def test_encoder(home, fips, short):
    fips.json(f"compress {home/'bert'} --out x --data {home/'text.txt'} --n 8 --epochs 1 --method fips-als:levels=2")
    ev = fips.json(f"eval x --data {home/'text.txt'} --dense {home/'bert'}")
    assert .5 < ev["cosine"] <= 1 and ev["n"] == len(TEXT)
    assert f"cosine similarity to the dense outputs is {ev['cosine']:.4f}" in " ".join(evaluate_text(ev).split())


def test_which_library(home):
    for name in ("demo-llm", str(home/"llama"), "meta-llama/Llama-3.2-1B"): assert in_transformers(name)
    for name in ("demo-vit", "vit_tiny_patch16_224", str(home/"nowhere")): assert not in_transformers(name)
