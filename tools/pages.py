"""Processors for nbdev (`procs` in settings.ini): what nbdev's own leave to be mended on the pages."""
import re

from nbdev.process import Processor

import fips_nb
from fips_nb import _modidx

_fence = re.compile(r"```python\n(?:def|class) .*?```", re.S)
_nested = re.compile(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(([^)]*)\)")
_linked = re.compile(r"\[`([\w.]+)(\(\))?`\]\((https?://[^)\s]*/)\w+\.html#[\w.]+\)")


def tidy(text):
    "A signature that reads like Python: classes as classes, no links, no types that say nothing."
    text = re.sub(r"\[`([^`]+)`\]\(https?:[^)]*\)", r"\1", text)
    text = re.sub(r"^(```python\n)def (_?[A-Z]\w*\()(.*?)\)->None:", r"\1class \2\3):", text, flags=re.S)
    text = text.replace("__main__.", "").replace("torch.Tensor", "Tensor").replace("collections.abc.", "")
    return text.replace(":NoneType=None", "=None")


def tidy_signatures(cell):
    "Mend the signatures among the outputs of `cell`."
    for out in getattr(cell, "outputs", None) or []:
        data = out.get("data", {})
        if "text/markdown" not in data: continue
        text = data["text/markdown"]
        text = text if isinstance(text, str) else "".join(text)
        data["text/markdown"] = _fence.sub(lambda m: tidy(m[0]), text)


def homes():
    "Where every public name lives: name -> {module: page and anchor}."
    out = {}
    for module, names in _modidx.d["syms"].items():
        for full, (where, _) in names.items():
            out.setdefault(full.removeprefix(f"{module}."), {})[module.removeprefix("fips_nb.")] = where
    return out


def mend_links(text, module, known):
    "No link inside a link; a name that several modules have leads to `module`, then to what `fips_nb` exports."
    def right(m):
        name, call, site = m[1], m[2] or "", m[3]
        here = known.get(name, {})
        if len(here) < 2: return m[0]
        where = here.get(module) or here.get(fips_nb._HOME.get(name))
        return f"[`{name}{call}`]({site}{where})" if where else f"`{name}{call}`"
    return _linked.sub(right, _nested.sub(r"[\1](\2)", text))


class MendLinks(Processor):
    "Mend the links that nbdev makes of names in the prose of a page."
    def __init__(self, nb):
        super().__init__(nb) # before other processors take the cell with the module's name away
        lines = [l for c in nb.cells for l in c.directives_.get("default_exp", [])]
        self.module, self.known = (lines or [""])[0], homes()

    def cell(self, cell):
        if cell.cell_type == "markdown": cell.source = mend_links(cell.source, self.module, self.known)
