"""The tools that mend signatures, sources, links, options and the search index of the site."""
import base64, dataclasses, inspect, io, json, sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.pages import (SITE, Figures, Prose, Signatures, Sources, class_fence, defined, fence, mend_links,  # noqa: E402
                         quote_options, tidy)
from tools import search  # noqa: E402

RAW = """### Thing

```python
def Thing(
    a:__main__.Other | None, # see [`feed`](https://example.org/x.html#feed)
    f:NoneType=None, # a function
)->None:
```

*About [`Thing`](https://example.org/x.html#thing).*"""


def shows(source, text=None, **kw):
    "A code cell with an output in Markdown."
    outputs = [dict(data={"text/markdown": text})] if text else []
    return SimpleNamespace(cell_type="code", source=source, outputs=outputs, directives_={}, **kw)


def text_of(cell): return cell.outputs[0]["data"]["text/markdown"]


def test_a_class_reads_as_a_class_and_prose_keeps_its_links():
    cell = shows("show_doc(Thing)", RAW)
    Signatures(SimpleNamespace(cells=[cell])).cell(cell)
    assert "class Thing(\n    a:Other | None, # see feed\n    f=None, # a function\n):" in text_of(cell)
    assert text_of(cell).endswith("*About [`Thing`](https://example.org/x.html#thing).*")


def test_classes_of_every_kind_and_functions_that_stay_functions():
    tidied = lambda text: tidy(f"```python\n{text}\n```").split("\n", 1)[1].removesuffix("\n```")
    assert tidied("def f(\n    x, # any\n)->None:") == "def f(\n    x, # any\n)->None:"
    assert tidied("def Thing(\n    x, # (a, b), or none\n):") == "class Thing(\n    x, # (a, b), or none\n):"
    assert tidied("def Rows(\n):") == "class Rows(\n):"
    assert tidied("def f(\n    a:torch.nn.modules.module.Module, # one\n    b:fips_nb.grouping.Group, # two\n):") \
        == "def f(\n    a:nn.Module, # one\n    b:Group, # two\n):"


@dataclasses.dataclass
class Base:
    size:int # of all
    names:list = dataclasses.field(default_factory=list) # of some


@dataclasses.dataclass
class Child(Base):
    share:float = .5 # of it


class Wrong(ValueError): "No parameters of its own."


def test_fields_of_a_dataclass_are_explained():
    want = "class Child(\n    size:int, # of all\n    names:list=list(), # of some\n    share:float=0.5, # of it\n):"
    assert want in class_fence("Child", Child)
    assert class_fence("Wrong", Wrong) == "```python\nclass Wrong(ValueError):\n```"


def test_options_of_a_function_are_explained():
    def make(
        what, # to make
        **options, # fields of Child
    ) -> int: # how many
        "Make it."
    own = [p for p in inspect.signature(make).parameters.values() if p.kind != p.VAR_KEYWORD]
    more = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, annotation=float, default=.5) for k in ("share",)]
    make.__signature__, make.__delwrap__ = inspect.signature(make).replace(parameters=own + more), Child
    assert fence("make", make) == "```python\ndef make(\n    what, # to make\n    share:float=0.5, # of it\n)->int: # how many\n```"
    assert fence("f", lambda x: x) is None


def test_links_lead_to_the_function_that_the_page_means():
    site = "https://example.org/"
    known = dict(fit=dict(a="a.html#fit", b="z/b.html#fit"), bits=dict(b="z/b.html#bits"), once=dict(a="a.html#once"),
                 save={"store.hub": "store/hub.html#save", "a": "a.html#save"})
    link = lambda name, page: f"[`{name}`]({site}{page}.html#{name})"
    mend = lambda text, page, **kw: mend_links(text, page, known, site=site, **kw)
    assert mend(link("fit", "z/b"), "a") == link("fit", "a") # its own
    assert mend(link("save", "a"), "b") == link("save", "store/hub") # what the package exports
    assert mend(link("fit", "z/b"), "c") == "`fit`" # nobody knows which
    assert mend(link("fit", "a"), "c", taken=dict(fit="b")) == link("fit", "z/b") # the one that it imports
    assert mend(link("once", "a"), "c") == link("once", "a")
    assert mend(link("bits", "z/b"), "c", words={"bits"}) == "`bits`" # an option is called the same
    assert mend(link("bits", "z/b"), "c", words={"bits"}, taken=dict(bits="b")) == link("bits", "z/b")
    assert mend(f"[{link('once', 'a')}](z.ipynb)", "a") == "[`once`](z.ipynb)"


def test_the_page_is_known_though_its_first_cell_is_gone():
    first = shows("")
    first.directives_ = {"default_exp": ["llm_experiments"]}
    proc = Prose(SimpleNamespace(cells=[first]))
    proc.nb.cells.clear() # as nbdev does before this processor has its turn
    proc.known = dict(measure=dict(llm_experiments="llm_experiments.html#measure", other="other.html#measure"))
    cell = SimpleNamespace(cell_type="markdown", source=f"[`measure`]({SITE}share/pipeline.html#measure)")
    proc.cell(cell)
    assert cell.source == f"[`measure`]({SITE}llm_experiments.html#measure)"


def test_options_are_code_and_code_stays():
    assert quote_options("| --budget | a `--bits 4` -- b |") == "| `--budget` | a `--bits 4` -- b |"
    fence = "```sh\nfips compress --bits 4\n```\n--out x\n\n    --indented"
    assert quote_options(fence) == fence.replace("--out", "`--out`")
    assert quote_options("|:--|--:|\n<!-- a comment -->") == "|:--|--:|\n<!-- a comment -->"


FUNCTION = "def f(x): return x"
FOLD = '#| code-fold: show\n#| code-summary: "Exported source"\n'


def exported(source, directive):
    "An exported cell, as it is before nbdev's processors have their turn."
    import ast
    cell = shows(source)
    cell.directives_, cell.parsed_ = {directive: []}, lambda: ast.parse(source).body
    return cell


def test_every_exported_cell_is_shown_once():
    doc = lambda name: shows(f"show_doc({name})", f"---\n\n### {name}\n\n```python\ndef {name}(x):\n```\n\n*Words.*", has_sd=True)
    nb = SimpleNamespace(cells=[exported("import torch", "exports"), exported(FUNCTION, "exports"),
                                exported("def g(x): return x\n_A = 1", "export")])
    proc = Sources(nb)
    assert all("exports" in c.directives_ for c in nb.cells) # or nbdev removes them
    imports, method, plumbing = nb.cells
    for c in nb.cells: c.source = FOLD + c.source # as nbdev does
    f, g = doc("f"), doc("g")
    nb.cells = [imports, method, f, plumbing, g]
    proc.begin()
    assert nb.cells == [imports, f, method, g, plumbing]
    assert imports.source == '#| code-fold: true\n#| code-summary: "Imports"\nimport torch'
    assert method.source == FUNCTION and text_of(f) == "---\n\n### f\n" # the source says all else
    assert plumbing.source.startswith('#| code-fold: true\n#| code-summary: "Source of g, _A"\n') and "def g" in text_of(g)


def test_summaries():
    assert defined("from a import b\nimport c") == "Imports"
    assert defined("A = 1\ndef f(): pass\nclass C: pass\ndef g(): pass\ndef h(): pass") == "Source of f, C, g, h and others"


def test_figures_with_a_background_are_marked():
    from PIL import Image
    def figure(mode):
        buf = io.BytesIO()
        Image.new(mode, (4, 4), (255, 255, 255, 0)[:len(mode)]).save(buf, "png")
        return SimpleNamespace(cell_type="code", source="plot()",
                               outputs=[dict(data={"image/png": base64.b64encode(buf.getvalue()).decode()})])
    white, clear = figure("RGB"), figure("RGBA")
    for cell in (white, clear): Figures(SimpleNamespace(cells=[])).cell(cell)
    assert white.source == "#| classes: opaque-figure\nplot()" and clear.source == "plot()"


def test_functions_and_usual_words_are_found(tmp_path):
    pages = {path.partition("#")[0] for _, path, _ in search.names()} | set(search.TERMS.values())
    index = tmp_path/"search.json"
    index.write_text(json.dumps([dict(objectID=o, href=o, title="a page", section="", text="", crumbs=["Method"]) for o in pages]))
    for _ in range(2): search.main(index) # twice adds nothing
    found = json.loads(index.read_text())
    by_title = {o["title"]: o for o in found}
    assert len({o["objectID"] for o in found}) == len(found) == len(pages) + len(list(search.names())) + len(search.TERMS)
    assert by_title["rank_for_budget"]["href"] == "svd_init.html#rank_for_budget"
    assert by_title["rank_for_budget"]["text"] and by_title["rank_for_budget"]["crumbs"] == ["Method"]
    assert by_title["Knowledge distillation"]["href"] == "learn/distillation.html"


def test_terms_lead_to_pages():
    root = Path(__file__).resolve().parents[1]/"nbs"
    pages = {o.relative_to(root).with_suffix(".html").as_posix() for o in root.rglob("*.ipynb")}
    pages = {o if "/" in o else o.lstrip("0123456789").lstrip("_") for o in pages}
    assert not set(search.TERMS.values()) - pages
