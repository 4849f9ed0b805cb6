"""The command `fips`: results, purity of stdout, bad input, interruption, other models."""
import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fips_nb.run import cli, commands
from fips_nb.store import hub, timm_folders
from fips_nb import pipeline
from fips_nb.share.budgets import PRESETS
from fips_nb.data.demo import demo_images, demo_vit
from fips_nb.store.codes import dense_bytes
from fips_nb.sparse_factors import factor_layers

DATA = os.environ.get("FIPS_NB_DATA")
QUICK = "--distill-epochs 0 --n-calib 200 --levels 15".split()
TINY = "test_vit"  # timm's smallest vision transformer: 64 wide, 160 pixels


@pytest.fixture
def fips(capsys, monkeypatch, tmp_path):
    "Run the command in an empty folder: (status, stdout, stderr)."
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = cli.main([str(w) for w in words])
        return (status, *capsys.readouterr())
    return run


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory):
    "A compressed demo, and what the command said."
    out = tmp_path_factory.mktemp("cli")/"small"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["compress", "demo-vit", "--out", str(out), "--json", *QUICK]) == 0
    return out, json.loads(said.getvalue())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A small timm model with random weights in a file, and a folder of pictures."
    d = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_file(timm.create_model(TINY, num_classes=7).state_dict(), d/"w.safetensors")
    for i in range(14):
        picture(d/"images"/f"{i % 7}"/f"{i}.png", i)
    return d


def picture(path, seed=0):
    "A file with a random image of 200 x 180 pixels."
    from torchvision.transforms.functional import to_pil_image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(seed))
    to_pil_image(pixels).resize((200, 180)).save(path)


def without_news(err):
    "stderr without the line that says what will be done and how long it takes."
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("fips: compressing "))


def refused(result, *words, status=2):
    "One helpful line, nothing on stdout, no traceback."
    err = without_news(result[2])
    assert result[0] == status and result[1] == ""
    assert err.startswith("fips: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for w in words:
        assert w in err, (w, err)
    assert not Path("x").exists() and not Path("x.state").exists()


# ---- results ----

def test_compress_says_what_was_written(demo_out):
    out, said = demo_out
    assert said["out"] == str(out)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "layers.png", "model.safetensors"]
    assert not Path(f"{out}.state").exists()
    assert said["bytes"] == (out/"model.safetensors").stat().st_size
    assert said["dense_bytes"] == dense_bytes(demo_vit()) > said["dense_bytes_16"] > said["bytes"]
    assert .49 < said["mlp_budget"] <= .5 and .6 < said["model_ratio"] < .7
    assert 0 < sum(said["seconds_by_phase"].values()) <= said["seconds"] + .1
    layers = factor_layers(hub.load(out)).values()
    bases = {id(f.U): f.U.numel() for f in layers}
    kept = sum(int((f.V != 0).sum()) for f in layers) + sum(bases.values())
    assert said["mlp_params"] == kept
    assert said["mlp_budget"] == pytest.approx(kept/said["mlp_dense_params"])
    assert (said["n_layers"], said["n_bases"]) == (len(layers), len(bases))


def test_eval_is_the_accuracy_of_what_was_written(fips, demo_out):
    status, out, err = fips("eval", demo_out[0], "--json")
    said = json.loads(out)
    x, y = demo_images("test")
    with torch.no_grad():
        right = [(m(x).argmax(1) == y).float().mean().item()
                 for m in (hub.load(demo_out[0]), demo_vit())]
    assert (status, err) == (0, "") and said["n"] == 797
    assert said["top1"] == pytest.approx(right[0], abs=1e-6)
    assert said["dense"]["top1"] == pytest.approx(right[1], abs=1e-6)
    assert said["difference"] == pytest.approx(right[0] - right[1], abs=1e-6)
    assert said["interval"][0] < said["top1"] < said["interval"][1]
    assert said["ms_per_image"] > 0 and said["bytes"] == demo_out[1]["bytes"]


def test_eval_of_a_dense_model(fips):
    said = json.loads(fips("eval", "demo-vit", "--json")[1])
    assert said["top1"] > .98 and "dense" not in said
    assert said["bytes"] == dense_bytes(demo_vit()) == pytest.approx(2*said["bytes_16"], rel=1e-3)


@pytest.mark.parametrize("value", ["x", None, 1.5, [], -10**9])
def test_info_of_a_report_that_says_nonsense(demo_out, tmp_path, value):
    folder = shutil.copytree(demo_out[0], tmp_path/"m")
    config = json.loads((folder/"config.json").read_text())
    config["report"]["model_params"] = value
    (folder/"config.json").write_text(json.dumps(config))
    said = commands.info(folder)
    assert said["model_params"] == value and "bits" not in said


def test_info_is_the_report(fips, demo_out):
    said = json.loads(fips("info", demo_out[0], "--json")[1])
    assert len(said["layers"]) == 40 and said["mlp_budget"] == demo_out[1]["mlp_budget"]
    assert said["config"]["levels"] > 0
    status, out, err = fips("info", demo_out[0], "--layers")
    assert (status, err) == (0, "")
    assert sum(line.strip().startswith("blocks.") for line in out.splitlines()) == 40
    assert f"{said['bytes']:,}" in out
    status, short, err = fips("info", demo_out[0])
    assert (status, err) == (0, "") and len(short.splitlines()) < 20
    assert all(name in short for name in ("fc1", "fc2", "errors"))


def test_people_read_the_same_numbers(fips):
    out = fips("compress", "demo-vit", "--out", "x", "--preset", "svd", *QUICK)[1]
    said = json.loads(fips("info", "x", "--json")[1])
    for k in ("mlp_params", "mlp_dense_params", "bytes"):
        assert f"{said[k]:,}" in out
    dense = demo_vit()
    for n in (dense_bytes(dense), dense_bytes(dense, torch.float16)):
        assert f"{n:,}" in out
    out = fips("eval", "x")[1]
    ev = json.loads(fips("eval", "x", "--json")[1])
    for p in (ev["top1"], ev["dense"]["top1"]):
        assert f"{100*p:.2f} %" in out
    assert "dense demo-vit" in out
    assert f"{ev['bytes']:,}" in out and f"{ev['dense']['dense_bytes']:,}" in out


def test_reports_keep_long_names_and_fit_100_columns(fips):
    name = "a-folder-with-a-name-of-more-than-24-characters"
    outs = [fips("compress", "demo-vit", "--out", name, "--preset", "svd", *QUICK)[1]]
    outs += [fips(*words)[1] for words in (["eval", name], ["info", name])]
    for out in outs:
        assert name in out and max(map(len, out.splitlines())) <= 100 + len(name)
    assert outs[1].splitlines()[1].startswith(f"{name}  ")


@pytest.mark.parametrize("words", [["compress", "demo-vit", "--out", "x", *QUICK],
                                   ["eval", "demo-vit"]])
def test_json_is_one_object_whatever_libraries_print(fips, monkeypatch, words):
    where = (pipeline, "collect_moments") if words[0] == "compress" else (commands, "latency")
    run = getattr(*where)

    def noisy(*a, **k):
        print("noise")
        return run(*a, **k)
    monkeypatch.setattr(*where, noisy)
    status, out, err = fips(*words, "--json")
    assert status == 0 and out.count("\n") == 1 and isinstance(json.loads(out), dict)
    assert without_news(err) == "noise\n"


def test_the_expected_time_is_said_before_the_start(fips):
    _, out, err = fips("compress", "demo-vit", "--out", "x", "--preset", "svd", *QUICK)
    news = err.splitlines()
    assert len(news) == 1 and news[0].startswith("fips: compressing demo-vit by svd")
    assert "200 images" in news[0] and "about" in news[0] and "fips: " not in out


def test_options_reach_the_pipeline(fips):
    words = "--sparsity .6 --group-size 5 --seed 3 --dtype float32 --budget .3 --json".split()
    json.loads(fips("compress", "demo-vit", "--out", "x", *words, *QUICK)[1])
    said = json.loads(fips("info", "x", "--json")[1])
    assert said["config"]["sparsity"] == .6 and len({la["group"] for la in said["layers"]}) == 4
    assert said["seed"] == 3 and said["budget"] == .3
    layers = factor_layers(hub.load("x")).values()
    assert any(not torch.equal(f.V, f.V.half().float()) for f in layers)


def test_the_rest_is_rounded_unless_it_is_kept(fips):
    words = ["compress", "demo-vit", "--preset", "svd", *QUICK]
    a = json.loads(fips(*words, "--out", "a", "--json")[1])
    b = json.loads(fips(*words, "--out", "b", "--keep-float32", "--json")[1])
    x = demo_vit().pos_embed
    assert torch.equal(hub.load("b").pos_embed, x)
    assert torch.equal(hub.load("a").pos_embed, x.half().float())
    assert a["bytes"] < b["bytes"]


def test_python_and_the_command_line_agree(fips):
    "One function behind both: the same names, the same defaults, the same weights."
    fips("compress", "demo-vit", "--out", "a", "--preset", "svd", "--n-calib", "100")
    said = commands.compress("demo-vit", out="b", preset="svd", n_calib=100).report
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads(json.dumps(said)) == said
    for kind in (commands.CompressOptions, commands.FitOptions, commands.EvaluateOptions):
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    with pytest.raises(ValueError, match="nearest are n_calib"):
        commands.compress("demo-vit", out="c", ncalib=100)


def test_presets_of_help_are_those_of_the_package(fips):
    said = " ".join(fips("compress", "--help")[1].split()).replace("- ", "-")  # of words broken at a hyphen
    assert f"method: {', '.join(['rounding', *PRESETS, 'auto'])} (default: auto for --bits" in said


def test_help_is_quick_and_light():
    t = time.perf_counter()
    call = ("import sys; from fips_nb.run.cli import main; s = main(['--help']); "
            "print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules))); sys.exit(s)")
    res = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert res.returncode == 0 and res.stdout.strip().endswith("[]")
    assert "fips compress demo-vit --out" in res.stdout
    assert time.perf_counter() - t < 5
    call = "import sys; from fips_nb.run.cli import main; sys.exit(main())"
    res = subprocess.run([sys.executable, "-c", call, "compress"], capture_output=True, text=True)
    assert res.returncode == 2 and res.stderr.startswith("fips: error: ")
    assert res.stderr.count("\n") == 1 and not res.stdout


@pytest.mark.parametrize("command", ["compress", "plan", "eval", "compare", "info", "bench", "export"])
def test_every_command_has_help_with_examples(fips, command):
    status, out, _ = fips(command, "--help")
    assert status == 0 and f"fips {command} " in out and "--json" in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(fips):
    import fips_nb
    assert fips("--version") == (0, f"fips_nb {fips_nb.__version__}\n", "")


# ---- bad input ----

@pytest.mark.parametrize("words, said", [
    ("compress demo-vti", "nearest are demo-vit"),
    ("compress vit_tiny_patch16_22 --calib x", "vit_tiny_patch16_224"),
    ("compress vit_tiny_patch16_224.none --calib x", "augreg_in21k_ft_in1k"),
    ("compress ./no_dir --calib x", "no folder ./no_dir"),
    ("compress demo-vit --budget 0", "outside (0, 1]"),
    ("compress demo-vit --budget 1.5", "outside (0, 1]"),
    ("compress demo-vit --budget -1", "outside (0, 1]"),
    ("compress demo-vit --budget nan", "outside (0, 1]"),
    ("compress demo-vit --budget half", "'half' is no number; write it like 0.5"),
    ("compress demo-vit --budget 1e-5", "smallest possible"),
    ("compress demo-vit --budget .001 --preset svd", "smallest possible"),
    ("compress demo-vit --sparsity 1.0", "outside [0, 1)"),
    ("compress demo-vit --sparsity -.1", "outside [0, 1)"),
    ("compress demo-vit --preset svd --sparsity .5", "needs fit='als'"),
    ("compress demo-vit --preset fisp", "there are rounding, fips-als, "),
    ("compress demo-vit --preset fips", "unknown preset 'fips'; there are rounding, fips-als, "),
    ("compress demo-vit --preset sparse", "unknown preset 'sparse'; there are rounding, fips-als, "),
    ("compress demo-vit --group-size 0", "less than 1"),
    ("compress demo-vit --group-size some", "'auto', 'all' or 'stage'"),
    ("compress demo-vit --n-calib 0", "less than 1"),
    ("compress demo-vit --batch-size 0", "less than 1"),
    ("compress demo-vit --distill-epochs -1", "less than 0"),
    ("compress demo-vit --match-epochs 1", "unrecognized arguments"),
    ("compress demo-vit --dtype int8", "float16"),
    ("compress demo-vit --device moon", "'moon' cannot be used"),
    ("compress demo-vit --calib nowhere", "no folder nowhere"),
    ("compress demo-vit --weights nowhere", "no weights file nowhere"),
    ("compress demo-vit --stream", "--distill-epochs 0"),
    ("compress vit_tiny_patch16_224", "--calib FOLDER"),
    ("compress demo-vit --budgets .5", "unrecognized arguments"),
    ("eval vit_tiny_patch16_224", "--data FOLDER"),
    ("eval some/where", "no folder"),
    ("eval demo-vti", "nearest are demo-vit"),
    ("info nowhere", "no folder nowhere"),
    ("bench nowhere/there/x", "no folder"),
    ("bench demo-vit --batch 0", "less than 1"),
    ("", "required"),
    ("shrink x", "invalid choice"),
])
def test_bad_words(fips, words, said):
    words = words.split()
    refused(fips(*words, *(["--out", "x"] if words[:1] == ["compress"] else [])), said)


def test_bad_calibration_folders(fips, tmp_path):
    def run(d):
        return fips("compress", "demo-vit", "--out", "x", "--calib", d, *QUICK)
    (tmp_path/"empty").mkdir()
    refused(run("empty"), "no images in empty")
    (tmp_path/"gone").mkdir()
    (tmp_path/"gone/labels.csv").write_text("file,label\n77.png,1\n")
    refused(run("gone"), "77.png")
    for i in range(20):
        picture(tmp_path/"some"/f"{i:02}.png", i)
    for i in range(3):
        (tmp_path/"some"/f"{i:02}.png").write_bytes(b"x")
    refused(run("some"), "3 of the first 20 images are unreadable", "00.png")
    (tmp_path/"some/00.png").unlink()
    (tmp_path/"some/01.png").unlink()
    status, out, err = run("some")
    err = without_news(err)
    assert status == 0 and err.startswith("fips: warning: left out 1 of 18 images")
    assert err.count("\n") == 1


@pytest.mark.parametrize("change, said", [
    (lambda sd: sd.pop("blocks.3.mlp.fc1.weight"), "1 keys missing (blocks.3.mlp.fc1.weight)"),
    (lambda sd: sd.update(more=torch.ones(1)), "1 keys unexpected (more)"),
    (lambda sd: sd.update({"norm.bias": torch.ones(3)}), "norm.bias (3,) instead of (40,)"),
    (lambda sd: sd["blocks.2.mlp.fc2.weight"].fill_(float("nan")), "blocks.2.mlp.fc2"),
    (lambda sd: sd["blocks.1.attn.qkv.weight"].fill_(float("inf")), "blocks.1.attn.qkv"),
])
def test_broken_weights(fips, change, said):
    sd = demo_vit().state_dict()
    change(sd)
    save_file(sd, "w.safetensors")
    words = ["compress", "demo-vit", "--out", "x", "--weights", "w.safetensors", *QUICK]
    refused(fips(*words), said)


def test_files_that_are_no_weights(fips):
    Path("text.pt").write_text("hello")
    Path("text.safetensors").write_text("hello")
    torch.save([1, 2], "list.pt")
    torch.save(demo_vit(), "model.pt")
    for f, said in (("text.pt", "text.pt"), ("text.safetensors", "cannot be read as safetensors"),
                    ("list.pt", "no state dict"), ("model.pt", "state_dict()")):
        refused(fips("eval", "demo-vit", "--weights", f), said)


def test_model_without_mlps(fips, tiny):
    save_file(timm.create_model("resnet18").state_dict(), "r.safetensors")
    words = ["--weights", "r.safetensors", "--calib", tiny/"images"]
    refused(fips("compress", "resnet18", "--out", "x", *words), "no MLP blocks in ResNet")


def test_labels_outside_the_classes(fips, tmp_path):
    for i in range(12):
        picture(tmp_path/"images"/f"{i:02}"/"a.png", i)
    said = "label 11 is outside the model's classes 0..9"
    refused(fips("eval", "demo-vit", "--data", "images"), said)


def test_data_without_labels(fips, tmp_path):
    picture(tmp_path/"images/a.png")
    refused(fips("eval", "demo-vit", "--data", "images"), "no labels")


def test_download_without_network(fips, tiny, monkeypatch):
    import socket

    from huggingface_hub import constants

    def none(*a, **k):
        raise socket.gaierror("no network")
    monkeypatch.setattr(socket, "getaddrinfo", none)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "none")
    t = time.perf_counter()
    words = ["compress", "vit_tiny_patch16_224", "--out", "x", "--calib", tiny/"images"]
    refused(fips(*words), "--weights")
    assert time.perf_counter() - t < 10


# ---- folders that exist, interruption, full disks ----

def test_output_that_exists(fips, monkeypatch):
    words = ["compress", "demo-vit", "--out", "there", *QUICK]
    monkeypatch.setattr(pipeline, "compress", None)  # refused before any work
    Path("there").mkdir()
    Path("there/mine.txt").write_text("mine")
    refused(fips(*words), "--overwrite")
    refused(fips(*words, "--overwrite"), "mine.txt")
    Path("file").write_text("mine")
    refused(fips("compress", "demo-vit", "--out", "file", "--overwrite"), "file")
    Path("z.state").mkdir()
    Path("z.state/a.safetensors").write_text("mine")
    refused(fips("compress", "demo-vit", "--out", "z"), "z.state", "something else")
    for f in ("there/mine.txt", "file", "z.state/a.safetensors"):
        assert Path(f).read_text() == "mine"


def test_a_plan_does_not_replace_other_files(fips):
    Path("notes.csv").write_text("mine")
    words = ["plan", "demo-vit", "--target-ratio", ".6", "--n-calib", "50", "--out"]
    refused(fips(*words, "notes.csv"), "notes.csv", "no plan")
    refused(fips(*words, "nowhere/plan.json"), "no folder")
    assert Path("notes.csv").read_text() == "mine"


def test_overwrite_replaces_a_model(fips):
    words = ["compress", "demo-vit", "--out", "there", "--preset", "svd", *QUICK]
    assert fips(*words)[0] == 0 and fips(*words)[0] == 2
    before = json.loads(fips("info", "there", "--json")[1])
    assert fips(*words, "--budget", ".3", "--overwrite")[0] == 0
    assert json.loads(fips("info", "there", "--json")[1])["bytes"] < before["bytes"]
    assert len(list(Path("there").iterdir())) == 4


def stop_at(monkeypatch, n, error):
    "Let the fit of group `n` (from 1) fail with `error`."
    fit, calls = pipeline.fit_plan, []

    def failing(*a, **k):
        calls.append(0)
        if len(calls) == n:
            raise error
        return fit(*a, **k)
    monkeypatch.setattr(pipeline, "fit_plan", failing)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The weights of a run that nothing stopped."
    out = tmp_path_factory.mktemp("whole")/"whole"
    words = ["compress", "demo-vit", "--out", str(out), "--group-size", "5", *QUICK]
    assert cli.main(words) == 0
    return load_file(out/"model.safetensors")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "interrupted"), (FULL, 1, "the disk is full")])
def test_a_stopped_run_resumes_bit_for_bit(fips, whole, monkeypatch, error, status, said):
    words = ["compress", "demo-vit", "--out", "x", "--group-size", "5", *QUICK]
    with monkeypatch.context() as m:
        stop_at(m, 3, error)
        got = fips(*words)
    err = without_news(got[2])
    assert got[:2] == (status, "") and said in err and err.count("\n") == 1
    assert err.rstrip().endswith("go on with: fips " + " ".join(words) + " --resume")
    kept = {p.name for p in Path("x.state").iterdir()}
    assert not Path("x").exists() and {"group-0.safetensors", "group-1.safetensors"} < kept
    status, _, err = fips(*words, "--resume", "--budget", ".4")
    assert status == 2 and "settings differ" in err
    with monkeypatch.context() as m:
        stop_at(m, 3, RuntimeError("only two groups were left to fit"))
        assert fips(*words, "--resume")[0] == 0
    assert not Path("x.state").exists()
    got = load_file("x/model.safetensors")
    assert got.keys() == whole.keys() and all(torch.equal(got[k], whole[k]) for k in whole)


def test_an_interrupted_run_is_dropped_only_when_asked(fips, monkeypatch):
    words = ["compress", "demo-vit", "--out", "x", "--preset", "svd", *QUICK]
    with monkeypatch.context() as m:
        stop_at(m, 5, KeyboardInterrupt())
        assert fips(*words)[0] == 130
    Path("x.state/notes.txt").write_text("mine")
    held = sorted(p.name for p in Path("x.state").iterdir())
    for other in ([], ["--seed", "1"]):
        status, _, err = fips(*words, *other)
        assert status == 2 and "holds an interrupted run" in err and "--resume" in err and "--overwrite" in err
    assert sorted(p.name for p in Path("x.state").iterdir()) == held
    words.append("--overwrite")
    with monkeypatch.context() as m:
        stop_at(m, 40, RuntimeError("boom"))
        assert "RuntimeError: boom" in fips(*words)[2]  # all forty are fitted anew
    assert fips(*words)[0] == 0
    assert [p.name for p in Path("x.state").iterdir()] == ["notes.txt"]  # not ours, so it stays


def test_resume_with_nothing_to_resume(fips):
    words = ["compress", "demo-vit", "--out", "x", "--preset", "svd", "--resume", *QUICK]
    status, out, err = fips(*words)
    assert status == 0 and "nothing to resume" in err


def test_interrupted_while_saving_nothing_is_half_written(fips, monkeypatch):
    def stop(*a, **k):
        raise KeyboardInterrupt
    words = ["compress", "demo-vit", "--out", "x", "--preset", "svd", *QUICK]
    with monkeypatch.context() as m:
        m.setattr(timm_folders, "write_tensors", stop)
        assert fips(*words)[0] == 130
    assert [p.name for p in Path(".").iterdir()] == ["x.state"]
    assert fips(*words, "--resume")[0] == 0 and [p.name for p in Path(".").iterdir()] == ["x"]


def test_debug_shows_the_traceback(fips, monkeypatch):
    monkeypatch.setenv("FIPS_DEBUG", "1")
    _, _, err = fips("info", "nowhere")
    assert "Traceback" in err and err.splitlines()[-1].startswith("fips: error: ")


# ---- other models ----

def test_a_timm_model_from_a_file(fips, tiny):
    words = ["--weights", tiny/"w.safetensors", "--calib", tiny/"images", "--distill-epochs", "1"]
    status, out, err = fips("compress", TINY, "--out", "x", *words, "--budget", ".6", "--json")
    assert status == 0, err
    said = json.loads(out)
    assert .55 < said["mlp_budget"] <= .6 and said["n_calib"] == 14
    assert hub.load("x").num_classes == 7
    data = ["--data", tiny/"images", "--json"]
    ev = json.loads(fips("eval", "x", "--weights", tiny/"w.safetensors", *data)[1])
    assert ev["n"] == 14 and ev["dense"]["dense_bytes"] == said["dense_bytes"]
    assert 0 <= ev["agreement"] <= 1
    alone = json.loads(fips("eval", "x", *data)[1])
    assert alone["top1"] == ev["top1"] and "dense" not in alone


def test_weights_of_another_format_and_wrapping(fips, tiny):
    sd = load_file(tiny/"w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in sd.items()}}, "w.pth")
    words = ["eval", TINY, "--data", tiny/"images", "--json", "--weights"]
    a, b = (json.loads(fips(*words, w)[1]) for w in (tiny/"w.safetensors", "w.pth"))
    assert a["loss"] == b["loss"] and a["n"] == 14


def test_a_vision_model_is_planned_and_exported(fips, tiny):
    words = ["--n-calib", "80", "--batch-size", "8", "--target-ratio", ".6", "--levels", "10"]
    status, out, err = fips("compress", "demo-vit", *words, "--distill-epochs", "0",
                            "--out", "small", "--json")
    assert status == 0, err
    out = json.loads(out)
    assert out["model_ratio"] <= .6 and out["plan"]["trials"]
    assert json.loads(fips("info", "small", "--json")[1])["config"]["levels"] == 10
    status, text, err = fips("export", "small", "--out", "dense")
    assert status == 0 and "plain weights" in text, err
    model = demo_vit(pretrained=False)
    model.load_state_dict(load_file("dense/model.safetensors"))
    x = demo_images("test")[0][:4]
    torch.testing.assert_close(model(x), hub.load("small")(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not DATA, reason="FIPS_NB_DATA is not set")
def test_the_real_model_becomes_smaller(fips):
    words = ["--weights", f"{DATA}/vit_tiny/vit_tiny_patch16_224.safetensors", "--calib",
             f"{DATA}/imagenet_calib", "--preset", "svd", "--n-calib", "16"]
    status, out, err = fips("compress", "vit_tiny_patch16_224", *words, "--out", "x", "--json")
    said = json.loads(out)
    assert (status, without_news(err)) == (0, "")
    assert said["bytes"] < .72*said["dense_bytes_16"] and said["mlp_budget"] <= .5
    assert hub.load("x")(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_eval_says_which_classes_it_takes_a_few_folders_for(fips, tiny):
    for i in range(6): picture(Path(f"few/{'cat' if i % 2 else 'dog'}/{i}.png"), i)
    words = ["eval", TINY, "--weights", tiny/"w.safetensors", "--data"]
    status, out, err = fips(*words, "few")
    assert status == 0, err
    assert "the 2 classes of the data are taken for the first of the model's 7" in " ".join(out.split())
    assert "taken for" not in fips(*words, tiny/"images")[1]
