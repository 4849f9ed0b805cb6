"""Say in results/ which rows today's code may not give.

    python tools/results.py                   # rows whose code has changed become outdated
    python tools/results.py --from COMMIT     # rows whose code only moved since COMMIT are taken over first

A row is taken over if it was up to date at COMMIT and if all that its entries reach today was reached there too, with the
same names and bodies, in whatever modules. Its figures stay; nothing is measured. `--renamed old=new` says that a
definition has another name now, `share.pipeline._old=share.pipeline.new`: an entry, or a helper that its own module
alone calls. `made['outdated']` of all other stale rows lists the modules that changed. Commit what it writes.
"""
import argparse, ast, subprocess, tempfile
from collections import Counter
from pathlib import Path

from fips_nb.measure.provenance import Code, code_id, repository
from fips_nb.measure.records import read, results_folder, stale, write


class Renamed(Code):
    "A repository in which some definitions have other names: module -> old name -> new name."
    def __init__(self, root, renamed):
        super().__init__(root)
        self.renamed = renamed

    def parse(self, module):
        "Statements of a module, with today's names."
        parsed = super().parse(module)
        names = self.renamed.get(self.exported(module) or module, {})
        for node in (o for body, _ in parsed for statement in body for o in ast.walk(statement)):
            for k in ("id", "name"):
                if getattr(node, k, None) in names: setattr(node, k, names[getattr(node, k)])
        return parsed


class Then:
    "The repository at a commit, beside that of today."
    def __init__(self, root, renamed=()):
        pairs, names = dict(o.split("=") for o in renamed), {}
        for old, new in pairs.items():
            (module, _, was), now = old.rpartition("."), new.rpartition(".")[2]
            names.setdefault(module, {})[was] = now
        self.pairs, self.code, self.renamed = pairs, Code(root), Renamed(root, names)
        self.today = Code(repository())

    def entry(self, names):
        "Today's names of entries."
        return [self.pairs.get(k, k) for k in names]

    def old_names(self, names):
        "Names of entries as `renamed` has them."
        pick = lambda k: k.rpartition(".")[0] + "." + self.pairs[k].rpartition(".")[2] if k in self.pairs else k
        return [pick(k) for k in names]

    def changed(self, entry):
        "Definitions behind `entry` today that were not there then, or with another body."
        then = {(name, body) for _, name, body in self.renamed.closure(self.old_names(entry))}
        now = self.today.closure(self.entry(entry))
        return sorted((module, name) for module, name, body in now if (name, body) not in then)


def take_over(row, code, then):
    "Give `row` today's identifier if its code only moved; else say what changed. None: it was stale before."
    made = row["made"]
    if code_id(then.code.modules(made["entry"])) != made["code"]: return None
    try: changed = then.changed(made["entry"])
    except ValueError as e: changed = [(str(e), "")]
    made["entry"] = then.entry(made["entry"])
    if changed: made["outdated"] = sorted({module for module, _ in changed})
    else:
        modules = then.today.modules(made["entry"])
        made["code"] = code_id(modules)
        code[made["code"]] = modules
        made.pop("outdated", None)
    return changed


def mark(row, code):
    "Let `row` say whether it is outdated; what it says already stays."
    if not (changed := stale(row, code)): row["made"].pop("outdated", None)
    elif not row["made"].get("outdated"): row["made"]["outdated"] = changed


def renew(name, folder, then=None):
    "Go through one file; counts by what was found, and what changed."
    file, found, reasons = read(name, folder), Counter(), Counter()
    for row in file["rows"]:
        changed = take_over(row, file["code"], then) if then else None
        if changed == []: found["taken over"] += 1
        for module, k in changed or (): reasons[f"{module}:{k}"] += 1
        mark(row, file["code"])
        found["outdated"] += bool(row["made"].get("outdated"))
        found["uncommitted"] += bool(row["made"].get("changed"))
    write(name, file["rows"], file["code"], folder)
    return found, reasons


def tree_at(commit, folder):
    "Write the repository at `commit` into `folder`."
    packed = subprocess.run(["git", "archive", commit], cwd=repository(), check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
    return folder


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="commit", help="take over rows whose code only moved since this commit")
    p.add_argument("--renamed", nargs="+", default=[], metavar="old=new", help="definitions with other names")
    p.add_argument("--folder", type=Path, help="the folder of the files (results/)")
    a = p.parse_args()
    folder = a.folder or results_folder()
    with tempfile.TemporaryDirectory() as d:
        then = Then(tree_at(a.commit, d), a.renamed) if a.commit else None
        for path in sorted(folder.glob("*.json")):
            found, reasons = renew(path.stem, folder, then)
            why = ", ".join(k for k, _ in reasons.most_common(5))
            print(f"{path.stem}: {len(read(path.stem, folder)['rows'])} rows, {dict(+found)} {why}")


if __name__ == "__main__": main()
