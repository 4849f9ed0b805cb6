"""Rows of results/ in a small repository: what is kept, when it is refused, and how it follows code that moves."""
import json, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT/"tools"), str(ROOT/"scripts")]

import results
from fips_nb.measure import records
from fips_nb.measure.provenance import code_of
from fips_nb.measure.records import doubts, read, recall, record
from notebooks import definitions

SOLVER = '"A module."\nfrom .sizes import SIZE\ndef _half(x): return x/2\ndef fit(x): return _half(x)*SIZE\n'
PAGE = "from fips_nb.solver import fit\ndef measure(x): return dict(y=fit(x))"


def notebook(source, output=()):
    return json.dumps(dict(cells=[dict(cell_type="code", source=[source], outputs=[*output])]))


class Repository:
    "A repository with one module, one notebook that measures with it, and a file of results."
    def __init__(self, root):
        self.root, self.n = root, 0
        self.put({"settings.ini": "", "fips_nb/__init__.py": "", "fips_nb/sizes.py": "SIZE = 3\n",
                  "fips_nb/solver.py": SOLVER, "nbs/page.ipynb": notebook(PAGE)})
        self.git("init", "-q")
        self.commit()

    def git(self, *args):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *args], cwd=self.root, check=True, capture_output=True, text=True).stdout

    def put(self, files):
        "Write files; None removes one."
        for name, text in files.items():
            path = self.root/name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if text is None else path.write_text(text)
        code_of.__globals__["_modules"].cache_clear()
        code_of.__globals__["_code"].cache_clear()

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-qm", "x")
        return self.git("rev-parse", "HEAD").strip()

    def record(self):
        self.n += 1
        return record("rows", dict(n=1), lambda: dict(y=self.n), "nbs/page:measure")


@pytest.fixture
def repo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = type("Spec", (), dict(origin=str(tmp_path/"fips_nb/__init__.py")))
    monkeypatch.setattr(records, "find_spec", lambda name: place)
    return Repository(tmp_path)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["results.py", *args])
    results.main()


def test_a_row_names_its_code(repo):
    row = repo.record()
    assert row["made"]["commit"] == repo.git("rev-parse", "--short=12", "HEAD").strip()
    assert set(read("rows")["code"][row["made"]["code"]]) == {"nbs/page", "sizes", "solver"}
    assert repo.record() == row  # not measured again
    repo.put({"fips_nb/sizes.py": "SIZE = 4 # a constant\n"})
    assert [o["key"] for o in doubts("rows")["stale"]] == [dict(n=1)]


@pytest.mark.parametrize("name", ["fips_nb/solver.py", "nbs/page.ipynb", "scripts/new.py"])
def test_uncommitted_code_is_refused(repo, name):
    repo.put({name: notebook("1 + 1") if name.endswith("ipynb") else "X = 1\n"})
    repo.put({"fips_nb/sizes.py": "SIZE = 3\n"})
    with pytest.raises(ValueError, match=f"{name} has changes that are not committed"):
        record("rows", dict(n=1), dict, "sizes.SIZE")
    assert record("rows", dict(n=1), dict, "sizes.SIZE", folder=repo.root/"elsewhere")["key"] == dict(n=1)


def test_outputs_and_results_are_no_code(repo):
    repo.put({"nbs/page.ipynb": notebook(PAGE, ["a figure"]), "results/other.json": "{}"})
    assert repo.record()["y"] == 1


def test_another_fips_nb_is_refused(repo, monkeypatch):
    monkeypatch.setattr(records, "find_spec", __import__("importlib.util").util.find_spec)
    with pytest.raises(ValueError, match="which is not this repository"): repo.record()


def test_rows_of_uncommitted_code_are_measured_again(repo):
    row = repo.record()
    file = read("rows")
    file["rows"][0]["made"]["changed"] = True
    records.write("rows", file["rows"], file["code"])
    assert recall("rows")[0]["y"] == row["y"] and len(doubts("rows")["uncommitted"]) == 1
    assert repo.record()["y"] == 2 and not doubts("rows")["uncommitted"]


def test_code_that_moves_is_followed(repo, monkeypatch):
    row, before = repo.record(), repo.commit()
    repo.put({"fips_nb/solver.py": None, "fips_nb/new/deep.py": SOLVER.replace(".sizes", "..sizes").replace("_half", "half"),
              "nbs/page.ipynb": notebook(PAGE.replace("solver", "new.deep"))})
    run(monkeypatch, "--from", before, "--renamed", "solver._half=new.deep.half")
    found, = recall("rows")
    assert found["y"] == row["y"] and found["made"]["code"] != row["made"]["code"]
    assert not any(doubts("rows").values()) and list(read("rows")["code"]) == [found["made"]["code"]]


def test_code_that_changes_is_said(repo, monkeypatch):
    repo.record()
    before = repo.commit()
    repo.put({"fips_nb/sizes.py": "SIZE = 4\n"})
    run(monkeypatch, "--from", before)
    assert recall("rows")[0]["made"]["outdated"] == ["sizes"]
    assert [len(o) for o in doubts("rows").values()] == [0, 1, 0]
    repo.put({"fips_nb/sizes.py": "SIZE = 3\n"})
    run(monkeypatch)
    assert "outdated" not in recall("rows")[0]["made"]


def test_stale_rows_are_marked_without_a_commit(repo, monkeypatch):
    repo.record()
    repo.put({"fips_nb/sizes.py": "SIZE = 4\n"})
    run(monkeypatch)
    assert recall("rows")[0]["made"]["outdated"] == ["sizes"]
    repo.commit()
    assert repo.record()["y"] == 2 and not doubts("rows")["outdated"]


def test_a_row_that_was_stale_before_is_not_taken_over(repo, monkeypatch):
    repo.record()
    repo.put({"fips_nb/sizes.py": "SIZE = 4\n"})
    run(monkeypatch, "--from", repo.commit())
    assert recall("rows")[0]["made"]["outdated"] == ["sizes"]


def test_definitions_of_a_notebook():
    found = definitions("06_llm_experiments")
    assert found.Subject("a", None, None, None, None).key() == dict(model="a", windows=256, length=256, seed=0)
    assert not hasattr(found, "stories")
