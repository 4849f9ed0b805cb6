"""What people type by mistake: one line that helps, exit status 2, and nothing left behind."""
import shlex
from pathlib import Path

import pytest
import torch

from fips_nb.cli import main

LINES = """\
compress
compres demo-vit --out x
compress demo-vit
compress demo-vti --out x
compress ./no_dir --out x
compress no_dir/sub/deep --out x
compress demo-vit --out mine
compress demo-vit --out /proc/x/y
compress demo-vit --out /dev/null/x
compress demo-vit --out text.txt
compress demo-vit --out x --budget 50%
compress demo-vit --out x --budget 0
compress demo-vit --out x --budget 1.5
compress demo-vit --out x --budget nan
compress demo-vit --out x --budget -1
compress demo-vit --out x --bits 0
compress demo-vit --out x --bits 17
compress demo-vit --out x --bits four
compress demo-vit --out x --bits 4 --budget .5
compress demo-vit --out x --target-bytes 12
compress demo-vit --out x --target-bytes 1e5
compress demo-vit --out x --target-bytes 100000000
compress demo-vit --out x --target-ratio 2
compress demo-vit --out x --target-ratio 0.01
compress demo-vit --out x --preset fisp
compress demo-vit --out x --preset rounding
compress demo-vit --out x --levels 0
compress demo-vit --out x --levels ten
compress demo-vit --out x --group-size 0
compress demo-vit --out x --group-size most
compress demo-vit --out x --sparsity 1
compress demo-vit --out x --sparsity -.1
compress demo-vit --out x --distill-epochs -1
compress demo-vit --out x --dtype int8
compress demo-vit --out x --device tpu
compress demo-vit --out x --device cuda:99
compress demo-vit --out x --seed -1
compress demo-vit --out x --seed one
compress demo-vit --out x --n-calib 0
compress demo-vit --out x --batch-size 0
compress demo-vit --out x --max-minutes 0
compress demo-vit --out x --max-minutes soon
compress demo-vit --out x --max-minutes 0.00001
compress demo-vit --out x --calib nowhere
compress demo-vit --out x --calib empty
compress demo-vit --out x --calib text.txt
compress demo-vit --out x --window 8
compress demo-vit --out x --weights nowhere.pt
compress demo-vit --out x --weights bin.safetensors
compress demo-vit --out x --weights a.pt
compress demo-vit --out x --plan nowhere.json
compress demo-vit --out x --plan text.txt
compress demo-vit --out x --plan nowhere.json --budget .5
compress demo-vit --out x --targets all --bits 4
compress demo-vit --out x --stream
compress demo-vit --out x --frobnicate
compress vit_tiny_patch16_224 --out x
compress resnet18 --out x --calib empty
compress junk --out x --calib text.txt
compress empty --out x --calib text.txt
compress demo-llm --out x --calib empty.txt
compress demo-llm --out x --calib nowhere.txt
compress demo-llm --out x --window 1
compress demo-llm --out x --weights a.pt
plan demo-vit
plan demo-vit --budget .5 --out text.txt
plan demo-vit --budget .5 --out nowhere/p.json
eval
eval nowhere
eval empty
eval demo-vit --data nowhere
eval demo-vit --data empty
eval demo-llm --data empty.txt
eval demo-llm --dense nowhere
info nowhere
info empty
info text.txt
info junk
bench nowhere
bench demo-vit --batch 0
bench demo-vit --batch many
bench demo-vit --prefer best
export nowhere --out x
export empty --out x
finetune
finetune nowhere --out x
finetune demo-vit --out x
finetune empty --out x
finetune junk --out x
finetune text.txt --out x
finetune nowhere --out x --epochs 0
finetune nowhere --out x --lr 0
finetune nowhere --out x --lr fast
finetune nowhere --out x --loss best
finetune nowhere --out x --smoothing 1
finetune nowhere --out x --views none --masks set
finetune nowhere --out x --batch-size 0
finetune nowhere --out x --n 0
finetune nowhere --out x --new-head --loss outputs
finetune nowhere --out x --loss labels --weights a.pt
finetune nowhere --out mine
compare demo-vit rounding --bits 4
compare demo-vit rounding fisp --bits 4
compare demo-vit rounding rounding --bits 4
compare demo-vit rounding pruning
""".splitlines()
SAYS = {"50%": "write 0.5", "/proc/x/y": "name another --out", "--batch many": "no list like 1,16", "demo-vti": "nearest are demo-vit",
        "./no_dir": "there is no folder ./no_dir", "--bits 4 --budget .5": "name a --preset of factors",
        "finetune demo-vit": "`fips compress MODEL --out DIR` makes one"}


@pytest.fixture
def there(tmp_path, monkeypatch):
    "A folder with files that are not what they are taken for."
    monkeypatch.chdir(tmp_path)
    for d in ("empty", "junk", "mine"): Path(d).mkdir()
    for name, text in {"text.txt": "some words. "*400, "empty.txt": "", "junk/config.json": "{", "mine/thesis.txt": "x",
                       "bin.safetensors": "xx"*50}.items(): Path(name).write_text(text)
    torch.save({"a": torch.zeros(2)}, "a.pt")
    return lambda: sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("line", LINES)
def test_wrong_input(line, there, capsys):
    before = there()
    status = main(shlex.split(line))
    out, err = capsys.readouterr()
    said = [s for s in err.splitlines() if not s.startswith("fips: compressing ")]  # the news before a size is refused
    assert status == 2 and out == "" and len(said) == 1 and said[0].startswith("fips: error: "), err
    assert there() == before
    for part, words in SAYS.items():
        if part in line: assert words in said[0]


def test_there_are_enough_of_them(): assert len(set(LINES)) == len(LINES) >= 60
