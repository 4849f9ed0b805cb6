"""`fips finetune`: what is written is what was measured, and runs go on after interruptions. What is refused: test_wrong_inputs.py."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fips_nb import compress, evaluate, finetune, info, load
from fips_nb.data.demo import demo_images
from fips_nb.learn import training
from fips_nb.sparse_factors import factor_layers
from fips_nb.store.codes import folder_bytes
from folders import shorten
from small import bits, first_blocks, same

pytestmark = pytest.mark.usefixtures("one_thread", "short")
QUICK = "--epochs 2 --n 240 --batch-size 24"  # eight updates an epoch
FEW = dict(epochs=2, n=240, batch_size=24)


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    "Folders of factors, of pruned weights, of codes, and of text."
    root, few = tmp_path_factory.mktemp("made"), dict(n=64, epochs=0)
    with pytest.MonkeyPatch.context() as m:
        shorten(m, 2)
        compress("demo-vit", out=root/"factors", params=.5, method="fips-als:levels=2,group_size=1", **few)
        compress("demo-vit", out=root/"pruned", params=.5, method="pruning:levels=2", **few)
        compress("demo-vit", out=root/"coded", bits=3., **few)
        compress(home/"llama", home/"text.txt", out=root/"text", method="svd", params=.85, n=16)
    return root


@pytest.fixture
def fips(fips, made):
    "The command in a folder with those of `made`."
    for d in made.iterdir(): shutil.copytree(d, d.name)
    return fips


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
    said = fips.json(f"finetune {folder} --out better {QUICK}")
    assert said["loss"] == "outputs" and (said["n"], said["epochs"]) == (240, 2)
    assert said["after"] < said["before"] and said["notes"] == []
    assert said["bytes"] == folder_bytes("better") <= folder_bytes(folder) == said["bytes_before"]
    old, new = load(folder), load("better")
    assert all(torch.equal(a, b) for a, b in zip(zeros(old), zeros(new)))
    assert evaluate("better", batch_size=400)["kl"] < evaluate(folder, batch_size=400)["kl"]
    report = info("better")
    assert report["preset"] and report["finetuned"]["after"] == said["after"]
    assert "fine-tuned on the dense model's outputs, with 240" in Path("better/README.md").read_text()
    again = finetune("better", out="again", epochs=1, n=240, batch_size=24).report["finetuned"]
    assert again["before"] == pytest.approx(said["after"], rel=1e-5) # of the loaded folder
    assert again["earlier"]["after"] == said["after"]
    assert not [n for n in names() if "state" in n]


def test_the_text_report(fips):
    status, out, err = fips("finetune pruned --out better --epochs 1 --n 160 --batch-size 20")
    assert status == 0 and "pruned was fine-tuned into better." in out
    assert "divergence from the dense outputs, held out" in out and "bytes on disk" in out
    assert "fips: fine-tuning pruned on the outputs of demo-vit with 160 images, 1 epoch of 7 updates; about" in err


def test_the_same_request_gives_the_same_bytes(fips):
    "On the command line and in Python."
    fips.json(f"finetune factors --out a {QUICK}")
    finetune("factors", out="b", **FEW)
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


@pytest.mark.parametrize("loss", ["outputs", "labels"])
def test_text_follows_the_dense_model_or_itself(home, fips, loss):
    more = dict(dense=home/"llama") if loss == "outputs" else {}
    res = finetune("text", home/"text.txt", out="tuned", epochs=1, n=48, batch_size=4, **more)
    told = res.report["finetuned"]
    assert told["loss"] == loss and told["after"] < told["before"]
    assert same(bits(load("tuned")), bits(res.model)) and folder_bytes("tuned") <= 1.01*folder_bytes("text")


def test_the_first_rate_follows_from_the_first_epoch(fips, monkeypatch):
    "A rate that makes the first epoch a step back is quartered, which the report says; a rate that was given stays."
    for module in "learn.finetuning", "run.finetune": monkeypatch.setattr(f"fips_nb.{module}.RATE", .3)
    told = finetune("factors", out="slower", **FEW).report["finetuned"]
    assert told["lr"] in (.075, .01875) and told["after"] < told["before"]
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
    said = fips.json(f"finetune {folder} --out task --data odd --new-head --epochs 6 --lr 2e-3 --views none")
    assert (said["loss"], said["classes"]) == ("labels", 2) and said["after"] < said["before"]
    seen = evaluate("task", "odd", batch_size=160)
    assert "dense" not in seen and seen["n"] == 160 and seen["top1"] > .55
    status, _, err = fips("eval task")
    assert status == 2 and "--data takes a folder" in err
    status, _, err = fips("finetune task --out x --data odd --loss outputs")
    assert status == 2 and "needs the dense model" in err


def test_modules_are_not_changed(made):
    x, y = demo_images("train")
    batches, model = list(zip(x[:240].split(24), y[:240].split(24))), load(made/"factors")
    before = bits(model)
    for more in (dict(dense=first_blocks(2)), dict(dense=first_blocks(2), loss="both"), dict(loss="labels")):
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
        assert Path("whole/model.safetensors").read_bytes() == Path(out, "model.safetensors").read_bytes()
        assert not Path(f"{out}.state").exists()
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
from fips_nb.data.demo import demo_images
from fips_nb.sparse_factors import Pruner, Schedule
from fips_nb.learn.training import Course, train
from small import first_blocks
accelerator = Accelerator(cpu=True)
x, y = demo_images('train')
batches = list(zip(x[:160].split(10), y[:160].split(10)))
torch.manual_seed(accelerator.process_index)
model = first_blocks(2)
loss = lambda m, j, epoch: (torch.nn.functional.cross_entropy(m(batches[j][0]), batches[j][1]), {})
Vs = [b.mlp.fc1.weight for b in model.blocks]
pruner = Pruner(Vs, Schedule(.8, 16, 'rigl', every=2))
first = [m.clone() for m in pruner.masks]
train(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3), Course(range(16), epochs=2), [pruner])
assert any(not torch.equal(a, b) for a, b in zip(first, pruner.masks))
torch.save([*model.state_dict().values(), *pruner.masks], sys.argv[1] + str(accelerator.process_index))
"""


def test_two_processes_keep_the_same_masks(tmp_path, monkeypatch):
    (tmp_path/"two.py").write_text(TWO)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    res = subprocess.run([*run, tmp_path/"two.py", tmp_path/"out"], capture_output=True, text=True, timeout=300)
    assert res.returncode == 0, res.stderr[-2000:]
    a, b = (torch.load(tmp_path/f"out{i}") for i in (0, 1))
    assert len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))
