"""Write README.md from nbs/index.ipynb: standard library only, the same bytes everywhere.

`nbdev_readme` does this through Quarto, which not every machine has; this keeps to what the index notebook uses.
`python tools/readme.py --check` writes nothing and fails where README.md is out of date.
"""
import base64, json, posixpath, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written from nbs/index.ipynb by `make readme`. Edit the notebook. -->"
_link = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
_direc = re.compile(r"^\s*#\s*\|\s*(.*?)\s*$")


def relink(text):
    "Make links that are relative to nbs/ relative to the repository."
    return _link.sub(lambda m: m[1] + posixpath.normpath("nbs/" + m[2]) + m[3], text)


def markdown(src):
    "The markdown of a markdown cell; Quarto's fences and headings that end with a dash are dropped."
    if re.fullmatch(r"#+\s.*\s-", src.strip()): return ""
    return relink("\n".join(o for o in src.splitlines() if not o.startswith(":::")))


def fenced(src):
    "A code cell as a fence; shell cells lose their magics."
    lines = src.strip().splitlines()
    if lines[0].startswith("%%"): return "```sh\n" + "\n".join(lines[1:]) + "\n```"
    if all(o.startswith("!") for o in lines if o): return "```sh\n" + "\n".join(o[1:] for o in lines) + "\n```"
    return "```python\n" + "\n".join(lines) + "\n```"


def output(out, images, alt=""):
    "One output as markdown; a figure is added to `images` and linked, with `alt` as its words."
    if out["output_type"] == "stream": return "" if out["name"] == "stderr" else verbatim(out["text"])
    if out["output_type"] == "error": raise ValueError(f"index.ipynb holds an error: {out['ename']}")
    data = {k: v if isinstance(v, str) else "".join(v) for k, v in out["data"].items()}
    if "image/png" in data:
        name = f"README_files/figure_{len(images) + 1}.png"
        images[name] = base64.b64decode(data["image/png"])
        return f"![{alt}]({name})"
    if "text/markdown" in data: return relink(data["text/markdown"])
    if "text/html" in data: return re.sub(r"<style.*?</style>\s*", "", data["text/html"], flags=re.S)
    return verbatim(data.get("text/plain", ""))


def verbatim(text):
    "Text as an indented block."
    text = text if isinstance(text, str) else "".join(text)
    return "\n".join("    " + o if o else "" for o in text.rstrip().splitlines())


def code(cell, images):
    "The parts of a code cell that its directives let through."
    lines = "".join(cell["source"]).splitlines()
    said = [m[1] for m in map(_direc.match, lines) if m]
    direcs = {o.replace(" ", "") for o in said}
    alt = next((o.partition(":")[2].strip().strip('"') for o in said if o.startswith("fig-alt:")), "")
    if not lines or {"hide", "include:false"} & direcs or any(o.startswith("default_exp") for o in direcs): return []
    src = "\n".join(o for o in lines if not _direc.match(o))
    parts = [fenced(src)] if src.strip() and not {"echo:false", "hide_input"} & direcs else []
    return parts + ([] if "output:false" in direcs else [output(o, images, alt) for o in cell["outputs"]])


def render(nb):
    "The README's text, and its images by path."
    images, parts = {}, [NOTE]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown": parts.append(markdown("".join(cell["source"])))
        if cell["cell_type"] == "code": parts += code(cell, images)
    return "\n\n".join(o.strip("\n") for o in parts if o.strip()) + "\n", images


def main():
    text, images = render(json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8")))
    files = {"README.md": text.encode(), **images}
    stale = [k for k, v in files.items() if not (ROOT/k).exists() or (ROOT/k).read_bytes() != v]
    gone = [o for o in (ROOT/"README_files").glob("*.png") if f"README_files/{o.name}" not in images]
    if "--check" in sys.argv[1:]:
        if stale or gone: sys.exit(f"out of date: {', '.join(stale + [o.name for o in gone])}. Run `make readme`.")
        return
    for k in stale:
        (ROOT/k).parent.mkdir(exist_ok=True)
        (ROOT/k).write_bytes(files[k])
    for o in gone: o.unlink()


if __name__ == "__main__": main()
