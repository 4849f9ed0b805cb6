"""The pages, without Quarto: nbdev's processing is enough to check headings, anchors, links and signatures."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
RUN = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Processed notebooks by the name of their page: a list of (kind, text) for each."
    root = tmp_path_factory.mktemp("site")
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml"): shutil.copy2(ROOT/name, root)
    shutil.copytree(ROOT/"nbs", root/"nbs", symlinks=True, ignore=shutil.ignore_patterns(".*"))
    for name in ("fips_nb", "tools"):
        shutil.copytree(ROOT/name, root/name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    res = subprocess.run([sys.executable, "-c", RUN], cwd=root, env=env, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    said = [o for o in res.stderr.splitlines() if "arning" in o]
    assert not said, f"processing the pages warns: {said[:3]}"
    return {page(o.name): list(texts(o)) for o in sorted((root/"_proc").glob("*.ipynb"))}


def page(name): return re.sub(r"^\d+[a-zA-Z0-9]*_", "", name).rpartition(".")[0]


def texts(path):
    "Markdown, code and outputs of one processed notebook."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        yield cell["cell_type"], "".join(cell["source"])
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            for k in ("text/markdown", "text/html", "text/plain"):
                if k in data:
                    yield k, "".join(data[k])
                    break


def without_code(text): return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)


def slug(heading):
    "The anchor that pandoc makes of a heading."
    own = re.search(r"\{[^}]*#([\w.-]+)[^}]*\}\s*$", heading)
    if own: return own[1]
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"\{[^}]*\}\s*$", "", heading))
    plain = re.sub(r"[`*$\\]", "", plain).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain)))


def anchors(cells):
    "All anchors of a page, in order."
    for kind, text in cells:
        if kind in ("markdown", "text/markdown"):
            yield from (slug(h) for h in re.findall(r"^#{1,6}\s+(.*?)\s*$", without_code(text), re.M))
        if kind != "code": yield from re.findall(r"<h\d[^>]*\bid=\"([^\"]+)\"", text)


def test_no_heading_twice(pages):
    doubled = set()
    for name, cells in pages.items():
        found = [a for a in anchors(cells) if a]
        twice = sorted({a for a in found if found.count(a) > 1})
        doubled |= {f"{name}: {a}" for a in twice}
    assert not doubled, f"these headings are there twice: {sorted(doubled)}"


def test_links_lead_somewhere(pages):
    host = yaml.safe_load((ROOT/"nbs/nbdev.yml").read_text())["website"]["site-url"].rstrip("/")
    known = {name: set(anchors(cells)) for name, cells in pages.items()}
    for name, cells in pages.items():
        for kind, text in cells:
            if kind == "code": continue
            links = re.findall(r"\]\(([^)\s]+)\)|href=\"([^\"]+)\"", without_code(text))
            for link in (a or b for a, b in links):
                ours = link.removeprefix(host).lstrip("/")
                if re.match(r"[a-z]+:", ours): continue
                path, _, anchor = ours.partition("#")
                if path and not re.search(r"\.(ipynb|html)$", path):
                    assert (ROOT/"nbs"/path).exists(), f"{name}: the link {link} leads nowhere"
                    continue
                target = page(path) if path else name
                assert target in known, f"{name}: the link {link} leads to no page"
                assert not anchor or anchor.lower() in {a.lower() for a in known[target]}, \
                    f"{name}: the link {link} leads to no heading of {target}"


def test_signatures_show_no_markdown(pages):
    for name, cells in pages.items():
        for kind, text in cells:
            if kind not in ("text/markdown", "text/html", "text/plain"): continue
            blocks = re.findall(r"^(?:```|>\s+\w+ ?\().*?(?:^```|\)\s*$)", text, re.M | re.S)
            raw = [b for b in blocks if re.search(r"\[`[^`]+`\]\(http", b)]
            assert not raw, f"{name}: raw Markdown in {raw[0][:200]}"


def test_every_class_is_shown_as_a_class(pages):
    for name, cells in pages.items():
        for kind, text in cells:
            m = re.search(r"def ([A-Z]\w+)\s*\([^)]*\)\s*->\s*None", text) if kind.startswith("text/") else None
            assert not m, f"{name}: the class {m[1]} shows as a function"


def test_no_link_inside_a_link(pages):
    found = [(name, m[0]) for name, cells in pages.items() for kind, text in cells if kind == "markdown"
             for m in re.finditer(r"\[[^\]\n]*\[[^\]\n]*\]\([^)\n]*\)[^\]\n]*\]\([^)\n]*\)", without_code(text))]
    assert not found, f"{found[:3]}: leave the brackets out, nbdev links the name"
