"""The command line on language models: a small Llama with a small tokenizer, in a folder as transformers writes it."""
import json
import shutil

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fips_nb.cli import is_text_model, main

pytestmark = pytest.mark.usefixtures('one_thread')
TEXT = ['def read(self, size=-1):\n    return self.buffer.read(size)\n' * 12, 'for name in sorted(names):\n    print(name, len(names[name]))\n' * 12] * 4


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
    "Folder with a Llama, an encoder, their text, and an empty folder."
    root = tmp_path_factory.mktemp('lm')
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok = tf.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<|endoftext|>', eos_token='<|endoftext|>', pad_token='<|endoftext|>')
    size = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    for name, model in (('llama', tf.LlamaForCausalLM(tf.LlamaConfig(**size, num_key_value_heads=2))), ('bert', tf.BertModel(tf.BertConfig(**size)))):
        model.save_pretrained(root / name)
        tok.save_pretrained(root / name)
    (root / 'text.txt').write_text('<|endoftext|>'.join(TEXT))
    (root / 'short.txt').write_text('def')
    (root / 'empty').mkdir()
    return root


def fips(capsys, *words):
    "Status, the JSON object or text on stdout, stderr."
    status = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out and '--json' in words else out, err


@pytest.fixture
def small(lm, tmp_path, capsys):
    status, out, err = fips(capsys, 'compress', lm / 'llama', '--out', tmp_path / 'small', '--calib', lm / 'text.txt', '--n-calib', 12, '--match-epochs', 1, '--json')
    assert status == 0, err
    return tmp_path / 'small', out


def test_compress_eval_info(lm, small, capsys):
    folder, made = small
    assert made['n_calib'] == 12 and made['targets'] == 'mlp' and abs(made['mlp_budget'] - .5) < .02
    status, ev, err = fips(capsys, 'eval', folder, '--data', lm / 'text.txt', '--dense', lm / 'llama', '--json')
    assert status == 0 and err == ''
    assert ev['window'] == 32 and ev['n_tokens'] > 500 and ev['perplexity'] > 1 and ev['bytes'] == made['bytes']
    status, dense, _ = fips(capsys, 'eval', lm / 'llama', '--data', lm / 'text.txt', '--json')
    assert abs(dense['perplexity'] - ev['dense']['perplexity']) < 1e-6 and dense['n_tokens'] == ev['n_tokens']
    status, text, _ = fips(capsys, 'eval', folder, '--data', lm / 'text.txt')
    assert 'perplexity' in text and f"{ev['n_tokens']:,} tokens" in text
    status, info, _ = fips(capsys, 'info', folder, '--json')
    assert status == 0 and info['arch'] == 'LlamaForCausalLM' and len(info['layers']) == 9 and info['bytes'] == ev['bytes']
    assert fips(capsys, 'info', folder)[0] == 0


def test_what_was_written_opens_with_transformers_and_answers_alike(lm, small):
    import fips_nb.hub  # noqa: F401
    folder, _ = small
    model, tok = tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)
    x = torch.tensor([tok(TEXT[0])['input_ids'][:16]])
    a, b = model(x).logits, tf.AutoModelForCausalLM.from_pretrained(lm / 'llama')(x).logits
    assert a.shape == b.shape and not torch.equal(a, b)
    assert model.generate(x, max_new_tokens=4, do_sample=False).shape == (1, 20)


@pytest.mark.parametrize('ratio, targets', [(.8, 'mlp'), (.7, 'all')])
def test_target_ratio_is_met(lm, tmp_path, capsys, ratio, targets):
    status, out, err = fips(capsys, 'compress', lm / 'llama', '--out', tmp_path / 'x', '--calib', lm / 'text.txt', '--target-ratio', ratio, '--targets', targets, '--match-epochs', 0, '--n-calib', 8, '--json')
    assert status == 0, err
    assert ratio - .02 < out['model_ratio'] <= ratio + 1e-6 and out['targets'] == targets


def test_encoder(lm, tmp_path, capsys):
    status, out, err = fips(capsys, 'compress', lm / 'bert', '--out', tmp_path / 'x', '--calib', lm / 'text.txt', '--n-calib', 8, '--match-epochs', 1, '--json')
    assert status == 0, err
    status, ev, err = fips(capsys, 'eval', tmp_path / 'x', '--data', lm / 'text.txt', '--dense', lm / 'bert', '--json')
    assert status == 0, err
    assert .5 < ev['cosine'] <= 1 and ev['n'] == len(TEXT)
    assert 'encoder' in fips(capsys, 'eval', tmp_path / 'x', '--data', lm / 'text.txt')[2]


@pytest.mark.parametrize('words, said', [
    ('compress LM/llama --out OUT', '--calib FILE'),
    ('compress LM/llama --out OUT --calib LM/short.txt', 'need'),
    ('compress LM/llama --out OUT --calib LM/nowhere.txt', 'no file or folder'),
    ('compress LM/llama --out OUT --calib LM/text.txt --window 64', '64'),
    ('compress LM/llama --out OUT --calib LM/text.txt --target-ratio 0.05', 'best possible'),
    ('compress LM/llama --out OUT --calib LM/text.txt --target-ratio 0.8 --budget 0.5', 'not allowed with'),
    ('compress LM/llama --out OUT --calib LM/text.txt --weights w.safetensors', '--weights is for vision models'),
    ('compress LM/empty --out OUT --calib LM/text.txt', 'no config.json'),
    ('compress demo-vit --out OUT --window 8', '--window is for language models'),
    ('eval LM/llama', '--data FILE'),
    ('eval LM/empty --data LM/text.txt', 'no config.json'),
    ('eval demo-vit --dense LM/llama', '--dense is for language models'),
])
def test_bad_input_is_one_line(lm, tmp_path, capsys, words, said):
    status, out, err = fips(capsys, *words.replace('LM', str(lm)).replace('OUT', str(tmp_path / 'x')).split())
    assert status == 2 and out == '' and said in err and err.count('\n') == 1, err
    assert not list(tmp_path.iterdir())


def test_broken_folders(lm, tmp_path, capsys):
    for name in ('cut', 'bare', 'lost', 'mute'):
        shutil.copytree(lm / 'llama', tmp_path / name)
    w = tmp_path / 'cut' / 'model.safetensors'
    w.write_bytes(w.read_bytes()[:1000])
    (tmp_path / 'bare' / 'model.safetensors').unlink()
    (tmp_path / 'mute' / 'tokenizer.json').unlink()
    (tmp_path / 'mute' / 'tokenizer_config.json').unlink()
    from safetensors.torch import load_file, save_file
    ts = load_file(tmp_path / 'lost' / 'model.safetensors')
    ts.pop('model.layers.1.mlp.up_proj.weight')
    save_file(ts, tmp_path / 'lost' / 'model.safetensors', {'format': 'pt'})
    for name, said in (('cut', 'model.safetensors cannot be read'), ('bare', 'cannot open'), ('lost', 'model.layers.1.mlp.up_proj.weight'), ('mute', 'no tokenizer')):
        status, out, err = fips(capsys, 'eval', tmp_path / name, '--data', lm / 'text.txt')
        assert status == 2 and said in err and err.count('\n') == 1, (name, err)


def test_which_world(lm, tmp_path):
    assert is_text_model('demo-llm') and is_text_model(str(lm / 'llama')) and is_text_model('meta-llama/Llama-3.2-1B')
    assert not is_text_model('demo-vit') and not is_text_model('vit_tiny_patch16_224') and not is_text_model(str(tmp_path / 'nowhere'))
