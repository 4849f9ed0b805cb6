"""The pages, without Quarto: nbdev's processing is enough to check headings, anchors, links and signatures."""
import json, os, posixpath, re, shutil, subprocess, sys
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
RUN = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the processed notebooks, and what nbdev said."
    root = tmp_path_factory.mktemp("site")
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml"): shutil.copy2(ROOT/name, root)
    shutil.copytree(ROOT/"nbs", root/"nbs", symlinks=True, ignore=shutil.ignore_patterns(".*"))
    for name in ("fips_nb", "tools"):
        shutil.copytree(ROOT/name, root/name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    res = subprocess.run([sys.executable, "-c", RUN], cwd=root, env=env, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    return root/"_proc", res.stderr


@pytest.fixture(scope="module")
def pages(site):
    "Processed notebooks by the name of their page: a list of (kind, text) for each."
    out = site[0]
    return {page(o.relative_to(out).as_posix()): list(texts(o)) for o in sorted(out.rglob("*.ipynb"))}


def page(path):
    "The name of a page, with its folder: 'svd_init' for 00_svd_init.ipynb, 'share/budgets' for share/budgets.html."
    folder, name = posixpath.split(path)
    return posixpath.join(folder, re.sub(r"^\d+[a-zA-Z0-9]*_", "", name).rpartition(".")[0])


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


def test_nothing_warns(site):
    assert "arning" not in site[1], f"processing the pages warns: {site[1]}"


def test_no_heading_twice(pages):
    doubled = set()
    for name, cells in pages.items():
        found = [a for a in anchors(cells) if a]
        twice = sorted({a for a in found if found.count(a) > 1})
        doubled |= {f"{name}: {a}" for a in twice}
    assert not doubled, f"these headings are there twice: {sorted(doubled)}"


def links(cells):
    "All links of a page."
    for kind, text in cells:
        if kind == "code": continue
        for a, b in re.findall(r"\]\(([^)\s]+)\)|href=\"([^\"]+)\"", without_code(text)): yield a or b


def broken(name, link, known, host):
    "Why a link of the page `name` leads nowhere; None for one that leads somewhere, or out of the site."
    own = link.startswith(host)
    if re.match(r"[a-z]+:", link) and not own: return None
    path, _, anchor = link.removeprefix(host).partition("#")
    if path: path = path.lstrip("/") if own or path.startswith("/") else posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    if path and not re.search(r"\.(ipynb|html)$", path):
        return None if (ROOT/"nbs"/path).exists() else "there is no such file"
    target = page(path) if path else name
    if target not in known: return "there is no such page"
    return None if not anchor or anchor.lower() in known[target] else f"{target} has no such heading"


def test_links_lead_somewhere(pages):
    host = yaml.safe_load((ROOT/"nbs/nbdev.yml").read_text())["website"]["site-url"].rstrip("/")
    known = {name: {a.lower() for a in anchors(cells)} for name, cells in pages.items()}
    found = {(name, link): broken(name, link, known, host) for name, cells in pages.items() for link in links(cells)}
    wrong = [f"{name}: {link}: {why}" for (name, link), why in found.items() if why]
    assert len(found) > 500, f"only {len(found)} links were found" # the test sees the site
    assert not wrong, "links that lead nowhere:\n" + "\n".join(wrong)


def written(pages):
    "Everything that cells write, with the name of its page."
    return [(name, text) for name, cells in pages.items() for kind, text in cells if kind.startswith("text/")]


def test_signatures_show_no_markdown(pages):
    blocks = [(name, b) for name, text in written(pages)
              for b in re.findall(r"^(?:```|>\s+\w+ ?\().*?(?:^```|\)\s*$)", text, re.M | re.S)]
    raw = [f"{name}: {b[:200]}" for name, b in blocks if re.search(r"\[`[^`]+`\]\(http", b)]
    assert not raw, "raw Markdown in signatures:\n" + "\n".join(raw)


def test_every_class_is_shown_as_a_class(pages):
    shown = [(name, m) for name, text in written(pages) for m in re.findall(r"^```python\n(def|class) ([\w.]+)", text, re.M)]
    assert sum(kind == "class" for _, (kind, _) in shown) > 20
    wrong = [f"{name}: {full}" for name, (kind, full) in shown if kind == "def" and full.split(".")[-1].lstrip("_")[:1].isupper()]
    assert not wrong, f"classes that show as functions: {wrong}"


def test_parameters_of_classes_are_explained(pages):
    "Comments of fields reach the page: nbdev drops those of a dataclass."
    fences = [(name, b) for name, text in written(pages) for b in re.findall(r"^```python\n(class \w+\(\n.*?)^```", text, re.M | re.S)]
    bare = [f"{name}: {b.split('(')[0]}: {line.strip()}" for name, b in fences for line in b.splitlines()[1:-1]
            if " # " not in line and not line.strip().startswith("*")]
    assert fences and not bare, "without a word:\n" + "\n".join(bare)


def test_exported_code_is_shown_once(pages):
    wrong = [name for name, cells in pages.items() for kind, text in cells if "Exported source" in text]
    assert not wrong, f"source that tools/pages.py neither folds nor shows as it is: {sorted(set(wrong))}"


def test_no_dashes_out_of_options(pages):
    prose = [(name, re.sub(r"(`+).*?\1|<[^>]*>|^ {4}.*$", "", without_code(text), flags=re.M | re.S))
             for name, cells in pages.items() for kind, text in cells if kind in ("markdown", "text/markdown")]
    bare = sorted({f"{name}: {o}" for name, text in prose for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)})
    assert not bare, f"pandoc makes one dash of the hyphens of {bare}"


def test_no_link_inside_a_link(pages):
    found = [(name, m[0]) for name, cells in pages.items() for kind, text in cells if kind == "markdown"
             for m in re.finditer(r"\[[^\]\n]*\[[^\]\n]*\]\([^)\n]*\)[^\]\n]*\]\([^)\n]*\)", without_code(text))]
    assert not found, f"{found[:3]}: leave the brackets out, nbdev links the name"
