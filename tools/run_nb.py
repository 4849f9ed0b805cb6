"""Execute notebooks in place, with outputs: `python tools/run_nb.py [--flags "slow cuda"] nbs/*.ipynb nbs/*/*.ipynb`.

Cells whose flag is in `tst_flags` of settings.ini run only if it is named in `--flags`; else they keep the outputs
they have, as do cells with `#| eval: false`. Plain `jupyter nbconvert --execute` would run them all.
"""
import argparse, os, re, sys
from configparser import RawConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # outputs hold no warnings
os.environ.setdefault("IN_TEST", "1")  # the last cell of a notebook does not export: `make export` does


def skipped(source, flags):
    "Whether a cell is left alone: one of its directives is in `flags`, or it is not to be evaluated."
    direcs = [m[1] for m in re.finditer(r"^\s*#\s*\|\s*(.*?)\s*$", source, re.M)]
    return any(o.split()[0] in flags or o.replace(" ", "") == "eval:false" for o in direcs if o)


class Client(NotebookClient):
    "A client that leaves some cells as they are."
    def __init__(self, nb, flags, **kwargs):
        super().__init__(nb, **kwargs)
        self.flags = flags

    async def async_execute_cell(self, cell, *args, **kwargs):
        if cell.cell_type == "code" and skipped(cell.source, self.flags): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def execute(path, flags):
    "Run the notebook at `path` from its own folder and write it back; a failing notebook is not written."
    nb = nbformat.read(path, as_version=4)
    Client(nb, flags, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(nb, path)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("notebooks", nargs="+", type=Path)
    ap.add_argument("--flags", default="", help="flags whose cells run too")
    args = ap.parse_args()
    cfg = RawConfigParser()
    cfg.read(ROOT/"settings.ini")
    flags = set(cfg["DEFAULT"]["tst_flags"].split()) - set(args.flags.split())
    for path in args.notebooks:
        print(path, flush=True)
        try: execute(path, flags)
        except CellExecutionError as e: sys.exit(f"{path} failed and was left as it is:\n{e}")


if __name__ == "__main__": main()
