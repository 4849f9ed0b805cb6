"""What people type by mistake: one line with the value and the mend, exit status 2, and nothing left behind."""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fips_nb.data.demo import demo_vit
from fips_nb.run import cli
from folders import run

pytestmark = pytest.mark.usefixtures("one_thread", "no_work", "timed_once")


# ---- a folder of things that are not what they are taken for ----

def put_texts(root):
    "Files and folders that hold something else."
    for name, text in {"junk/config.json": "{", "mine/thesis.txt": "mine", "z.state/a.safetensors": "mine",
                       "bin.safetensors": "xx"*50, "text.pt": "hello", "table.csv": "a,b\n1,2\n",
                       "chat.jsonl": '{"messages": [{"role": "user", "content": "hi"}]}\n',
                       "gone/labels.csv": "file,label\n77.png,1\n"}.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_text(text)
    (root/"kept/svd").mkdir(parents=True)
    (root/"cut.state").mkdir()
    (root/"cut.state/codes.safetensors").write_bytes(b"")
    (root/"cut.state/fingerprint.json").write_text(json.dumps(dict(run="0"*16, depends={})))


def put_images(root):
    "Folders of images of which some cannot be read, and with more classes than the demo has."
    for i in range(20):
        (root/"some").mkdir(exist_ok=True)
        (root/f"twelve/{i % 12:02}").mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f"flat/{i % 18}.png", root/f"twelve/{i % 12:02}/{i}.png")
        shutil.copy(root/f"flat/{i % 18}.png", root/f"some/{i:02}.png")
        if i < 3: (root/f"some/{i:02}.png").write_bytes(b"x")


def put_weights(root):
    "Files of weights that are none, or those of another model."
    import timm
    changes = dict(missing=lambda sd: sd.pop("blocks.3.mlp.fc1.weight"), more=lambda sd: sd.update(more=torch.ones(1)),
                   shape=lambda sd: sd.update({"norm.bias": torch.ones(3)}),
                   nan=lambda sd: sd["blocks.2.mlp.fc2.weight"].fill_(float("nan")),
                   inf=lambda sd: sd["blocks.1.attn.qkv.weight"].fill_(float("inf")))
    for name, change in changes.items():
        change(sd := demo_vit().state_dict())
        torch.save(sd, root/f"{name}.pt")
    torch.save([1, 2], root/"list.pt")
    torch.save(demo_vit(), root/"model.pt")
    torch.save(timm.create_model("test_resnet").state_dict(), root/"resnet.pt")


def put_broken(root):
    "Folders of transformers that lack something, or that somebody has changed."
    def copied(name, new): return Path(shutil.copytree(root/name, root/f"{name}-{new}"))
    for name, new, gone in (("vit", "unprocessed", "preprocessor_config"), ("clip", "unprocessed", "preprocessor_config"),
                            ("clip", "untokenized", "tokenizer"), ("t5", "untokenized", "tokenizer")):
        (copied(name, new)/f"{gone}.json").unlink()
    size = json.dumps(dict(image_processor_type="ViTImageProcessor", size=10**9))
    for new, file, text in (("cut", "preprocessor_config", '{"size": '), ("other", "preprocessor_config", '{"a": 1}'),
                            ("huge", "preprocessor_config", size), ("modules", "modules", "{}"), ("list", "modules", "[1]")):
        (copied("vit", new)/f"{file}.json").write_text(text)
    w = copied("llama", "cut")/"model.safetensors"
    w.write_bytes(w.read_bytes()[:1000])
    (copied("llama", "bare")/"model.safetensors").unlink()
    for p in copied("llama", "mute").glob("tokenizer*"): p.unlink()
    w = copied("llama", "lost")/"model.safetensors"
    tensors = load_file(w)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, w, dict(format="pt"))


def put_compressed(root, demos):
    "Compressed folders of each kind, one that is broken, and those of other versions."
    import fips_nb
    for name in ("coded", "factors"): shutil.copytree(demos/name, root/name)
    run(f"compress {root/'llama'} --out {root/'llama-svd'} --data {root/'text.txt'} --n 8 --method svd")
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    fips_nb.compress(net, list(torch.randn(4, 8, 32)), bits=8, epochs=0).save(root/"own")
    for name, change in dict(broken=dict(arch=3), later=dict(version=99), older=dict(version=3)).items():
        shutil.copytree(demos/"coded", root/name)
        config = json.loads((root/name/"config.json").read_text()) | change
        (root/name/"config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def traps(home, demos, tmp_path_factory):
    "The folder that all commands run in."
    root = tmp_path_factory.mktemp("traps")
    shutil.copytree(home, root, dirs_exist_ok=True)
    put_texts(root)
    put_images(root)
    put_weights(root)
    put_broken(root)
    put_compressed(root, demos)
    return root


def contents(root): return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


@pytest.fixture(scope="module")
def untouched(traps): return contents(traps)


# ---- the table: a command, and a part of the one sentence that it gets ----

CASES = """
-> the following arguments are required: compress|eval|finetune|compare|info|bench|export
compres demo-vit --out x -> invalid choice: 'compres' (choose from 'compress', 'eval',
compress -> the following arguments are required: MODEL (see `fips compress --help`)
compress demo-vit -> --out is required: a folder
compress demo-vit --out x --budget .5 -> unrecognized arguments: --budget .5
compress demo-vit --out x --par .5 -> unrecognized arguments: --par .5
compress demo-vit --dry-run --resume -> --resume needs --out, a folder
compress demo-vit --dry-run --overwrite -> --overwrite needs --out, a folder
compress demo-vti --out x -> unknown model 'demo-vti'; the nearest are demo-vit
compress vit_tiny_patch16_22 --out x --data images -> the nearest are vit_tiny_patch16_224
compress vit_tiny_patch16_224.none --out x --data images -> has no weights 'none'; there are augreg_in21k
compress ./no_dir --out x -> there is no folder ./no_dir, and no model has that name
compress no_dir/sub/deep --out x -> there is no folder no_dir/sub/deep
compress no_dir/sub --out x --data text.txt -> there is no folder no_dir/sub, and the hub gives no model
compress empty --out x --data text.txt -> empty has no config.json, so it holds no model of transformers
compress junk --out x --data text.txt -> junk/config.json is not valid JSON
compress own --out x --data images -> own holds a module of the class 'Sequential'
compress whisper --out x --data text.txt -> takes batches that are dicts of input_features and decoder_input_ids

compress vit_tiny_patch16_224 --out x -> needs images to calibrate with: --data takes a folder
compress coded --out x -> coded needs images to calibrate with: --data takes a folder
compress clip --out x -> needs images with captions to calibrate with: --data takes a folder
compress t5 --out x -> needs text to calibrate with: --data takes a file (some hundred kilobytes

compress demo-vit --out mine -> --out mine exists; name another folder, or replace the model in it with --overwrite
compress demo-vit --out mine --overwrite -> mine holds 'thesis.txt', which is not part of a saved model
compress demo-vit --out text.txt -> text.txt is a file; name a folder
compress demo-vit --out text.txt --overwrite -> text.txt is a file; name a folder
compress demo-vit --out coded -> --out coded exists
compress demo-vit --out z -> z.state is where the state of the run would go, and it holds something else
compress demo-vit --out cut -> cut.state holds an interrupted run: go on with it by --resume, or drop it by --overwrite
compress demo-vit --out /proc/x/y -> no folder can be made at /proc/x/y (No such file or directory)
compress demo-vit --out /dev/null/x -> no folder can be made at /dev/null/x (Not a directory)

compress demo-vit --out x --bits 0 -> --bits 0 is outside (0, 16)
compress demo-vit --out x --bits 17 -> --bits 17 is outside (0, 16)
compress demo-vit --out x --bits nan -> --bits nan is outside (0, 16)
compress demo-vit --out x --bits four -> argument --bits: 'four' is no number; write it like 0.5
compress demo-vit --out x --bits -> argument --bits: expected one argument
compress demo-vit --out x --bits 4 --bytes 90000 -> --bits 4 and --bytes 90000 both say how large the file is
compress llama --out x --data text.txt --bits .5 -> cannot be reached; the least possible is
compress llama --out x --data text.txt --bytes 12 -> a file of 12 bytes cannot be reached; the least possible is
compress demo-vit --out x --bytes -5 -> --bytes -5 is less than 1
compress demo-vit --out x --bytes 1e5 -> '1e5' is no size; write 500000, 500kB or 3.2MB
compress demo-vit --out x --bytes 5TB -> '5TB' is no size
compress demo-vit --out x --bytes 100MB -> is no smaller than the model in 16 bits
compress demo-vit --out x --params 50% -> '50%' is no number; write 0.5
compress demo-vit --out x --params half -> 'half' is no number; write it like 0.5
compress demo-vit --out x --params 0 -> --params 0 is outside (0, 1]
compress demo-vit --out x --params 1.5 -> --params 1.5 is outside (0, 1]
compress demo-vit --out x --params -1 -> --params -1 is outside (0, 1]
compress demo-vit --out x --params nan -> --params nan is outside (0, 1]
compress demo-vit --out x --params .01 -> --params 0.01: target ratio 0.01 cannot be met
compress demo-vit --out x --params .37 --method svd -> --params 0.37 leaves too little for the linears
compress demo-vit --out x --params .5 --method rounding -> --params 0.5 is for factors, and rounding keeps all
compress demo-vit --out x --params .8 --bits 14 --method svd -> is no smaller than these factors in 16 bits
compress test_resnet --out x --data images --dense resnet.pt --params .5 -> no MLP blocks in ResNet

compress demo-vit --out x --method fisp -> --method fisp is unknown; did you mean fips-als? there are rounding, fips-als, fips-paper
compress demo-vit --out x --method rounding:levels=3 -> rounding has no settings; leave out levels=3
compress demo-vit --out x --method fips-als:level=3 -> unknown setting 'level'; the nearest are levels
compress demo-vit --out x --method fips-als:levels -> levels '' is not an integer of at least 1
compress demo-vit --out x --method fips-als:levels=0 -> levels 0 is not an integer of at least 1
compress demo-vit --out x --method fips-als:levels=ten -> levels 'ten' is not an integer of at least 1
compress demo-vit --out x --method fips-als:levels=2.5 -> levels 2.5 is not an integer of at least 1
compress demo-vit --out x --method fips-als:levels=1,levels=2 -> levels is given twice
compress demo-vit --out x --method fips-als:group_size=0 -> --method fips-als:group_size=0: group size 0 is not
compress demo-vit --out x --method fips-als:group_size=most -> group size 'most' is not a positive integer, 'all', 'stage'
compress demo-vit --out x --method fips-als:sparsity=1 -> sparsity 1 is outside [0, 1)
compress demo-vit --out x --method fips-als:sparsity=-.1 -> sparsity -0.1 is outside [0, 1)
compress demo-vit --out x --method fips-als:sparsity=x -> sparsity 'x' is outside [0, 1)
compress demo-vit --out x --method fips-als:targets=mpl -> targets 'mpl' is not one of mlp, attn, all
compress demo-vit --out x --method fips-als:pattern=some -> pattern 'some' is not 'fan_in' or (n, m)
compress demo-vit --out x --method svd:sparsity=.5 -> sparsity 0.5 needs fit='als'
compress demo-vit --out x --method pruning:sparsity=.5 -> the budget is the density; leave sparsity out

compress demo-vit --out x --epochs -1 -> --epochs -1 is less than 0
compress demo-vit --out x --epochs 1.5 -> argument --epochs: invalid int value: '1.5'
compress demo-vit --out x --seed -1 -> --seed -1 is less than 0
compress demo-vit --out x --n 0 -> --n 0 is less than 1
compress demo-vit --out x --batch-size 0 -> --batch-size 0 is less than 1
compress demo-vit --out x --minutes 0 -> --minutes 0 is not above 0
compress demo-vit --out x --minutes soon -> argument --minutes: 'soon' is no number
compress llama --out x --data text.txt --minutes 0.00001 -> --minutes 1e-05 is not enough: the least takes about
compress demo-vit --out x --minutes 0.00001 --n 20 --method svd -> --minutes 1e-05 is not enough: the least takes about
compress demo-vit --out x --device tpu -> --device tpu cannot be used here
compress demo-vit --out x --device cuda:99 -> leave out --device to run on the CPU
compress demo-vit --out x --window 8 -> --window is for models of text, and demo-vit is none
compress vit --out x --data images --window 8 -> --window is for models of text, and vit is none
compress demo-llm --out x --window 1 -> --window 1 is less than 2
compress bart --out x --data text.txt --window 64 -> longer than the model's context of 32; take 32 or fewer
compress llama --out x --data text.txt --window 64 -> longer than the model's context of 32; take 32 or fewer
compress llama --out x --data text.txt --n 999 -> use more text, --n

compress t5 --out x --data text.txt -> needs 2048 tokens, and the text has
compress llama --out x --data short.txt -> needs 32 tokens, and the text has 1; use more text or shorter windows
compress llama --out x --data empty.txt -> the text is empty
compress llama --out x --data nowhere.txt -> there is no file or folder 'nowhere.txt'
compress llama --out x --data images -> no text in images: needed are files that end in .jsonl, .md, .txt
compress llama --out x --data chat.jsonl -> has no chat template; set tokenizer.chat_template, or pass texts
compress demo-vit --out x --data nowhere -> there is no folder nowhere
compress demo-vit --out x --data empty -> no images in empty: needed are image files
compress demo-vit --out x --data text.txt -> text.txt is a file; a folder of images is needed
compress demo-vit --out x --data gone -> labels.csv names 1 files that are not in gone, such as 77.png
compress demo-vit --out x --data some -> 3 of the first 20 images are unreadable, such as some/00.png
compress vit --out x --data captions -> captions/labels.csv needs a header with the columns file,label
compress clip --out x --data flat -> the images in flat have no captions: needed is labels.csv with file,caption
compress clip --out x --data text.txt -> text.txt is a file; a folder of images is needed

compress demo-vit --out x --dense nowhere.pt -> there is no weights file nowhere.pt
compress demo-vit --out x --dense bin.safetensors -> bin.safetensors cannot be read as safetensors
compress demo-vit --out x --dense text.pt -> text.pt cannot be read as a torch state dict
compress demo-vit --out x --dense list.pt -> list.pt holds no state dict
compress demo-vit --out x --dense model.pt -> save model.state_dict() with torch.save or safetensors
compress demo-vit --out x --dense missing.pt -> missing.pt does not fit VisionTransformer: 1 keys missing (blocks.3.mlp.fc1.weight)
compress demo-vit --out x --dense more.pt -> 1 keys unexpected (more)
compress demo-vit --out x --dense shape.pt -> 1 of another shape (norm.bias (3,) instead of (40,))
compress demo-vit --out x --dense nan.pt --n 8 --epochs 0 -> blocks.2.mlp.fc2
compress demo-vit --out x --dense inf.pt --n 8 --epochs 0 -> blocks.1.attn.qkv
compress demo-llm --out x --dense missing.pt -> --dense names trained weights of a timm model, and demo-llm has its own
compress vit --out x --data images --dense missing.pt -> --dense names trained weights of a timm model, and vit has its own

compress vit-unprocessed --out x --data images -> no image processor in vit-unprocessed: copy preprocessor_config.json
compress clip-unprocessed --out x --data captions -> no image processor in clip-unprocessed
compress clip-untokenized --out x --data captions -> no tokenizer in clip-untokenized: copy tokenizer.json
compress t5-untokenized --out x --data text.txt -> no tokenizer in t5-untokenized: copy tokenizer.json
compress vit-cut --out x --data images -> the image processor of vit-cut cannot be opened
compress vit-other --out x --data images -> Input image size (224*224) doesn't match model (16*16)
compress vit-huge --out x --data images -> size height 1000000000, which is not in 1..8192
compress vit-modules --out x --data images -> vit-modules/modules.json: it is {}
compress vit-list --out x --data images -> vit-list/modules.json: [0] is 1

eval -> the following arguments are required: DIR|MODEL
eval some/where -> there is no folder some/where
eval demo-vti -> the nearest are demo-vit
eval empty -> empty has no config.json
eval own -> open it by load(folder, Net())
eval vit_tiny_patch16_224 -> needs images to be measured on: --data takes a folder (labelled, if it has classes)
eval vit -> vit needs images to be measured on: --data takes a folder
eval clip -> clip needs images with captions to be measured on
eval llama -> llama needs text to be measured on: --data takes a file
eval llama-cut --data text.txt -> model.safetensors cannot be read
eval llama-bare --data text.txt -> cannot open the model llama-bare
eval llama-lost --data text.txt -> lack 1 tensors of LlamaForCausalLM (model.layers.1.mlp.up_proj.weight)
eval llama-mute --data text.txt -> no tokenizer in llama-mute
eval coded --data nowhere -> there is no folder nowhere
eval coded --data flat -> the images in flat have no labels; accuracy needs one folder per class
eval factors --data twelve -> label 11 is outside the model's classes 0..9
eval vit --data flat -> the images in flat have no labels
eval llama --data empty.txt -> the text is empty
eval demo-vit --batch-size 0 -> --batch-size 0 is less than 1
eval demo-vit --device tpu -> --device tpu cannot be used here
eval demo-vit --n 3 -> unrecognized arguments: --n 3
eval dinov2 --data flat -> dinov2 is an encoder, which has no accuracy and no perplexity; --dense compares
eval bart_model --data text.txt -> bart_model is an encoder
eval bert --data text.txt -> bert is an encoder
eval whisper --data text.txt -> no command has data for
eval demo-vit --dense nowhere.pt -> there is no weights file nowhere.pt
eval factors --dense missing.pt -> missing.pt does not fit VisionTransformer
eval llama --data text.txt --dense empty -> empty has no config.json
eval vit --data images --dense t5 -> --dense t5 takes text, and vit takes images; it is another model
eval clip --data captions --dense siglip -> those of the dense model (8, 64); it is another model

info -> the following arguments are required: DIR
info nowhere -> there is no folder nowhere; `fips compress` makes one
info empty -> empty has no config.json, so it is no model saved by fips_nb
info junk -> junk/config.json is not valid JSON
info llama -> llama/config.json does not describe a model saved by fips_nb
info broken -> broken/config.json: arch is 3: Expected `str`, got `int`
info later -> later has format version 99, which needs a newer fips_nb
info older -> older has format version 3, written before fips_nb 0.2.0, which no release was: compress the model again
info coded --plot x.txt -> --plot x.txt has none of the suffixes .png, .svg, .pdf
info coded --plot nowhere/x.png -> nowhere to write the picture to

bench nowhere/there/x -> there is no folder nowhere/there/x
bench whisper -> dicts of input_features and decoder_input_ids
bench demo-vit --batch 0 -> argument --batch: 0 is less than 1
bench demo-vit --batch many -> 'many' is no number, and no list like 1,16
bench demo-vit --prefer best -> --prefer best is not time or memory
bench demo-vit --params 2 -> --params 2 is outside (0, 1]
bench coded --params .5 -> coded is compressed already; leave out --params
bench demo-vit --device tpu -> --device tpu cannot be used here

export coded -> the following arguments are required: --out
export nowhere --out x -> there is no folder nowhere; `fips compress` makes one
export empty --out x -> empty has no config.json
export llama --out x -> llama/config.json does not describe a model saved by fips_nb
export coded --out empty -> --out empty exists; name another folder

finetune -> the following arguments are required: DIR, --out
finetune nowhere --out x -> nowhere is no folder of a compressed model; `fips compress MODEL --out DIR` makes one
finetune demo-vit --out x -> demo-vit is no folder of a compressed model
finetune empty --out x -> empty has no config.json
finetune llama --out x --data text.txt -> llama is not compressed; `fips compress llama --out DIR` makes a folder
finetune llama-svd --out x -> llama-svd needs text to be trained on: --data takes a file
finetune own --out x -> open it by load(folder, Net())
finetune factors --out coded -> --out coded exists
finetune factors --out x --epochs 0 -> --epochs 0 is not an integer of at least 1
finetune factors --out x --lr 0 -> --lr 0.0 is not positive
finetune factors --out x --lr fast -> argument --lr: 'fast' is no number
finetune factors --out x --loss best -> --loss best is not outputs, labels or both
finetune factors --out x --views many -> --views 'many' is not one of none, crops, strong
finetune factors --out x --n 0 -> --n 0 is less than 1
finetune factors --out x --n 20 -> 20 images are 2 batches, and one batch in 8 judges the others; take more data, or a smaller --batch-size, such as 2
finetune factors --out x --n 7 --batch-size 2 -> 7 images are 4 batches, and one batch in 8 judges the others; take more data, or at least 8
finetune factors --out x --window 8 -> --window is for models of text, and factors is none
finetune factors --out x --device tpu -> --device tpu cannot be used here
finetune factors --out x --new-head --loss outputs -> --new-head learns from labels; leave out --loss outputs
finetune factors --out x --loss labels --dense missing.pt -> --dense is for a dense model to follow, and labels follow none
finetune factors --out x --dense missing.pt -> missing.pt does not fit VisionTransformer
finetune factors --out x --data flat --loss labels --batch-size 2 -> these data have no labels, which this needs; bring labels
finetune factors --out x --data flat --new-head --batch-size 2 -> these data have no labels, which --new-head needs
finetune factors --out x --data twelve --loss labels --batch-size 1 -> data with other classes need a new head: --new-head
finetune llama-svd --out x --data text.txt --mix -> --mix is for classifiers of images, and llama-svd is none
finetune llama-svd --out x --data text.txt --views none -> --views is for classifiers of images
finetune llama-svd --out x --data text.txt --new-head -> --new-head is for classifiers of images
finetune llama-svd --out x --data text.txt --loss outputs -> --loss outputs needs the dense model: name it by --dense, or take --loss labels

compare demo-vit -> the following arguments are required: METHOD
compare demo-vit rounding --bits 4 -> there is nothing to compare with rounding; name at least two methods
compare demo-vit rounding prunning --bits 3 -> prunning is unknown; did you mean pruning? there are rounding
compare demo-vit svd svd: --bits 3 -> svd and svd: are the same; leave one of them out
compare demo-vit svd:params=.5 svd:params=0.50 --bits 3 -> svd:params=.5 and svd:params=0.50 are the same
compare demo-vit rounding pruning -> methods are compared at one size: give one of --bits, --params and --bytes
compare demo-vit svd aafm --bits 3 --params .5 -> give one of --bits, --params and --bytes
compare demo-vit svd aafm --bits 20 -> --bits 20 is outside (0, 16)
compare demo-vit svd aafm --params 0 -> --params 0 is outside (0, 1]
compare demo-vit svd rounding --params .5 -> rounding: --params is for methods of factors; give --bits or --bytes
compare demo-vit svd pruning:params=.5 --params .5 -> pruning:params=.5: params would change the size
compare demo-vit svd pruning:targets=all --params .5 -> targets would change the size that --params asks for
compare demo-vit svd pruning:level=3 --bits 3 -> pruning:level=3: unknown setting 'level'; the nearest are levels
compare demo-vit svd pruning:epochs=x --bits 3 -> pruning:epochs=x: 'x' is no number
compare demo-vit svd pruning:epochs=-1 --bits 3 -> pruning:epochs=-1: epochs=-1 is less than 0
compare demo-vit svd pruning:params=2 --bits 3 -> pruning:params=2: --params 2 is outside (0, 1]
compare demo-vit svd rounding:params=.5 --bits 3 -> rounding:params=.5: --params 0.5 is for factors
compare demo-vit svd pruning:epochs=1,epochs=2 --bits 3 -> epochs is given twice
compare demo-vit svd aafm --params .5 --window 9 -> --window is for models of text
compare demo-vit svd aafm --params .5 --data nowhere -> there is no nowhere to calibrate with
compare demo-vit svd aafm --params .5 --data images --test images -> --data images and --test images overlap
compare demo-vit svd aafm --params .5 --data images --test images/red -> --data images and --test images/red overlap
compare demo-vit svd aafm --params .5 --test nowhere -> there is no folder nowhere
compare demo-vit svd aafm --params .5 --test empty -> no images in empty
compare demo-vit svd aafm --params .5 --plot x.txt -> --plot x.txt has none of the suffixes
compare demo-vit svd aafm --params .5 --out kept -> kept/svd exists; name another folder by --out
compare demo-vit svd aafm --bytes 9999999 -> is no smaller than the model in 16 bits
compare demo-vit svd aafm --params .5 --device moon -> --device moon cannot be used here
compare vit_tiny_patch16_224 svd aafm --params .5 --test flat -> needs data to calibrate with: --data, others than --test
compare vit_tiny_patch16_224 svd aafm --params .5 --data flat -> needs images to be measured on: --data takes a folder
"""
TABLE = [tuple(part.strip() for part in line.split("->", 1)) for line in CASES.splitlines() if line]


def test_the_table_has_a_sentence_for_each_command_once():
    lines = [line for line, _ in TABLE]
    assert len(set(lines)) == len(lines) and all(len(said) > 12 for _, said in TABLE)


def check_spelling(said, line):
    "Every option that is named is one of the command."
    known = {a for c in cli._parser()._subparsers._group_actions[0].choices.items() if line.startswith(c[0])
             for a in c[1]._option_string_actions} | {"--help"}
    named = set(re.findall(r"--[a-z-]+", re.sub("`.*?`|unrecognized.*", "", said)))
    assert named <= known, named - known


@pytest.mark.parametrize("line, part", TABLE)
def test_wrong_input(line, part, traps, untouched, monkeypatch, capsys):
    monkeypatch.chdir(traps)
    status = cli.main(shlex.split(line))
    out, err = capsys.readouterr()
    said = [s for s in err.splitlines() if not s.startswith("fips: compressing ")]  # the news before a size is refused
    assert status == 2 and out == "" and len(said) == 1 and said[0].startswith("fips: error: "), err
    assert part in said[0], said[0]
    check_spelling(said[0], line)
    assert contents(traps) == untouched


# ---- the same in Python ----

X = torch.zeros(160, 1, 8, 8)


def labelled(y): return [(X[:10], torch.full((10,), y))]*8


CALLS = [
    ("compress", ("demo-vit",), dict(bits=17), "bits=17 is outside (0, 16)"),
    ("compress", ("demo-vit",), dict(params=1.5), "params=1.5 is outside (0, 1]"),
    ("compress", ("demo-vit",), dict(bits=4, bytes=90000), "bits=4 and bytes=90000 both say"),
    ("compress", ("demo-vit",), dict(params=.5, method="rounding"), "params=0.5 is for factors"),
    ("compress", ("demo-vit",), dict(method="fisp"), "method=fisp is unknown; did you mean fips-als?"),
    ("compress", ("demo-vit",), dict(n=0), "n=0 is less than 1"),
    ("compress", ("demo-vit",), dict(device="tpu"), "leave out device= to run on the CPU"),
    ("compress", ("demo-vit",), dict(resume=True), "resume= needs out=, a folder"),
    ("compress", ("demo-vit",), dict(out="mine"), "out=mine exists; name another folder, or replace the model in it with overwrite=True"),
    ("compress", ("demo-vit",), dict(out="cut"), "go on with it by resume=True, or drop it by overwrite=True"),
    ("compress", ("demo-vit",), dict(window=8), "window= is for models of text"),
    ("compress", ("demo-vit",), dict(bit=4), "there is no option bit; the nearest are bits"),
    ("compress", ("t5",), {}, "data= takes a file"),
    ("compress", (3, X), {}, "a model is a name, a folder or a torch module, not a int"),
    ("compress", (nn.Linear(8, 8),), {}, "this Linear needs data to calibrate with: data= takes a path, tensors"),
    ("compress", (nn.Linear(8, 8), X), dict(dense="a.pt"), "dense= is for names of timm"),
    ("compress", (nn.Linear(32, 32), torch.zeros(4, 9)), {}, "Linear cannot run on the first batch of the data"),
    ("compress", ("llama", "text.txt"), dict(processor=3), "llama has its own processor; processor= is for modules"),
    ("evaluate", ("demo-vit",), dict(batch_size=0), "batch_size=0 is less than 1"),
    ("evaluate", (3,), {}, "evaluate takes a module, what compress gave, a folder or a name, and not 3"),
    ("evaluate", (nn.Linear(8, 8),), {}, "this Linear needs data to be measured on: data="),
    ("evaluate", ("vit", "images"), dict(dense="t5"), "dense=t5 takes text, and vit takes images"),
    ("bench", ("coded",), dict(params=.5), "coded is compressed already; leave out params="),
    ("export", ("coded", "empty"), {}, "out=empty exists"),
    ("info", ("coded",), dict(plot="x.txt"), "plot=x.txt has none of the suffixes"),
    ("load", ("own",), {}, "load(folder, model=Net())"),
    ("load", ("coded",), dict(mode="int9"), "int9"),
    ("compare", ("demo-vit", "rounding"), dict(bits=3), "there is nothing to compare with rounding"),
    ("compare", ("demo-vit", ["svd", "aafm"]), {}, "give one of bits=, params= and bytes="),
    ("compare", ("demo-vit", ["svd", "aafm"], "flat"), dict(bits=3, test="flat"), "data=flat and test=flat overlap"),
    ("finetune", ("factors",), dict(epochs=0), "epochs=0 is not an integer of at least 1"),
    ("finetune", ("factors",), dict(lr=0), "lr=0 is not positive"),
    ("finetune", ("factors",), dict(new_head=True, loss="both"), "new_head=True learns from labels; leave out loss=both"),
    ("finetune", ("factors",), dict(epoch=3), "there is no option epoch; the nearest are epochs"),
    ("finetune", ("factors", X[:100]), {}, "100 rows of data are 7 batches"),
    ("finetune", ("factors", X), dict(loss="labels"), "these data have no labels"),
    ("finetune", ("factors", []), {}, "there is no calibration data"),
    ("finetune", ("factors", labelled(12)), dict(loss="labels"), "need a new head: new_head=True"),
    ("finetune", ("factors", labelled(-1)), dict(loss="both"), "label -1"),
    ("finetune", ("factors", [X[:10, :, :5]]*8), {}, "cannot run on the first batch of the data"),
    ("finetune", ("llama-svd", "text.txt"), dict(mix=True), "mix= is for classifiers of images"),
    ("finetune", ("llama-svd", "text.txt"), dict(loss="outputs"), "loss=outputs needs the dense model: name it by dense=, or take loss=labels"),
    ("finetune", (nn.Linear(8, 8), X), {}, "compress it first"),
]


@pytest.mark.parametrize("name, args, how, part", CALLS, ids=lambda v: v if isinstance(v, str) else None)
def test_wrong_call(name, args, how, part, traps, untouched, monkeypatch):
    import fips_nb
    monkeypatch.chdir(traps)
    with pytest.raises(ValueError) as e: getattr(fips_nb, name)(*args, **how)
    assert part in (said := str(e.value)) and "\n" not in said and "--" not in said, said
    assert contents(traps) == untouched


def test_a_module_that_was_compiled():
    "torch.compile keeps the module as `_orig_mod`; importing its compiler takes seconds."
    import fips_nb
    net = nn.Linear(8, 8)
    net._orig_mod = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"pass what was compiled \(model._orig_mod\)"): fips_nb.compress(net, X)


def test_unlabelled_data_without_a_dense_model(traps, monkeypatch):
    import fips_nb
    with pytest.raises(ValueError, match="have no labels, which this needs; bring labels"):
        fips_nb.finetune(fips_nb.load(traps/"factors"), X)


def test_the_command_prints_what_python_raises(traps, monkeypatch, capsys):
    "Only the spelling of options differs."
    import fips_nb
    monkeypatch.chdir(traps)
    for line, call in (("--bits 17", dict(bits=17)), ("--n 0", dict(n=0)), ("--out mine", dict(out="mine")),
                       ("--params .5 --method rounding", dict(params=.5, method="rounding"))):
        cli.main(["compress", "demo-vit", *([] if "out" in call else ["--out", "x"]), *line.split()])
        with pytest.raises(ValueError) as e: fips_nb.compress("demo-vit", **call)
        plain = re.sub(r"--([a-z]+) ", r"\1=", capsys.readouterr().err.removeprefix("fips: error: ").strip())
        assert plain.replace("--overwrite", "overwrite=True") == str(e.value)
