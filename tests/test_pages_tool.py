"""The processor that mends signatures on the site."""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.pages import tidy, tidy_signatures  # noqa: E402

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
