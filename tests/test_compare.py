"""`fips compare`: equal sizes, rows that say why, what is refused before any work, and what is left behind."""
import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from fips_nb.run import cli, commands, compare as module
from fips_nb.run.compare import compare
from fips_nb.data.demo import demo_text, demo_vit
from fips_nb.store.codes import folder_bytes
from fips_nb.store.hub import load

PRUNED = "pruning:levels=3,distill_epochs=0"
QUICK = dict(n_calib=40)


@pytest.fixture
def fips(capsys, monkeypatch, tmp_path):
    "Run the command in an empty folder: (status, stdout, stderr)."
    monkeypatch.chdir(tmp_path)

    def run(line):
        status = cli.main(shlex.split(line))
        return (status, *capsys.readouterr())
    return run


def no_work(monkeypatch):
    "Let it fail if anything is opened or compressed."
    def called(*args, **kwargs): raise AssertionError("work has begun")
    monkeypatch.setattr(module, "open_any", called)
    monkeypatch.setattr(commands, "compress", called)


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


# ---- results ----

def test_a_share_of_the_parameters(fips):
    "The rows are those of compress and eval; the best is marked; files of 16 bits are kept on demand."
    status, out, err = fips(f"compare demo-vit {PRUNED} svd-llm --budget .3 --n-calib 40 --keep kept "
                            "--plot p.svg --json")
    assert status == 0 and out.count("\n") == 1
    said = json.loads(out)
    assert [r["setting"] for r in said["rows"]] == [PRUNED, "svd-llm"] == names("kept")
    assert names(".") == ["kept", "p.svg"] and Path("p.svg").read_text().startswith("<?xml")
    assert (said["budget"], said["bits"], said["measure"]) == (.3, None, "accuracy")
    alone = commands.compress("demo-vit", out="alone", preset="svd-llm", budget=.3, n_calib=40).report
    ev = commands.evaluate("alone")
    row = said["rows"][1]
    assert (row["bytes"], row["bits"]) == (alone["bytes"], alone["bits"])
    assert row["bytes"] == folder_bytes("kept/svd-llm")
    assert row["value"] == ev["top1"] and row["divergence"] == pytest.approx(ev["kl"])
    assert said["dense"] == ev["dense"]["top1"]
    assert row["loss"] == pytest.approx(-100*ev["difference"])
    low, high = row["interval"]
    assert low < row["loss"] < high
    assert high - low == pytest.approx(2*196*ev["difference_stderr"], rel=.05)
    assert [r["best"] for r in said["rows"]] == [True, False] # svd-llm loses half of the accuracy
    assert said["rows"][0]["within"] and not row["within"]
    assert "setting 2 of 2: svd-llm" in err


def test_the_model_is_opened_once_and_stays_as_it_was(monkeypatch):
    "Settings share the dense model, which none of them changes."
    opened, real = [], module.open_any

    def open_any(*args):
        opened.append(real(*args))
        return opened[-1]

    monkeypatch.setattr(module, "open_any", open_any)
    monkeypatch.setattr(commands, "open_any", lambda *args: pytest.fail("opened again"))
    compare("demo-vit", ["rounding:distill_epochs=1", "svd-llm"], bits=3., n_calib=40)
    (dense, *folders), want = opened, dict(demo_vit().named_parameters())
    assert dense.name == "demo-vit" and "demo-vit" not in [o.name for o in folders]
    for k, p in dense.model.named_parameters():
        assert torch.equal(p, want[k]) and p.requires_grad == want[k].requires_grad and p.grad is None, k


@pytest.mark.parametrize("size", [dict(bits=3.), dict(target_bytes=148_001)])
def test_a_size_of_the_file(fips, size):
    "Files are at most as large; a setting out of reach says why, and the next goes on."
    most = size.get("target_bytes") or int(3*sum(p.numel() for p in demo_vit().parameters())/8)
    o = compare("demo-vit", ["svd:budget=1e-5", "rounding:distill_epochs=0"], keep="k", **size, **QUICK)
    wrong, right = o["rows"]
    assert "smallest possible" in wrong["why"] and "loss" not in wrong
    assert .97*most < right["bytes"] <= most
    assert right["best"] and names("k") == ["rounding:distill_epochs=0"]


def test_people_read_the_same_figures(fips):
    status, out, _ = fips(f"compare demo-vit {PRUNED} svd-llm basis-sharing:group_size=all --budget 1e-3 "
                          "--n-calib 40")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    table, said = out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == [
        "setting", PRUNED, "svd-llm", "basis-sharing:group_size=all"]
    assert table.splitlines()[2].split()[1:] == ["-"]*7
    assert table.count("*") == 1
    assert "svd-llm could not be made: " in said and "0.9862" in said


def test_a_language_model(fips):
    "Per cent of perplexity, with data of the user; another text calibrates than measures."
    Path("fit.txt").write_text("\n".join(demo_text("calib"))[:30_000])
    Path("held.txt").write_text("\n".join(demo_text("eval"))[:6_000])
    o = compare("demo-llm", ["svd-llm", "aafm"], "held.txt", budget=.8, calib="fit.txt", n_calib=4, window=64,
                batch_size=4, keep="k")
    assert (o["measure"], o["data"]) == ("perplexity", "held.txt")
    for r in o["rows"]:
        assert r["loss"] == pytest.approx(100*(r["value"]/o["dense"] - 1))
        assert r["interval"][0] < r["loss"] < r["interval"][1]
    ev = commands.evaluate("k/aafm", "held.txt", window=64)
    assert o["rows"][1]["value"] == pytest.approx(ev["perplexity"])


# ---- what is refused ----

@pytest.mark.parametrize("words, said", [
    ("demo-vit rounding --bits 3", "at least two"),
    ("demo-vit", "required: SETTING"),
    ("demo-vit rounding prunning --bits 3", "setting prunning: unknown preset 'prunning'; the nearest are pruning"),
    ("demo-vit rounding pruning:level=3 --bits 3", "unknown option of pruning 'level'; the nearest are levels"),
    ("demo-vit auto:levels=3 svd --bits 3", "unknown option of auto 'levels'; the nearest are distill_epochs"),
    ("demo-vit svd pruning:levels --bits 3", "levels= is not an integer"),
    ("demo-vit svd pruning:levels=2.5 --bits 3", "levels=2.5 is not an integer"),
    ("demo-vit svd pruning:sparsity=x --bits 3", "sparsity=x is not a number"),
    ("demo-vit svd fips-als:group_size=some --bits 3", "group_size=some is not an integer or auto or all or stage"),
    ("demo-vit svd fips-als:targets=mpl --bits 3", "'mpl' is not one of mlp"),
    ("demo-vit svd fips-als:levels=0 --bits 3", "levels"),
    ("demo-vit svd fips-als:budget=2 --bits 3", "outside (0, 1]"),
    ("demo-vit svd pruning:levels=1,levels=2 --bits 3", "levels is given twice"),
    ("demo-vit svd svd: --bits 3", "svd and svd: are the same setting"),
    ("demo-vit svd:budget=.5 svd:budget=0.50 --bits 3", "are the same setting"),
    ("demo-vit svd rounding --budget .5", "presets of factors"),
    ("demo-vit svd pruning:budget=.5 --budget .5", "would change the size"),
    ("demo-vit svd aafm", "give one of --bits"),
    ("demo-vit svd aafm --bits 3 --budget .5", "give one of --bits"),
    ("demo-vit svd aafm --bits 20", "outside (0, 16)"),
    ("demo-vit svd aafm --budget 0", "outside (0, 1]"),
    ("demo-vit svd aafm --budget .5 --n-calib 0", "less than 1"),
    ("demo-vit svd aafm --budget .5 --calib nowhere", "no nowhere"),
    ("demo-vit svd aafm --budget .5 --calib . --data .", "overlap"),
    ("demo-vit svd aafm --budget .5 --calib . --data here", "overlap"),
    ("demo-vit svd aafm --budget .5 --window 9", "--window"),
    ("demo-vit svd aafm --budget .5 --plot x.txt", ".png, .svg"),
    ("demo-vit svd aafm --budget .5 --keep kept", "kept/svd exists"),
    ("demo-vti svd aafm --budget .5", "nearest are demo-vit"),
    ("vit_tiny_patch16_224 svd aafm --budget .5 --data here", "--calib PATH"),
    ("vit_tiny_patch16_224 svd aafm --budget .5 --calib here", "--data FOLDER"),
])
def test_refused_before_any_work(fips, monkeypatch, words, said):
    no_work(monkeypatch)
    Path("here").mkdir()
    Path("kept/svd").mkdir(parents=True)
    status, out, err = fips(f"compare {words}")
    assert (status, out) == (2, ""), err
    assert err.startswith("fips: error: ") and err.count("\n") == 1 and said in err, err
    assert names(".") == ["here", "kept"] and names("kept") == ["svd"]


@pytest.mark.parametrize("words, said", [
    ("--target-bytes 9999999", "no smaller than the model in 16 bits"),
    ("--target-bytes -5", "not above 0"),
    ("--bits 3 --device moon", "'moon' cannot be used"),
    ("--bits 3 --data here", "no images in here"),
])
def test_refused_before_compression(fips, monkeypatch, words, said):
    def called(*args, **kwargs): raise AssertionError("work has begun")
    monkeypatch.setattr(commands, "compress", called)
    Path("here").mkdir()
    status, out, err = fips(f"compare demo-vit rounding svd {words}")
    assert (status, out) == (2, "") and err.count("\n") == 1 and said in err, err


def test_no_setting_can_be_made(fips):
    status, out, err = fips("compare demo-vit svd svd-llm --budget 1e-4 --n-calib 40 --json")
    assert (status, out) == (2, "")
    assert "no setting could be made; svd: budget 0.0001 is too small" in err.splitlines()[-1]


# ---- what is left behind ----

@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (RuntimeError("broken"), 1)])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stopped_run_leaves_only_what_is_finished(fips, monkeypatch, tmp_path, error, status, keep):
    "Temporary files are removed; a model that was finished stays in --keep."
    made, inner = [], tmp_path/"temporary"
    inner.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(inner))
    true = commands.compress

    def second_fails(*args, **kwargs):
        made.append(true(*args, **kwargs))
        if len(made) == 2: raise error
        return made[-1]
    monkeypatch.setattr(commands, "compress", second_fails)
    got, out, err = fips(f"compare demo-vit svd svd-llm --budget .3 --n-calib 40 {'--keep kept' if keep else ''}")
    assert (got, out) == (status, "") and names(inner) == []
    if keep:
        assert names("kept") == ["svd"]
        with torch.no_grad(): assert load("kept/svd")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    if status == 130: assert ("what was finished is in kept" if keep else "nothing was written") in err


# ---- figures ----

@pytest.mark.parametrize("b, c, n", [(0, 0, 50), (3, 1, 100), (0, 7, 30), (10, 10, 20)])
def test_the_interval_is_that_of_bonett_and_price(b, c, n):
    d = (b - c)/n
    res = dict(top1=.5, n=n, difference=d, difference_stderr=math.sqrt(((b + c)/n - d*d)/n))
    p, q = (b + 1)/(n + 2), (c + 1)/(n + 2)
    half = 1.96*math.sqrt((p + q - (p - q)**2)/(n + 2))
    loss, interval = module._loss(res)
    assert loss == pytest.approx(-100*d)
    assert interval == pytest.approx([-100*(p - q + half), -100*(p - q - half)])
    assert interval[0] < loss < interval[1]


def test_one_window_has_no_interval(fips):
    Path("held.txt").write_text(demo_text("eval")[0][:90])
    status, out, _ = fips("compare demo-llm svd-llm aafm --data held.txt --budget .5 --n-calib 4 --window 64")
    assert status == 0 and out.splitlines()[1].split()[-2] == "none"
