"""Add to the search index of the site what Quarto leaves out: `python tools/search.py _docs/search.json`.

Quarto indexes sections of the second level, so a function is found only within the text around it. Here every public
name gets an entry of its own, and so do words that readers look for and the pages say otherwise.
"""
import ast, json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fips_nb  # noqa: E402

TERMS = { # what readers look for: the page that has it
    "Quantization": "round/rounding.html",
    "Post-training quantization (PTQ), GPTQ": "round/rounding.html",
    "Quantized models": "round/code.html",
    "Mixed precision, bit allocation": "round/costs.html",
    "Huffman, ANS, entropy coding": "round/entropy.html",
    "Int8 inference": "round/modes.html",
    "Knowledge distillation": "learn/distillation.html",
    "Quantization-aware training (QAT)": "round/distil.html",
    "Data augmentation": "learn/augmentation.html",
    "Pruning": "sparse_factors.html",
    "Parameter sharing": "grouping.html",
    "Low-rank factorization": "svd_init.html",
    "N:M sparsity, 2:4": "sparse_kernels.html",
    "Dynamic sparse training, RigL, SET": "research/sparse_training.html",
    "Calibration data": "data/calibration.html",
    "Benchmarks": "about/results.html",
}


def index():
    "What nbdev knows of the package: module -> {full name: (page and anchor, file)}."
    source = (ROOT/"fips_nb/_modidx.py").read_text(encoding="utf-8")
    return ast.literal_eval(source[source.index("{"):])["syms"]


def docs(path):
    "The first line of the documentation of what a module defines."
    tree = ast.parse((ROOT/path).read_text(encoding="utf-8"))
    defined = (o for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef)))
    return {o.name: (ast.get_docstring(o) or "").split("\n")[0] for o in defined}


def names():
    "Every public function and class: name, page and anchor, what it does; first the modules of `fips_nb.__all__`."
    first = {f"fips_nb.{o}" for o in fips_nb._HOME.values()}
    for module, known in sorted(index().items(), key=lambda o: o[0] not in first):
        if not known: continue
        said = docs(next(iter(known.values()))[1])
        for full, (where, _) in known.items():
            name = full.removeprefix(f"{module}.")
            if "." not in name and not name.startswith("_"): yield name, where, said.get(name, "")


def more(entries):
    "The entries to add before those that Quarto wrote: of equals, the search shows the first."
    crumbs = {o["href"].partition("#")[0]: o.get("crumbs", []) for o in entries}
    found = [*names(), *((k, v, "") for k, v in TERMS.items())]
    return [dict(objectID=f"{where}~{name}", href=where, title=name, section="", text=text,
                 crumbs=crumbs[where.partition("#")[0]]) for name, where, text in found if where.partition("#")[0] in crumbs]


def main(path):
    entries = [o for o in json.loads(path.read_text(encoding="utf-8")) if "~" not in o["objectID"]]
    added = more(entries)
    path.write_text(json.dumps(added + entries, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"{path}: {len(added)} names and terms")


if __name__ == "__main__": main(Path(sys.argv[1]))
