"""`fips compare`: equal sizes, rows that say why, and what is left behind. What is refused: test_wrong_inputs.py."""
import math
from pathlib import Path

import pytest
import torch

from fips_nb import compare, compress, evaluate, load
from fips_nb.data.demo import demo_text
from fips_nb.run import compare as module
from fips_nb.store.codes import folder_bytes
from small import first_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
PRUNED = "pruning:levels=3,epochs=0"


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


# ---- results ----

def test_a_share_of_the_parameters(fips, short):
    "The rows are those of compress and evaluate; the best is marked; models are kept on demand."
    said = fips.json(f"compare demo-vit {PRUNED} svd-llm --params .55 --n 40 --batch-size 100 --out kept --plot p.svg")
    assert [r["setting"] for r in said["rows"]] == [PRUNED, "svd-llm"] == names("kept")
    assert names(".") == ["kept", "p.svg"] and Path("p.svg").read_text().startswith("<?xml")
    assert (said["params"], said["bits"], said["measure"]) == (.55, None, "accuracy")
    alone = compress("demo-vit", out="alone", method="svd-llm", params=.55, n=40).report
    ev, row = evaluate("alone", batch_size=100), said["rows"][1]
    assert (row["bytes"], row["bits"]) == (alone["bytes"], alone["bits"]) and row["bytes"] == folder_bytes("kept/svd-llm")
    assert row["value"] == ev["top1"] and row["divergence"] == pytest.approx(ev["kl"])
    assert said["dense"] == ev["dense"]["top1"] and row["loss"] == pytest.approx(-100*ev["difference"])
    low, high = row["interval"]
    assert low < row["loss"] < high and high - low == pytest.approx(2*196*ev["difference_stderr"], rel=.05)
    best = min(said["rows"], key=lambda r: (r["loss"], r["divergence"]))
    for r in said["rows"]: assert r["best"] == (r is best) and r["within"] == (r["loss"] <= best["interval"][1])


def test_people_read_the_same_figures(fips, short):
    "In a table of at most 100 columns, with a reason for what could not be made."
    status, out, err = fips(f"compare demo-vit {PRUNED} svd-llm basis-sharing:group_size=auto --params .384 --n 40 --batch-size 100")
    assert status == 0 and max(map(len, out.splitlines())) <= 100 and "fips: method 2 of 3: svd-llm" in err
    table, said = out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == [PRUNED, "svd-llm", "basis-sharing:group_size=auto"]
    assert table.splitlines()[2].split()[1:] == ["-"]*7 and table.count("*") == 1
    assert "svd-llm could not be made: " in said


def test_the_model_is_opened_once_and_stays_as_it_was(monkeypatch, short):
    "Methods share the dense model, which none of them changes."
    opened, real = [], module.open_any

    def open_any(*args):
        opened.append(real(*args))
        return opened[-1]
    monkeypatch.setattr(module, "open_any", open_any)
    monkeypatch.setattr("fips_nb.run.request.open_any", lambda *args: pytest.fail("opened again"))
    compare("demo-vit", ["rounding:epochs=1", "svd-llm:epochs=0"], bits=6., n=40, batch_size=100)
    (dense, *folders), want = opened, dict(first_blocks(2).named_parameters())
    assert dense.name == "demo-vit" and "demo-vit" not in [o.name for o in folders]
    for k, p in dense.model.named_parameters():
        assert torch.equal(p, want[k]) and p.requires_grad == want[k].requires_grad and p.grad is None, k


@pytest.mark.parametrize("size", [dict(bits=5.), dict(bytes=12_001)])
def test_a_size_of_the_file(fips, shorter, monkeypatch, size):
    "Files are at most as large; a setting out of reach says why, and the next goes on."
    monkeypatch.setattr("fips_nb.round.sizes.SPARE_BYTES", .01)
    most = size.get("bytes") or int(5*sum(p.numel() for p in first_blocks(1).parameters())/8)
    o = compare("demo-vit", ["svd:params=.41", "rounding:epochs=0"], out="k", n=40, batch_size=100, **size)
    wrong, right = o["rows"]
    assert "params=0.41 leaves too little" in wrong["why"] and "loss" not in wrong
    assert .96*most < right["bytes"] <= most
    assert right["best"] and names("k") == ["rounding:epochs=0"]


def test_a_language_model(home, fips, timed_once):
    "Per cent of perplexity, with data of the user; another text calibrates than measures."
    Path("fit.txt").write_text("\n".join(demo_text("calib"))[:6_000])
    Path("held.txt").write_text("\n".join(demo_text("eval"))[:3_000])
    o = compare(str(home/"llama"), ["svd-llm", "aafm"], "fit.txt", test="held.txt", params=.9, n=4, batch_size=4, out="k")
    assert (o["measure"], o["data"]) == ("perplexity", "held.txt")
    for r in o["rows"]:
        assert r["loss"] == pytest.approx(100*(r["value"]/o["dense"] - 1))
        assert r["interval"][0] < r["loss"] < r["interval"][1]
    assert o["rows"][1]["value"] == pytest.approx(evaluate("k/aafm", "held.txt")["perplexity"])


def test_one_window_has_no_interval(home, fips, short):
    Path("held.txt").write_text("def read(self):\n")
    status, out, _ = fips(f"compare {home/'llama'} svd-llm aafm --data {home/'text.txt'} --test held.txt --params .9 --n 4")
    assert status == 0 and out.splitlines()[1].split()[-2] == "none"


def test_no_method_can_reach_the_size(fips, short):
    status, out, err = fips("compare demo-vit svd svd-llm --params .384 --n 40 --batch-size 400 --json")
    assert (status, out) == (2, "")
    assert "no setting could be made; svd: --params 0.384 leaves too little" in err.splitlines()[-1]


# ---- what is left behind ----

@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (RuntimeError("broken"), 1)])
@pytest.mark.parametrize("keep", ["", " --out kept"])
def test_a_stopped_run_leaves_only_what_is_finished(fips, short, monkeypatch, tmp_path, error, status, keep):
    "Temporary files are removed; a model that was finished stays in --out."
    inner, true, made = tmp_path/"temporary", module.compress, []
    inner.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(inner))

    def second_fails(*args, **kwargs):
        made.append(true(*args, **kwargs))
        if len(made) == 2: raise error
        return made[-1]
    monkeypatch.setattr(module, "compress", second_fails)
    got, out, err = fips(f"compare demo-vit svd svd-llm --params .6 --n 40 --batch-size 400{keep}")
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
