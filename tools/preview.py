"""Render the pages without Quarto, good enough to look at: nbdev's processing, then nbconvert, into _preview/.

Callouts, cross references, search and the site's theme need Quarto (`make docs`).
"""
import html, os, re, shutil, sys
from pathlib import Path

import nbformat, yaml
from nbconvert import HTMLExporter
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/"_preview"
sys.path.insert(0, str(ROOT))  # where settings.ini finds our processors


def sidebar(here, contents=None):
    "The site's navigation as nested lists, from _quarto.yml, for a page in the folder `here`."
    if contents is None: contents = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    items = []
    for o in contents:
        if isinstance(o, dict) and "section" in o:
            items.append(f"<details><summary>{html.escape(o['section'])}</summary>{sidebar(here, o['contents'])}</details>")
            continue
        page = o if isinstance(o, str) else o["href"]
        text = Path(page).stem if isinstance(o, str) else o.get("text", Path(page).stem)
        link = os.path.relpath(Path(page).with_suffix(".html"), here)
        items.append(f'<a href="{link}">{html.escape(text)}</a>')
    return "<ul>" + "".join(f"<li>{o}</li>" for o in items) + "</ul>"


def prepare(nb, stem):
    "A processed notebook for nbconvert: its front matter a heading, Quarto's options obeyed and taken away."
    if nb.cells[0].cell_type == "raw":
        fm = next(yaml.safe_load_all(nb.cells[0].source))
        nb.cells[0] = nbformat.v4.new_markdown_cell(f"# {fm.get('title', stem)}\n\n{fm.get('description', '')}")
    nb.cells = [o for o in nb.cells if o.source or o.get("outputs")]
    for o in nb.cells:
        said = dict(re.findall(r"^#\| *([\w-]+): *(.*)$", o.source, re.M))
        if said.get("echo") == "false": o.metadata["tags"] = ["hide"]
        if o.cell_type != "code": continue
        o.source = re.sub(r"^#\|.*\n?", "", o.source, flags=re.M)
        if said.get("code-fold") == "true": o.source = f"FOLD {said.get('code-summary', 'Code').strip(chr(34))}\n{o.source}"
    return nb


def page(path, here):
    "One processed notebook as HTML."
    exp = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True,
                       config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["hide"]}})
    body, _ = exp.from_notebook_node(prepare(nbformat.read(path, as_version=4), path.stem))
    body = re.sub(r'(<div class="highlight[^"]*"><pre>(?:<span></span>)?)<span[^>]*>FOLD</span>(.*?)\n(.*?</pre></div>)',
                  lambda m: f"<details><summary>{re.sub('<[^>]*>', '', m[2])}</summary>{m[1]}{m[3]}</details>", body, flags=re.S)
    body = re.sub(r"\{target=(?:\"|&quot;)_blank.*?\}", "", body)  # attributes that only Quarto reads
    body = re.sub(r'href="(?!https?:)([^"#]*)\.ipynb', r'href="\1.html', body)
    nav = f'<nav style="margin:1em 4em">{sidebar(here)}</nav>'
    return re.sub(r"(<body[^>]*>)", lambda m: m[1] + nav, body, count=1)


def main():
    cache = Path(proc_nbs(n_workers=0, force=True))
    shutil.rmtree(OUT, ignore_errors=True)
    for path in sorted(cache.rglob("*.ipynb")):
        name = path.relative_to(cache)
        to = OUT/name.with_suffix(".html")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page(path, name.parent), encoding="utf-8")
    print(f"open {OUT.relative_to(ROOT)}/index.html")


if __name__ == "__main__": main()
