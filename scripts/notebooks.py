"""The definitions of a notebook, for scripts: nothing that computes is run."""
import ast
import json
from pathlib import Path
from types import ModuleType

NBS = Path(__file__).resolve().parents[1]/"nbs"


def definitions(name):
    "A module with what `nbs/NAME.ipynb` defines in cells of imports, functions and classes alone, without directives."
    module = ModuleType(Path(name).name)
    for cell in json.loads((NBS/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith(("#|", "%", "!")): continue
        tree = ast.parse(source)
        plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        if all(isinstance(o, plain) for o in tree.body): exec(compile(tree, f"{name}.ipynb", "exec"), vars(module))
    return module
