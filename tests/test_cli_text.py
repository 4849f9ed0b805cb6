"""The command line on language models: a small Llama in a folder as transformers writes it."""
import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import fips_nb.store.transformers_folders  # noqa: F401 (registers the format with transformers)
from fips_nb.run import commands
from fips_nb.share import planner
from fips_nb import coded_models, pipeline
from fips_nb.share.budgets import PRESETS, configure
from fips_nb.run.cli import main
from fips_nb.data.models import in_transformers
from fips_nb.data.text import enough_windows

pytestmark = pytest.mark.usefixtures('one_thread')
TEXT = ['def read(self, size=-1):\n    return self.buffer.read(size)\n' * 12,
        'for name in sorted(names):\n    print(name, len(names[name]))\n' * 12] * 4
END = '<|endoftext|>'


def small_tokenizer():
    "A tokenizer of 320 byte pairs."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet,
                                  show_progress=False)
    tok.train_from_iterator(TEXT, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=END, eos_token=END,
                                      pad_token=END)


@pytest.fixture(scope='module')
def lm(tmp_path_factory):
    "Folder with a Llama, an encoder, their text, and an empty folder."
    root = tmp_path_factory.mktemp('lm')
    tok = small_tokenizer()
    size = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
                pad_token_id=0)
    torch.manual_seed(0)
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**size, num_key_value_heads=2))
    for name, model in (('llama', llama), ('bert', tf.BertModel(tf.BertConfig(**size)))):
        model.save_pretrained(root / name)
        tok.save_pretrained(root / name)
    (root / 'text.txt').write_text(END.join(TEXT))
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
    "A compressed Llama, and what was said of it."
    words = ['--calib', lm / 'text.txt', '--n-calib', 12, '--distill-epochs', 1, '--json']
    status, out, err = fips(capsys, 'compress', lm / 'llama', '--out', tmp_path / 'small', *words)
    assert status == 0, err
    return tmp_path / 'small', out


def test_compress_eval_info(lm, small, capsys):
    folder, made = small
    assert made['n_calib'] == 12 and made['targets'] == 'mlp' and abs(made['mlp_budget'] - .5) < .02
    data = ['--data', lm / 'text.txt']
    status, ev, err = fips(capsys, 'eval', folder, *data, '--dense', lm / 'llama', '--json')
    assert status == 0 and err == ''
    assert ev['window'] == 32 and ev['n_tokens'] > 500 and ev['perplexity'] > 1
    assert ev['bytes'] == made['bytes']
    status, dense, _ = fips(capsys, 'eval', lm / 'llama', *data, '--json')
    assert abs(dense['perplexity'] - ev['dense']['perplexity']) < 1e-6
    assert dense['n_tokens'] == ev['n_tokens']
    status, text, _ = fips(capsys, 'eval', folder, *data)
    assert 'perplexity' in text and f"{ev['n_tokens']:,} tokens" in text
    status, text, _ = fips(capsys, 'eval', folder, *data, '--dense', lm / 'llama')
    assert f"dense {lm / 'llama'}  " in text and f"{ev['dense']['dense_bytes_16']:,}" in text
    status, info, _ = fips(capsys, 'info', folder, '--json')
    assert status == 0 and info['arch'] == 'LlamaForCausalLM' and len(info['layers']) == 9
    assert info['bytes'] == ev['bytes']
    status, text, _ = fips(capsys, 'info', folder)
    assert status == 0 and all(name in text for name in ('gate_proj', 'up_proj', 'down_proj'))


def test_what_was_written_opens_with_transformers_and_answers_alike(lm, small):
    folder, _ = small
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    tok = tf.AutoTokenizer.from_pretrained(folder)
    x = torch.tensor([tok(TEXT[0])['input_ids'][:16]])
    a = model(x).logits
    b = tf.AutoModelForCausalLM.from_pretrained(lm / 'llama')(x).logits
    assert a.shape == b.shape and not torch.equal(a, b)
    assert model.generate(x, max_new_tokens=4, do_sample=False).shape == (1, 20)


@pytest.mark.parametrize('ratio, targets', [(.8, 'mlp'), (.7, 'all')])
def test_target_ratio_is_met(lm, tmp_path, capsys, ratio, targets):
    words = ['--calib', lm / 'text.txt', '--target-ratio', ratio, '--targets', targets,
             '--distill-epochs', 0, '--n-calib', 8, '--json']
    status, out, err = fips(capsys, 'compress', lm / 'llama', '--out', tmp_path / 'x', *words)
    assert status == 0, err
    assert ratio - .02 < out['model_ratio'] <= ratio + 1e-6 and out['targets'] == targets


def same_tensors(a, b):
    "The weights in two folders agree bit for bit."
    one, two = load_file(a / 'model.safetensors'), load_file(b / 'model.safetensors')
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_plan_is_what_compress_makes_by_itself(lm, tmp_path, capsys):
    words = [lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 12, '--batch-size', 1]
    size, rest = ['--target-ratio', .8], ['--distill-epochs', 0, '--json']
    file = tmp_path / 'plan.json'
    status, plan, err = fips(capsys, 'plan', *words, *size, '--out', file, '--json')
    assert status == 0, err
    assert plan['size'] <= plan['budget'] * plan['dense_size']
    known = {'pruning', 'groups of 12, rank 3 d', 'groups of 12, rank 5 d'}
    assert set(plan['trials']) <= known and 'pruning' in plan['trials']
    assert plan['divergence'] <= min(plan['trials'].values()) and len(plan['layers']) == 9
    status, text, _ = fips(capsys, 'plan', *words, *size, '--layers')
    assert status == 0 and 'this plan' in text and 'model.layers.2.mlp.down_proj' in text
    out = ['--out', tmp_path / 'one']
    status, one, err = fips(capsys, 'compress', *words, *size, *rest, *out)
    assert status == 0 and not (tmp_path / 'one.state').exists(), err
    out = ['--out', tmp_path / 'two']
    status, two, err = fips(capsys, 'compress', *words, '--plan', file, *rest, *out)
    assert status == 0, err
    same_tensors(tmp_path / 'one', tmp_path / 'two')
    assert one['plan'] == two['plan'] and .78 < one['model_ratio'] <= .8
    planned = ['--calib', lm / 'text.txt', '--plan', file, '--out', tmp_path / 'x']
    status, _, err = fips(capsys, 'compress', lm / 'bert', *planned)
    assert status == 2 and 'made for another model' in err and err.count('\n') == 1
    file.write_text('[]')
    status, _, err = fips(capsys, 'compress', *words, '--plan', file, '--out', tmp_path / 'x')
    assert status == 2 and 'no plan of fips_nb' in err and not (tmp_path / 'x').exists()


def test_target_bytes(lm, tmp_path, capsys):
    words = [lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--distill-epochs', 0,
             '--json']
    full = ['--budget', 1, '--preset', 'pruning', '--out', tmp_path / 'full']
    dense = fips(capsys, 'compress', *words, *full)[1]
    ours = 3 * 3 * 32 * 80  # weights of the MLPs
    half = dict(goal=dense['dense_bytes_16'] - ours, more=[])  # an MLP weight at half of 16 bits
    kept = dict(goal=dense['dense_bytes'] - 4 * ours + ours, more=['--keep-float32'])
    for size in (half, kept):
        for preset in ('fips-als', 'pruning'):
            out = tmp_path / f"{preset}{len(size['more'])}"
            given = ['--target-bytes', size['goal'], '--preset', preset, *size['more']]
            status, out, err = fips(capsys, 'compress', *words, *given, '--out', out)
            assert status == 0, err
            assert .9 * ours < out['mlp_bytes'] <= ours
            assert (out['plan'] is None) == (preset == 'pruning')
    few = ['--target-bytes', 1000, '--preset', 'fips-als', '--out', tmp_path / 'x']
    status, _, err = fips(capsys, 'compress', *words[:-1], *few)
    assert status == 2 and 'best possible' in err


def test_bits(lm, tmp_path, capsys, monkeypatch):
    "Rounded to a size, whole or after an interruption; opened by transformers; too small a size named."
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--json']
    given = [*words, '--bits', 7, '--distill-epochs', 1, '--out']
    status, made, err = fips(capsys, *given, tmp_path / 'coded')
    assert status == 0 and 'by rounding to' in err, err
    assert 6.9 < made['bits'] <= 7 and made['preset'] == 'rounding'
    assert made['bytes'] == (tmp_path / 'coded/model.safetensors').stat().st_size
    size = ['--target-bytes', made['target_bytes'], '--distill-epochs', 1, '--out', tmp_path / 'cut']
    with monkeypatch.context() as m:
        m.setattr(coded_models, 'distill_codes', interrupt)
        status, _, err = fips(capsys, *words, *size)
        assert status == 130 and '--resume' in err and (tmp_path / 'cut.state/codes.safetensors').exists()
    assert fips(capsys, *words, *size, '--resume')[0] == 0
    same_tensors(tmp_path / 'cut', tmp_path / 'coded')
    net = tf.AutoModelForCausalLM.from_pretrained(tmp_path / 'coded')
    said = fips(capsys, 'info', tmp_path / 'coded', '--json', '--plot', tmp_path / 'bits.png')[1]
    assert said['bits'] == made['bits'] and (tmp_path / 'bits.png').stat().st_size > 10_000
    shapes = {l['name']: l['shape'] for l in said['layers']}
    assert shapes['model.layers.0.mlp.up_proj.weight'] == list(net.model.layers[0].mlp.up_proj.weight.shape)
    assert 'bits per weight' in fips(capsys, 'info', tmp_path / 'coded', '--layers')[1]
    status, _, err = fips(capsys, *words[:-1], '--bits', .5, '--out', tmp_path / 'x')
    assert status == 2 and 'the least possible is' in err and not (tmp_path / 'x').exists()


@pytest.mark.parametrize('preset', PRESETS)
def test_bits_of_factors(preset, lm, tmp_path, capsys):
    "A file of a given size for every preset, everything counted."
    more = [] if preset in ('fips-paper', *SVDS) else ['--levels', 2]
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--distill-epochs', 1, '--json',
             '--preset', preset, '--bits', 7, '--budget', .4, *more, '--out', tmp_path / 'm']
    status, made, err = fips(capsys, *words)
    assert status == 0 and f'by {preset} to' in err and err.count('\n') == 1, err
    n = sum(p.numel() for p in tf.AutoModelForCausalLM.from_pretrained(lm / 'llama').parameters())
    size = (tmp_path / 'm/model.safetensors').stat().st_size
    assert .98 * 7 <= 8 * size / n <= 7 and made['bytes'] == size and made['bits'] == pytest.approx(8 * size / n)
    assert made['preset'] == preset and made['factors']['mlp_budget'] <= .4
    said = fips(capsys, 'info', tmp_path / 'm', '--json', '--plot', tmp_path / 'm.png')[1]
    assert said['preset'] == preset and said['bits'] == made['bits'] and said['model_params'] == n
    kept = {'budget', 'mlp_budget', 'mlp_params', 'model_ratio', 'config', 'layers'}
    assert kept <= said['factors'].keys() and said['factors']['config']['distill_epochs'] == 0
    assert {'name', 'shape', 'bits', 'bytes', 'zeros', 'step'} == said['layers'][0].keys()
    assert {'name', 'rank', 'density', 'error', 'bytes'} <= said['factors']['layers'][0].keys()
    assert (tmp_path / 'm.png').stat().st_size > 10_000
    text = fips(capsys, 'info', tmp_path / 'm', '--layers')[1]
    assert 'bits per weight' in text and 'The factors before they were rounded' in text
    assert 'model.layers.0.mlp.up_proj.V' in text and '  up  ' in text
    net = tf.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
    names = {l['name'] for l in said['layers']}
    assert names == set(net.fips_codes) and {'U', 'V'} >= {k[-1] for k in names if '.mlp.' in k}


SVDS = ('svd', 'asvd', 'svd-llm', 'basis-sharing', 'aafm', 'gfm')


def test_options_of_coded_factors(lm, tmp_path, capsys):
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--distill-epochs', 0, '--json']
    given = ['--targets', 'all', '--group-size', 1, '--sparsity', .6, '--levels', 3, '--preset', 'fips-als', '--bits', 8]
    status, made, err = fips(capsys, *words, *given, '--out', tmp_path / 'm')
    assert status == 0 and ' 21 linears' in err and 'no distillation' in err, err
    said = fips(capsys, 'info', tmp_path / 'm', '--json')[1]['factors']
    assert {k: said['config'][k] for k in ('targets', 'group_size', 'sparsity', 'levels')} == dict(
        targets='all', group_size=1, sparsity=.6, levels=3)
    assert len(said['layers']) == 21 and made['factors']['n_bases'] > 2 and said['budget'] == .5
    text = fips(capsys, *words[:-1], *given, '--out', tmp_path / 'n')[1]
    assert 'compressed by fips-als and rounded into' in text and 'of the MLPs and attentions' in text
    assert 'Distillation took' not in text


def test_auto_rounds_at_two_bits(lm, tmp_path, capsys):
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--distill-epochs', 0, '--json']
    for i, how in enumerate((['--bits', 7], ['--bits', 7, '--preset', 'auto'], ['--bits', 7, '--preset', 'rounding'])):
        status, made, err = fips(capsys, *words, *how, '--out', tmp_path / str(i))
        assert status == 0 and made['preset'] == 'rounding' and made['notes'] == [] and 'factors' not in made
        assert err.count('\n') == 1 and 'by rounding to' in err
    for i in (1, 2): same_tensors(tmp_path / '0', tmp_path / str(i))


@pytest.mark.parametrize('size', ['--bits', '--target-bytes'])
@pytest.mark.parametrize('better', ['rounding', 'fips-als'])
def test_auto_keeps_the_better(better, size, lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, 'AUTO_BITS', 16)
    seen, real = [], commands._divergences

    def measure(request, models, batches):
        seen.extend([real(request, models, batches), len(batches)])
        return [.1, .2] if better == 'rounding' else [.2, .1]
    monkeypatch.setattr(commands, '_divergences', measure)
    fitted = []
    for module, name in ((coded_models, 'code_model'), (pipeline, 'compress')):
        def spy(model, batches, *a, call=getattr(module, name), **k):
            fitted.append(len(batches))
            return call(model, batches, *a, **k)
        monkeypatch.setattr(module, name, spy)
    much = 7 if size == '--bits' else 34000
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 10, '--batch-size', 1,
             '--distill-epochs', 1, size, much, '--out', tmp_path / 'm']
    status, made, err = fips(capsys, *words, '--json')
    assert status == 0 and made['preset'] == better and ('factors' in made) == (better != 'rounding'), err
    assert fitted == [8, 8, 8] and seen[1] == 2 and all(0 < d < 1 for d in seen[0])  # two of ten were kept out
    own, note = made['notes']
    assert 'made up itself' in own
    assert note.startswith('on 2 batches that were kept out, the divergence of rounding is 0.') and 'fips-als 0.' in note
    assert err.count('\n') == 1 and 'by rounding and by fips-als to' in err
    assert not (tmp_path / 'm.state').exists()
    assert set(made['seconds_by_phase']) >= {'moments', 'factors', 'costs', 'rounding', 'distillation'}
    assert fips(capsys, 'info', tmp_path / 'm', '--json')[1]['preset'] == better


def test_auto_without_a_choice(lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, 'AUTO_BITS', 16)
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--distill-epochs', 0, '--bits', 7, '--json']
    status, made, _ = fips(capsys, *words, '--n-calib', 8, '--out', tmp_path / 'few')
    assert status == 0 and made['preset'] == 'rounding'
    assert made['notes'] == ['fips-als was not tried: of 1 batches none can be kept out to compare with rounding']

    def fail(*a, **k): raise ValueError('a budget is too small; the smallest possible is 1')
    monkeypatch.setattr(pipeline, 'compress', fail)
    status, made, _ = fips(capsys, *words, '--n-calib', 8, '--batch-size', 1, '--out', tmp_path / 'none')
    assert status == 0 and made['preset'] == 'rounding' and 'not tried: a budget is too small' in made['notes'][-1]
    assert made['notes'][-1].startswith('fips-als')


@pytest.mark.parametrize('preset', ['fips-als', 'auto'])
@pytest.mark.parametrize('where', ['factors', 'codes', 'distillation'])
def test_coded_factors_resume(preset, where, lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, 'AUTO_BITS', 16)
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--batch-size', 1, '--bits', 7,
             '--distill-epochs', 1, '--preset', preset, *([] if preset == 'auto' else ['--group-size', 1])]
    assert fips(capsys, *words, '--out', tmp_path / 'whole')[0] == 0
    cut = [*words, '--out', tmp_path / 'cut']
    calls, last = [], dict(factors=(pipeline, 'fit_plan'), codes=(coded_models, 'round_to_bytes'),
                           distillation=(coded_models, 'distill_codes'))[where]
    real = getattr(*last)
    with monkeypatch.context() as m:
        nth = 2 if preset == 'auto' and where != 'factors' else 1  # auto rounds the dense model first

        def stop(*a, **k):
            calls.append(0)
            if len(calls) == nth: raise KeyboardInterrupt
            return real(*a, **k)
        m.setattr(*last, stop)
        status, _, err = fips(capsys, *cut)
    assert status == 130, err
    if where == 'factors' and preset == 'fips-als':  # nothing was finished but moments
        assert not list((tmp_path / 'cut.state').glob('*.safetensors'))
    else: assert '--resume' in err
    if where != 'factors': assert list((tmp_path / 'cut.state/factors').glob('group-*.safetensors'))
    if (tmp_path / 'cut.state').exists():
        status, _, err = fips(capsys, *cut, '--resume', '--seed', 1)
        assert status == 2 and 'differ' in err
    with monkeypatch.context() as m:
        if where != 'factors': m.setattr(pipeline, 'fit_plan', lambda *a, **k: 1 / 0)  # nothing is fitted again
        assert fips(capsys, *cut, '--resume')[0] == 0
    same_tensors(tmp_path / 'cut', tmp_path / 'whole')
    assert not (tmp_path / 'cut.state').exists()
    status, _, err = fips(capsys, *cut, '--resume')
    assert status == 0 and 'is complete' in err


def test_an_old_state_of_stages_is_dropped_when_asked(lm, tmp_path, capsys, monkeypatch):
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8, '--bits', 7, '--distill-epochs', 1,
             '--out', tmp_path / 'm']
    with monkeypatch.context() as m:
        m.setattr(coded_models, 'distill_codes', interrupt)
        assert fips(capsys, *words, '--preset', 'svd')[0] == 130
    assert (tmp_path / 'm.state/factors').is_dir()
    with monkeypatch.context() as m:
        m.setattr(coded_models, 'distill_codes', interrupt)
        assert 'holds an interrupted run' in fips(capsys, *words, '--preset', 'rounding')[2]
        assert fips(capsys, *words, '--preset', 'rounding', '--overwrite')[0] == 130
    assert not list((tmp_path / 'm.state/factors').glob('*.safetensors'))
    assert fips(capsys, *words, '--preset', 'rounding', '--resume')[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ['m']


def interrupt(*a, **k):
    raise KeyboardInterrupt


def test_a_planned_run_resumes_with_its_plan(lm, tmp_path, capsys, monkeypatch):
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 12,
             '--target-ratio', .8, '--distill-epochs', 1]
    assert fips(capsys, *words, '--out', tmp_path / 'whole')[0] == 0
    monkeypatch.setattr(pipeline, 'distill_outputs', interrupt)
    status, _, err = fips(capsys, *words, '--out', tmp_path / 'cut')
    assert status == 130 and '--resume' in err and (tmp_path / 'cut.state/plan.json').exists()
    monkeypatch.undo()
    monkeypatch.setattr(planner, 'make_plan', lambda *a, **k: 1 / 0)  # not planned again
    other = [*words, '--out', tmp_path / 'cut', '--resume']
    other[other.index(.8)] = .9
    status, _, err = fips(capsys, *other)
    assert status == 2 and 'budget differ' in err
    status, _, err = fips(capsys, *words, '--out', tmp_path / 'cut', '--resume')
    assert status == 0, err
    same_tensors(tmp_path / 'cut', tmp_path / 'whole')
    assert not (tmp_path / 'cut.state').exists()


def test_a_large_model_is_given_what_can_be_computed():
    "The modules below decide it, so Python and the command line agree."
    shape = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                 num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device('meta'):
        big = tf.LlamaForCausalLM(tf.LlamaConfig(**shape))
    n = enough_windows(big, 2048)
    assert 8 <= n < 32 and n * 2048 > 16_000  # a CPU has hours, not days
    assert enough_windows(big, 2048, 'cuda') == 128
    cfg = configure()
    with pytest.warns(UserWarning, match=f'distill_epochs={cfg.distill_epochs} does them'):
        left, notes = pipeline.limit_distillation(big, cfg, n * 2048, 'cpu')
    assert cfg.distill_epochs == 3 and left.distill_epochs == 0 and len(notes) == 1
    assert pipeline.limit_distillation(big, cfg, n * 2048, 'cuda') == (cfg, [])


def test_distillation_that_is_left_out_is_said(lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, 'can_distill', lambda *a: False)
    words = ['compress', lm / 'llama', '--calib', lm / 'text.txt', '--n-calib', 8]
    status, out, err = fips(capsys, *words, '--out', tmp_path / 'x')
    lines = err.splitlines()
    assert status == 0 and 'Note: distillation is left out' in out
    assert len(lines) == 2 and 'no distillation' in lines[0]
    assert lines[1].startswith('fips: warning: distillation is left out')
    status, out, err = fips(capsys, *words, '--out', tmp_path / 'y', '--distill-epochs', 1)
    assert status == 0 and '1 distillation epoch;' in err and 'left out' not in out + err


def test_export_is_plain_and_answers_alike(lm, small, tmp_path, capsys):
    folder, _ = small
    plain = tmp_path / 'dense'
    status, out, err = fips(capsys, 'export', folder, '--out', plain, '--json')
    assert status == 0 and out['bytes'] >= 4 * 3 * 3 * 32 * 80, err
    assert 'quantization_config' not in json.loads((plain / 'config.json').read_text())
    x = torch.arange(16)[None]
    a, b = (tf.AutoModelForCausalLM.from_pretrained(f)(x).logits for f in (folder, plain))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    status, _, err = fips(capsys, 'eval', plain, '--data', lm / 'text.txt')
    assert status == 0, err  # the tokenizer came along
    assert 'exists' in fips(capsys, 'export', folder, '--out', plain)[2]
    assert 'no folder' in fips(capsys, 'export', tmp_path / 'nowhere', '--out', tmp_path / 'y')[2]


def test_encoder(lm, tmp_path, capsys):
    text, out = lm / 'text.txt', tmp_path / 'x'
    words = ['--calib', text, '--n-calib', 8, '--distill-epochs', 1, '--json']
    status, _, err = fips(capsys, 'compress', lm / 'bert', '--out', out, *words)
    assert status == 0, err
    beside = ['--data', text, '--dense', lm / 'bert']
    status, ev, err = fips(capsys, 'eval', out, *beside, '--json')
    assert status == 0, err
    assert .5 < ev['cosine'] <= 1 and ev['n'] == len(TEXT)
    status, said, _ = fips(capsys, 'eval', out, *beside)
    assert f"cosine similarity to the dense outputs is {ev['cosine']:.4f}" in ' '.join(said.split())
    assert 'encoder' in fips(capsys, 'eval', out, '--data', text)[2]


@pytest.mark.parametrize('words, said', [
    ('compress LM/llama --out OUT', '--calib FILE'),
    ('compress LM/llama --out OUT --calib LM/short.txt', 'need'),
    ('compress LM/llama --out OUT --calib LM/nowhere.txt', 'no file or folder'),
    ('compress LM/llama --out OUT --calib LM/text.txt --window 64', '64'),
    ('compress LM/llama --out OUT --calib LM/text.txt --target-ratio 0.05', 'best possible'),
    ('compress LM/llama --out OUT --calib LM/text.txt --target-ratio 0.8 --budget 0.5',
     'not allowed with'),
    ('compress LM/llama --out OUT --calib LM/text.txt --weights w.safetensors',
     '--weights is for models of timm'),
    ('compress LM/empty --out OUT --calib LM/text.txt', 'no config.json'),
    ('compress demo-vit --out OUT --window 8', '--window is for models of text'),
    ('compress LM/llama --out OUT --calib LM/text.txt --target-ratio 0.8 --sparsity 0.9',
     'is what a plan chooses'),
    ('compress LM/llama --out OUT --calib LM/text.txt --plan nowhere.json', 'no plan nowhere.json'),
    ('compress LM/llama --out OUT --calib LM/text.txt --plan nowhere.json --preset svd',
     '--plan is for the preset fips-als'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --budget 0.5',
     'or name a --preset of factors'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --budget 0.5 --preset rounding', 'both say how small'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --target-ratio 0.5 --preset svd', 'both say how small'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --preset svd --dtype float16', 'factors of 16 bits'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --preset svd --stream', 'factors of 16 bits'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --preset svd --budget 1e-5', 'smallest possible'),
    ('compress LM/llama --out OUT --calib LM/text.txt --preset auto', '--bits or --target'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 14 --preset svd --budget 0.3', 'than these factors in'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 0', 'outside (0, 16)'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits nan', 'outside (0, 16)'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --targets mlp', 'is for factors'),
    ('compress LM/llama --out OUT --calib LM/text.txt --bits 4 --preset sdv', 'there are rounding, fips-als, '),
    ('compress LM/llama --out OUT --calib LM/text.txt --preset rounding', '--bits or --target'),
    ('plan LM/llama --calib LM/text.txt',
     'one of the arguments --budget --target-ratio --target-bytes is required'),
    ('plan LM/llama --target-ratio 0.8', '--calib FILE'),
    ('eval LM/llama', '--data FILE'),
    ('eval LM/empty --data LM/text.txt', 'no config.json'),
    ('eval demo-vit --dense LM/llama', '--dense is for models of transformers'),
])
def test_bad_input_is_one_line(lm, tmp_path, capsys, words, said):
    words = words.replace('LM', str(lm)).replace('OUT', str(tmp_path / 'x')).split()
    status, out, err = fips(capsys, *words)
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
    ts = load_file(tmp_path / 'lost' / 'model.safetensors')
    ts.pop('model.layers.1.mlp.up_proj.weight')
    save_file(ts, tmp_path / 'lost' / 'model.safetensors', {'format': 'pt'})
    broken = dict(cut='model.safetensors cannot be read', bare='cannot open',
                  lost='model.layers.1.mlp.up_proj.weight', mute='no tokenizer')
    for name, said in broken.items():
        status, out, err = fips(capsys, 'eval', tmp_path / name, '--data', lm / 'text.txt')
        assert status == 2 and said in err and err.count('\n') == 1, (name, err)


def test_which_library(lm, tmp_path):
    for name in ('demo-llm', str(lm / 'llama'), 'meta-llama/Llama-3.2-1B'):
        assert in_transformers(name)
    for name in ('demo-vit', 'vit_tiny_patch16_224', str(tmp_path / 'nowhere')):
        assert not in_transformers(name)
