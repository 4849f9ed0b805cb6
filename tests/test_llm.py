"""Language models: every architecture, made small from its configuration, through the pipeline."""
import copy

import pytest
import torch
import transformers as tf

from fips_nb.blockwise_opt import Solver, fit_group
from fips_nb.grouping import find_modules, group_modules, weights
from fips_nb.share.pipeline import compress
from fips_nb.share.planner import make_plan
from fips_nb.sparse_factors import factor_layers, factorize, to_dense
from fips_nb.share.statistics import collect_moments, feed, layer_metric, moment_bytes
from fips_nb.share.streaming import Visit, block_names, memory_advice, share_tensors

pytestmark = pytest.mark.usefixtures('one_thread', 'timed_once')
SIZE = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
            eos_token_id=2)
MODELS = {
    'llama-tied': ('Llama', 'ForCausalLM', dict(tie_word_embeddings=True)),
    'llama-untied': ('Llama', 'ForCausalLM', dict(tie_word_embeddings=False)),
    'llama-bias': ('Llama', 'ForCausalLM', dict(mlp_bias=True, attention_bias=True)),
    'mistral': ('Mistral', 'ForCausalLM', {}),
    'qwen2': ('Qwen2', 'ForCausalLM', {}),
    'qwen3': ('Qwen3', 'ForCausalLM', dict(head_dim=8)),
    'gemma2': ('Gemma2', 'ForCausalLM', dict(head_dim=16)),
    'gemma3': ('Gemma3', 'ForCausalLM', dict(head_dim=16)),
    'phi3': ('Phi3', 'ForCausalLM', {}),
    'gpt-neox': ('GPTNeoX', 'ForCausalLM', {}),
    'opt': ('OPT', 'ForCausalLM', dict(ffn_dim=80, word_embed_proj_dim=32)),
    'bert': ('Bert', 'Model', {}),
}


def make(name):
    torch.manual_seed(0)
    if name == 'gpt2':
        return tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)).eval()
    kind, head, more = MODELS[name]
    config = getattr(tf, {'Gemma3': 'Gemma3Text'}.get(kind, kind) + 'Config')(**SIZE | more)
    model = getattr(tf, kind + head)(config).eval()
    for p in model.parameters():  # biases and norms that are not zero: nothing right by accident
        if p.ndim == 1:
            p.data.add_(.1 * torch.randn_like(p))
    return model


def tokens(n=6, b=2, length=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (b, length), generator=g) for _ in range(n)]


def outputs(model, x):
    with torch.no_grad():
        out = model(x)
    return out.logits if 'logits' in out else out.last_hidden_state


@pytest.mark.parametrize('name', [*MODELS, 'gpt2'])
@pytest.mark.parametrize('targets', ['mlp', 'attn', 'all'])
def test_nothing_removed_is_the_dense_model(name, targets):
    model, x = make(name), tokens(1, seed=9)[0]
    kw = dict(distill_epochs=0, levels=1, dtype=torch.float32)
    res = compress(model, tokens(), 1., preset='pruning', targets=targets, **kw)
    gated = name.startswith(('llama', 'mistral', 'qwen', 'gemma'))
    fused = name in ('phi3', 'gpt2', 'gpt-neox')  # queries, keys and values in one weight
    per_block = dict(mlp=2, attn=4, all=6)[targets]
    per_block += (targets != 'attn' and gated) - 2 * (targets != 'mlp' and fused)
    assert len(factor_layers(res.model)) == 3 * per_block
    torch.testing.assert_close(outputs(res.model, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    assert res.report['mlp_budget'] == 1


@pytest.mark.parametrize('name', [*MODELS, 'gpt2'])
def test_full_rank_basis_is_the_dense_model_and_comes_back_dense(name):
    model, x = make(name), tokens(1, seed=9)[0]
    modules = find_modules(model, 'all')
    ms = collect_moments(model, tokens(), [l for m in modules for l in m.linears])
    small = copy.deepcopy(model)
    for g in group_modules(modules, 'all'):
        Ws = weights(model, g)
        metrics = [layer_metric(W, l.role, ms[l.name]) for W, l in zip(Ws, g.linears)]
        factorize(small, g, *fit_group(Ws, metrics, g.d, 1., Solver(levels=1)))
    torch.testing.assert_close(outputs(small, x), outputs(model, x), rtol=1e-3, atol=1e-4)
    dense = to_dense(small)
    torch.testing.assert_close(outputs(dense, x), outputs(model, x), rtol=1e-3, atol=1e-4)
    shapes = lambda m: {k: v.shape for k, v in m.state_dict().items()}
    assert shapes(dense) == shapes(model)


@pytest.mark.parametrize('name', ['llama-tied', 'gpt2', 'bert'])
def test_distillation_lowers_the_divergence_and_leaves_the_dense_model_alone(name):
    model = make(name)
    with torch.no_grad():  # outputs that differ from token to token, so that there is much to mend
        for p in model.parameters():
            if p.ndim == 2: p.mul_(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = compress(model, tokens(16), .4, levels=4, distill_epochs=0)
    distilled = compress(model, tokens(16), .4, levels=4, distill_epochs=3)
    x = tokens(1, seed=9)[0]
    far = lambda m: (outputs(m, x) - outputs(model, x)).pow(2).mean().item()
    assert far(distilled.model) < far(plain.model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pairs = zip(model.parameters(), distilled.model.parameters())
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs if a.numel())


def test_bfloat16_model_comes_back_in_bfloat16():
    model = make('llama-tied').bfloat16()
    res = compress(model, tokens(), .5, levels=4, distill_epochs=1)
    assert {p.dtype for p in res.model.parameters()} == {torch.bfloat16}
    assert outputs(res.model, tokens(1)[0]).dtype == torch.bfloat16


def test_tied_head_stays_tied():
    res = compress(make('llama-tied'), tokens(), .5, levels=2, distill_epochs=1)
    assert res.model.lm_head.weight is res.model.model.embed_tokens.weight


def test_gate_and_up_share_their_moments():
    model = make('llama-tied')
    linears = [l for m in find_modules(model) for l in m.linears]
    ms = collect_moments(model, tokens(), linears)
    gate, up = (ms[f'model.layers.0.mlp.{k}_proj'] for k in ('gate', 'up'))
    assert gate is up


EXPERTS = dict(Mixtral=dict(num_local_experts=4),
               Qwen3Moe=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                             head_dim=8))


@pytest.mark.parametrize('config', EXPERTS)
def test_experts_are_refused(config):
    settings = getattr(tf, f'{config}Config')(**SIZE | EXPERTS[config])
    model = getattr(tf, f'{config}ForCausalLM')(settings)
    with pytest.raises(ValueError, match='mixture of experts'):
        compress(model, tokens(), .5)
    res = compress(model, tokens(), .5, targets='attn', levels=2, distill_epochs=0)
    assert len(factor_layers(res.model)) == 12


def test_dict_batches_with_masks():
    model = make('llama-tied')
    batches = [dict(input_ids=x, attention_mask=torch.ones_like(x)) for x in tokens()]
    a, b = (compress(model, bs, .5, levels=2, distill_epochs=1).model for bs in (batches, tokens()))
    x = tokens(1, seed=9)[0]
    torch.testing.assert_close(outputs(a, x), outputs(b, x), rtol=1e-4, atol=1e-4)


def test_nothing_is_cached_while_calibrating():
    model = make('llama-tied')
    assert feed(model, tokens(1)[0]).past_key_values is None


def test_less_memory_takes_more_passes_and_gives_the_same_model():
    model, passes = make('llama-tied'), []

    class Counted(list):
        def __iter__(self):
            passes.append(1)  # when the first batch is drawn
            yield from super().__iter__()

    kw = dict(levels=3, distill_epochs=0, group_size=1)
    models, counts = [], []
    for memory in (8., 1e-9):
        passes.clear()
        models.append(compress(model, Counted(tokens()), .5, memory=memory, **kw).model)
        counts.append(len(passes) - 1)  # the first batch is looked at to count the tokens
    assert counts == [2, 4]  # one to forecast, and three groups of one block
    pairs = zip(models[0].parameters(), models[1].parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_statistics_take_what_the_formula_says():
    model = make('llama-tied')
    for g in group_modules(find_modules(model, 'all'), 1):
        ms = collect_moments(model, tokens(), list(g.linears))
        each = {id(m): m for m in ms.values()}.values()
        assert moment_bytes(g) == sum(3 * m.C.nbytes for m in each)  # float64 summed, then float32


def test_copies_share_the_tensors_of_the_model():
    model = make('llama-tied')
    twin = share_tensors(model, torch.device('cpu'))
    pairs = zip(model.parameters(), twin.parameters())
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_out_of_memory_says_what_helps():
    with pytest.raises(torch.OutOfMemoryError, match="'factors'; what helps: a smaller group_size"):
        with memory_advice('factors'):
            raise torch.OutOfMemoryError('CUDA out of memory')


@pytest.mark.parametrize('name', [*MODELS, 'gpt2'])
def test_streaming_holds_one_block_and_changes_nothing(name, monkeypatch):
    model, most = make(name), [0]

    class Watched(Visit):  # another piece of the same memory stands for the device
        def put(self, t):
            here = sum(x.nbytes for x in (*self.stay, *self.guest))
            most[0] = max(most[0], here + t.nbytes)
            return t.clone()

    size = lambda m: sum(t.nbytes for t in (*m.parameters(), *m.buffers()))
    modules = find_modules(model)
    blocks = block_names(model, [l for m in modules for l in m.linears])
    assert set(blocks) == {m.block for m in modules} and len(blocks) == 3
    sizes = [size(model.get_submodule(n)) for n in blocks]
    outside = size(model) - sum(sizes)
    kw = dict(budget=.5, levels=3, distill_epochs=0, group_size=1, sparsity=.6, memory=1e-9)
    a = compress(model, tokens(), **kw).model
    monkeypatch.setattr('fips_nb.share.pipeline.Visit', Watched)
    b = compress(model, tokens(), stream=True, **kw).model
    assert outside < most[0] <= outside + max(sizes)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)


def test_streaming_refuses_what_needs_the_whole_network():
    with pytest.raises(ValueError, match='distill_epochs=0'):
        compress(make('llama-tied'), tokens(), stream=True)
    away = make('llama-tied')
    up = away.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to('meta'))
    with pytest.raises(ValueError, match='layers.1.mlp.up_proj.weight is not in memory'):
        compress(away, tokens(), distill_epochs=0)


def test_a_plan_of_streamed_fits_is_the_same_plan():
    model, batches = make('llama-untied'), tokens(8, 1)
    a, b = (make_plan(model, batches, .5, ranks=(2,), levels=(3,), stream=stream) for stream in (False, True))
    assert a == b and a.about['trials']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_streaming_on_a_device():
    model = make('llama-tied')
    a = compress(model, tokens(), distill_epochs=0, levels=3, device='cuda').model
    b = compress(model, tokens(), distill_epochs=0, levels=3, device='cuda', stream=True).model
    for p, q in zip(a.parameters(), b.parameters()):
        assert p.device.type == q.device.type == 'cpu' and torch.equal(p, q)
