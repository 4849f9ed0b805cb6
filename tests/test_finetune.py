"""`fips finetune`: what is written is what was measured, runs go on after interruptions, and what is refused before any work."""
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fips_nb.run import cli, commands
from fips_nb.learn import finetuning, training
from fips_nb import finetune
from fips_nb.data.demo import demo_images
from fips_nb.store.codes import folder_bytes
from fips_nb.store.hub import load
from fips_nb.sparse_factors import factor_layers
from small import bits, same

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = "--epochs 2 --n 240 --batch-size 24"
FEW = dict(epochs=2, n=240, batch_size=24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders of factors, of pruned weights, of codes, and of text."
    root = tmp_path_factory.mktemp("made")
    few = dict(n_calib=64, distill_epochs=0)
    commands.compress("demo-vit", out=root/"factors", budget=.15, levels=2, **few)
    commands.compress("demo-vit", out=root/"pruned", budget=.15, levels=2, preset="pruning", **few)
    commands.compress("demo-vit", out=root/"coded", bits=2., **few)
    commands.compress("demo-llm", out=root/"text", budget=.4, preset="svd", window=64, n_calib=16)
    return root


@pytest.fixture
def fips(capsys, monkeypatch, tmp_path, made):
    "Run the command in a folder with those of `made`: (status, stdout, stderr)."
    monkeypatch.chdir(tmp_path)
    for d in made.iterdir(): shutil.copytree(d, tmp_path/d.name)

    def run(line):
        status = cli.main(shlex.split(line))
        return (status, *capsys.readouterr())
    return run


def names(): return sorted(p.name for p in Path().iterdir())
def zeros(model): return [f.V == 0 for f in factor_layers(model).values()]


def stop_at(monkeypatch, n):
    "Play Ctrl-C in update `n`, from 0."
    calls, real = [], training.check_loss
    def check(*args):
        calls.append(0)
        if len(calls) > n: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(training, "check_loss", check)


# ---- results ----

@pytest.mark.parametrize("folder", ["factors", "pruned", "coded"])
def test_what_is_written_is_what_was_measured(fips, folder):
    status, out, err = fips(f"finetune {folder} --out better {QUICK} --json")
    assert status == 0 and out.count("\n") == 1, err
    said = json.loads(out)
    assert said["loss"] == "outputs" and (said["n"], said["epochs"]) == (240, 2)
    assert said["after"] < said["before"] and said["notes"] == []
    assert "fine-tuning" in err and "on the outputs of demo-vit with 240 images, 2 epochs of 8 updates; about" in err
    assert said["bytes"] == folder_bytes("better") <= folder_bytes(folder) == said["bytes_before"]
    old, new = load(folder), load("better")
    assert all(torch.equal(a, b) for a, b in zip(zeros(old), zeros(new)))
    a, b = (commands.evaluate(f)["kl"] for f in (folder, "better"))
    assert b < a
    report = commands.info("better")
    assert report["preset"] and report["finetuned"]["after"] == said["after"]
    assert "fine-tuned on the dense model's outputs, with 240" in Path("better/README.md").read_text()
    again = finetune("better", out="again", epochs=1, n=240, batch_size=24).report["finetuned"]
    assert again["before"] == pytest.approx(said["after"], rel=1e-5) # of the loaded folder
    assert again["earlier"]["after"] == said["after"]
    assert not [n for n in names() if "state" in n]


def test_the_text_report(fips):
    status, out, _ = fips(f"finetune pruned --out better --epochs 1 --n 160 --batch-size 20")
    assert status == 0 and "pruned was fine-tuned into better." in out
    assert "divergence from the dense outputs, held out" in out and "bytes on disk" in out


def test_text_follows_the_dense_model_or_itself(fips):
    how = dict(epochs=1, n=48, window=64, batch_size=4)
    for loss in (None, "labels"):
        res = finetune("text", out=f"of-{loss}", loss=loss, **how)
        told = res.report["finetuned"]
        assert told["loss"] == (loss or "outputs") and told["after"] < told["before"]
        assert same(bits(load(f"of-{loss}")), bits(res.model))
        assert folder_bytes(f"of-{loss}") <= 1.01*folder_bytes("text")


def test_masks_that_move_stay_as_dense_and_as_small(fips):
    finetune("factors", out="moved", masks="rigl", epochs=14, n=240, batch_size=24)
    old, new = zeros(load("factors")), zeros(load("moved"))
    assert any(not torch.equal(a, b) for a, b in zip(old, new))
    assert all(b.sum() >= a.sum() for a, b in zip(old, new))
    assert folder_bytes("moved") <= 1.01*folder_bytes("factors")


def test_masks_that_prune_on_leave_a_smaller_folder(fips):
    "By GMP; the report says so, even if the smaller model is worse."
    status, out, err = fips("finetune factors --out thin --masks gmp --prune .5 --epochs 4 --n 240 --batch-size 24 --json")
    assert status == 0, err
    said = json.loads(out)
    assert said["prune"] == .5 and any("50% of the live entries" in note for note in said["notes"])
    old, new = zeros(load("factors")), zeros(load("thin"))
    assert all((a <= b).all() and abs((~b).sum() - .5*(~a).sum()) <= 1 for a, b in zip(old, new))
    gone = sum(int(b.sum() - a.sum()) for a, b in zip(old, new))
    assert folder_bytes("factors") - folder_bytes("thin") > 1.9*gone > 0


def test_the_first_rate_follows_from_the_first_epoch(fips, monkeypatch):
    "A rate that makes the first epoch a step back is quartered, which the report says; a rate that was given stays."
    monkeypatch.setattr(finetuning, "RATE", .1)
    told = finetune("factors", out="slower", **FEW).report["finetuned"]
    assert told["lr"] in (.025, .00625) and told["after"] < told["before"]
    assert told["notes"][0].startswith(f"the first rate was {told['lr']:g}")
    assert finetune("factors", out="given", lr=.1, **FEW).report["finetuned"]["lr"] == .1


@pytest.mark.parametrize("folder", ["factors", "coded"])
def test_a_new_head(fips, folder):
    "Another task, its folder, and its measure; the dense model has another head and does not stand beside."
    from PIL import Image
    x, y = demo_images("train")
    for i in range(160):
        d = Path("odd")/("odd" if y[i] % 2 else "even")
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((x[i, 0] + 1)*127).byte().numpy()).save(d/f"{i}.png")
    status, out, err = fips(f"finetune {folder} --out task --data odd --new-head --epochs 6 --lr 2e-3 --views none --json")
    assert status == 0, err
    said = json.loads(out)
    assert (said["loss"], said["classes"]) == ("labels", 2) and said["after"] < said["before"]
    seen = commands.evaluate("task", "odd")
    assert "dense" not in seen and seen["n"] == 160 and seen["top1"] > .55
    status, _, err = fips("eval task")
    assert status == 2 and "--data FOLDER" in err
    status, _, err = fips("finetune task --out x --data odd --loss outputs")
    assert status == 2 and "needs the dense model" in err


def test_modules_are_not_changed(made):
    from fips_nb.data.demo import demo_vit
    x, y = demo_images("train")
    batches = list(zip(x[:240].split(24), y[:240].split(24)))
    model = load(made/"factors")
    before = bits(model)
    for more in (dict(dense=demo_vit()), dict(dense=demo_vit(), loss="blocks"), dict(loss="labels")):
        res = finetune(model, batches, epochs=1, **more)
        assert same(bits(model), before) and not same(bits(res.model), before)
    assert "held-out loss before" in repr(res) and "| after |" in res._repr_markdown_()


# ---- interruptions ----

@pytest.mark.parametrize("folder", ["factors", "coded"])
def test_resumed_and_uninterrupted_agree(fips, folder, monkeypatch):
    line = f"finetune {folder} --out {{}} {QUICK}"
    assert fips(line.format("whole"))[0] == 0
    for k, at in enumerate((3, 12)): # in the first epoch of eight updates, and in the second
        out = f"part{k}"
        with monkeypatch.context() as m:
            stop_at(m, at)
            status, _, err = fips(line.format(out))
        assert status == 130 and not Path(out).exists()
        assert Path(f"{out}.state").exists() == bool(k) and ("--resume" in err) == bool(k)
        status, _, err = fips(line.format(out) + " --resume")
        assert status == 0 and ("nothing to resume" in err) == (not k)
        assert same(bits(load("whole")), bits(load(out))) and not Path(f"{out}.state").exists()
    status, _, err = fips(line.format("part1") + " --resume")
    assert status == 0 and "is complete" in err


def test_a_run_that_differs_is_refused(fips, monkeypatch):
    with monkeypatch.context() as m:
        stop_at(m, 12)
        assert fips(f"finetune factors --out better {QUICK}")[0] == 130
    for line, word in ((f"factors {QUICK} --lr .001", "settings"), (f"pruned {QUICK}", "model"),
                       ("factors --epochs 2 --n 200 --batch-size 24", "data")):
        status, _, err = fips(f"finetune {line} --out better --resume")
        assert status == 2 and f"{word} differ" in err, err
    status, _, err = fips(f"finetune factors --out better {QUICK}")
    assert status == 2 and "holds an interrupted run" in err
    assert fips(f"finetune factors --out better {QUICK} --resume")[0] == 0


def test_a_loss_that_turns_nan_keeps_the_last_state(fips):
    status, out, err = fips(f"finetune factors --out better {QUICK} --lr 1e30")
    assert status == 2 and out == "" and "in update" in err and "a smaller lr helps" in err
    assert "better" not in names() and "better.state" not in names()


# ---- two processes ----

TWO = """
import sys, torch
from accelerate import Accelerator
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.sparse_factors import Pruner, Schedule
from fips_nb.learn.training import Course, train
accelerator = Accelerator(cpu=True)
x, y = demo_images('train')
batches = list(zip(x[:160].split(10), y[:160].split(10)))
torch.manual_seed(accelerator.process_index)
model = demo_vit()
loss = lambda m, j, epoch: (torch.nn.functional.cross_entropy(m(batches[j][0]), batches[j][1]), {})
Vs = [b.mlp.fc1.weight for b in model.blocks]
pruner = Pruner(Vs, Schedule(.8, 16, 'rigl', every=2))
first = [m.clone() for m in pruner.masks]
train(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3), Course(range(16), epochs=2), [pruner])
assert any(not torch.equal(a, b) for a, b in zip(first, pruner.masks))
torch.save([*model.state_dict().values(), *pruner.masks], sys.argv[1] + str(accelerator.process_index))
"""


def test_two_processes_keep_the_same_masks(tmp_path):
    (tmp_path/"two.py").write_text(TWO)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    res = subprocess.run([*run, tmp_path/"two.py", tmp_path/"out"], capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr[-2000:]
    a, b = (torch.load(tmp_path/f"out{i}") for i in (0, 1))
    assert len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


# ---- refusals ----

X = torch.zeros(160, 1, 8, 8)
REFUSED = [(("demo-vit",), {}, "no folder of a compressed model"), (("nowhere",), {}, "fips compress MODEL"),
           ((3, X), {}, "not a int"), ((torch.nn.Linear(2, 2), X), {}, "compress it first"),
           (("factors", X), dict(loss="labels"), "no labels"), (("factors", X), dict(new_head=True), "no labels"),
           (("factors", X[:9]), {}, "one batch in 8"), (("factors", X[:100]), {}, "such as 12"),
           (("factors", []), {}, "no calibration data"),
           (("factors", [(X[:10], torch.full((10,), 12))]*8), dict(loss="labels"), "--new-head"),
           (("factors", [(X[:10], torch.full((10,), -1))]*8), dict(loss="both"), "label -1"),
           (("factors", [X[:10, :, :5]]*8), {}, "cannot run on the first batch"),
           (("coded",), dict(masks="rigl"), "has codes"), (("coded",), dict(masks="gmp", prune=.5), "has codes"),
           (("factors",), dict(masks="gmp"), ".5 takes half"), (("factors",), dict(prune=.5), "for masks 'gmp'"),
           (("text",), dict(mix=True), "--mix is for classifiers of images"),
           (("text",), dict(new_head=True), "--new-head is for"), (("factors",), dict(window=8), "--window is for models of text"),
           (("factors",), dict(dense="demo-vit"), "--dense is for models of transformers"),
           (("factors",), dict(epochs=0), "--epochs 0"), (("factors",), dict(smoothing=2.), "smoothing 2.0"),
           (("factors",), dict(device="tpu"), "'tpu' cannot be used"), (("factors",), dict(epoch=3), "nearest are epochs"),
           (("factors",), dict(out="pruned"), "--overwrite"), (("factors",), dict(resume=True), "needs out="),
           (("factors",), dict(new_head=True, loss="both"), "leave out --loss both")]


@pytest.mark.parametrize("args, how, said", REFUSED)
def test_refused(fips, args, how, said):
    before = names()
    with pytest.raises(ValueError) as e: finetune(*args, **dict(out="x") | how if "resume" not in how else how)
    assert said in str(e.value) and "\n" not in str(e.value)
    assert names() == before


def test_unlabelled_data_without_a_dense_model(made, monkeypatch):
    with pytest.raises(ValueError, match="have no labels, which this needs; bring labels"):
        finetune(load(made/"factors"), X)
