"""The repository agrees with itself: generated files, versions, sidebar, direction of imports, layout of the code."""
import ast, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted((ROOT/"nbs").glob("*.ipynb"))
each_nb = pytest.mark.parametrize("path", NBS, ids=lambda o: o.stem)


def cells(path, kind=None):
    "The cells of a notebook as dicts whose source is one string."
    res = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for o in res: o["source"] = "".join(o["source"])
    return [o for o in res if kind in (None, o["cell_type"])]


def default_exp(path):
    "The module a notebook exports to, or None."
    found = [m[1] for o in cells(path, "code") if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", o["source"], re.M))]
    assert len(found) <= 1, f"{path.name} has {len(found)} default_exp cells"
    return found[0] if found else None


def order(path):
    "A notebook's place, its name: by number, then letter, then word; None for a page."
    return path.stem if re.match(r"\d+[a-z]?_", path.name) else None


def outputs(path):
    "Each output of a notebook with its text, images left out."
    for o in cells(path, "code"):
        for out in o["outputs"]:
            parts = [out.get("text", ""), *(v for k, v in out.get("data", {}).items() if not k.startswith("image"))]
            yield out, "\n".join(v if isinstance(v, str) else "".join(map(str, v)) for v in parts)


def settings():
    cfg = ConfigParser()
    cfg.read(ROOT/"settings.ini")
    return cfg["DEFAULT"]


def python(code, cwd=ROOT):
    "Run `code` in a fresh interpreter, without nbdev's marker for running tests."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    res = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout


@pytest.fixture
def project(tmp_path):
    "A copy of what nbdev reads and writes."
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml"): shutil.copy2(ROOT/name, tmp_path)
    skip = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", symlinks=True, ignore=skip)
    (tmp_path/"fips_nb").mkdir()
    shutil.copy2(ROOT/"fips_nb/__init__.py", tmp_path/"fips_nb")
    return tmp_path


# ---- generated files ----

@pytest.mark.sync
def test_export_leaves_no_diff(project):
    python("from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=project)
    want, have = ({o.name: o.read_text(encoding="utf-8") for o in (d/"fips_nb").glob("*.py")} for d in (project, ROOT))
    missing, extra = want.keys() - have.keys(), have.keys() - want.keys()
    differ = [k for k in want.keys() & have.keys() if want[k] != have[k]]
    behind = sorted(missing) + sorted(differ)
    assert not behind, f"fips_nb/ is behind the notebooks in {behind}: run `make export`"
    assert not extra, f"no notebook exports {sorted(extra)}: fips_nb/ is generated, remove them or write the notebook"
    assert (project/"pyproject.toml").read_text() == (ROOT/"pyproject.toml").read_text(), "nbdev rewrote pyproject.toml"


@pytest.mark.sync
def test_clean_leaves_no_diff(project):
    python("from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()", cwd=project)
    differ = [o.name for o in NBS if o.read_bytes() != (project/"nbs"/o.name).read_bytes()]
    assert not differ, f"{differ} hold execution counts or editor metadata: run `make clean-nbs`"


@pytest.mark.sync
def test_readme_is_the_index_notebook():
    res = subprocess.run([sys.executable, ROOT/"tools/readme.py", "--check"], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr


@pytest.mark.sync
def test_nbdev_yml_is_from_settings(project):
    python("from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()", cwd=project)
    for name in ("nbs/nbdev.yml", "_quarto.yml"):
        assert (project/name).read_text() == (ROOT/name).read_text(), f"{name} is not what settings.ini says"


# ---- package ----

def test_import_is_light():
    loaded = python("import sys, fips_nb; print(*sys.modules)").split()
    heavy = sorted({"torch", "timm", "numpy", "matplotlib", "transformers"} & set(loaded))
    assert not heavy, f"`import fips_nb` imports {heavy}: fips_nb/__init__.py imports when it is asked"


def test_first_import():
    got = python("from fips_nb import compress, load, save, evaluate; print(compress.__module__, save.__module__)")
    assert got.split() == ["fips_nb.commands", "fips_nb.hub"]
    assert "no attribute 'kompress'" in python("import fips_nb\ntry: fips_nb.kompress\nexcept AttributeError as e: print(e)")


def test_versions_agree():
    version = python("import fips_nb; print(fips_nb.__version__)").strip()
    assert version == settings()["version"], "settings.ini and fips_nb/__init__.py differ: run `make export`"
    first = re.search(r"^## (\S+)", (ROOT/"CHANGELOG.md").read_text(), re.M)[1]
    assert first == version, f"CHANGELOG.md begins with {first}, the package is at {version}"
    assert yaml.safe_load((ROOT/"CITATION.cff").read_text())["version"] == version


@each_nb
def test_default_exp_module_exists(path):
    name = default_exp(path)
    if order(path) is None: assert name is None, f"{path.name} is a page, not a module"
    else:
        assert name == path.stem.split("_", 1)[1], f"{path.name} exports to {name}.py: notebook and module share a name"
        assert (ROOT/f"fips_nb/{name}.py").exists(), f"fips_nb/{name}.py is missing: run `make export`"


# ---- structure ----

ORDERS = {default_exp(o): order(o) for o in NBS if default_exp(o)}
FOR_EXAMPLES = {"demo", "results"}  # every notebook may use them, but never in an exported cell


def imported_modules(tree):
    "The modules of this package that some code imports, by their short names."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [o.name for o in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["fips_nb" if node.level else "", node.module]))
            names = [f"fips_nb.{o.name}" for o in node.names] if base == "fips_nb" else [base]
        else: continue
        yield from (o.split(".")[1] for o in names if o.startswith("fips_nb."))


def parse(source):
    "The syntax tree of a cell without its magics; empty where it is no Python."
    try: return ast.parse("\n".join(o for o in source.splitlines() if not o.lstrip().startswith(("%", "!"))))
    except SyntaxError: return ast.parse("")


def is_export(cell): return bool(re.search(r"^#\|\s*export", cell["source"], re.M))


@each_nb
def test_imports_point_backwards(path):
    if order(path) is None: return
    for cell in cells(path, "code"):
        for name in imported_modules(parse(cell["source"])):
            if name not in ORDERS or (not is_export(cell) and name in FOR_EXAMPLES): continue
            ok = ORDERS[name] < order(path) or (name == default_exp(path) and not is_export(cell))
            assert ok, f"{path.name} imports fips_nb.{name} from {ORDERS[name]}: imports point backwards only"


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_modules_import_backwards_and_no_private_names(name):
    tree = ast.parse((ROOT/f"fips_nb/{name}.py").read_text(encoding="utf-8"))
    for dep in imported_modules(tree):
        if dep in ORDERS: assert ORDERS[dep] < ORDERS[name], f"{name} ({ORDERS[name]}) imports {dep} ({ORDERS[dep]})"
    ours = set(ORDERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fips_nb")):
            private = [o.name for o in node.names if o.name.startswith("_") and not o.name.startswith("__")]
            assert not private, f"{name} imports {private} from {node.module}: make it public, or keep it there"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert not node.attr.startswith("_"), f"{name} uses {node.value.id}.{node.attr}"


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_no_hidden_machinery(name):
    text = (ROOT/f"fips_nb/{name}.py").read_text(encoding="utf-8")
    assert "meta_path" not in text and "importlib.import_module('fips_nb" not in text
    assert not re.search(r"in str\((e|err|error|exc)\)", text), f"{name} decides by the text of an exception"


@each_nb
def test_layout_of_code(path):
    "At most 100 columns, one statement a line, no exported cell above 45 lines."
    for cell in cells(path, "code"):
        wide = [o for o in cell["source"].splitlines() if len(o) > 100 and not o.startswith("#|")]
        assert not wide, f"{path.name} has a line of {len(wide[0])} columns: {wide[0]}"
        lines = [o for o in cell["source"].splitlines() if not o.startswith("#|")]
        if is_export(cell): assert len(lines) <= 45, f"{path.name} exports a cell of {len(lines)} lines: {lines[0]}"
        if "nbdev_export()" in cell["source"]: continue
        for node in ast.walk(parse(cell["source"])):
            for body in (getattr(node, k, None) for k in ("body", "orelse", "finalbody")):
                starts = [o.lineno for o in body] if isinstance(body, list) else []
                double = next((i for i in starts if starts.count(i) > 1), None)
                assert double is None, f"{path.name}, two statements on a line: {cell['source'].splitlines()[double-1]}"


def public_callables(name):
    "Public functions and classes of a module, by name."
    import importlib
    module = importlib.import_module(f"fips_nb.{name}")
    for k in module.__all__:
        o = getattr(module, k)
        if callable(o) and getattr(o, "__module__", "") == module.__name__: yield k, o


def explained(o):
    "Comments of the parameters of `o`; a dataclass inherits those of its parents."
    import inspect
    from fastcore.docments import docments
    if not inspect.isclass(o): return docments(o, returns=False)
    if "__dataclass_params__" not in vars(o): return docments(o.__init__, returns=False)
    parents = [c for c in reversed(o.__mro__) if "__dataclass_params__" in vars(c)]
    return {k: v for c in parents for k, v in docments(c, returns=False).items() if v}


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_parameters_are_few_and_explained(name):
    import inspect
    from dataclasses import is_dataclass
    for k, o in public_callables(name):
        assert inspect.getdoc(o), f"{name}.{k} has no docstring"
        if inspect.isclass(o) and (o.__init__ is object.__init__ or issubclass(o, BaseException)): continue
        try: params = [p for p in inspect.signature(o).parameters.values() if p.name not in ("self", "cls")]
        except ValueError: continue
        if "__init__" not in vars(o) and inspect.isclass(o) and not is_dataclass(o): continue
        plain = [p for p in params if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        few = is_dataclass(o) or len(plain) <= 7
        assert few, f"{name}.{k} takes {len(plain)} parameters; give it a dataclass of options"
        docs = explained(o)
        bare = [p.name for p in plain if not docs.get(p.name)]
        assert not bare, f"{name}.{k} does not explain {bare}"
        ticks = [p.name for p in plain if "`" in docs[p.name]]
        assert not ticks, f"{name}.{k}: backticks in the comments of {ticks} show as raw Markdown on the site"


# ---- site ----

def test_quarto_yml_is_one_file():
    link = ROOT/"nbs/_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml", \
        "nbs/_quarto.yml is not the symlink to ../_quarto.yml (restore it with `git checkout nbs/_quarto.yml`)"


def sidebar_pages(o):
    "Every page named in a sidebar tree."
    if isinstance(o, str): return [o] if o.endswith(".ipynb") else []
    if isinstance(o, dict): o = [o.get("href", ""), *o.get("contents", [])]
    return [p for x in o for p in sidebar_pages(x)]


def test_every_notebook_is_in_the_sidebar():
    pages = sidebar_pages(yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"])
    names = [o.name for o in NBS]
    assert len(pages) == len(set(pages)), "a page is in the sidebar twice"
    assert not set(names) - set(pages), f"add {sorted(set(names) - set(pages))} to the sidebar in _quarto.yml"
    assert not set(pages) - set(names), f"the sidebar names {sorted(set(pages) - set(names))}: not in nbs/"


# ---- committed outputs ----

@each_nb
def test_outputs_are_committed(path):
    code = [o for o in cells(path, "code") if not re.search(r"^#\|\s*(export|default_exp|hide)\b", o["source"], re.M)]
    assert not code or any(o["outputs"] for o in code), f"{path.name} has no outputs: run `make run NB=nbs/{path.name}`"


@each_nb
def test_outputs_are_clean(path):
    for out, text in outputs(path):
        where = f"in an output of {path.name}: {text[:200]!r}"
        assert out["output_type"] != "error" and "Traceback (most recent call last)" not in text, f"an error {where}"
        assert out.get("name") != "stderr", f"a warning or log line {where}"
        assert not any("widget" in k for k in out.get("data", {})), f"a widget {where}"
        assert not re.search(r"\d+%\|[█▏▎▍▌▋▊▉ ]", text), f"a progress bar {where}"


roots = "home|root|tmp|Users|work|mnt|scratch|private|var/folders"
machine_path = re.compile(rf"(?<![\w.~:/-])(?:/(?:{roots})/|[A-Z]:\\\\?Users)[^\s'\")]*")


@each_nb
def test_no_paths_of_a_machine(path):
    for where, text in [("a cell", o["source"]) for o in cells(path)] + [("an output", t) for _, t in outputs(path)]:
        m = machine_path.search(text)
        assert not m, f"{where} of {path.name} names a path of one machine: {m[0]}"


@each_nb
def test_figures_have_captions_and_words(path):
    for o in cells(path, "code"):
        pictures = [out for out in o["outputs"] if "image/png" in out.get("data", {})]
        lacking = [k for k in ("fig-cap", "fig-alt") if f"#| {k}:" not in o["source"]]
        assert not pictures or not lacking, f"a figure of {path.name} has no {lacking}: {o['source'][:200]}"


decimal = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])")


def digits_of(number):
    "How many significant digits a decimal number shows."
    return len(number.replace(".", "").lstrip("0"))


@each_nb
def test_numbers_have_sensible_digits(path):
    for out, text in outputs(path):
        plain = out.get("data", {}).get("text/plain", text)
        plain = plain if isinstance(plain, str) else "".join(plain)
        long = [o for o in decimal.findall(plain) if digits_of(o) > 6]
        assert not long, f"an output of {path.name} shows {long[0]}: round it, or show a table"


# ---- measurements ----

RESULTS = sorted((ROOT/"results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda o: o.stem)
def test_published_figures_come_from_todays_code(path):
    from fips_nb.results import recall, stale
    rows = recall(path.stem, ROOT/"results")
    assert rows, f"{path.name} holds no rows"
    for row in rows:
        lacking = {"commit", "code", "seed", "device", "threads", "versions", "seconds", "load"} - set(row["made"])
        assert not lacking, f"a row of {path.name} does not say its {sorted(lacking)}"
        changed = stale(row)
        assert not changed, f"{path.name}, row {row['key']}: {changed} changed since; run its slow cell again"


@each_nb
def test_size(path):
    size = path.stat().st_size
    assert size < 1_000_000, f"{path.name} is {size/1e6:.2f} MB: make its figures smaller (limit 1 MB)"
