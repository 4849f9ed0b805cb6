"""Processors for nbdev (`procs` in settings.ini): what nbdev's own leave to be mended on the pages."""
import ast, base64, dataclasses, importlib, inspect, io, operator, re
from functools import cache
from pathlib import Path

from nbdev.process import Processor
from nbdev.showdoc import showdoc_nm

import fips_nb
from fips_nb import _modidx

ROOT = Path(__file__).resolve().parents[1]
SITE = "{doc_host}{doc_baseurl}/".format(**_modidx.d["settings"])


def home(nb):
    "The module of a notebook, as its name within the package; '' for a page without a module."
    return next((line for c in nb.cells for line in getattr(c, "directives_", {}).get("default_exp", [])), "")


def markdown_of(cell):
    "The outputs of a cell that are Markdown, as (data, text)."
    for out in getattr(cell, "outputs", None) or []:
        if "text/markdown" not in out.get("data", {}): continue
        text = out["data"]["text/markdown"]
        yield out["data"], text if isinstance(text, str) else "".join(text)


def documented(cell):
    "The name that a cell shows the documentation of, or None."
    found = re.search(r"^show_doc\((\w[\w.]*)", cell.source, re.M) if cell.cell_type == "code" else None
    return found and found[1]


# ---- signatures ----

_fence = re.compile(r"```python\n(?:def|class) .*?```", re.S)
_torch = re.compile(r"\btorch\.nn\.(?:modules\.\w+|parameter)\.(?=\w)")
_ours = re.compile(r"\bfips_nb\.[a-z_.]+\.(?=[A-Z])")


def tidy(text):
    "A signature that reads like Python: classes as classes, no links, no types that say nothing."
    text = re.sub(r"\[`([^`]+)`\]\(https?:[^)]*\)", r"\1", text)
    text, classes = re.subn(r"^(```python\n)def ((?:\w+\.)*_?[A-Z]\w*\()", r"\1class \2", text)
    if classes: text = re.sub(r"\)->None:(?=\n```$)", "):", text)
    text = text.replace("__main__.", "").replace("torch.Tensor", "Tensor").replace("collections.abc.", "").replace("pathlib.Path", "Path")
    text = _torch.sub("nn.", _ours.sub("", text))
    return text.replace(":NoneType=None", "=None")


def comments(cls):
    "Comments of the parameters of `cls`; a dataclass inherits those of its parents."
    from fastcore.docments import docments
    if "__dataclass_params__" not in vars(cls): return docments(cls.__init__, returns=False)
    parents = [c for c in reversed(cls.__mro__) if "__dataclass_params__" in vars(c)]
    return {k: v for c in parents for k, v in docments(c, returns=False).items() if v}


def default(p, fields):
    "How the default of a parameter reads; `fields` are those of a dataclass."
    if p.default is p.empty: return ""
    factory = getattr(fields.get(p.name), "default_factory", dataclasses.MISSING)
    if factory is not dataclasses.MISSING: return f"={getattr(factory, '__name__', '...')}()"
    named = inspect.isroutine(p.default) or inspect.isclass(p.default)
    return f"={p.default.__name__ if named else repr(p.default)}"


def parameter_lines(params, said, fields):
    "A line for each parameter, with its comment."
    for p in params:
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        note = "" if p.annotation is p.empty else f":{inspect.formatannotation(p.annotation)}"
        line = f"    {star}{p.name}{note}{default(p, fields)},"
        yield f"{line} # {said[p.name]}" if said.get(p.name) else line


def class_fence(name, cls):
    "The signature of a class, a parameter a line; without parameters, what it inherits from."
    try: params = list(inspect.signature(cls).parameters.values())
    except (TypeError, ValueError): params = []
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in params):
        bases = ", ".join(b.__name__ for b in cls.__bases__ if b is not object)
        return f"```python\nclass {name}{f'({bases})' if bases else ''}:\n```"
    lines = parameter_lines(params, comments(cls), getattr(cls, "__dataclass_fields__", {}))
    return tidy(f"```python\nclass {name}(\n" + "\n".join(lines) + "\n):\n```")


def options_fence(name, f):
    "The signature of a function whose options are the fields of a dataclass, with the comments of the fields."
    from fastcore.docments import docments
    sig, own, kind = inspect.signature(f), docments(f, full=True), f.__delwrap__
    said = comments(kind) | {k: v.docment for k, v in own.items() if v.docment}
    gives = "" if sig.return_annotation is sig.empty else f"->{inspect.formatannotation(sig.return_annotation)}"
    lines = parameter_lines(sig.parameters.values(), said, kind.__dataclass_fields__)
    end = f" # {said['return']}" if said.get("return") else ""
    return tidy(f"```python\ndef {name}(\n" + "\n".join(lines) + f"\n){gives}:{end}\n```")


def fence(name, thing):
    "The signature of what nbdev shows too little of; None for other things."
    if inspect.isclass(thing): return class_fence(name, thing)
    if dataclasses.is_dataclass(getattr(thing, "__delwrap__", None)): return options_fence(name, thing)


class Signatures(Processor):
    "Mend the signatures that nbdev shows: classes as classes, each parameter with its comment."
    def __init__(self, nb):
        super().__init__(nb) # before other processors take the cell with the module's name away
        self.module = home(nb)

    def found(self, name):
        "What is called `name` in the module of this page, or None."
        try: return operator.attrgetter(name)(importlib.import_module(f"fips_nb.{self.module}"))
        except (AttributeError, ImportError): return None

    def cell(self, cell):
        name = documented(cell)
        thing = self.found(name) if name and self.module else None
        own = fence(name, thing)
        for data, text in markdown_of(cell): data["text/markdown"] = _fence.sub(lambda m: own or tidy(m[0]), text)


# ---- sources ----

_summary = '#| code-fold: show\n#| code-summary: "Exported source"\n'


def defined(source):
    "What a cell of exported code defines, in words for the line that unfolds it."
    body = ast.parse(source).body
    if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body): return "Imports"
    names = [o.name for o in body if hasattr(o, "name")]
    names += [t.id for o in body if isinstance(o, ast.Assign) for t in o.targets if isinstance(t, ast.Name)]
    return f"Source of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}" if names else "Source"


def names_in(cell):
    "Names of the functions and classes that a cell defines, as nbdev documents them."
    return [showdoc_nm(o) for o in cell.parsed_() or [] if hasattr(o, "name")]


class Sources(Processor):
    """Every exported cell is on its page, once: code of the method (`#| exports`) as it is, below its name;
    plumbing (`#| export`) and imports folded, below the signatures."""
    def __init__(self, nb):
        super().__init__(nb) # before nbdev removes what is exported
        for cell in nb.cells:
            said = getattr(cell, "directives_", {})
            if cell.cell_type != "code" or "hide" in said or not {"export", "exports"} & said.keys(): continue
            cell.summary_ = defined(cell.source)
            cell.folded_ = "export" in said or cell.summary_ == "Imports"
            if "export" in said: said["exports"] = said.pop("export")

    def begin(self):
        "Documentation right before the source that it is of."
        docs = {documented(c): c for c in self.nb.cells if getattr(c, "has_sd", 0)}
        sources = {id(c): [docs[k] for k in names_in(c) if k in docs] for c in self.nb.cells if hasattr(c, "summary_")}
        moved = {id(d) for mine in sources.values() for d in mine}
        cells = []
        for cell in self.nb.cells:
            if id(cell) in moved: continue
            mine = sources.get(id(cell), [])
            if hasattr(cell, "summary_"): self.show(cell, mine)
            cells += [*mine, cell]
        self.nb.cells = cells

    def show(self, cell, docs):
        "Fold `cell`, or leave it open and take the signatures away that it repeats."
        cell.source = cell.source.removeprefix(_summary)
        if cell.folded_ and "#| code-fold:" not in cell.source:
            cell.source = f'#| code-fold: true\n#| code-summary: "{cell.summary_}"\n{cell.source}'
        if cell.folded_ or "@takes(" in cell.source: return # the options stand in the signature alone
        for doc in docs:
            for data, text in markdown_of(doc):
                data["text/markdown"] = re.sub(r"^(#+ [^\n]*)\n.*", r"\1\n", text, count=1, flags=re.M | re.S)


# ---- prose ----

_code = re.compile(r"(`+.*?`+)")
_option = re.compile(r"(?<![\w`-])--[a-z][\w-]*")
_nested = re.compile(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(([^)]*)\)")


def quote_options(text):
    "Options of the command line as code: outside of code, pandoc makes one dash of two hyphens."
    out, fence = [], None
    for line in text.split("\n"):
        mark = re.match(r"\s*(```|~~~)", line)
        if mark and fence in (None, mark[1]): fence = None if fence else mark[1]
        elif fence is None and not line.startswith("    "):
            parts = _code.split(line) # code spans are at odd places
            line = "".join(o if i % 2 else _option.sub(r"`\g<0>`", o) for i, o in enumerate(parts))
        out.append(line)
    return "\n".join(out)


def homes():
    "Where every public name lives: name -> {module: page and anchor}."
    out = {}
    for module, names in _modidx.d["syms"].items():
        for full, (where, _) in names.items():
            out.setdefault(full.removeprefix(f"{module}."), {})[module.removeprefix("fips_nb.")] = where
    return out


@cache
def parameters():
    "All names of parameters and of fields: in prose such a word rather means them than a function."
    out = set()
    for path in (ROOT/"fips_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg): out.add(node.arg)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): out.add(node.target.id)
    return out


def imported(nb):
    "What a notebook imports from the package: name -> module."
    out = {}
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        for module, names in re.findall(r"^from fips_nb\.([\w.]+) import ([^(#\n]+|\([^)]*\))", cell.source, re.M):
            out |= {o: module for o in re.findall(r"\w+", names)}
    return out


def mend_links(text, module, known, taken={}, words=(), site=SITE):
    """No link inside a link; a name leads to the module of the page, to the one that the page imports it from, or to
    what `fips_nb` exports; a name that several modules have, or that options have too, leads nowhere else."""
    def right(m):
        name, call, here = m[1], m[2] or "", known.get(m[1], {})
        where = here.get(module) or here.get(taken.get(name)) or here.get(fips_nb._HOME.get(name))
        if not where and len(here) == 1 and (call or name not in words): where = next(iter(here.values()))
        if not here: return m[0]
        return f"[`{name}{call}`]({site}{where})" if where else f"`{name}{call}`"
    links = re.compile(rf"\[`([\w.]+)(\(\))?`\]\({re.escape(site)}[^)\s#]*\.html#[\w.]+\)")
    return links.sub(right, _nested.sub(r"[\1](\2)", text))


class Prose(Processor):
    "Mend links and options in the prose of a page and in what its cells write as Markdown."
    def __init__(self, nb):
        super().__init__(nb) # before other processors take cells away
        self.module, self.known, self.taken = home(nb), homes(), imported(nb)

    def mend(self, text): return quote_options(mend_links(text, self.module, self.known, self.taken, parameters()))

    def cell(self, cell):
        if cell.cell_type == "markdown": cell.source = self.mend(cell.source)
        for data, text in markdown_of(cell): data["text/markdown"] = self.mend(text)


# ---- figures ----

class Figures(Processor):
    "Figures with an opaque background get a class, with which the style sheet fits them to a dark page."
    def cell(self, cell):
        if cell.cell_type != "code" or "#| classes:" in cell.source: return
        pictures = [o["data"]["image/png"] for o in getattr(cell, "outputs", None) or [] if "image/png" in o.get("data", {})]
        if any(map(opaque, pictures)): cell.source = f"#| classes: opaque-figure\n{cell.source}"


def opaque(png):
    "Whether a picture, in base64, has a background."
    from PIL import Image
    data = png if isinstance(png, str) else "".join(png)
    with Image.open(io.BytesIO(base64.b64decode(data))) as im: return im.convert("RGBA").getchannel("A").getextrema()[0] == 255
