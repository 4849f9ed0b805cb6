"""Runs that are interrupted and resumed, and the files that they leave."""
import re

import pytest
import torch
from small import bits, images, make, same

from fips_nb.store.disk import replacing
from fips_nb.grouping import find_mlps
from fips_nb.share.pipeline import compress
from fips_nb.sparse_factors import factor_layers
from fips_nb.store.state import Progress, digest, open_state, read_meta, read_run, write_tensors
from fips_nb.share.statistics import collect_moments

pytestmark = pytest.mark.usefixtures("one_thread", "timed_once") # so that forwards can be counted


class Stop(KeyboardInterrupt): pass


class StopMoments(dict):
    "Moments that interrupt at look-up number `left`, in the middle of the fits."
    left = 0

    def __getitem__(self, k):
        self.left -= 1
        if self.left == 0: raise Stop
        return super().__getitem__(k)


def stop_in_forward(model, n):
    "Interrupt in forward number `n` of `model` and its copies; the handle of the hook, the count."
    calls = []
    def hook(*_): # copies of the model share this function
        calls.append(0)
        if len(calls) == n: raise Stop
    return model.register_forward_pre_hook(hook), calls


CASES = {
    "fips-als": dict(levels=3, distill_epochs=3, group_size=1),
    "gfm": dict(distill_epochs=3),
    "pruning": dict(levels=2, distill_epochs=2, group_size=1),
    "aafm": {},
    "fips-paper": dict(block_steps=4, distill_epochs=2, group_size=1),
}
KW = dict(dtype=torch.float32)


def without_seconds(report): return {k: v for k, v in report.items() if "seconds" not in k}


def check_resumed(run, model, before, whole, state):
    "The interrupted run has left the model alone, and goes on to the same result."
    assert same(before, bits(model)) and not factor_layers(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not list(state.glob("*.tmp"))
    written = lambda p: p.stat().st_mtime_ns
    done = {p: written(p) for p in state.glob("group-*.safetensors")}
    again = run(state=state, resume=True)
    assert same(bits(whole.model), bits(again.model))
    assert all(written(p) == t for p, t in done.items()) # nothing was done twice
    assert without_seconds(whole.report) == without_seconds(again.report)


@pytest.mark.parametrize("preset", CASES)
@pytest.mark.parametrize("part", [0., .3, .6, .8, 1.])
def test_a_run_stopped_in_a_forward_resumes_bit_for_bit(preset, part, tmp_path):
    model, bs = make(), images(n=3)
    before = bits(model)
    run = lambda **kw: compress(model, bs, .5, preset, **KW, **CASES[preset], **kw)
    handle, calls = stop_in_forward(model, 0)
    whole = run()
    handle.remove()
    handle, _ = stop_in_forward(model, max(1, round(part*len(calls))))
    with pytest.raises(Stop): run(state=tmp_path)
    handle.remove()
    check_resumed(run, model, before, whole, tmp_path)


@pytest.mark.parametrize("preset, n", [("fips-als", 1), ("fips-als", 3), ("fips-als", 4),
                                       ("pruning", 2), ("pruning", 3), ("aafm", 3), ("gfm", 6),
                                       ("gfm", 8)])
def test_a_run_stopped_in_a_fit_resumes_bit_for_bit(preset, n, tmp_path):
    model, bs = make(), images(n=3)
    before = bits(model)
    linears = [l for m in find_mlps(model) for l in m.linears]
    moments = StopMoments(collect_moments(model, bs, linears))
    run = lambda **kw: compress(model, bs, .5, preset, moments=moments, **KW, **CASES[preset], **kw)
    whole = run()
    moments.left = n
    with pytest.raises(Stop): run(state=tmp_path)
    check_resumed(run, model, before, whole, tmp_path)


def test_the_passes_of_distillation_are_not_repeated(tmp_path):
    model, bs = make(), images(n=3)
    run = lambda **kw: compress(model, bs, .5, **KW, **CASES["fips-als"], **kw)
    handle, calls = stop_in_forward(model, 0)
    run()
    handle.remove()
    handle, _ = stop_in_forward(model, len(calls)) # the very last
    with pytest.raises(Stop): run(state=tmp_path)
    handle.remove()
    mark = read_run(tmp_path).run
    assert Progress(tmp_path/"distillation.safetensors", mark).load()[1] == 2
    handle, again = stop_in_forward(model, 0)
    run(state=tmp_path, resume=True)
    handle.remove()
    assert len(calls) - len(again) == 3 + 2*3 # statistics, and two passes over three batches


@pytest.mark.parametrize("preset", ["fips-als", "fips-paper"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_parts_are_made_again(preset, damage, tmp_path):
    model, bs = make(), images(n=3)
    run = lambda **kw: compress(model, bs, .5, preset, **KW, **CASES[preset], **kw)
    whole = run(state=tmp_path)
    for p in tmp_path.glob("*.safetensors"):
        old = p.read_bytes()
        flipped = old[:-1] + bytes([old[-1] ^ 1])
        p.write_bytes(dict(cut=old[:len(old)//2], flip=flipped, empty=b"")[damage])
    with pytest.warns(UserWarning, match="made again"): again = run(state=tmp_path, resume=True)
    assert same(bits(whole.model), bits(again.model))


OTHERS = [("model", {}), ("data", {}), ("settings", dict(budget=.4)), ("settings", dict(seed=1)),
          ("settings", dict(levels=2)), ("settings", dict(group_size=2)),
          ("settings", dict(dtype=torch.bfloat16)),
          ("settings", dict(filter_fn=lambda n, m: "1" in n)), ("settings", dict(moments={}))]


@pytest.mark.parametrize("what, kw", OTHERS, ids=[f"{w}-{'-'.join(kw)}" for w, kw in OTHERS])
def test_another_run_does_not_resume(what, kw, tmp_path):
    args = dict(levels=1, distill_epochs=0, group_size=1, filter_fn=lambda n, m: "0" in n)
    if "moments" in kw: # those of other data
        linears = [l for m in find_mlps(make()) for l in m.linears]
        kw = dict(moments=collect_moments(make(), images(seed=7), linears))
    compress(make(), images(), state=tmp_path, **args)
    data = images()
    if what == "data": data[-1][-1, 0, 0, 0] += .1 # a single value of the last image
    with pytest.raises(ValueError, match=f"cannot resume.*{what}"):
        compress(make(seed=what == "model"), data, state=tmp_path, resume=True, **args | kw)


def test_without_resume_the_state_starts_afresh(tmp_path):
    def run(seed, **kw):
        kw |= dict(levels=1, distill_epochs=0, seed=seed)
        return bits(compress(make(), images(), **kw).model)
    run(1, state=tmp_path)
    assert same(run(0, state=tmp_path), run(0))


def test_other_files_in_the_state_folder_stay(tmp_path):
    (tmp_path/"weights.safetensors").write_bytes(b"mine")
    (tmp_path/"notes.txt").write_text("mine")
    for resume in (False, False, True):
        compress(make(), images(), levels=1, distill_epochs=0, state=tmp_path, resume=resume)
    assert (tmp_path/"weights.safetensors").read_bytes() == b"mine"
    assert (tmp_path/"notes.txt").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                   torch.bool])
def test_parts_keep_every_dtype(dtype, tmp_path):
    x = {"b": torch.arange(6).view(2, 3).T.to(dtype), "a": torch.tensor(1).to(dtype)}
    with open_state(tmp_path, {}, []) as s: s.part("group-0", lambda: x)
    with open_state(tmp_path, {}, [], resume=True) as s: got = s.part("group-0", lambda: 1/0)
    assert same(got, x) and got["a"].dtype == dtype


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path/"x.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, epoch=1)
    with pytest.raises(Stop), replacing(path) as tmp:
        tmp.write_bytes(b"half")
        raise Stop
    assert read_meta(path) == {"epoch": "1"} and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_digest_sees_names_shapes_and_values():
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    with torch.no_grad():
        for m in (a, b):
            for p in m.parameters(): p.zero_()
    assert digest(a) != digest(b) and re.fullmatch("[0-9a-f]{64}", digest(a))
