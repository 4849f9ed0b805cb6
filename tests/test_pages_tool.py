"""The processor that mends signatures on the site."""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.pages import MendLinks, mend_links, tidy, tidy_signatures  # noqa: E402

RAW = """### Thing

```python
def Thing(
    a:__main__.Other | None, # see [`feed`](https://example.org/x.html#feed)
    f:NoneType=None, # a function
)->None:
```

*About [`Thing`](https://example.org/x.html#thing).*"""


def test_a_class_reads_as_a_class_and_prose_keeps_its_links():
    cell = SimpleNamespace(outputs=[dict(data={"text/markdown": RAW})])
    tidy_signatures(cell)
    text = cell.outputs[0]["data"]["text/markdown"]
    assert "class Thing(\n    a:Other | None, # see feed\n    f=None, # a function\n):" in text
    assert text.endswith("*About [`Thing`](https://example.org/x.html#thing).*")


def test_functions_stay_functions():
    assert tidy("```python\ndef f(\n    x, # any\n)->None:\n```") == "```python\ndef f(\n    x, # any\n)->None:\n```"


def test_links_lead_to_the_function_that_the_page_means():
    site = "https://example.org/"
    known = dict(fit=dict(a="a.html#fit", b="b.html#fit"), save=dict(hub="hub.html#save", a="a.html#save"),
                 once=dict(a="a.html#once"))
    link = lambda name, page: f"[`{name}`]({site}{page}.html#{name})"
    assert mend_links(link("fit", "b"), "a", known) == link("fit", "a") # its own
    assert mend_links(link("save", "a"), "b", known) == link("save", "hub") # what the package exports
    assert mend_links(link("fit", "b"), "c", known) == "`fit`" # nobody knows which
    assert mend_links(link("once", "a"), "c", known) == link("once", "a")
    assert mend_links(f"[{link('once', 'a')}](z.ipynb)", "a", known) == "[`once`](z.ipynb)"


def test_the_page_is_known_though_its_first_cell_is_gone():
    first = SimpleNamespace(directives_={"default_exp": ["llm_experiments"]})
    proc = MendLinks(SimpleNamespace(cells=[first]))
    proc.nb.cells.clear() # as nbdev does before this processor has its turn
    cell = SimpleNamespace(cell_type="markdown", source="[`measure`](https://example.org/pipeline.html#measure)")
    proc.cell(cell)
    assert cell.source == "[`measure`](https://example.org/llm_experiments.html#measure)"
