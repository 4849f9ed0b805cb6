"""Models of transformers as folders: round trips, ways of opening them, and what is refused."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import put_codes
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers import BertConfig, BertForMaskedLM, Gemma2Config, Gemma2ForCausalLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from fips_nb.store import conversions, hub, transformers_folders
from fips_nb.store import codes
from fips_nb.store.codes import dense_bytes, file_parts, folder_bytes, shard_files
from fips_nb.store.values import layer_groups, narrow, outside, round_rest
from fips_nb.store.format import read_config
from fips_nb.grouping import Group, LinearSpec, stored_weight
from fips_nb.share.report import Compressed, size_report
from fips_nb.share.pipeline import compress
from fips_nb.sparse_factors import factor_layers, factorize, to_dense, topk_mask
from fips_nb.svd_init import orient
from fips_nb.store.lora import lora_config
from fips_nb.store.plain import save_dense
from fips_nb.store.shards import checksum, pack_layers
from fips_nb.store.transformers_folders import attach

ROOT = Path(__file__).resolve().parents[1]
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.usefixtures("one_thread", "timed_once"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning",
                               "ignore:Attempting to save a model with offloaded modules")]

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)
OPT = dict(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
           max_position_embeddings=64, word_embed_proj_dim=32)
BERT = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64)
TIED = dict(tie_word_embeddings=True, mlp_bias=True)
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **TIED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
}
ROLES = {"gate_proj": "up", "up_proj": "up", "gate_up_proj": "up", "down_proj": "down",
         "c_fc": "up", "fc1": "up", "fc2": "down", "mlp.c_proj": "down",
         "intermediate.dense": "up", "output.dense": "down"}
TOKENS = torch.arange(24).view(2, 12)*7 % 96


def mlp_linears(model, d=32):
    "The MLP linears of a small model by name, with the roles of their oriented weights."
    for n, m in model.named_modules():
        role = next((r for k, r in ROLES.items() if n.endswith("." + k)), None)
        if role and "attention" not in n:
            out, in_ = stored_weight(m).shape
            yield LinearSpec(n, role, d, out if role == "up" else in_)


def oriented(model, l):
    "The weight (d, h) of the linear `l`."
    return orient(stored_weight(model.get_submodule(l.name)).detach().float(), l.role)


def factored(model, density=.25, basis=True, runs=1, rounded=True):
    """Factorise `model` in place: orthogonal bases of full rank, the projections pruned to
    `density` and rounded to 16 bits. Unless `rounded` is false, the rest is rounded as well, so
    that round trips are exact."""
    ls = list(mlp_linears(model))
    half = lambda t: t if t is None or density == 1 else t.half().float()
    for i in range(runs):
        part = ls[i*len(ls)//runs:(i+1)*len(ls)//runs]
        Ws = [oriented(model, l) for l in part]
        U = torch.linalg.qr(torch.randn(32, 32)).Q if basis else None
        Vs = [W if U is None else U.T@W for W in Ws]
        Vs = [half(V*topk_mask(V.abs(), density)) for V in Vs]
        factorize(model, Group("mlp", tuple(part)), half(U), Vs)
    return (round_rest(model) if rounded else model).eval()


def made(name, **kw):
    torch.manual_seed(0)
    return factored(BUILD[name](), **kw)


def cast(model, dtype):
    "`model` with its parameters in `dtype`; `to` would cast rotary tables as well."
    for p in model.parameters(): p.data = p.data.to(dtype)
    return model


@torch.no_grad()
def logits(model): return model.eval()(TOKENS).logits


def shared(model):
    "Which factor layers of `model` share their basis."
    layers = factor_layers(model).values()
    return [[f.U is g.U for g in layers] for f in layers]


def same(a, b):
    "Assert that two models hold the same bits in the same layout, and give the same outputs."
    sa, sb = a.state_dict(), b.state_dict()
    assert sa.keys() == sb.keys()
    for k in sa:
        assert sa[k].dtype == sb[k].dtype and sa[k].stride() == sb[k].stride(), k
        assert torch.equal(sa[k], sb[k]), k
    assert len(list(a.parameters())) == len(list(b.parameters())) # shared ones count once
    assert shared(a) == shared(b) and len(factor_layers(a)) > 0
    assert torch.equal(logits(a), logits(b))


def python(code, path=()):
    "Run `code` in a fresh interpreter."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *path]), OMP_NUM_THREADS="1")
    res = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout


@pytest.fixture
def model(): return made("llama", runs=2)


@pytest.fixture
def folder(model, tmp_path): return hub.save(model, tmp_path/"m", report=dict(preset="fips-als"))


# ---- round trips ----

@pytest.mark.parametrize("name", BUILD)
def test_architectures(name, tmp_path):
    torch.manual_seed(0)
    dense = BUILD[name]().eval()
    full = factored(copy.deepcopy(dense), density=1, rounded=False)
    torch.testing.assert_close(logits(full), logits(dense), rtol=1e-3, atol=1e-4)
    same(full, hub.load(hub.save(full, tmp_path/"full", rest="keep")))
    m = made(name)
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    back = auto.from_pretrained(hub.save(m, tmp_path/"m"))
    same(m, back)
    back.save_pretrained(tmp_path/"again", max_shard_size="10KB")
    assert len(shard_files(tmp_path/"again")) > 2
    same(m, hub.load(tmp_path/"again"))
    plain = auto.from_pretrained(save_dense(back, tmp_path/"dense"))
    same(m, back) # left as it was
    shapes = [{k: t.shape for k, t in o.state_dict().items()} for o in (plain, dense)]
    assert not factor_layers(plain) and shapes[0] == shapes[1]
    torch.testing.assert_close(logits(plain), logits(m), rtol=1e-5, atol=1e-6)
    kind = type(plain.get_submodule(next(iter(factor_layers(m)))))
    assert kind is (Conv1D if name == "gpt2" else nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_16_bit_models(name, dtype, tmp_path):
    m = cast(made(name), dtype)
    hub.save(m, tmp_path/"m")
    same(m, AutoModelForCausalLM.from_pretrained(tmp_path/"m"))
    config = read_config(tmp_path/"m")
    assert {g["values"] for g in config["groups"]} == {str(dtype)[6:]} and config["rest"] == "keep"
    wide = AutoModelForCausalLM.from_pretrained(tmp_path/"m", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    same(cast(m, torch.float32), wide)
    plain = AutoModelForCausalLM.from_pretrained(save_dense(tmp_path/"m", tmp_path/"d"))
    assert plain.dtype == dtype
    torch.testing.assert_close(logits(plain), logits(cast(m, dtype)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kw", [dict(basis=False), dict(density=.02), dict(density=.97),
                                dict(runs=3)])
def test_kinds_of_factors(kw, tmp_path):
    m = made("llama", **kw)
    back = hub.load(hub.save(m, tmp_path/"m"))
    same(m, back)
    parts = file_parts(tmp_path/"m")
    assert sum(parts.values()) == folder_bytes(tmp_path/"m")
    assert (parts["U"] == 0) == (kw.get("basis") is False)


def kept_by_columns(model, folder):
    "Factors that lie in memory by columns come back as they were."
    f = next(iter(factor_layers(model).values()))
    U = nn.Parameter(f.U.detach().T.contiguous().T)
    for g in factor_layers(model).values():
        if g.U is f.U and g is not f: g.U = U
    f.U, f.V = U, nn.Parameter(f.V.detach().T.contiguous().T)
    same(model, hub.load(hub.save(model, folder)))


def test_memory_order_of_factors_is_kept(model, tmp_path):
    kept_by_columns(model, tmp_path/"m")


def test_biases_that_came(model, tmp_path):
    "Some presets add biases; the factors keep them, a plain checkpoint would lose them."
    name, f = next(iter(factor_layers(model).items()))
    f.bias = nn.Parameter(torch.randn(f.out_features).half().float())
    same(model, AutoModelForCausalLM.from_pretrained(hub.save(model, tmp_path/"m")))
    with pytest.raises(ValueError, match=f"{name}.bias has no place in a plain Llama"):
        save_dense(model, tmp_path/"d")
    assert not (tmp_path/"d").exists() and factor_layers(model) and model.hf_quantizer is not None
    rewrite(tmp_path/"m/model.safetensors", lambda t: t.pop(f"{name}.bias"))
    refused(tmp_path/"m", f"{name}.bias is missing")


def test_size(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | dict(hidden_size=512, intermediate_size=1376, num_attention_heads=8)
    m = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    dense = dense_bytes(m)
    ls = tuple(mlp_linears(m, 512))
    Vs = [torch.randn(256, l.h)*(torch.rand(256, l.h) < .25) for l in ls]
    factorize(m, Group("mlp", ls), torch.randn(512, 256), Vs)
    hub.save(m, tmp_path/"m")
    said = size_report(m)["mlp_bytes"] + file_parts(tmp_path/"m")["rest"]
    assert dense_bytes(m) == dense and said < folder_bytes(tmp_path/"m") < 1.01*said


def test_tied_weights_are_stored_once(tmp_path):
    hub.save(made("llama-tied"), tmp_path/"m")
    names = load_file(tmp_path/"m/model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    back = hub.load(tmp_path/"m")
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_report_and_tokenizer(model, tmp_path):
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    model.generation_config.temperature, model.generation_config.do_sample = .7, True
    report = dict(preset="svd", where=Path("x"))
    hub.save(Compressed(model, report), tmp_path/"m", tokenizer=tok)
    assert read_config(tmp_path/"m")["report"] == dict(preset="svd", where="x")
    back = hub.load(tmp_path/"m")
    assert back.generation_config.temperature == .7 and not back.training
    assert back.fips_config["arch"] == "LlamaForCausalLM"
    back.save_pretrained(tmp_path/"n") # the report goes on with the model
    assert read_config(tmp_path/"n")["report"] == dict(preset="svd", where="x")
    hub.export(tmp_path/"m", tmp_path/"d")
    for k in "md":
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path/k)("b", return_tensors="pt")
        assert ids["input_ids"].tolist() == [[1]]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/"d")
    assert plain.generation_config.temperature == .7
    hub.save(model, tmp_path/"m", overwrite=True, tokenizer=tok) # tokenizer files are ours
    save_dense(model, tmp_path/"e", tokenizer=tok)
    assert (tmp_path/"e/tokenizer.json").exists()


def values(folder): return {g["values"] for g in read_config(folder)["groups"]}


def test_value_dtypes(model, tmp_path):
    f = next(iter(factor_layers(model).values()))
    assert values(hub.save(model, tmp_path/"a")) == {"float16"}
    assert values(hub.save(model, tmp_path/"b", dtype=torch.float32)) == {"float32"}
    f.V.data.mul_(torch.pi)
    assert values(hub.save(model, tmp_path/"c")) == {"float32"}
    same(model, hub.load(tmp_path/"c"))
    f.V.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="gate_proj holds values that are not finite"):
        hub.save(model, tmp_path/"d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


# ---- what is outside the factors ----

@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_the_rest_is_rounded_to_16_bits_once(name, tmp_path):
    m = made(name, rounded=False)
    hub.save(m, tmp_path/"a")
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    back = auto.from_pretrained(tmp_path/"a", dtype="auto")
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert json.loads((tmp_path/"a/config.json").read_text())["dtype"] == "float32"
    stored = load_file(tmp_path/"a/model.safetensors")
    rest = outside(m.state_dict(), factor_layers(m))
    for k, t in rest.items():
        assert torch.equal(back.state_dict()[k], narrow(t).to(t.dtype)), k
        assert k not in stored or stored[k].dtype.itemsize == 2 or not t.is_floating_point(), k
    config = read_config(tmp_path/"a")
    assert config["rest"] == "16bit" and 0 < config["report"]["rest_error"] < 2**-11
    back.save_pretrained(tmp_path/"b")
    same(back, hub.load(tmp_path/"b"))
    assert (tmp_path/"b/config.json").read_text() == (tmp_path/"a/config.json").read_text()
    again = load_file(tmp_path/"b/model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(t, again[k]) and t.dtype == again[k].dtype for k, t in stored.items())
    same(round_rest(m), back)


def test_the_rest_is_kept_on_request(tmp_path):
    m = made("llama", rounded=False)
    hub.save(m, tmp_path/"a", rest="keep")
    back = AutoModelForCausalLM.from_pretrained(tmp_path/"a")
    same(m, back)
    back.save_pretrained(tmp_path/"b")
    same(m, hub.load(tmp_path/"b")) # what was kept is kept
    attach(back).save_pretrained(tmp_path/"c")
    same(round_rest(m), hub.load(tmp_path/"c"))
    assert file_parts(tmp_path/"a")["rest"] == 2*file_parts(tmp_path/"c")["rest"]
    with pytest.raises(ValueError, match="rest '8bit' is not one of"):
        hub.save(m, tmp_path/"d", rest="8bit")


# ---- coded factors ----

MAP = {k: "cpu" for k in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm",
                          "model.rotary_emb", "lm_head")}


def coded(name, **kw): return round_rest(put_codes(made(name, **kw)))


def tensors(folder): return {k: t for p in shard_files(folder) for k, t in load_file(p).items()}


@pytest.fixture
def coded_folder(tmp_path): return hub.save(coded("llama", runs=2), tmp_path/"m", report=dict(preset="fips-als"))


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("kw", [dict(), dict(basis=False), dict(runs=2)], ids=str)
def test_coded_factors(name, kw, tmp_path):
    m = coded(name, **kw)
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    back = auto.from_pretrained(hub.save(m, tmp_path/"m"))
    same(m, back)
    assert back.fips_codes.keys() == m.fips_codes.keys()
    assert all(torch.equal(data, back.fips_codes[k]) for k, data in m.fips_codes.items())
    config, parts = read_config(tmp_path/"m"), file_parts(tmp_path/"m")
    assert {l["codec"] for g in config["groups"] for l in g["linears"]} == {"coded"}
    assert sum(parts.values()) == folder_bytes(tmp_path/"m") and parts["U"] == parts["V"] == parts["mask"] == 0
    back.save_pretrained(tmp_path/"again")
    assert (tmp_path/"m/config.json").read_text() == (tmp_path/"again/config.json").read_text()
    old, new = tensors(tmp_path/"m"), tensors(tmp_path/"again")
    assert old.keys() == new.keys() and all(torch.equal(t, new[k]) for k, t in old.items())
    back.save_pretrained(tmp_path/"shards", max_shard_size="1KB")
    assert len(shard_files(tmp_path/"shards")) > 2
    same(m, hub.load(tmp_path/"shards"))
    plain = auto.from_pretrained(save_dense(tmp_path/"m", tmp_path/"dense"))
    torch.testing.assert_close(logits(plain), logits(m), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_coded_factors_in_other_dtypes(name, dtype, tmp_path):
    wide = coded(name)
    hub.save(wide, tmp_path/"m")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path/"m", dtype=dtype)
    for f, g in zip(factor_layers(narrow).values(), factor_layers(wide).values(), strict=True):
        assert torch.equal(f.V, g.V.to(dtype)) and torch.equal(f.U, g.U.to(dtype))
    narrow.save_pretrained(tmp_path/"n")
    same(narrow, hub.load(tmp_path/"n"))
    codecs = {l["codec"] for g in read_config(tmp_path/"n")["groups"] for l in g["linears"]}
    assert codecs == {"coded"}
    m = put_codes(cast(made(name), dtype))
    same(m, hub.load(hub.save(m, tmp_path/"o")))


def test_zeros_that_a_narrower_dtype_makes(tmp_path):
    m = round_rest(put_codes(made("llama"), -180)) # steps of 2^-45 are nothing in float16
    with torch.no_grad():
        for f in factor_layers(m).values(): assert (f.V != 0).any() and not f.V.half().any()
    back = AutoModelForCausalLM.from_pretrained(hub.save(m, tmp_path/"m"), dtype=torch.float16)
    assert not any(f.V.any() for f in factor_layers(back).values())


def test_memory_order_of_coded_factors_is_kept(tmp_path):
    model = coded("llama", runs=2)
    kept_by_columns(model, tmp_path/"m")


def test_other_heads_of_coded_factors(coded_folder):
    model = hub.load(coded_folder)
    trunk = AutoModel.from_pretrained(coded_folder)
    with torch.no_grad():
        want, got = (o(TOKENS).last_hidden_state for o in (model.model, trunk))
    assert torch.equal(got, want) and len(trunk.fips_codes) == len(model.fips_codes) - 1
    judge = AutoModelForSequenceClassification.from_pretrained(coded_folder, num_labels=3, pad_token_id=0)
    assert torch.equal(judge.model.layers[1].mlp.up_proj.V, model.model.layers[1].mlp.up_proj.V)


@pytest.mark.parametrize("kw", [dict(device_map="auto"), dict(device_map=MAP), dict(dtype="auto")], ids=str)
def test_ways_of_loading_coded_factors(kw, coded_folder):
    same(hub.load(coded_folder), AutoModelForCausalLM.from_pretrained(coded_folder, **kw))


def test_coded_layers_on_the_disk(tmp_path):
    m = coded("llama")
    hub.save(m, tmp_path/"m")
    places = MAP | {"model.layers.1": "disk"}
    how = dict(device_map=places, offload_folder=tmp_path/"away")
    back = AutoModelForCausalLM.from_pretrained(tmp_path/"m", **how)
    assert torch.equal(logits(back), logits(m))
    back.save_pretrained(tmp_path/"n")
    config = read_config(tmp_path/"n")
    assert len(config["groups"]) == 1 and config["coded"] == read_config(tmp_path/"m")["coded"]
    same(m, hub.load(tmp_path/"n"))


@pytest.mark.parametrize("last", ["gate_proj.U", "up_proj.V"])
def test_a_group_that_has_changed_is_stored_in_16_bits(last, coded_folder, tmp_path):
    m, name = hub.load(coded_folder), f"model.layers.0.mlp.{last}"
    n = len(m.fips_codes)
    with torch.no_grad(): m.get_parameter(name)[0, 0] += 1e-3
    with pytest.warns(UserWarning, match=f"1 of {n} .* such as {name}"): m.save_pretrained(tmp_path/"n")
    config = read_config(tmp_path/"n")
    kinds = [{l["codec"] == "coded" for l in g["linears"]} for g in config["groups"]]
    assert kinds == [{False}, {True}] and len(config["coded"]) == n - 4
    assert [g["values"] for g in config["groups"]][0] == "float16"
    back = hub.load(tmp_path/"n")
    for k, p in m.named_parameters():
        if "0.mlp" not in k: assert torch.equal(p, back.get_parameter(k)), k
        else: torch.testing.assert_close(p, back.get_parameter(k), rtol=1e-3, atol=1e-6)
    back.save_pretrained(tmp_path/"o")
    same(back, hub.load(tmp_path/"o"))


# ---- as any model of transformers ----

def test_other_heads(model, folder):
    trunk = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        want, got = (o(TOKENS).last_hidden_state for o in (model.model, trunk))
    assert torch.equal(got, want)
    how = dict(num_labels=3, pad_token_id=0)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, **how)
    up = [o.model.layers[1].mlp.up_proj.V for o in (judge, model)]
    assert judge(TOKENS).logits.shape == (2, 3) and torch.equal(*up)


def test_a_bare_model_gets_a_head(tmp_path):
    m = made("gpt2").transformer
    hub.save(m, tmp_path/"m")
    assert type(hub.load(tmp_path/"m")).__name__ == "GPT2Model"
    back = AutoModelForCausalLM.from_pretrained(tmp_path/"m").transformer
    with torch.no_grad(): want, got = (o(TOKENS).last_hidden_state for o in (m, back))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kw", [
    dict(device_map="cpu"), dict(device_map="auto"), dict(device_map={"": "cpu"}),
    dict(low_cpu_mem_usage=True), dict(dtype="auto"), dict(dtype="float32"), dict(device_map=MAP)])
def test_ways_of_loading(kw, tmp_path):
    m = made("llama")
    same(m, AutoModelForCausalLM.from_pretrained(hub.save(m, tmp_path/"m"), **kw))


def test_one_basis_on_each_device():
    m = made("llama")
    packed, records = pack_layers(layer_groups(m), torch.float32)
    q = transformers_folders.FipsQuantizer(transformers_folders.FipsConfig(records))
    q.validate_environment(device_map={"model.layers.0": "cpu", "model.layers.1": "meta",
                                       "": "cpu"})
    with torch.device("meta"): blank = LlamaForCausalLM(m.config)
    q.linears, q.bases = conversions.replace_layers(blank, records)
    first = next(iter(q.bases))
    stored, name = {"U": [packed[f"{first}.fips.U"]]}, f"{first}.U"
    bases = conversions.ShareU(q).convert(stored, full_layer_name=name, model=blank)
    assert len(bases) == 6 and len({id(p) for p in bases.values()}) == 2
    devices = {k.split(".")[2]: p.device.type for k, p in bases.items()}
    assert devices == {"0": "cpu", "1": "meta"}
    size = lambda n: q.param_element_size(blank, n, blank.get_parameter(n))
    assert size(name) == 4 and size("model.layers.1.mlp.up_proj.U") == 0
    assert size("model.layers.1.mlp.up_proj.V") == 4


def test_layers_on_the_disk(tmp_path):
    m = made("llama")
    hub.save(m, tmp_path/"m")
    places = MAP | {"model.layers.1": "disk"}
    how = dict(device_map=places, offload_folder=tmp_path/"away")
    back = AutoModelForCausalLM.from_pretrained(tmp_path/"m", **how)
    assert next(back.model.layers[1].parameters()).device.type == "meta"
    assert torch.equal(logits(back), logits(m))
    repr(back)
    with pytest.raises(ValueError, match="laid away by accelerate"):
        save_dense(back, tmp_path/"d")
    back.save_pretrained(tmp_path/"n")
    assert len(read_config(tmp_path/"n")["groups"]) == 1 # copies of one basis
    same(m, hub.load(tmp_path/"n"))


def test_generate(model, folder):
    back = AutoModelForCausalLM.from_pretrained(folder)
    kw = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = model.generate(TOKENS, **kw)
    assert torch.equal(back.generate(TOKENS, **kw), want)
    assert torch.equal(back.generate(TOKENS, use_cache=False, **kw), want)


def test_compile(model, folder):
    back = AutoModelForCausalLM.from_pretrained(folder)
    fast = torch.compile(back, backend="aot_eager")
    with torch.no_grad(): torch.testing.assert_close(fast(TOKENS).logits, logits(model))
    up = back.model.layers[0].mlp.up_proj
    up.V.data = 2*up.V # a kept product must notice
    with torch.no_grad(): torch.testing.assert_close(fast(TOKENS).logits, logits(back))


def test_compile_into_one_graph(tmp_path):
    "Where the layer multiplies through the rank."
    torch.manual_seed(0)
    m = BUILD["llama"]().eval()
    ls = tuple(mlp_linears(m))
    Vs = [torch.randn(8, l.h).half().float()*.125 for l in ls]
    factorize(m, Group("mlp", ls), torch.randn(32, 8).half().float(), Vs)
    back = hub.load(hub.save(round_rest(m), tmp_path/"m"))
    fast = torch.compile(back, backend="aot_eager", fullgraph=True)
    with torch.no_grad(): torch.testing.assert_close(fast(TOKENS).logits, logits(m))


def test_casts_and_training(folder):
    m = AutoModelForCausalLM.from_pretrained(folder)
    assert m.half().dtype == torch.float16 and m.float().dtype == torch.float32
    transformers.trainer_utils.validate_quantization_for_training(m)
    a, b = m.model.layers[0].mlp.up_proj, m.model.layers[0].mlp.down_proj
    assert a.U is b.U
    opt = torch.optim.SGD(m.parameters(), lr=.1)
    before, old = m(TOKENS, labels=TOKENS).loss, a.U.detach().clone()
    before.backward()
    opt.step()
    assert m(TOKENS, labels=TOKENS).loss < before
    assert not torch.equal(a.U, old) and a.U is b.U


@pytest.mark.parametrize("make,dtype", [
    (to_dense, torch.float32), (lambda m: m.dequantize(), torch.float32),
    (lambda m: m.dequantize(torch.bfloat16), torch.bfloat16)])
def test_what_was_multiplied_out_is_plain(make, dtype, folder, tmp_path):
    m = make(AutoModelForCausalLM.from_pretrained(folder))
    assert not factor_layers(m) and m.dtype == dtype
    m.save_pretrained(tmp_path/"d")
    assert "quantization_config" not in json.loads((tmp_path/"d/config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"d")), logits(m))


def test_push_to_hub(model, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, repo_id, **kw):
            return type("Repo", (), dict(repo_id="me/" + repo_id))()

        def __getattr__(self, name): return lambda *args, **kw: sent.setdefault(name, (args, kw))

    def upload(self, working_dir, repo_id, *args, **kw): sent[repo_id] = hub.load(working_dir)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", Api)
    monkeypatch.setattr(transformers.modeling_utils, "hf_api", Api)
    card = type("Card", (), dict(save=lambda self, path: None))()
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *a, **kw: card)
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    attach(model).push_to_hub("small")
    same(model, sent["me/small"])


BY_LOADING = """
import fips_nb.store.hub
assert 'transformers' not in sys.modules
fips_nb.store.hub.load(folder + '/m')
from transformers import AutoModelForCausalLM
"""
AFTER = """
from transformers import AutoModelForCausalLM
torch.testing.assert_close(outputs('d'), want, rtol=1e-5, atol=1e-6)
try: outputs('m')
except RuntimeError as e: assert 'ignore_mismatched_sizes' in str(e), e
else: raise AssertionError('random MLPs')
assert 'fips_nb' not in sys.modules
import fips_nb
"""


@pytest.mark.parametrize("first", [BY_LOADING, AFTER], ids=["by loading", "after transformers"])
def test_order_of_imports(first, folder, model, tmp_path):
    """One import registers the format, before transformers or after; the dense folder needs none.

    Transformers alone makes up no model, and the configuration says what is missing."""
    save_dense(folder, tmp_path/"d")
    torch.save(logits(model), tmp_path/"want.pt")
    python(f"""
import sys, torch
torch.set_num_threads(1)
folder = {str(tmp_path)!r}
want = torch.load(folder + '/want.pt')
def outputs(k):
    tokens = torch.arange(24).view(2, 12)*7 % 96
    return AutoModelForCausalLM.from_pretrained(folder + '/' + k)(tokens).logits
{first}
assert torch.equal(outputs('m'), want)
assert not any('fips' in type(f).__module__ for f in sys.meta_path)""")
    q = json.loads((folder/"config.json").read_text())["quantization_config"]
    assert "pip install fips_nb" in q["note"]


@pytest.mark.skipif("FIPS_NB_DATA" not in os.environ, reason="FIPS_NB_DATA names no folder of data")
def test_a_trained_model(tmp_path):
    path = Path(os.environ["FIPS_NB_DATA"])/"stories260k"
    m = AutoModelForCausalLM.from_pretrained(path)
    tok = transformers.AutoTokenizer.from_pretrained(path)
    ids = tok("Once upon a time there was a little girl", return_tensors="pt")["input_ids"]
    with torch.no_grad(): want = m(ids).logits
    d = m.config.hidden_size
    ls = tuple(mlp_linears(m, d))
    U = torch.linalg.qr(torch.randn(d, d)).Q
    factorize(m, Group("mlp", ls), U, [U.T@oriented(m, l) for l in ls])
    hub.save(m, tmp_path/"m", tokenizer=tok, rest="keep")
    back = hub.load(tmp_path/"m")
    half = hub.load(hub.save(m, tmp_path/"half", tokenizer=tok))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, m(ids).logits)
        torch.testing.assert_close(back(ids).logits, want, rtol=1e-3, atol=1e-3)
        change = half(ids).logits - want
    assert 0 < change.norm() < 2e-3*want.norm()
    kw = dict(max_new_tokens=20, do_sample=False)
    plain = AutoModelForCausalLM.from_pretrained(save_dense(tmp_path/"m", tmp_path/"d"))
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path/"d")
    texts = [tok.decode(x.generate(ids, **kw)[0]) for x in (m, back, plain, half)]
    assert len(set(texts)) == 1 and "little girl" in texts[0]


# ---- what is refused when saving ----

def test_refused_models(model, tmp_path):
    m = tmp_path/"m"
    with pytest.raises(ValueError, match="compress it first"): hub.save(BUILD["llama"](), m)
    with pytest.raises(ValueError, match="compress it first"): attach(BUILD["llama"]())
    with pytest.raises(ValueError, match="arch means nothing for a LlamaForCausalLM"):
        hub.save(model, m, arch="llama")
    with pytest.raises(ValueError, match="tokenizer means nothing for a Linear"):
        hub.save(nn.Linear(2, 2), m, tokenizer=object())
    with pytest.raises(ValueError, match="no model of transformers"):
        save_dense(nn.Linear(2, 2), m)
    other = copy.deepcopy(model)
    gptq = type("C", (), dict(quant_method="gptq"))()
    other.hf_quantizer = type("Q", (), dict(quantization_config=gptq))()
    with pytest.raises(ValueError, match="quantised by gptq"): attach(other)
    d, ours = save_dense(model, tmp_path/"d"), transformers_folders.FipsConfig()
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(d, quantization_config=ours)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_targets_that_are_not_ours_are_left_alone(model, folder, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"): hub.save(model, folder)
    hub.save(model, folder, overwrite=True, max_shard_size="20KB")
    hub.save(model, folder, overwrite=True) # from shards to one file
    assert len(shard_files(folder)) == 1 and not (folder/"model.safetensors.index.json").exists()
    (folder/"thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis.tex"):
        hub.save(model, folder, overwrite=True)
    save_dense(model, tmp_path/"d")
    with pytest.raises(FileExistsError, match="left alone"):
        hub.save(model, tmp_path/"d", overwrite=True)
    with pytest.raises(FileExistsError, match="exists"): save_dense(model, tmp_path/"d")
    assert (folder/"thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "m"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(error, model, folder, monkeypatch):
    old = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args, **kw): raise error
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    for target, kw in ((folder, dict(overwrite=True)), (folder.parent/"fresh", {})):
        with pytest.raises(type(error)): hub.save(model, target, **kw)
    with pytest.raises(type(error)): save_dense(model, folder.parent/"fresh")
    monkeypatch.undo()
    assert [p.name for p in folder.parent.iterdir()] == ["m"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    same(model, hub.load(folder))


# ---- what is refused when loading ----

def sharded(model, tmp_path):
    hub.save(model, tmp_path/"s", max_shard_size="20KB")
    return tmp_path/"s", shard_files(tmp_path/"s")


def refused(folder, match, error=ValueError):
    "Both ways of opening say the same."
    for way in (hub.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(error, match=match): way(folder)


def rewrite(path, change):
    "Change the tensors of one shard and let its checksums agree."
    with safe_open(path, "pt") as f: meta = f.metadata()
    old = load_file(path)
    ts = dict(old)
    change(ts)
    sums = {k: v for k, v in json.loads(meta["fips"]).items() if k in ts or k not in old}
    sums |= {k: checksum(t) for k, t in ts.items()}
    save_file(ts, path, meta | dict(fips=json.dumps(sums)))


def test_broken_shards(model, tmp_path):
    d, shards = sharded(model, tmp_path)
    good = shards[1].read_bytes()
    for n in (0, 5, 1000, len(good) - 1):
        shards[1].write_bytes(good[:n])
        refused(d, "shard model-00002-of.* cannot be used")
    for at in (3, len(good)//2, len(good) - 1):
        shards[1].write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at+1:])
        refused(d, "shard model-00002-of.* cannot be used")
    shards[1].write_bytes(good)
    same(model, hub.load(d))
    hub.save(made("llama", runs=3), tmp_path/"o", max_shard_size="20KB")
    shutil.copy(shard_files(tmp_path/"o")[1], shards[1])
    refused(d, "model-00002-of.* belongs to another model|was altered")
    shards[1].unlink()
    for way in (hub.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((OSError, ValueError), match="model-00002-of"): way(d)


LAYERS = "model.layers."


@pytest.mark.parametrize("change,match", [
    (lambda t: t.pop(LAYERS + "0.mlp.gate_proj.fips.U"), "gate_proj.fips.U is missing"),
    (lambda t: t.pop(LAYERS + "1.mlp.up_proj.fips.mask"), "up_proj.fips.mask is missing"),
    (lambda t: t.update({LAYERS + "0.mlp.gate_proj.fips.U": torch.ones(32, 31)}),
     r"fips.U is \(32, 31\) instead of \(32, 32\)"),
    (lambda t: t.update({LAYERS + "0.mlp.up_proj.fips.V": torch.ones(7)}),
     r"fips.V is \(7,\) instead of \(384,\)")])
def test_other_tensors(change, match, folder):
    rewrite(folder/"model.safetensors", change)
    refused(folder, match)


MASK = torch.ones(5, dtype=torch.uint8)


@pytest.mark.parametrize("change,match", [
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    (lambda t: t.update({LAYERS + "0.mlp.x.fips.V": torch.ones(2)}), "no record tells"),
    (lambda t: t["model.norm.weight"].fill_(float("nan")), "NaN"),
    (lambda t: t[LAYERS + "0.mlp.up_proj.fips.V"].fill_(float("inf")), "NaN or infinity")])
def test_incomplete_tensors(change, match, folder):
    rewrite(folder/"model.safetensors", change)
    refused(folder, match)


@pytest.mark.parametrize("change,match", [
    (lambda t: t.update(extra=torch.ones(1)), "extra has no place"),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}), "does not fit"),
    (lambda t: t.update({LAYERS + "0.mlp.up_proj.fips.mask": MASK}), "does not fit")])
def test_tensors_that_do_not_fit(change, match, folder):
    rewrite(folder/"model.safetensors", change)
    with pytest.raises(ValueError, match=match): hub.load(folder)


def test_a_linear_that_the_records_leave_out(folder):
    good = (folder/"config.json").read_text()
    edit(folder, lambda c, q: q["groups"][0]["linears"].pop())
    refused(folder, "no record tells of the tensor")
    (folder/"config.json").write_text(good)
    ours = lambda k: ".fips." not in k or "0.mlp" in k
    rewrite(folder/"model.safetensors", lambda t: [t.pop(k) for k in list(t) if not ours(k)])
    def first_block(c, q):
        for g in q["groups"]: g["linears"] = [l for l in g["linears"] if "0.mlp" in l["name"]]
        q["groups"] = [g for g in q["groups"] if g["linears"]]
    edit(folder, first_block)
    refused(folder, "weight is missing|incomplete")


def test_a_missing_tensor_is_noticed_by_from_pretrained_too(folder):
    ts = load_file(folder/"model.safetensors")
    with safe_open(folder/"model.safetensors", "pt") as f: meta = f.metadata()
    ts.pop("model.norm.weight")
    save_file(ts, folder/"model.safetensors", meta)
    refused(folder, "model.norm.weight is missing")


def edit(folder, change):
    c = json.loads((folder/"config.json").read_text())
    change(c, c["quantization_config"])
    (folder/"config.json").write_text(json.dumps(c))


def move_layers(c, q):
    "Give every layer of the records another name."
    for g in q["groups"]:
        for l in g["linears"]: l["name"] = "x." + l["name"]


def first_linear(**kw): return lambda c, q: q["groups"][0]["linears"][0].update(kw)


@pytest.mark.parametrize("change,match", [
    (lambda c, q: q.update(version=99), "version 99.*newer fips_nb"),
    (first_linear(name="model.layers.0.mlp.gate"), "gate"), (move_layers, "x.model"),
    (first_linear(shape=7), r"linears\[0\].shape is 7"),
    (first_linear(role="sideways"), "sideways"),
    (lambda c, q: c.update(intermediate_size=40), "32 -> 48 in the folder")])
def test_other_configs(change, match, folder):
    edit(folder, change)
    refused(folder, match)


GATE = "model.layers.0.mlp.gate_proj"


def drop_coded(name): return lambda c, q: q["coded"].remove(name)


@pytest.mark.parametrize("change,match", [
    (drop_coded(f"{GATE}.V"), "gate_proj.V is not among the coded parameters"),
    (drop_coded(f"{GATE}.U"), "gate_proj.U is not among the coded parameters"),
    (lambda c, q: [l.update(codec="gaps") for l in q["groups"][0]["linears"]], "no record says that it is coded"),
    (lambda c, q: q["groups"][0]["linears"][1].update(codec="gaps"), "only some of them are coded"),
    (lambda c, q: q["coded"].append(f"{GATE}.V"), "occurs twice"),
    (lambda c, q: q["coded"].append(f"{GATE[:-9]}up_proj.U"), "up_proj.U is among the coded"),
    (lambda c, q: q["groups"].pop(0), "incomplete|is missing|no record|cannot"),
    (lambda c, q: q["groups"][0]["linears"].pop(), "is missing|no record|cannot|ignore_mismatched_sizes"),
    (lambda c, q: q["groups"][0]["linears"][0].update(nnz=3), "non-zeros instead of 3|CONVERSION"),
    (lambda c, q: q["groups"][0]["linears"][0].update(shape=[31, 48]), "31 rows"),
    (lambda c, q: q["groups"][0].update(d=33), "do not fit|in this model|cannot")])
def test_other_records_of_coded_factors(change, match, coded_folder):
    edit(coded_folder, change)
    refused(coded_folder, match, (ValueError, RuntimeError))


@pytest.mark.parametrize("change,match", [
    (lambda t: t.pop(f"{GATE}.coded.V"), "gate_proj.coded.V is missing"),
    (lambda t: t.pop(f"{GATE}.coded.U"), "gate_proj.coded.U is missing"),
    (lambda t: t.update({f"{GATE}.fips.V": torch.ones(3)}), "no record tells of the tensor"),
    (lambda t: t.update({f"{GATE[:-9]}up_proj.coded.U": t[f"{GATE}.coded.U"].clone()}), "no record tells"),
    (lambda t: t.update({f"{GATE}.coded.V": t[f"{GATE}.coded.V"][:-1].clone()}), "cannot be used|CONVERSION"),
    (lambda t: t.update({f"{GATE}.coded.U": t[f"{GATE}.coded.V"].clone()}), "cannot be used|CONVERSION"),
    (lambda t: t.update({f"{GATE}.coded.V": t["lm_head.coded.weight"].clone()}), "non-zeros instead|cannot be used|CONVERSION")])
def test_other_codes_of_factors(change, match, coded_folder):
    rewrite(coded_folder/"model.safetensors", change)
    refused(coded_folder, match, (ValueError, RuntimeError))


def test_coded_factors_are_bounded_by_their_files(coded_folder, monkeypatch):
    for k, v in dict(MOST_DECODED=.1, SPARE=0).items(): monkeypatch.setattr(codes, k, v)
    refused(coded_folder, "would decode to")
    with pytest.raises(ValueError, match="would decode to"): hub.save(coded("llama"), coded_folder.parent/"x")
    assert not (coded_folder.parent/"x").exists()


def test_configs_that_only_we_read(folder, tmp_path):
    good = (folder/"config.json").read_text()
    for change, match in (
        (lambda c, q: c.update(architectures=["LlamaForCausalML"]),
         "no architecture 'LlamaForCausalML'.*'LlamaForCausalLM'"),
        (lambda c, q: c.pop("architectures"), "arch is None"),
        (lambda c, q: c.pop("model_type"), "model_type is None"),
        (lambda c, q: q.pop("groups"), "required field `groups`"),
        (lambda c, q: q.update(rest="8bit"), "8bit"),
        (lambda c, q: q.update(quant_method="gptq"), "quantised already, in the format 'gptq'"),
        (lambda c, q: c.update(model_type="gpt2"), "no class for models of the type 'gpt2'"),
        (lambda c, q: c.update(architectures=["Trainer"]), "no architecture 'Trainer'"),
        (lambda c, q: c.update(attn_implementation="somebody/kernels"), "might be code"),
        (lambda c, q: c.update(num_hidden_layers=10**9), "more than 65536"),
        (lambda c, q: c.update(num_hidden_layers=9000), "too many modules"),
        (lambda c, q: c.update(num_hidden_layers=1), "has no place")):
        (folder/"config.json").write_text(good)
        edit(folder, change)
        with pytest.raises(ValueError, match=match): hub.load(folder)
    (folder/"config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"): hub.load(folder)
    (folder/"config.json").write_text(good)
    (folder/"model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match="model.safetensors"): hub.load(folder)


def test_without_transformers(folder):
    python(f"""
import sys
sys.modules['transformers'] = None
from fips_nb.store import codes, format, hub
folder = {str(folder)!r}
assert format.read_config(folder)['arch'] == 'LlamaForCausalLM'
assert codes.folder_bytes(folder)
try: hub.load(folder)
except ImportError as e: assert "pip install 'transformers>=5'" in str(e), e
else: assert False""")


# ---- LoRA ----

peft = pytest.importorskip("peft")


def trained(m, steps=8, **kw):
    "`m` with an adapter on every factor layer, trained a little."
    torch.manual_seed(0)
    t = peft.get_peft_model(m, lora_config(m, r=2, **kw))
    opt = torch.optim.Adam([p for p in t.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        t(TOKENS, labels=TOKENS).loss.backward()
        opt.step()
        opt.zero_grad()
    return t.eval()


def adapters(m): return [n for n, x in m.named_modules() if type(x).__name__ == "LoraFactor"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_lora(name, tmp_path):
    m = made(name)
    hub.save(m, tmp_path/"m")
    t = trained(copy.deepcopy(m), lora_alpha=8)
    assert len(adapters(t)) == len(factor_layers(m)) == len(factor_layers(t))
    want = logits(t)
    assert (want - logits(m)).abs().max() > 1e-3
    with t.disable_adapter(): assert torch.equal(logits(t), logits(m))
    assert all(p.grad is None or p.requires_grad for p in t.parameters())
    for f, g in zip(factor_layers(t).values(), factor_layers(m).values(), strict=True):
        assert torch.equal(f.V, g.V) and torch.equal(f.U, g.U)
    t.save_pretrained(tmp_path/"a")
    base = hub.load(tmp_path/"m")
    config = lora_config(base, adapter=tmp_path/"a")
    back = peft.PeftModel.from_pretrained(base, tmp_path/"a", config=config).eval()
    assert torch.equal(logits(back), want)
    with pytest.raises(ValueError, match="keep it beside them"): back.merge_and_unload()
    dense = to_dense(back).merge_and_unload()
    assert not adapters(dense) and not factor_layers(dense)
    torch.testing.assert_close(logits(dense), want, rtol=1e-3, atol=1e-4)


def too_old():
    "Whether transformers refuses the installed peft."
    from transformers.utils.peft_utils import check_peft_version
    from transformers.integrations.peft import MIN_PEFT_VERSION
    try: check_peft_version(MIN_PEFT_VERSION)
    except ValueError: return True


@pytest.mark.skipif(too_old(), reason="this transformers wants a newer peft for add_adapter")
def test_lora_through_functions_of_transformers(tmp_path):
    m = made("llama")
    m.add_adapter(lora_config(m, r=2, target_modules=["q_proj"]))
    q_proj = m.model.layers[0].self_attn.q_proj
    assert len(adapters(m)) == 6 and type(q_proj).__name__ == "Linear"
    assert hasattr(q_proj, "lora_A")
    attach(m).save_pretrained(tmp_path/"a")
    names = sorted(p.name for p in tmp_path.glob("a/*.safetensors"))
    assert names == ["adapter_model.safetensors"]


def test_refused_adapters(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="compress it first"): lora_config(BUILD["llama"]())
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match=init): lora_config(model, init_lora_weights=init)
    with pytest.raises(ValueError, match="'lora_alpha' is a setting of the saved adapter"):
        lora_config(model, adapter=tmp_path, lora_alpha=2)
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(copy.deepcopy(model), lora_config(model, use_dora=True))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"fips_nb\[lora\]"): lora_config(model)


def test_what_compress_returns(tmp_path):
    "It is saved by `hub.save`, or by its own `save_pretrained` after `attach`, and not before."
    x = torch.arange(1, 25).view(2, 12)
    res = compress(BUILD["llama"](), [x, x], .5, levels=2, distill_epochs=1)
    assert getattr(res.model, "hf_quantizer", None) is None
    with pytest.raises(RuntimeError, match="shared tensors"):
        res.model.save_pretrained(tmp_path/"x")
    attach(res).save_pretrained(tmp_path/"a")
    hub.save(res, tmp_path/"b")
    round_rest(res.model)
    for k in "ab":
        back = AutoModelForCausalLM.from_pretrained(tmp_path/k)
        assert back.config.quantization_config.report["preset"] == "fips-als"
        with torch.no_grad(): assert torch.equal(back(x).logits, res.model.eval()(x).logits)


def test_card_of_a_transformers_model(model, tmp_path):
    model = copy.deepcopy(model)
    model.name_or_path = "somebody/llama" # as from_pretrained sets it
    card = (hub.save(model, tmp_path/"m", report=dict(preset="svd"))/"README.md").read_text()
    for word in ('base_model: "somebody/llama"', "library_name: transformers", "AutoModelForCausalLM.from_pretrained"):
        assert word in card
    assert (hub.save(hub.load(tmp_path/"m"), tmp_path/"n")/"README.md").read_text() == card
    hub.export(tmp_path/"m", tmp_path/"plain")
    assert not (tmp_path/"plain/README.md").exists() # it is about another folder
