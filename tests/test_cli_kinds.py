"""The command line on every kind of model of transformers, each small and saved as transformers saves it."""
import csv
import json
import shutil

import pytest
import torch
import transformers as tf
from PIL import Image
from test_cli_text import END, TEXT, fips, small_tokenizer

from fips_nb.store import hub
from fips_nb.data.models import kind_of, open_any
from fips_nb.sparse_factors import factor_layers

pytestmark = pytest.mark.usefixtures('one_thread')
WIDTHS = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
SIGHT = WIDTHS | dict(image_size=16, patch_size=4)
TOKENS = dict(vocab_size=320, pad_token_id=0, bos_token_id=0, eos_token_id=0)
WORDS = WIDTHS | TOKENS | dict(max_position_embeddings=32)
HALVES = TOKENS | dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
                       max_position_embeddings=32, decoder_start_token_id=0)
T5 = dict(vocab_size=320, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, pad_token_id=0,
          eos_token_id=0, decoder_start_token_id=0)
LABELS = dict(num_labels=3, id2label={0: 'green', 1: 'dark blue', 2: 'red'},
              label2id={'green': 0, 'dark blue': 1, 'red': 2})
TOWERS = dict(text_config=WORDS, vision_config=SIGHT)
MAKE = dict(
    vit=lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIGHT, **LABELS)),
    deit=lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**SIGHT, **LABELS)),
    swin=lambda: tf.SwinForImageClassification(tf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4,
        **LABELS)),
    dinov2=lambda: tf.Dinov2Model(tf.Dinov2Config(**SIGHT, mlp_ratio=2)),
    siglip_vision=lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIGHT)),
    clip_vision=lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**SIGHT)),
    t5=lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    bart=lambda: tf.BartForConditionalGeneration(tf.BartConfig(**HALVES)),
    bart_model=lambda: tf.BartModel(tf.BartConfig(**HALVES)),
    marian=lambda: tf.MarianMTModel(tf.MarianConfig(**HALVES)),
    clip=lambda: tf.CLIPModel(tf.CLIPConfig(**TOWERS, projection_dim=16)),
    siglip=lambda: tf.SiglipModel(tf.SiglipConfig(**TOWERS)),
    sentences=lambda: tf.BertModel(tf.BertConfig(**WORDS)),
    whisper=lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(
        **{k: v for k, v in HALVES.items() if k != 'max_position_embeddings'}, num_mel_bins=8,
        max_source_positions=12, max_target_positions=32)),
)
KINDS = dict.fromkeys(('vit', 'deit', 'swin', 'dinov2', 'siglip_vision', 'clip_vision'), 'images')
KINDS |= dict.fromkeys(('t5', 'bart', 'bart_model', 'marian'), 'pairs')
KINDS |= dict(clip='captions', siglip='captions', sentences='text')
CLASSIFIERS, LANGUAGE = ('vit', 'deit', 'swin'), ('t5', 'bart', 'marian')
MODULES = [dict(idx=0, name='0', path='', type='sentence_transformers.models.Transformer'),
           dict(idx=1, name='1', path='1_Pooling', type='sentence_transformers.models.Pooling')]
BESIDE = {'modules.json': MODULES, 'sentence_bert_config.json': dict(max_seq_length=32),
          'config_sentence_transformers.json': dict(prompts={}),
          '1_Pooling/config.json': dict(word_embedding_dimension=64, pooling_mode_mean_tokens=True)}


def save(name, folder):
    "A model with its processor's files."
    torch.manual_seed(0)
    MAKE[name]().save_pretrained(folder)
    if KINDS.get(name) in ('images', 'captions'):
        kind = tf.CLIPImageProcessor if 'clip' in name else tf.ViTImageProcessor
        kind(size=16, crop_size=16).save_pretrained(folder)
    if KINDS.get(name) != 'images': small_tokenizer().save_pretrained(folder)
    if name != 'sentences': return
    (folder / '1_Pooling').mkdir()
    for file, said in BESIDE.items(): (folder / file).write_text(json.dumps(said))
    (folder / 'extra.py').write_text('print("code")')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Folders of all models, of images in class folders, with captions and without, and a text."
    root = tmp_path_factory.mktemp('kinds')
    for name in MAKE: save(name, root / name)
    (root / 'flat').mkdir()
    (root / 'captions').mkdir()
    rows = [('file', 'caption')]
    for i, colour in enumerate(('red', 'green', 'dark_blue') * 6):
        (root / 'images' / colour).mkdir(parents=True, exist_ok=True)
        picture = Image.effect_mandelbrot((20, 16 + i), (-2, -1.5, 1 + i / 9, 1.5), 40).convert('RGB')
        for place in (f'images/{colour}', 'flat', 'captions'): picture.save(root / place / f'{i}.png')
        rows.append((f'{i}.png', f'a {colour} thing, number {i}'))
    with open(root / 'captions/labels.csv', 'w', newline='') as f: csv.writer(f).writerows(rows)
    (root / 'text.txt').write_text(END.join(TEXT))
    return root


def data(home, name):
    return home / dict(images='images', captions='captions').get(KINDS[name], 'text.txt')


def outputs(folder):
    "What the model in a folder says on fixed inputs."
    o, g = open_any(str(folder)), torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 16, 16, generator=g), torch.randint(1, 320, (2, 6), generator=g)
    given = dict(images=dict(pixel_values=x), text=dict(input_ids=t),
                 pairs=dict(input_ids=t, decoder_input_ids=t),
                 captions=dict(pixel_values=x, input_ids=t))
    with torch.no_grad(): out = o.model(**given[o.kind])
    return next(t for t in out.values() if torch.is_tensor(t))


@pytest.mark.parametrize('name', KINDS)
def test_compress_eval_load_export(name, home, tmp_path, capsys):
    assert kind_of(str(home / name)) == KINDS[name]
    small, plain, where = tmp_path / 'small', tmp_path / 'plain', data(home, name)
    window = ['--window', 32] if name == 't5' else []
    words = ['--calib', where, '--n-calib', 12, '--distill-epochs', 1, '--levels', 2, *window, '--json']
    status, made, err = fips(capsys, 'compress', home / name, '--out', small, *words)
    assert status == 0 and err.count('\n') == 1, err
    assert made['n_calib'] == 12 and .4 < made['mlp_budget'] <= .5
    assert {'text': 'windows of 32', 'pairs': 'windows of', 'images': 'images',
            'captions': 'images with captions'}[KINDS[name]] in made['unit']
    assert factor_layers(hub.load(small))

    on = ['--data', where, *window]
    status, ev, err = fips(capsys, 'eval', small, *on, '--dense', home / name, '--json')
    assert status == 0 and err == '', err
    assert ev['bytes'] == made['bytes'] and ev['dense']['dense_bytes'] == made['dense_bytes']
    alone = fips(capsys, 'eval', small, *on, '--json')
    if name in CLASSIFIERS:
        assert ev['n'] == 18 and ev['classes'] == 3 and alone[1]['top1'] == ev['top1']
    elif name in LANGUAGE:
        assert 1 < ev['perplexity'] == alone[1]['perplexity'] and ev['dense']['perplexity'] > 1
    else:
        assert .5 < ev['least_cosine'] <= ev['cosine'] < 1 and ev['measure'] == 'cosine_similarity'
        assert ('text_cosine' in ev) == (KINDS[name] == 'captions')
        assert alone[0] == 2 and '--dense MODEL' in alone[2] and alone[2].count('\n') == 1
    status, text, err = fips(capsys, 'eval', small, *on, '--dense', home / name)
    assert status == 0 and f"dense {home / name}" in text, err

    said = fips(capsys, 'info', small, '--json')[1]
    assert said['arch'] == type(hub.load(small)).__name__ and said['bytes'] == made['bytes']
    assert fips(capsys, 'export', small, '--out', plain)[0] == 0
    torch.testing.assert_close(outputs(plain), outputs(small), rtol=1e-3, atol=1e-4)
    beside = {'preprocessor_config.json'} if KINDS[name] in ('images', 'captions') else set()
    beside |= set(BESIDE) if name == 'sentences' else set()
    for folder in (small, plain):
        files = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
        assert beside <= files and not any(f.endswith('.py') for f in files)
    assert all((small / f).read_text() == (home / name / f).read_text() for f in beside)
    again = ['compress', home / name, '--out', small, '--overwrite', *words]
    assert fips(capsys, *again, '--preset', 'svd')[0] == 0 and not list(tmp_path.glob('.small*'))


@pytest.mark.parametrize('name', ['vit', 'dinov2', 't5', 'clip', 'sentences'])
def test_compare(name, home, tmp_path, capsys):
    "Every kind has its measure, and the figures are those of eval on the folders that are kept."
    where, fit = data(home, name), tmp_path / data(home, name).name
    (shutil.copytree if where.is_dir() else shutil.copy)(where, fit)
    words = ['svd-llm', 'pruning:levels=2,distill_epochs=0', '--budget', .5, '--calib', fit, '--data', where,
             '--n-calib', 12, '--window', 32]
    if KINDS[name] in ('images', 'captions'): words = words[:-2]
    status, o, err = fips(capsys, 'compare', home / name, *words, '--keep', tmp_path / 'kept', '--json')
    assert status == 0, err
    key = 'top1' if name == 'vit' else 'perplexity' if name == 't5' else 'cosine'
    for r in o['rows']:
        ev = fips(capsys, 'eval', tmp_path / 'kept' / r['setting'], '--data', where, *words[10:],
                  '--dense', home / name, '--json')[1]
        assert ev['measure'] == o['measure'] and r['value'] == pytest.approx(ev[key], abs=1e-6)
        if key == 'cosine': assert r['loss'] == pytest.approx(1 - ev[key], abs=1e-6) and r['divergence'] is None
    assert sum(r['best'] for r in o['rows']) == 1
    status, text, _ = fips(capsys, 'compare', home / name, *words)
    assert status == 0 and f"{key.replace('top1', 'top-1')} of {o['dense']:.4f}" in ' '.join(text.split())


@pytest.mark.parametrize('name', ['t5', 'clip'])
def test_nothing_that_was_read_is_drawn_anew(name, home, tmp_path, capsys):
    "transformers initialises the weights of an MLP by their names, and that of a pruned linear is V itself."
    words = ['--preset', 'pruning', '--levels', 2, '--distill-epochs', 0, '--calib', data(home, name)]
    if name == 't5': words += ['--window', 32]
    status, _, err = fips(capsys, 'compress', home / name, '--out', tmp_path / 'x', *words, '--n-calib', 12)
    assert status == 0, err
    a, b = (hub.load(tmp_path / 'x').state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    pruned = [v for k, v in a.items() if k.endswith('.V')]
    assert pruned and all((v == 0).float().mean() > .3 for v in pruned) # what is drawn has no zeros


@pytest.mark.parametrize('name', ['vit', 'dinov2', 't5', 'clip', 'siglip'])
def test_bits_and_bench(name, home, tmp_path, capsys):
    where, out = data(home, name), tmp_path / 'coded'
    window = ['--window', 32] if name == 't5' else []
    words = ['compress', home / name, '--calib', where, '--n-calib', 8, '--bits', 10, '--distill-epochs', 1, *window]
    status, made, err = fips(capsys, *words, '--out', out, '--json')
    assert status == 0 and 'by rounding to' in err, err
    assert 9.5 < made['bits'] <= 10 and made['bytes'] == (out / 'model.safetensors').stat().st_size
    status, ev, err = fips(capsys, 'eval', out, '--data', where, '--dense', home / name, '--json', *window)
    assert status == 0 and ev.get('agreement', ev.get('cosine')) > .8, err
    status, modes, err = fips(capsys, 'bench', out, '--batch', '2', '--json')
    assert status == 0 and {r['mode'] for r in modes['rows']} == {'dense', 'int8', 'coded'}, err
    status, packed, err = fips(capsys, 'bench', home / name, '--batch', '1,2', '--json')
    assert status == 0 and [r['batch'] for r in packed['rows']] == [1, 2], err


def test_labels_are_those_of_the_model(home, tmp_path):
    "Folders named as the classes are numbered by id2label, whatever their order."
    from fips_nb.run.commands import evaluate
    from fips_nb.data.models import read_batches
    ours = torch.cat([y for _, y in read_batches(open_any(str(home / 'vit')), home / 'images')])
    assert ours.tolist() == [1] * 6 + [0] * 6 + [2] * 6  # dark_blue, green, red
    o = open_any(str(home / 'vit'))
    with torch.no_grad():
        right = [(o.model(x).logits.argmax(1) == y) for x, y in read_batches(o, home / 'images')]
    assert evaluate(str(home / 'vit'), home / 'images')['top1'] == torch.cat(right).double().mean().item()


def test_captions_of_a_file_and_of_classes(home, tmp_path, capsys):
    words = ['--calib', home / 'images', '--n-calib', 9, '--levels', 2, '--distill-epochs', 0, '--json']
    status, made, err = fips(capsys, 'compress', home / 'clip', '--out', tmp_path / 'x', *words)
    assert status == 0 and made['n_calib'] == 9, err
    status, _, err = fips(capsys, 'plan', home / 'clip', '--calib', home / 'captions', '--n-calib', 8,
                          '--target-ratio', .9, '--json')
    assert status == 0, err


@pytest.mark.parametrize('words, said', [
    ('compress H/whisper --out OUT --calib H/text.txt', 'dicts of input_features and decoder_input_ids'),
    ('eval H/whisper --data H/text.txt', 'no command has data for'),
    ('bench H/whisper', 'dicts of input_features and decoder_input_ids'),
    ('compress H/vit --out OUT', '--calib FOLDER'),
    ('compress H/clip --out OUT', 'needs images with captions to calibrate with: --calib FOLDER'),
    ('compress H/t5 --out OUT', 'needs text to calibrate with: --calib FILE'),
    ('compress H/vit --out OUT --calib H/images --window 8', '--window is for models of text'),
    ('compress H/vit --out OUT --calib H/images --weights w.pth', '--weights is for models of timm'),
    ('compress H/clip --out OUT --calib H/flat', 'have no captions'),
    ('compress H/clip --out OUT --calib H/text.txt', 'is a file'),
    ('compress H/vit --out OUT --calib H/captions', 'columns file,label'),
    ('compress H/t5 --out OUT --calib H/text.txt', 'needs 2048 tokens'),
    ('compress H/bart --out OUT --calib H/text.txt --window 64', 'context of 32'),
    ('eval H/vit --data H/flat', 'have no labels'),
    ('eval H/vit', 'needs images to be measured on: --data FOLDER'),
    ('eval H/clip', 'needs images with captions to be measured on'),
    ('eval H/dinov2 --data H/flat', 'is an encoder'),
    ('eval H/vit --data H/images --dense H/t5', 'it is another model'),
    ('eval H/clip --data H/captions --dense H/siglip', 'is another model'),
    ('eval H/bart_model --data H/text.txt', 'is an encoder'),
])
def test_bad_input_is_one_line(home, tmp_path, capsys, words, said):
    words = words.replace('H/', f'{home}/').replace('OUT', str(tmp_path / 'x')).split()
    status, out, err = fips(capsys, *words)
    assert status == 2 and out == '' and said in err and err.count('\n') == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name, gone, said', [
    ('vit', 'preprocessor_config.json', 'copy preprocessor_config.json'),
    ('clip', 'preprocessor_config.json', 'copy preprocessor_config.json'),
    ('clip', 'tokenizer.json', 'copy tokenizer.json'), ('t5', 'tokenizer.json', 'copy tokenizer.json')])
def test_a_missing_processor_is_named(name, gone, said, home, tmp_path, capsys):
    shutil.copytree(home / name, tmp_path / 'm')
    (tmp_path / 'm' / gone).unlink()
    words = ['compress', tmp_path / 'm', '--calib', data(home, name), '--out', tmp_path / 'x']
    status, _, err = fips(capsys, *words)
    assert status == 2 and said in err and err.count('\n') == 1, err


@pytest.mark.parametrize('file, text, said', [
    ('preprocessor_config.json', '{"size": ', 'not'), ('preprocessor_config.json', '{"a": 1}', "doesn't match model"),
    ('preprocessor_config.json', json.dumps(dict(image_processor_type='ViTImageProcessor', size=10**9)), '8192'),
    ('modules.json', '{}', 'modules.json'), ('modules.json', '[1]', 'modules.json')])
def test_broken_processors(file, text, said, home, tmp_path, capsys):
    shutil.copytree(home / 'vit', tmp_path / 'm')
    (tmp_path / 'm' / file).write_text(text)
    words = ['compress', tmp_path / 'm', '--calib', home / 'images', '--out', tmp_path / 'x']
    status, _, err = fips(capsys, *words)
    assert status == 2 and said in err and err.count('\n') == 1, err
    assert not (tmp_path / 'x').exists()
