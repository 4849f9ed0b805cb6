"""Render the pages without Quarto, good enough to look at: nbdev's processing, then nbconvert, into _preview/.

Callouts, cross references and the site's theme need Quarto (`make docs`).
"""
import html, re, shutil, sys
from pathlib import Path

import nbformat, yaml
from nbconvert import HTMLExporter
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/"_preview"
sys.path.insert(0, str(ROOT))  # where settings.ini finds our processor


def sidebar():
    "The site's navigation as HTML, from _quarto.yml."
    parts = []
    for sec in yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]:
        if isinstance(sec, dict): parts.append(f"<b>{html.escape(sec['section'])}</b>")
        for nb in sec["contents"] if isinstance(sec, dict) else [sec]:
            nb = nb if isinstance(nb, str) else nb["href"]
            parts.append(f'<a href="{Path(nb).stem}.html">{Path(nb).stem}</a>')
    return '<nav style="margin:1em 4em">' + " &middot; ".join(parts) + "</nav>"


def page(path, nav):
    "One processed notebook as HTML, its first cell (the front matter) made a heading."
    nb = nbformat.read(path, as_version=4)
    if nb.cells[0].cell_type == "raw":
        fm = next(yaml.safe_load_all(nb.cells[0].source))
        head = f"# {fm.get('title', path.stem)}\n\n{fm.get('description', '')}"
        nb.cells[0] = nbformat.v4.new_markdown_cell(head)
    nb.cells = [o for o in nb.cells if o.source or o.get("outputs")]
    for o in nb.cells:
        if re.search(r"^#\| *echo: *false", o.source, re.M): o.metadata["tags"] = ["hide"]
        if o.cell_type == "code": o.source = re.sub(r"^#\|.*\n?", "", o.source, flags=re.M)
    exp = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True,
                       config={"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["hide"]}})
    body, _ = exp.from_notebook_node(nb)
    body = re.sub(r"\{target=(?:\"|&quot;)_blank.*?\}", "", body)  # attributes that only Quarto reads
    body = re.sub(r'href="(?!https?:)([^"#]*)\.ipynb', r'href="\1.html', body)
    return re.sub(r"(<body[^>]*>)", lambda m: m[1] + nav, body, count=1)


def main():
    cache = proc_nbs(n_workers=0, force=True)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for path in sorted(Path(cache).glob("*.ipynb")):
        (OUT/path.with_suffix(".html").name).write_text(page(path, sidebar()), encoding="utf-8")
    print(f"open {OUT.relative_to(ROOT)}/index.html")


if __name__ == "__main__": main()
