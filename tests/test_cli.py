"""The command `fips` on vision models: results, purity of stdout, other models, interruption. What is refused: test_wrong_inputs.py."""
import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import fips_nb
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.round import code
from fips_nb.run import cli, compress as run_compress
from fips_nb.run.folders import info
from fips_nb.run.reports import compress_text, evaluate_text
from fips_nb.round.sizes import bits_to_bytes
from fips_nb.share import pipeline
from fips_nb.share.budgets import PRESETS
from fips_nb.sparse_factors import factor_layers
from fips_nb.store import hub, timm_folders
from fips_nb.store.codes import dense_bytes
from folders import without_news
from small import first_blocks

SVD = "compress demo-vit --n 40 --method svd"
BITS = "compress demo-vit --n 40 --bits 6"
TINY = "test_vit"  # timm's smallest vision transformer: 64 wide, 160 pixels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A small timm model with random weights in a file, and a folder of pictures."
    d = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_file(timm.create_model(TINY, num_classes=7).state_dict(), d/"w.safetensors")
    for i in range(14): picture(d/"images"/f"{i % 7}"/f"{i}.png", i)
    return d


def picture(path, seed=0):
    "A file with a random image of 200 x 180 pixels."
    from torchvision.transforms.functional import to_pil_image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(seed))
    to_pil_image(pixels).resize((200, 180)).save(path)


# ---- results ----

def test_compress_says_what_was_written(demos):
    "Four bits if nobody names a size; everything is counted again."
    n, sizes = sum(p.numel() for p in demo_vit().parameters()), dense_bytes(demo_vit())
    for name in ("coded", "factors"):
        said, out = json.loads((demos/f"{name}.json").read_text()), demos/name
        assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "layers.png", "model.safetensors"]
        assert said["out"] == str(out) and not Path(f"{out}.state").exists()
        assert said["bytes"] == (out/"model.safetensors").stat().st_size
        assert said["bits"] == pytest.approx(8*said["bytes"]/n) and (said["n"], said["unit"]) == (200, "images")
        assert said["dense_bytes"] == sizes > said["dense_bytes_16"] > said["bytes"]
        assert 0 < sum(said["seconds_by_phase"].values()) <= said["seconds"] + .1
    layers = factor_layers(hub.load(out)).values()
    kept = sum(int((f.V != 0).sum()) for f in layers)  # pruning has no bases
    assert said["mlp_params"] == kept and said["mlp_budget"] == pytest.approx(kept/said["mlp_dense_params"])
    assert said["model_ratio"] == pytest.approx(.65, abs=1e-4) and (said["n_layers"], said["n_bases"]) == (len(layers), 0)
    assert said["method"] == "pruning:levels=5" and torch.equal(hub.load(out).pos_embed, demo_vit().pos_embed.half().float())
    said = json.loads((demos/"coded.json").read_text())
    assert 3.97 < said["bits"] <= 4 and said["method"] == "rounding" and "factors" not in said


def test_eval_is_the_accuracy_of_what_was_written(fips, demos):
    x, y = demo_images("test")
    with torch.no_grad(): right, dense = ((m(x).argmax(1) == y).float().mean().item()
                                          for m in (hub.load(demos/"coded"), demo_vit()))
    said = fips.json(f"eval {demos/'coded'}")
    assert said["n"] == 797 and said["top1"] == pytest.approx(right, abs=1e-6)
    assert said["dense"]["top1"] == pytest.approx(dense, abs=1e-6)
    assert said["difference"] == pytest.approx(right - dense, abs=1e-6)
    assert said["interval"][0] < said["top1"] < said["interval"][1] and said["ms_per_image"] > 0
    assert said["bytes"] == (demos/"coded/model.safetensors").stat().st_size
    assert "dense demo-vit" in (out := evaluate_text(said))
    for p in (right, dense): assert f"{100*p:.2f} %" in out
    for n in (said["bytes"], dense_bytes(demo_vit()), dense_bytes(demo_vit(), torch.float16)): assert f"{n:,}" in out


def test_eval_of_a_dense_model(fips, short):
    said = fips.json("eval demo-vit --batch-size 100")
    assert "dense" not in said and said["bytes"] == dense_bytes(first_blocks(2)) == pytest.approx(2*said["bytes_16"], rel=3e-3)


@pytest.mark.parametrize("value", ["x", None, 1.5, [], -10**9])
def test_info_of_a_report_that_says_nonsense(demos, tmp_path, value):
    folder = shutil.copytree(demos/"factors", tmp_path/"m")
    config = json.loads((folder/"config.json").read_text())
    config["report"]["model_params"] = value
    (folder/"config.json").write_text(json.dumps(config))
    said = info(folder)
    assert said["model_params"] == value and "bits" not in said


def test_info_is_the_report(fips, demos):
    folder, made = demos/"factors", json.loads((demos/"factors.json").read_text())
    said = fips.json(f"info {folder}")
    assert len(said["layers"]) == 40 and said["mlp_budget"] == made["mlp_budget"] and said["config"]["levels"] == 5
    assert said["source"] == dict(model="demo-vit", n=200, unit="images", dense=None, data=None)
    status, out, err = fips(f"info {folder} --layers")
    assert (status, err) == (0, "") and f"{said['bytes']:,}" in out
    assert sum(line.strip().startswith("blocks.") for line in out.splitlines()) == 40
    status, out, err = fips(f"info {folder} --plot p.svg")
    assert (status, err) == (0, "") and len(out.splitlines()) < 20 and Path("p.svg").read_text().startswith("<?xml")
    assert all(name in out for name in ("fc1", "fc2", "errors"))
    said = fips.json(f"info {demos/'coded'}")
    assert len(said["layers"]) == 80 and 3.97 < said["bits"] <= 4
    assert "bits per weight" in fips(f"info {demos/'coded'} --layers")[1]


def test_people_read_the_same_numbers(fips, short):
    "And long names stay whole, in lines of at most 100 columns beside them."
    name, dense = "a-folder-with-a-name-of-more-than-24-characters", first_blocks(2)
    outs = [fips(f"{SVD} --out {name}")[1], fips(f"eval {name}")[1], fips(f"info {name}")[1]]
    said = fips.json(f"info {name}")
    for k in ("mlp_params", "mlp_dense_params", "bytes"): assert f"{said[k]:,}" in outs[0]
    for n in (dense_bytes(dense), dense_bytes(dense, torch.float16)): assert f"{n:,}" in outs[0]
    for out in outs: assert name in out and max(map(len, out.splitlines())) <= 100 + len(name)
    assert outs[1].splitlines()[1].startswith(f"{name}  ")


@pytest.mark.parametrize("line", [f"{SVD} --out x", "eval demo-vit"])
def test_json_is_one_object_whatever_libraries_print(fips, short, monkeypatch, line):
    where = (pipeline, "fit_plan") if line.startswith("compress") else (fips_nb.run.evaluate, "latency")
    real = getattr(*where)

    def noisy(*a, **k):
        print("noise")
        return real(*a, **k)
    monkeypatch.setattr(*where, noisy)
    status, out, err = fips(f"{line} --json")
    assert status == 0 and out.count("\n") == 1 and isinstance(json.loads(out), dict)
    assert set(without_news(err).splitlines()) == {"noise"}


def test_the_expected_time_is_said_before_the_start(fips, short):
    _, out, err = fips(f"{SVD} --out x")
    news = err.splitlines()
    assert len(news) == 1 and news[0].startswith("fips: compressing demo-vit by svd, 4 linears, with 40 images")
    assert "no distillation; about" in news[0] and "fips: " not in out


def test_options_reach_the_pipeline(fips, short):
    fips.json("compress demo-vit --out x --n 40 --epochs 0 --seed 3 --params .6 "
              "--method fips-als:sparsity=.6,group_size=1,levels=2")
    said = fips.json("info x")
    assert {k: said["config"][k] for k in ("sparsity", "levels", "group_size", "distill_epochs")} == dict(
        sparsity=.6, levels=2, group_size=1, distill_epochs=0)
    assert said["seed"] == 3 and said["model_ratio"] <= .6 and len({la["group"] for la in said["layers"]}) == 2
    fips.json(f"{BITS} --out y --epochs 1 --batch-size 20 --seed 4")
    said = fips.json("info y")
    assert (said["seed"], said["config"]["distill_epochs"], len(said["divergences"])) == (4, 1, 2)


@pytest.mark.parametrize("line, options", [
    ("--method svd", dict(method="svd")),
    ("--bits 5 --params .8 --method svd --epochs 1", dict(bits=5, params=.8, method="svd", epochs=1))])
def test_the_same_request_gives_the_same_bytes(fips, shorter, line, options):
    "Twice on the command line, and by the same names in Python."
    def written(folder):
        report = json.loads((Path(folder)/"config.json").read_text())
        for k in ("seconds", "seconds_by_phase", "expected_seconds", "run", "request"): report["report"].pop(k, None)
        return Path(f"{folder}/model.safetensors").read_bytes(), report
    for out in "ab": fips.json(f"compress demo-vit --n 40 --out {out} {line}")
    said = fips_nb.compress("demo-vit", out="c", n=40, **options)
    assert written("a") == written("b") == written("c")
    assert json.loads(json.dumps(said.report)) == said.report
    assert written(said.save("d"))[0] == written("a")[0]


def test_a_dry_run_says_what_is_done(fips, short, monkeypatch):
    "The plan is the one that is made, it meets the share of the parameters, and the export computes the same."
    monkeypatch.setattr(run_compress, "LEVELS", 3)
    line = "compress demo-vit --n 40 --params .7 --method fips-als:levels=3 --epochs 0"
    plan = fips.json(f"{line} --dry-run")
    assert plan["dry_run"] and plan["epochs"] == 0 and not list(Path().iterdir())
    assert plan["plan"]["divergence"] <= min(plan["plan"]["trials"].values())
    text = compress_text(plan)
    assert text.startswith("Nothing was written: compressing demo-vit by fips-als") and "this plan, measured" in text
    made = fips.json(f"{line} --out small")
    assert .69 < made["model_ratio"] <= .7 and made["plan"]["trials"] == plan["plan"]["trials"]
    kept = {la["name"]: (la["rank"], la["density"]) for la in fips.json("info small")["layers"]}
    for la in plan["layers"]:
        rank, density = kept[la["name"]]
        assert rank == la["rank"] and density == pytest.approx(la["density"], abs=.01)
    status, text, err = fips("export small --out dense")
    assert status == 0 and "plain weights" in text, err
    (model := first_blocks(2)).load_state_dict(load_file("dense/model.safetensors"))
    x = demo_images("test")[0][:4]
    torch.testing.assert_close(model(x), hub.load("small")(x), rtol=1e-4, atol=1e-4)


def test_minutes_decide_on_the_passes(fips, short, monkeypatch):
    "Six passes of ten seconds each, and five seconds without them: half a minute has room for two."
    def seconds(request, o, plans=()):
        epochs = 6 if o.epochs is None else o.epochs
        return epochs, 5 + 10.*epochs
    monkeypatch.setattr("fips_nb.run.forecast.codes_ahead", seconds)
    said = fips.json(f"{BITS} --dry-run --minutes .5")
    assert said["epochs"] == 2 and said["nbytes"] == bits_to_bytes(first_blocks(2), 6) and said["expected_seconds"] == 25


# ---- help ----

def test_help_and_the_package_are_light():
    "Neither imports torch, nor does a command that is typed wrong."
    call = ("import sys, fips_nb; from fips_nb.run.cli import main\n"
            "heavy = lambda: sorted({'torch', 'timm', 'numpy', 'transformers'} & set(sys.modules))\n"
            "assert 'compress' in dir(fips_nb) and not hasattr(fips_nb, 'code_model'), dir(fips_nb)\n"
            "print(heavy(), main(['--help']), main(['compress']), main(['finetune', '--help']), heavy())")
    t = time.perf_counter()
    res = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert res.returncode == 0 and res.stdout.splitlines()[-1] == "[] 0 2 0 []", res
    assert res.stdout.startswith("usage: fips") and "fips compress demo-vit --out" in res.stdout
    assert res.stderr.startswith("fips: error: ") and res.stderr.count("\n") == 1
    assert time.perf_counter() - t < 5


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_has_help_with_examples(fips, command):
    status, out, _ = fips(f"{command} --help")
    assert status == 0 and f"fips {command} " in out and "--json" in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_names_the_methods_of_the_package(fips):
    said = " ".join(fips("compress --help")[1].split()).replace("- ", "-")  # of words broken at a hyphen
    assert f"{', '.join(['rounding', *PRESETS])} (default: rounding, and with --params fips-als)" in said


def test_version(fips): assert fips("--version") == (0, f"fips_nb {fips_nb.__version__}\n", "")


def test_debug_shows_the_traceback(fips, monkeypatch):
    monkeypatch.setenv("FIPS_DEBUG", "1")
    _, _, err = fips("info nowhere")
    assert "Traceback" in err and err.splitlines()[-1].startswith("fips: error: ")


# ---- folders that exist, interruption, full disks, two runs at once ----

def test_overwrite_replaces_a_model(fips, short):
    assert fips(f"{SVD} --out there")[0] == 0 and fips(f"{SVD} --out there")[0] == 2
    before = fips.json("info there")
    assert fips(f"{SVD} --params .6 --out there --overwrite")[0] == 0
    assert fips.json("info there")["bytes"] < before["bytes"]
    assert sorted(p.name for p in Path("there").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def stop_at(monkeypatch, n, error):
    "Let the fit of group `n` (from 1) fail with `error`."
    fit, calls = pipeline.fit_plan, []

    def failing(*a, **k):
        calls.append(0)
        if len(calls) == n: raise error
        return fit(*a, **k)
    monkeypatch.setattr(pipeline, "fit_plan", failing)


FULL = OSError(errno.ENOSPC, "No space left on device")
ALS = "compress demo-vit --n 40 --epochs 0 --method fips-als:split=linear,group_size=1,levels=2"  # four groups


@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "interrupted"), (FULL, 1, "the disk is full")])
def test_a_stopped_run_resumes_bit_for_bit(fips, short, monkeypatch, error, status, said):
    line = f"{ALS} --out x"
    with monkeypatch.context() as m:
        stop_at(m, 3, error)
        got = fips(line)
    err = without_news(got[2])
    assert got[:2] == (status, "") and said in err and err.count("\n") == 1
    assert err.rstrip().endswith(f"go on with: fips {line} --resume")
    kept = {p.name for p in Path("x.state").iterdir()}
    assert not Path("x").exists() and {"group-0.safetensors", "group-1.safetensors"} < kept
    status, _, err = fips(f"{line} --resume --params .6")
    assert status == 2 and "settings differ" in err
    with monkeypatch.context() as m:
        stop_at(m, 3, RuntimeError("only two groups were left to fit"))
        assert fips(f"{line} --resume")[0] == 0
    assert not Path("x.state").exists() and fips(f"{ALS} --out whole")[0] == 0
    assert Path("x/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    status, _, err = fips(f"{line} --resume")
    assert status == 0 and "x is complete; nothing is left to do" in err


def test_a_stopped_rounding_resumes_bit_for_bit(fips, shorter, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    line = f"{BITS} --epochs 1 --out"
    with monkeypatch.context() as m:
        m.setattr(code, "distill_codes", stop)
        assert fips(f"{line} x")[0] == 130 and Path("x.state/codes.safetensors").exists()
    with monkeypatch.context() as m:
        m.setattr(code, "round_to_bytes", stop)  # not again
        assert fips(f"{line} x --resume")[0] == 0
    assert fips(f"{line} whole")[0] == 0
    assert Path("x/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_an_interrupted_run_is_dropped_only_when_asked(fips, short, monkeypatch):
    line = f"{SVD} --out x"
    with monkeypatch.context() as m:
        stop_at(m, 3, KeyboardInterrupt())
        assert fips(line)[0] == 130
    Path("x.state/notes.txt").write_text("mine")
    held = sorted(p.name for p in Path("x.state").iterdir())
    for other in ("", " --seed 1"):
        status, _, err = fips(line + other)
        assert status == 2 and "holds an interrupted run" in err and "--resume" in err and "--overwrite" in err
    assert sorted(p.name for p in Path("x.state").iterdir()) == held
    with monkeypatch.context() as m:
        stop_at(m, 4, RuntimeError("boom"))
        assert "RuntimeError: boom" in fips(f"{line} --overwrite")[2]  # all four are fitted anew
    assert fips(f"{line} --overwrite")[0] == 0
    assert [p.name for p in Path("x.state").iterdir()] == ["notes.txt"]  # not ours, so it stays


def test_resume_with_nothing_to_resume(fips, short):
    status, _, err = fips(f"{SVD} --out x --resume")
    assert status == 0 and "nothing to resume" in err


def test_interrupted_while_saving_nothing_is_half_written(fips, short, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(timm_folders, "write_tensors", stop)
        assert fips(f"{SVD} --out x")[0] == 130
    assert [p.name for p in Path().iterdir()] == ["x.state"]
    assert fips(f"{SVD} --out x --resume")[0] == 0 and [p.name for p in Path().iterdir()] == ["x"]


HOLD = """import filelock
with filelock.FileLock('x.state/.lock'): print(flush=True); input()"""


def test_two_runs_at_once(fips, short):
    "The second is told who runs, and leaves the first alone."
    Path("x.state").mkdir()
    Path("x.state/.holder").write_text("process 7 on a machine")
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        status, out, err = fips(f"{SVD} --out x")
        other.communicate("\n")
    assert (status, out) == (2, "") and "x.state is in use by process 7 on a machine; wait until it has finished" in err
    assert fips(f"{SVD} --out x")[0] == 0


# ---- other models, and data ----

def test_a_timm_model_from_a_file(fips, tiny, short):
    made = fips.json(f"compress {TINY} --out x --dense {tiny/'w.safetensors'} --data {tiny/'images'} --params .8 --method svd")
    assert .79 < made["model_ratio"] <= .8 and made["n"] == 14 and hub.load("x").num_classes == 7
    assert fips.json("info x")["source"] == dict(model=TINY, n=14, unit="images", dense="w.safetensors", data="images")
    ev = fips.json(f"eval x --data {tiny/'images'} --dense {tiny/'w.safetensors'}")
    assert ev["n"] == 14 and ev["dense"]["dense_bytes"] == made["dense_bytes"] and 0 <= ev["agreement"] <= 1
    alone = fips.json(f"eval x --data {tiny/'images'}")
    assert alone["top1"] == ev["top1"] and "dense" not in alone


def test_a_compressed_folder_is_compressed_further(fips, shorter):
    "It is opened like any model; codes of factors keep their zeros."
    picture(Path("images/a.png"))
    fips.json("compress demo-vit --out factors --n 40 --method pruning:levels=2 --epochs 0")
    fips.json("compress factors --out x --data images --bits 8 --epochs 0")
    a, b = (factor_layers(hub.load(f)) for f in ("factors", "x"))
    assert a.keys() == b.keys() and all((b[k].V[a[k].V == 0] == 0).all() for k in a)


def test_weights_of_another_format_and_wrapping(fips, tiny, short):
    sd = load_file(tiny/"w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in sd.items()}}, "w.pth")
    a, b = (fips.json(f"eval {TINY} --data {tiny/'images'} --dense {w}") for w in (tiny/"w.safetensors", "w.pth"))
    assert a["loss"] == b["loss"] and a["n"] == 14


def test_eval_says_which_classes_it_takes_a_few_folders_for(fips, tiny, short):
    for i in range(6): picture(Path(f"few/{'cat' if i % 2 else 'dog'}/{i}.png"), i)
    line = f"eval {TINY} --dense {tiny/'w.safetensors'} --data"
    status, out, err = fips(f"{line} few")
    assert status == 0, err
    assert "the 2 classes of the data are taken for the first of the model's 7" in " ".join(out.split())
    assert "taken for" not in fips(f"{line} {tiny/'images'}")[1]


def test_an_unreadable_image_is_left_out_with_a_warning(fips, short):
    for i in range(18): picture(Path(f"some/{i:02}.png"), i)
    Path("some/02.png").write_bytes(b"x")
    status, _, err = fips("compress demo-vit --out x --data some --method svd")
    assert status == 0 and without_news(err).startswith("fips: warning: left out 1 of 18 images")
    assert without_news(err).count("\n") == 1


def test_download_without_network(fips, tiny, monkeypatch):
    import socket

    from huggingface_hub import constants

    def none(*a, **k): raise socket.gaierror("no network")
    monkeypatch.setattr(socket, "getaddrinfo", none)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "none")
    t = time.perf_counter()
    status, out, err = fips(f"compress vit_tiny_patch16_224 --out x --data {tiny/'images'}")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "pass a file of them with --dense" in err
    assert time.perf_counter() - t < 10 and not list(Path().iterdir())
