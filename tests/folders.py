"""Folders that several files of tests share: compressed demos, a model of every kind as transformers saves it, and data for them."""
import csv
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest
from filelock import FileLock

CODED = "demo-vit --n 200 --epochs 0"  # 4 bits, as nobody names a size
FACTORS = "demo-vit --n 200 --epochs 0 --params .65 --method pruning:levels=5"
END = "<|endoftext|>"
TEXT = ["def read(self, size=-1):\n    return self.buffer.read(size)\n"*12,
        "for name in sorted(names):\n    print(name, len(names[name]))\n"*12]*4


def once(factory, name, make):
    "A folder that the first process fills by `make(folder)`, and for which all others wait."
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)/name
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".done").exists():
            folder.mkdir()
            make(folder)
            folder.with_suffix(".done").touch()
    return folder


# ---- the demo ----

def run(line):
    "What a command prints; that of stderr too if it fails."
    from fips_nb.run.cli import main
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err: status = main(line.split())
    assert status == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="session")
def demos(tmp_path_factory):
    "The demo in 4 bits (`coded`) and with 65 % of its parameters (`factors`), and what --json said of both."
    def make(root):
        for name, words in dict(coded=CODED, factors=FACTORS).items():
            (root/f"{name}.json").write_text(run(f"compress {words} --out {root/name} --json"))
    return once(tmp_path_factory, "demos", make)


def shorten(monkeypatch, blocks):
    "Let the demo have few blocks, and folders no picture; no time is measured, and a file may be half of what was asked for."
    from small import first_blocks
    monkeypatch.setattr("fips_nb.data.demo.demo_vit", lambda pretrained=True: first_blocks(blocks))
    monkeypatch.setattr("fips_nb.store.hub.picture", lambda config: None)
    monkeypatch.setattr("fips_nb.round.sizes.SPARE_BYTES", .5)
    monkeypatch.setattr("fips_nb.run.evaluate.latency", lambda models, *_: [1.5]*len(models))


@pytest.fixture
def short(monkeypatch, timed_once): shorten(monkeypatch, 2)


@pytest.fixture
def shorter(monkeypatch, timed_once): shorten(monkeypatch, 1)


@pytest.fixture
def no_work(monkeypatch):
    "Let a command fail, other than by wrong input, once it fits, plans, trains or compares."
    def begun(*args, **kwargs): raise AssertionError("work has begun")
    for at in ("share.pipeline.fit_plan", "round.code.distill_codes", "run.compress.make_plan", "run.finetune.tune",
               "run.finetune.tune_codes", "run.compare._row"): monkeypatch.setattr(f"fips_nb.{at}", begun)


# ---- models of transformers ----

WIDTHS = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
SIGHT = WIDTHS | dict(image_size=16, patch_size=4)
TOKENS = dict(vocab_size=320, pad_token_id=0, bos_token_id=0, eos_token_id=0)
WORDS = WIDTHS | TOKENS | dict(max_position_embeddings=32)
LLAMA = TOKENS | dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=32)
HALVES = TOKENS | dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                       encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=32, decoder_start_token_id=0)
T5 = dict(vocab_size=320, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=0,
          decoder_start_token_id=0)
SWIN = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
WHISPER = {k: v for k, v in HALVES.items() if k != "max_position_embeddings"} | dict(
    num_mel_bins=8, max_source_positions=12, max_target_positions=32)
LABELS = dict(num_labels=3, id2label={0: "green", 1: "dark blue", 2: "red"},
              label2id={"green": 0, "dark blue": 1, "red": 2})
TOWERS = dict(text_config=WORDS, vision_config=SIGHT)
MODELS = dict(  # folder -> class and configuration
    llama=("LlamaForCausalLM", LLAMA), bert=("BertModel", WORDS), sentences=("BertModel", WORDS),
    vit=("ViTForImageClassification", SIGHT | LABELS), deit=("DeiTForImageClassification", SIGHT | LABELS),
    swin=("SwinForImageClassification", SWIN | LABELS), dinov2=("Dinov2Model", SIGHT | dict(mlp_ratio=2)),
    siglip_vision=("SiglipVisionModel", SIGHT), clip_vision=("CLIPVisionModelWithProjection", SIGHT),
    t5=("T5ForConditionalGeneration", T5), bart=("BartForConditionalGeneration", HALVES), bart_model=("BartModel", HALVES),
    marian=("MarianMTModel", HALVES), clip=("CLIPModel", TOWERS | dict(projection_dim=16)), siglip=("SiglipModel", TOWERS),
    whisper=("WhisperForConditionalGeneration", WHISPER))
KINDS = dict.fromkeys(("vit", "deit", "swin", "dinov2", "siglip_vision", "clip_vision"), "images")
KINDS |= dict.fromkeys(("t5", "bart", "bart_model", "marian"), "pairs")
KINDS |= dict(clip="captions", siglip="captions", sentences="text")
MODULES = [dict(idx=0, name="0", path="", type="sentence_transformers.models.Transformer"),
           dict(idx=1, name="1", path="1_Pooling", type="sentence_transformers.models.Pooling")]
BESIDE = {"modules.json": MODULES, "sentence_bert_config.json": dict(max_seq_length=32),
          "config_sentence_transformers.json": dict(prompts={}),
          "1_Pooling/config.json": dict(word_embedding_dimension=64, pooling_mode_mean_tokens=True)}


def small_tokenizer():
    "A tokenizer of 320 byte pairs."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=END, eos_token=END, pad_token=END)


def save_model(name, folder):
    "A model of MODELS with its processor's files."
    import torch
    import transformers as tf
    torch.manual_seed(0)
    cls, config = MODELS[name]
    cls = getattr(tf, cls)
    cls(cls.config_class(**config)).save_pretrained(folder)
    if KINDS.get(name) in ("images", "captions"):
        kind = tf.CLIPImageProcessor if "clip" in name else tf.ViTImageProcessor
        kind(size=16, crop_size=16).save_pretrained(folder)
    if KINDS.get(name) != "images": small_tokenizer().save_pretrained(folder)
    if name != "sentences": return
    (folder/"1_Pooling").mkdir()
    for file, said in BESIDE.items(): (folder/file).write_text(json.dumps(said))
    (folder/"extra.py").write_text('print("code")')


def save_data(root):
    "Images in folders of classes, without classes and with captions, and texts."
    from PIL import Image
    for d in ("flat", "captions", "empty"): (root/d).mkdir()
    rows = [("file", "caption")]
    for i, colour in enumerate(("red", "green", "dark_blue")*6):
        (root/"images"/colour).mkdir(parents=True, exist_ok=True)
        picture = Image.effect_mandelbrot((20, 16 + i), (-2, -1.5, 1 + i/9, 1.5), 40).convert("RGB")
        for place in (f"images/{colour}", "flat", "captions"): picture.save(root/place/f"{i}.png")
        rows.append((f"{i}.png", f"a {colour} thing, number {i}"))
    with open(root/"captions/labels.csv", "w", newline="") as f: csv.writer(f).writerows(rows)
    for name, text in dict(text=END.join(TEXT), short="def", empty="").items(): (root/f"{name}.txt").write_text(text)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    "A folder with those of all MODELS, of images (`images`, `flat`, `captions`) and with `text.txt`."
    def make(root):
        for name in MODELS: save_model(name, root/name)
        save_data(root)
    return once(tmp_path_factory, "home", make)


def data_for(home, name):
    "What the model `name` is calibrated on and measured with."
    return home/dict(images="images", captions="captions").get(KINDS.get(name), "text.txt")


# ---- the command ----

class Command:
    "Runs `fips` in this process: (status, stdout, stderr), or with `.json` what it says."
    def __init__(self, capsys): self.capsys = capsys

    def __call__(self, line):
        from fips_nb.run.cli import main
        status = main(line.split())
        return status, *self.capsys.readouterr()

    def json(self, line):
        status, out, err = self(f"{line} --json")
        assert status == 0 and out.count("\n") == 1, err
        return json.loads(out)


@pytest.fixture
def fips(capsys, monkeypatch, tmp_path):
    "The command, in an empty folder."
    monkeypatch.chdir(tmp_path)
    return Command(capsys)


def without_news(err):
    "stderr without the lines that say what will be done and how long it takes."
    news = "fips: compressing ", "fips: planning ", "fips: fine-tuning "
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(news))
