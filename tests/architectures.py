"""Architectures that work, each made small from its configuration, and those that are refused.

`test_architectures.py` proves the list, and the page nbs/architectures.ipynb shows it.
"""
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    "A small instance of one architecture."
    name: str # of timm, or the class of transformers
    args: dict = field(default_factory=dict) # of timm.create_model, or of the configuration
    config: str = "" # class of the configuration; "" for timm
    side: int = 8 # of an image
    said: str = "" # part of the sentence that refuses the MLPs; "" where they work
    attention: bool = True # whether targets='attn' works
    known: str = "" # by which name of its own a variant goes
    inputs: tuple = () # keys of a batch that is a dict
    parts: tuple = () # of timm: module, class and arguments of a smaller model of the same parts

    @property
    def title(self): return self.known or self.name

    @property
    def library(self):
        if self.name.startswith("Transformer"): return "torch"
        return "transformers" if self.config else "timm"

    def make(self):
        "The model, of which nothing is trivial."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make = dict(timm=_of_timm, transformers=_of_transformers, torch=_of_torch)
            return _stirred(make[self.library](self).eval())

    def small(self):
        "A smaller model of the same parts, where timm makes only a large one under this name."
        if not self.parts: return self.make()
        import timm
        module, name, args = self.parts
        module = getattr(timm.models, module)
        named = {k: [getattr(module, n) for n in v.split()] if isinstance(v, str) else v
                 for k, v in args.items()} # classes go by their names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _stirred(getattr(module, name)(num_classes=5, **named).eval())

    def batches(self, n=2, size=2, seed=1):
        "`n` batches of `size` random images or windows of tokens."
        g = torch.Generator().manual_seed(seed)
        if self.inputs: return [{k: self._input(k, size, g) for k in self.inputs} for _ in range(n)]
        if self.config: return list(torch.randint(3, VOCABULARY, (n, size, 24), generator=g))
        return list(torch.randn(n, size, *self.shape, generator=g))

    def _input(self, key, size, g):
        "One input of a model that takes several, or another than tokens."
        if key == "pixel_values": return torch.randn(size, 3, self.side, self.side, generator=g)
        if key == "input_features": return torch.randn(size, 16, 48, generator=g)
        return torch.randint(3, VOCABULARY, (size, 16 if "decoder" in key else 24), generator=g)

    @property
    def shape(self): return (12, 32) if self.library == "torch" else (3, self.side, self.side)


def _stirred(model):
    "`model` with noise on everything: heads are zero at first, and layer scales tiny."
    for p in model.parameters():
        size = .1 if p.ndim < 2 else .5/(p[0].numel() if p.ndim > 3 else p.shape[-1])**.5
        p.data.add_(size*torch.randn_like(p))
    return model


def _of_timm(case):
    import timm
    return timm.create_model(case.name, num_classes=5, **case.args)


def _of_transformers(case):
    import transformers
    return getattr(transformers, case.name)(getattr(transformers, case.config)(**case.args))


def _of_torch(case):
    layer = getattr(torch.nn, case.name)(32, 4, 64, batch_first=True)
    kind = torch.nn.TransformerDecoder if "Decoder" in case.name else torch.nn.TransformerEncoder
    return Headed(kind(layer, 2))


class Headed(torch.nn.Module):
    "A transformer of PyTorch whose decoder looks at the input, with a head."
    num_classes = 40

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, torch.nn.Linear(32, 40)

    def forward(self, x):
        more = (x,) if isinstance(self.body, torch.nn.TransformerDecoder) else ()
        return self.head(self.body(x, *more))


VOCABULARY = 96
VIT = dict(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2)
SWIN = dict(img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2))
FOUR, WIDTHS = dict(depths=(1, 1, 1, 1)), dict(dims=(8, 8, 16, 16))
MIXERS = "SepConv SepConv Attention Attention"
NORMS = "LayerNorm2dNoBias LayerNorm2dNoBias LayerNormNoBias LayerNormNoBias"
WIDER = FOUR | dict(dims=(16, 16, 32, 32))
TIMM = [
    Case("vit_tiny_patch16_224", VIT),
    Case("vit_small_patch14_reg4_dinov2", VIT), # register tokens and layer scale
    Case("vit_base_patch16_clip_224", VIT), # a norm before the blocks
    Case("vit_base_patch16_siglip_224", VIT), # pools by an attention with an MLP of its own
    Case("deit3_small_patch16_224", VIT),
    Case("beit_base_patch16_224", VIT, attention=False), # it reads the weight past the linear
    Case("eva02_tiny_patch14_224", VIT, attention=False), # gate and value apart
    Case("vit_small_patch16_dinov3", VIT),
    Case("cait_xxs24_224", VIT), # the attention of the class token alone
    Case("swin_tiny_patch4_window7_224", SWIN, side=16), # stages of different widths
    Case("swinv2_tiny_window8_256", SWIN, side=16, attention=False),
    Case("mixer_s32_224", dict(img_size=64), side=64, attention=False,
         parts=("mlp_mixer", "MlpMixer", dict(img_size=64, num_blocks=2, embed_dim=32))),
    Case("convnext_tiny", FOUR | WIDTHS, side=32, attention=False),
    Case("xcit_nano_12_p16_224", dict(img_size=32, embed_dim=16, depth=2, num_heads=2), side=32),
    Case("pvt_v2_b0", FOUR | dict(embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2)), side=32,
         attention=False),
    Case("caformer_s18", side=64, parts=("metaformer", "MetaFormer", WIDER | dict(
        token_mixers=MIXERS, norm_layers=NORMS))), # attention in two of four stages
    Case("convnext_atto", FOUR | WIDTHS, side=32, attention=False),
    Case("poolformer_s12", side=32, attention=False, parts=(
        "metaformer", "MetaFormer", WIDER | dict(downsample_norm=None, mlp_bias=True,
                                                 use_mlp_head=False))),
]
NO_MLP = "no MLP blocks"
REFUSED_TIMM = [
    Case("resnet18", dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)), side=32, said=NO_MLP,
         attention=False),
    Case("mobilenetv3_small_050", side=32, said=NO_MLP, attention=False),
]

LM = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
          pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENCODER = {k: v for k, v in LM.items() if k != "num_key_value_heads"}
HEAD = LM | dict(head_dim=16)
GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2)
OPT = LM | dict(ffn_dim=80, word_embed_proj_dim=32)
NEO = dict(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
           attention_types=[[["global", "local"], 1]], intermediate_size=80,
           max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
DISTIL = dict(vocab_size=VOCABULARY, dim=32, hidden_dim=80, n_layers=2, n_heads=4,
              max_position_embeddings=64)


def causal(name, args=LM, config="", **kw):
    "A causal language model of transformers."
    return Case(f"{name}ForCausalLM", args, config or f"{name}Config", **kw)


def encoder(name, args=ENCODER, **kw):
    "An encoder of text of transformers."
    return Case(f"{name}Model", args, f"{name}Config", **kw)


TRANSFORMERS = [
    causal("Llama"), causal("Mistral"), causal("Qwen2"), causal("Qwen3", HEAD),
    causal("Gemma", HEAD), causal("Gemma2", HEAD), causal("Gemma3", HEAD, "Gemma3TextConfig"),
    causal("Phi"), causal("Phi3"), # Phi-3 holds gate and value in one linear
    Case("GPT2LMHeadModel", GPT2, "GPT2Config"), # Conv1D instead of linears
    causal("GPTJ", GPT2 | dict(rotary_dim=4)), causal("GPTNeo", NEO), causal("GPTNeoX"),
    causal("OPT", OPT), causal("Olmo2"), causal("SmolLM3", LM | dict(no_rope_layers=[1, 1])),
    causal("Granite"), causal("Starcoder2"), causal("StableLm"), causal("Cohere"),
    causal("Glm4", HEAD),
    encoder("Bert"),
    encoder("Roberta", ENCODER | dict(max_position_embeddings=80)),
    encoder("DistilBert", DISTIL), encoder("Electra", ENCODER | dict(embedding_size=32)),
    encoder("ModernBert"), encoder("MPNet"),
]
BODY = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
SEEN = BODY | dict(image_size=8, patch_size=4)
BARTS = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1,
             encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=80,
             decoder_ffn_dim=80, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
             eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
T5S = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=80, num_layers=1, num_heads=4,
           decoder_start_token_id=0)
HEARD = BARTS | dict(num_mel_bins=16, max_source_positions=24, max_target_positions=32,
                     suppress_tokens=None, begin_suppress_tokens=None)
TOWERS = dict(text_config=ENCODER, vision_config=SEEN, projection_dim=32)
PIXELS, PAIR = ("pixel_values",), ("input_ids", "decoder_input_ids")
BOTH, SPOKEN = ("input_ids", "pixel_values"), ("input_features", "decoder_input_ids")


def sees(name, args=SEEN, config="", **kw):
    "A model of transformers that sees."
    head = f"{name}ForImageClassification"
    return Case(head, args, config or f"{name}Config", inputs=PIXELS, **kw)


TRANSFORMERS += [
    Case("T5ForConditionalGeneration", T5S, "T5Config", inputs=PAIR),
    Case("T5ForConditionalGeneration", T5S | dict(feed_forward_proj="gated-gelu"), "T5Config",
         inputs=PAIR, known="Flan-T5"),
    Case("BartForConditionalGeneration", BARTS, "BartConfig", inputs=PAIR),
    Case("WhisperForConditionalGeneration", HEARD, "WhisperConfig", inputs=SPOKEN),
    sees("ViT"), sees("DeiT"), sees("Dinov2"),
    sees("Swin", dict(image_size=16, patch_size=2, window_size=4, embed_dim=32, depths=[1, 1],
                      num_heads=[2, 2]), side=16),
    Case("DINOv3ViTModel", SEEN, "DINOv3ViTConfig", inputs=PIXELS),
    Case("SiglipVisionModel", SEEN, "SiglipVisionConfig", inputs=PIXELS, attention=False),
    Case("SiglipModel", TOWERS, "SiglipConfig", inputs=BOTH, attention=False),
    Case("CLIPModel", TOWERS, "CLIPConfig", inputs=BOTH),
    Case("CLIPVisionModelWithProjection", SEEN | dict(projection_dim=32), "CLIPVisionConfig",
         inputs=PIXELS),
]
TORCH = [Case(f"Transformer{kind}Layer", attention=False) for kind in ("Encoder", "Decoder")]
EXPERTS = "mixture of experts"
MOE = HEAD | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
REFUSED_TRANSFORMERS = [
    causal("Mixtral", LM | dict(num_local_experts=4), said=EXPERTS),
    causal("Qwen3Moe", MOE, said=EXPERTS),
    causal("Olmoe", LM | dict(num_experts=4, num_experts_per_tok=2), said=EXPERTS),
    causal("Mamba", dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
           said=NO_MLP, attention=False),
]

WORK = TIMM + TRANSFORMERS + TORCH
REFUSED = REFUSED_TIMM + REFUSED_TRANSFORMERS


def found(case):
    "Numbers of MLPs, attentions and coded matrices of `case`; None where they do not work."
    from fips_nb.round.costs import find_parts
    from fips_nb.grouping import find_modules
    model, out = case.make(), {}
    for targets, works in (("mlp", not case.said), ("attn", case.attention)):
        out[targets] = len(find_modules(model, targets)) if works else None
    return out | dict(rounding=len(find_parts(model)))


def refusal(case):
    "The sentence that refuses the MLPs of `case`."
    from fips_nb.grouping import find_modules
    try: find_modules(case.make())
    except ValueError as e: return str(e)
