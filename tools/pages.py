"""A processor for nbdev (`procs` in settings.ini): what nbdev's own leave to be mended in the signatures of the pages."""
import re

_fence = re.compile(r"```python\n(?:def|class) .*?```", re.S)


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
