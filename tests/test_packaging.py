"""The repository agrees with itself: generated files, versions, sidebar, imports, layout of the code.

A rule is one test: it collects every violation and names them all.
"""
import ast, graphlib, importlib, inspect, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(o for o in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in o.parts)
SEVEN = ("00_svd_init", "01_grouping", "02_sparse_factors", "03_blockwise_opt", "04_sparse_kernels", "05_vit_experiments",
         "06_llm_experiments")
PAGES = {"start", "about"} # folders of pages that export nothing
EXPERIMENTS = {"05_vit_experiments", "06_llm_experiments"} # pages of results, with a module or without


def name(path):
    "The name of a notebook below nbs/, with its folder."
    return path.relative_to(ROOT/"nbs").as_posix()


def report(found, rule):
    "Fail with all violations of a rule."
    found = list(found)
    assert not found, f"{rule}:\n  " + "\n  ".join(map(str, found))


@cache
def cells(path, kind=None):
    "The cells of a notebook as dicts whose source is one string."
    res = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for o in res: o["source"] = "".join(o["source"])
    return [o for o in res if kind in (None, o["cell_type"])]


def default_exp(path):
    "The module a notebook exports to, or None."
    found = [m[1] for o in cells(path, "code") if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", o["source"], re.M))]
    assert len(found) <= 1, f"{name(path)} has {len(found)} default_exp cells"
    return found[0] if found else None


def module_of(path):
    "The module that a notebook has by its place: 'share.budgets' for share/budgets.ipynb, 'svd_init' for 00_svd_init.ipynb."
    parts = path.relative_to(ROOT/"nbs").with_suffix("").parts
    return ".".join((*parts[:-1], re.sub(r"^\d+_", "", parts[-1])))


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
    files = lambda root: {o.relative_to(root).as_posix(): o.read_text(encoding="utf-8") for o in (root/"fips_nb").rglob("*.py")}
    want, have = files(project), files(ROOT)
    missing, extra = want.keys() - have.keys(), have.keys() - want.keys()
    differ = [k for k in want.keys() & have.keys() if want[k] != have[k]]
    behind = sorted(missing) + sorted(differ)
    assert not behind, f"fips_nb/ is behind the notebooks in {behind}: run `make export`"
    assert not extra, f"no notebook exports {sorted(extra)}: fips_nb/ is generated, remove them or write the notebook"
    assert (project/"pyproject.toml").read_text() == (ROOT/"pyproject.toml").read_text(), "nbdev rewrote pyproject.toml"


@pytest.mark.sync
def test_clean_leaves_no_diff(project):
    python("from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()", cwd=project)
    differ = [name(o) for o in NBS if o.read_bytes() != (project/"nbs"/name(o)).read_bytes()]
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
    assert got.split() == ["fips_nb.run.compress", "fips_nb.store.hub"]
    assert "no attribute 'kompress'" in python("import fips_nb\ntry: fips_nb.kompress\nexcept AttributeError as e: print(e)")


def test_every_folder_is_shipped():
    "setuptools finds folders with an __init__.py; data is listed."
    folders = {o.parent for o in (ROOT/"fips_nb").rglob("*.py")}
    report(sorted(o.relative_to(ROOT) for o in folders if not (o/"__init__.py").exists()), "a folder of modules is a package")
    said = (ROOT/"pyproject.toml").read_text()
    globs = re.search(r"^fips_nb = \[(\"assets.*)\]$", said, re.M)[1]
    shipped = {p for glob in re.findall(r'"([^"]+)"', globs) for p in (ROOT/"fips_nb").glob(glob)}
    data = {o for o in (ROOT/"fips_nb").rglob("*") if o.is_file() and o.suffix not in (".py", ".pyc")}
    report(sorted(o.relative_to(ROOT) for o in data - shipped), "package-data in pyproject.toml names every file")


def test_versions_agree():
    version = python("import fips_nb; print(fips_nb.__version__)").strip()
    assert version == settings()["version"], "settings.ini and fips_nb/__init__.py differ: run `make export`"
    first = re.search(r"^## (\S+)", (ROOT/"CHANGELOG.md").read_text(), re.M)[1]
    assert first == version, f"CHANGELOG.md begins with {first}, the package is at {version}"
    assert yaml.safe_load((ROOT/"CITATION.cff").read_text())["version"] == version


def test_every_notebook_exports_to_the_module_of_its_name():
    wrong = []
    for path in NBS:
        said, want, exports = default_exp(path), module_of(path), any(map(is_export, cells(path, "code")))
        page = path.parent.name in PAGES or path.stem == "index"
        if page and (said or exports): wrong.append(f"{name(path)} is a page: it exports nothing")
        if not page and not said and (exports or path.stem not in EXPERIMENTS): wrong.append(f"{name(path)} has no default_exp")
        if said and said != want: wrong.append(f"{name(path)} exports to {said}, not to {want}")
        file = "fips_nb/" + want.replace(".", "/") + ".py"
        if said and not (ROOT/file).exists(): wrong.append(f"{file} is missing: run `make export`")
    report(wrong, "a notebook and its module share folder and name")


def test_the_seven_stand_alone():
    top = {o.stem for o in NBS if o.parent == ROOT/"nbs"}
    assert top == {"index", *SEVEN}, f"nbs/ itself holds the index and the seven: move {sorted(top - {'index', *SEVEN})} into a folder"
    report((name(o) for o in NBS if name(o).count("/") > 1), "folders are one deep")


# ---- structure ----

MODULES = sorted(default_exp(o) for o in NBS if default_exp(o))
FOR_EXAMPLES = {"data.demo", "measure.records"} # every notebook may use them in its examples


def base_of(node, package=()):
    "What an import statement names before `import`, in full; `package` is where a relative one stands."
    lead = ["fips_nb", *package][:len(package) + 2 - node.level] if node.level else []
    return ".".join([*lead, *filter(None, [node.module])])


def imported_modules(tree, package=()):
    "The modules of this package that some code imports, by their names within it."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found = [o.name for o in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = base_of(node, package)
            found = [f"{base}.{o.name}" if f"{base}.{o.name}"[8:] in MODULES else base for o in node.names]
        else: continue
        yield from (o[8:] for o in found if o.startswith("fips_nb."))


def source_of(module): return (ROOT/"fips_nb"/(module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


def cycle(graph):
    "A cycle of `graph`, or None."
    try: graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e: return " -> ".join(reversed(e.args[1]))


def parse(source):
    "The syntax tree of a cell without its magics; empty where it is no Python."
    try: return ast.parse("\n".join(o for o in source.splitlines() if not o.lstrip().startswith(("%", "!"))))
    except SyntaxError: return ast.parse("")


def is_export(cell): return bool(re.search(r"^#\|\s*export", cell["source"], re.M))


def test_no_module_imports_itself_in_a_circle():
    graph = {m: set(imported_modules(ast.parse(source_of(m)), m.split(".")[:-1])) for m in MODULES}
    unknown = {m: sorted(deps - set(MODULES)) for m, deps in graph.items() if deps - set(MODULES)}
    assert not unknown, f"these modules are imported and do not exist: {unknown}"
    assert not cycle(graph), f"modules import each other: {cycle(graph)}"


def test_notebooks_can_be_read_in_an_order():
    "What a notebook uses, in its examples too, comes before it; the demo and the tables of records may be used everywhere."
    graph, wrong = {}, []
    for path in (o for o in NBS if default_exp(o)):
        own, uses = default_exp(path), set()
        for cell in cells(path, "code"):
            found = set(imported_modules(parse(cell["source"])))
            wrong += [f"{name(path)} imports fips_nb.{o}, which no notebook exports" for o in sorted(found - set(MODULES))]
            if is_export(cell) and own in found: wrong.append(f"{name(path)} imports itself in an exported cell")
            uses |= found - {own} - (set() if is_export(cell) else FOR_EXAMPLES)
        graph[own] = uses
    report(wrong, "imports lead to other notebooks")
    assert not cycle(graph), f"notebooks use each other: {cycle(graph)}"


def private_imports(module):
    "Names with a leading underscore that a module takes from others of the package."
    tree, aliases = ast.parse(source_of(module)), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        base = base_of(node, module.split(".")[:-1])
        if base.split(".")[0] != "fips_nb": continue
        yield from (f"{o.name} of {base}" for o in node.names if o.name.startswith("_") and not o.name.startswith("__"))
        aliases |= {o.asname or o.name for o in node.names if f"{base}.{o.name}"[8:] in MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if node.attr.startswith("_"): yield f"{node.value.id}.{node.attr}"


def test_no_private_names_across_modules():
    report((f"{m} uses {o}" for m in MODULES for o in private_imports(m)), "make it public, or keep it in its module")


def test_no_hidden_machinery():
    wrong = []
    for m in MODULES:
        text = source_of(m)
        ours = m == "store.announce" # `import fips_nb` has to be enough for from_pretrained
        if "meta_path" in text and not ours or "importlib.import_module('fips_nb" in text: wrong.append(f"{m} meddles with imports")
        if re.search(r"in str\((e|err|error|exc)\)", text): wrong.append(f"{m} decides by the text of an exception")
    report(wrong, "code does what it says")


def crowded(cell):
    "What is wrong with the layout of a code cell."
    lines = [o for o in cell["source"].splitlines() if not o.startswith("#|")]
    yield from (f"a line of {len(o)} columns: {o}" for o in lines if len(o) > 100)
    if is_export(cell) and len(lines) > 45: yield f"an exported cell of {len(lines)} lines: {lines[0]}"
    if "nbdev_export()" in cell["source"]: return
    for node in ast.walk(parse(cell["source"])):
        for body in (getattr(node, k, None) for k in ("body", "orelse", "finalbody")):
            starts = [o.lineno for o in body] if isinstance(body, list) else []
            double = {i for i in starts if starts.count(i) > 1}
            yield from (f"two statements on a line: {cell['source'].splitlines()[i-1]}" for i in sorted(double))


def test_layout_of_code():
    report((f"{name(path)} has {o}" for path in NBS for cell in cells(path, "code") for o in crowded(cell)),
           "at most 100 columns, one statement a line, no exported cell above 45 lines")


def test_cells_hold_imports_or_code():
    "The site is built by running the cells with imports, without those that compute."
    wrong = []
    for path in NBS:
        for cell in cells(path, "code"):
            nodes = list(ast.walk(parse(cell["source"])))
            mixed = any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in nodes) and \
                any(isinstance(o, (ast.Expr, ast.Assign)) for o in nodes)
            if mixed and not is_export(cell) and "nbdev_export()" not in cell["source"] and "eval: false" not in cell["source"]:
                wrong.append(f"{name(path)}: {cell['source'][:80]!r}")
    report(wrong, "give the imports a cell of their own")


def public_callables(module):
    "Public functions and classes of a module, by name."
    loaded = importlib.import_module(f"fips_nb.{module}")
    for k in loaded.__all__:
        o = getattr(loaded, k)
        if callable(o) and getattr(o, "__module__", "") == loaded.__name__: yield k, o


def explained(o):
    "Comments of the parameters of `o`; a dataclass inherits those of its parents."
    from fastcore.docments import docments
    if not inspect.isclass(o): return docments(o, returns=False)
    if "__dataclass_params__" not in vars(o): return docments(o.__init__, returns=False)
    parents = [c for c in reversed(o.__mro__) if "__dataclass_params__" in vars(c)]
    return {k: v for c in parents for k, v in docments(c, returns=False).items() if v}


def unexplained(o):
    "What is wrong with the signature and the words of a function or class."
    if not inspect.getdoc(o): yield "has no docstring"
    if inspect.isclass(o) and (o.__init__ is object.__init__ or issubclass(o, BaseException)): return
    try: params = [p for p in inspect.signature(o).parameters.values() if p.name not in ("self", "cls")]
    except ValueError: return
    if "__init__" not in vars(o) and inspect.isclass(o) and not is_dataclass(o): return
    plain = [p for p in params if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    options = getattr(o, "__delwrap__", None) # a dataclass whose fields show in the signature
    own = {p.name for p in plain} - set(getattr(options, "__dataclass_fields__", ()))
    if len(own) > 7 and not is_dataclass(o): yield f"takes {len(own)} parameters; give it a dataclass of options"
    docs = explained(o)
    bare = [p.name for p in plain if not docs.get(p.name)]
    if bare: yield f"does not explain {bare}"
    ticks = [p.name for p in plain if "`" in (docs.get(p.name) or "")]
    if ticks: yield f"has backticks in the comments of {ticks}, which show as raw Markdown on the site"


def test_parameters_are_few_and_explained():
    report((f"{m}.{k} {said}" for m in MODULES for k, o in public_callables(m) for said in unexplained(o)),
           "at most 7 parameters, each with a comment, and a docstring")


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
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]
    pages, names = sidebar_pages(site["sidebar"]["contents"]), [name(o) for o in NBS]
    assert len(pages) == len(set(pages)), "a page is in the sidebar twice"
    assert not set(names) - set(pages), f"add {sorted(set(names) - set(pages))} to the sidebar in _quarto.yml"
    assert not set(pages) - set(names), f"the sidebar names {sorted(set(pages) - set(names))}: not in nbs/"
    assert [p for p in pages if p[:2].isdigit()] == [f"{o}.ipynb" for o in SEVEN], "the seven come in their order"
    lost = set(sidebar_pages(site["navbar"]["left"])) - set(names)
    assert not lost, f"the bar on top leads to {sorted(lost)}: not in nbs/"


def test_files_named_in_the_guide_exist():
    text = "\n".join((ROOT/o).read_text() for o in ("CONTRIBUTING.md", "Makefile"))
    named = {o for o in re.findall(r"\b(?:nbs|tools|tests|fips_nb)/[\w/]+\.(?:ipynb|py)\b", text) if "name" not in o}
    assert named
    report((o for o in sorted(named) if not (ROOT/o).exists()), "CONTRIBUTING.md and the Makefile name files that exist")


# ---- committed outputs ----

def test_outputs_are_committed():
    hidden = re.compile(r"^#\|\s*(export|default_exp|hide)\b", re.M)
    code = {path: [o for o in cells(path, "code") if not hidden.search(o["source"])] for path in NBS}
    report((f"make run NB=nbs/{name(path)}" for path, shown in code.items() if shown and not any(o["outputs"] for o in shown)),
           "these notebooks have no outputs")


def unclean(out, text):
    "What an output must not hold."
    if out["output_type"] == "error" or "Traceback (most recent call last)" in text: yield "an error"
    if out.get("name") == "stderr": yield "a warning or log line"
    if any("widget" in k for k in out.get("data", {})): yield "a widget"
    if re.search(r"\d+%\|[█▏▎▍▌▋▊▉ ]", text): yield "a progress bar"


def test_outputs_are_clean():
    report((f"{what} in an output of {name(path)}: {text[:200]!r}" for path in NBS for out, text in outputs(path)
            for what in unclean(out, text)), "outputs are those of one clean run")


roots = "home|root|tmp|Users|work|mnt|scratch|private|var/folders"
machine_path = re.compile(rf"(?<![\w.~:/-])(?:/(?:{roots})/|[A-Z]:\\\\?Users)[^\s'\")]*")


def test_no_paths_of_a_machine():
    texts = ((path, where, text) for path in NBS for where, text in
             [("a cell", o["source"]) for o in cells(path)] + [("an output", t) for _, t in outputs(path)])
    report((f"{where} of {name(path)}: {m[0]}" for path, where, text in texts if (m := machine_path.search(text))),
           "no paths of one machine")


def test_figures_have_captions_and_words():
    wrong = []
    for path in NBS:
        for o in cells(path, "code"):
            pictures = [out for out in o["outputs"] if "image/png" in out.get("data", {})]
            lacking = [k for k in ("fig-cap", "fig-alt") if f"#| {k}:" not in o["source"]]
            if pictures and lacking: wrong.append(f"{name(path)} has no {lacking}: {o['source'][:200]!r}")
    report(wrong, "every figure has a caption and words for those who do not see it")


decimal = re.compile(r"(?<![\w.])\d*\.\d+(?![\w.])")


def digits_of(number):
    "How many significant digits a decimal number shows."
    return len(number.replace(".", "").lstrip("0"))


def test_numbers_have_sensible_digits():
    wrong = []
    for path in NBS:
        for out, text in outputs(path):
            plain = out.get("data", {}).get("text/plain", text)
            plain = plain if isinstance(plain, str) else "".join(plain)
            wrong += [f"{name(path)} shows {o}" for o in decimal.findall(plain) if digits_of(o) > 6]
    report(wrong, "round the numbers of outputs, or show a table")


# ---- measurements ----

RESULTS = sorted((ROOT/"results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda o: o.stem)
def test_published_figures_come_from_todays_code(path, monkeypatch):
    "Or they say themselves that they are outdated."
    from fips_nb.measure.records import doubts, read, stale
    monkeypatch.chdir(ROOT)
    file = read(path.stem)
    assert file["rows"], f"{path.name} holds no rows"
    for row in file["rows"]:
        lacking = {"commit", "entry", "code", "seed", "device", "threads", "versions", "seconds", "load"} - set(row["made"])
        assert not lacking, f"a row of {path.name} does not say its {sorted(lacking)}"
    for row in doubts(path.stem)["stale"]:
        changed = stale(row, file["code"])
        assert not changed, f"{path.name}, row {row['key']}: {changed} changed since; run its slow cell again, or say that " \
                            "it is outdated with `python tools/results.py`"


def test_size():
    report((f"{name(o)}: {o.stat().st_size/1e6:.2f} MB" for o in NBS if o.stat().st_size >= 1_000_000),
           "make the figures of these notebooks smaller (limit 1 MB)")
