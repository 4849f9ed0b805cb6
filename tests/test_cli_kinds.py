"""The command line on every kind of model of transformers, each small and saved as transformers saves it."""
import json
import shutil
from pathlib import Path

import pytest
import torch

import fips_nb
from fips_nb.data.models import kind_of, open_any, read_batches
from fips_nb.run.reports import compare_text
from fips_nb.sparse_factors import factor_layers
from fips_nb.store import hub
from folders import BESIDE, KINDS, data_for, without_news

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSIFIERS, LANGUAGE = ("vit", "deit", "swin"), ("t5", "bart", "marian")


def window(name): return " --window 32" if name == "t5" else ""  # the others have a context of 32


def outputs(folder):
    "What the model in a folder gives for fixed inputs."
    o, g = open_any(str(folder)), torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 16, 16, generator=g), torch.randint(1, 320, (2, 6), generator=g)
    given = dict(images=dict(pixel_values=x), text=dict(input_ids=t),
                 pairs=dict(input_ids=t, decoder_input_ids=t),
                 captions=dict(pixel_values=x, input_ids=t))
    with torch.no_grad(): out = o.model(**given[o.kind])
    return next(t for t in out.values() if torch.is_tensor(t))


def check_eval(fips, name, made, on, dense):
    "The measure of the kind, beside the dense model and alone."
    ev = fips.json(f"eval small {on} --dense {dense}")
    assert ev["bytes"] == made["bytes"] and ev["dense"]["dense_bytes"] == made["dense_bytes"]
    if name in CLASSIFIERS: assert ev["n"] == 18 and ev["classes"] == 3 and 0 <= ev["top1"] <= 1
    elif name in LANGUAGE: assert ev["perplexity"] > 1 and ev["dense"]["perplexity"] > 1
    else:
        assert .5 < ev["least_cosine"] <= ev["cosine"] < 1 and ev["measure"] == "cosine_similarity"
        assert ("text_cosine" in ev) == (KINDS[name] == "captions")
    status, text, err = fips(f"eval small {on}")
    alone = name in CLASSIFIERS + LANGUAGE
    assert (status, err) == (0, "") if alone else status == 2 and "is an encoder" in err
    if alone: assert (f"{100*ev['top1']:.2f} %" if name in CLASSIFIERS else f"{ev['perplexity']:.4f}") in text


@pytest.mark.parametrize("name", KINDS)
def test_compress_eval_load_export(name, home, fips, tmp_path, short):
    "One model of each kind is distilled too."
    assert kind_of(str(home/name)) == KINDS[name]
    on, epochs = f"--data {data_for(home, name)}{window(name)}", int(name in ("vit", "t5", "clip", "sentences"))
    status, out, err = fips(f"compress {home/name} --out small {on} --n 12 --method fips-als:levels=2 --epochs {epochs} --json")
    assert status == 0 and without_news(err) == "", err
    made = json.loads(out)
    assert made["n"] == 12 and .4 < made["mlp_budget"] <= .5
    assert {"text": "windows of 32", "pairs": "windows of", "images": "images",
            "captions": "images with captions"}[KINDS[name]] in made["unit"]
    said = fips.json("info small")
    assert said["arch"] == type(net := hub.load("small")).__name__ and said["bytes"] == made["bytes"] and factor_layers(net)
    check_eval(fips, name, made, on, home/name)

    assert fips("export small --out plain")[0] == 0
    torch.testing.assert_close(outputs("plain"), outputs("small"), rtol=1e-3, atol=1e-4)
    beside = {"preprocessor_config.json"} if KINDS[name] in ("images", "captions") else set()
    beside |= set(BESIDE) if name == "sentences" else set()
    for folder in (tmp_path/"small", tmp_path/"plain"):
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert beside <= files and not any(f.endswith(".py") for f in files)
    assert all((tmp_path/"small"/f).read_text() == (home/name/f).read_text() for f in beside)


@pytest.mark.parametrize("name", ["sentences", "clip"])
def test_overwrite_replaces_what_lies_beside(name, home, fips, short):
    line = f"compress {home/name} --out small --data {data_for(home, name)} --n 12 --method"
    before = fips.json(f"{line} svd")["bytes"]
    assert fips.json(f"{line} svd --params .9 --overwrite")["bytes"] != before
    assert [p.name for p in Path().iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["vit", "t5", "clip"])
def test_compare(name, home, fips, short):
    "Every kind has its measure, and the figures are those of eval on the folders that are kept."
    fit = Path(data_for(home, name).name)
    (shutil.copytree if data_for(home, name).is_dir() else shutil.copy)(data_for(home, name), fit)
    text = KINDS[name] in ("text", "pairs")
    o = fips.json(f"compare {home/name} svd-llm pruning:levels=2,epochs=0 --params .9 --data {fit} --n 12 --out kept "
                  f"--test {data_for(home, name)}{' --window 32'*text}")
    key = "top1" if name == "vit" else "perplexity" if name == "t5" else "cosine"
    for r in o["rows"]:
        ev = fips.json(f"eval kept/{r['setting']} --data {data_for(home, name)} --dense {home/name}{' --window 32'*text}")
        assert ev["measure"] == o["measure"] and r["value"] == pytest.approx(ev[key], abs=1e-6)
        if key == "cosine": assert r["loss"] == pytest.approx(1 - ev[key], abs=1e-6) and r["divergence"] is None
    assert sum(r["best"] for r in o["rows"]) == 1
    assert f"{key.replace('top1', 'top-1')} of {o['dense']:.4f}" in " ".join(compare_text(o).split())


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_nothing_that_was_read_is_drawn_anew(name, home, fips, short):
    "transformers initialises the weights of an MLP by their names, and that of a pruned linear is V itself."
    fips.json(f"compress {home/name} --out x --method pruning:levels=2 --epochs 0 --data {data_for(home, name)} --n 12{window(name)}")
    a, b = (hub.load("x").state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    pruned = [v for k, v in a.items() if k.endswith(".V")]
    assert pruned and all((v == 0).float().mean() > .3 for v in pruned)  # what is drawn has no zeros


@pytest.mark.parametrize("name", ["vit", "t5", "clip"])
def test_bits_and_bench(name, home, fips, short):
    on = f"--data {data_for(home, name)}{window(name)}"
    made = fips.json(f"compress {home/name} --out coded --n 8 --bits 6 --epochs {int(name == 't5')} {on}")
    assert 3 < made["bits"] <= 6 and made["bytes"] == Path("coded/model.safetensors").stat().st_size
    ev = fips.json(f"eval coded {on} --dense {home/name}")
    assert ev.get("agreement", ev.get("cosine")) > .8
    assert {r["mode"] for r in fips.json("bench coded --batch 2")["rows"]} == {"dense", "int8", "coded"}
    assert [r["batch"] for r in fips.json(f"bench {home/name} --batch 1,2")["rows"]] == [1, 2]


def test_labels_are_those_of_the_model(home):
    "Folders named as the classes are numbered by id2label, whatever their order."
    o = open_any(str(home/"vit"))
    batches = list(read_batches(o, home/"images"))
    assert torch.cat([y for _, y in batches]).tolist() == [1]*6 + [0]*6 + [2]*6  # dark_blue, green, red
    with torch.no_grad(): right = torch.cat([o.model(x).logits.argmax(1) == y for x, y in batches])
    assert fips_nb.evaluate(str(home/"vit"), home/"images")["top1"] == right.double().mean().item()


def test_captions_may_be_the_names_of_classes(home, fips, short):
    assert fips.json(f"compress {home/'clip'} --out x --data {home/'images'} --n 9 --method svd")["n"] == 9


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors"])
def test_checkpoints_of_other_formats_are_refused_by_name(method, home, tmp_path):
    from fips_nb import compress, evaluate, info, load
    shutil.copytree(home/"llama", folder := tmp_path/"m")
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(quantization_config=dict(quant_method=method, bits=4))))
    for f in (compress, evaluate, info, load):
        with pytest.raises(ValueError, match=f"quantised already, in the format '{method}'; take the model that it was made of"):
            f(str(folder))


def test_adapters_and_gguf_files_are_refused_by_name(home, tmp_path):
    from fips_nb import compress, info, load
    (tmp_path/"a").mkdir()
    (tmp_path/"a/adapter_config.json").write_text("{}")
    (tmp_path/"m.gguf").write_bytes(b"GGUF")
    for f in (compress, info, load):
        with pytest.raises(ValueError, match="holds an adapter of PEFT"): f(str(tmp_path/"a"))
        with pytest.raises(ValueError, match="is of the format GGUF"): f(str(tmp_path/"m.gguf"))


def test_a_sentence_encoder_whose_config_names_a_head_that_its_file_has_not(home, tmp_path):
    "As the most used one is shipped."
    from fips_nb.data.models import open_any
    shutil.copytree(home/"sentences", folder := tmp_path/"m")
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(architectures=["BertForMaskedLM"])))
    assert type(open_any(str(folder)).model).__name__ == "BertModel"
    (folder/"modules.json").unlink()
    with pytest.raises(ValueError, match="lack 6 tensors of BertForMaskedLM"): open_any(str(folder))
