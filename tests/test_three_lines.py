"""A smaller model in three lines: round it, save it, load it, for models of many families."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from architectures import REFUSED, WORK
from fips_nb import code_model, load, save
from fips_nb.distillation import predict
from fips_nb.folder_format import dense_bytes

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
WIDER = dict(convnext_tiny=dict(dims=(32, 32, 64, 64)), # whose matrices are large enough to code
             swin_tiny_patch4_window7_224=dict(embed_dim=32))
CASES = {c.title: replace(c, args=c.args | WIDER.get(c.title, {})) for c in (*WORK, *REFUSED)}
FAMILIES = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny",
            "ViTForImageClassification", "CLIPModel", "LlamaForCausalLM", "GPT2LMHeadModel",
            "Qwen3ForCausalLM", "Gemma2ForCausalLM", "T5ForConditionalGeneration", "BertModel",
            "WhisperForConditionalGeneration", "MambaForCausalLM", "MixtralForCausalLM")
SHARE = .5 # of dense in 16 bits; of models as small as these the header alone takes a tenth


class Net(nn.Module):
    "A module of one's own, of plain linears."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 10)

    def forward(self, x): return self.head(self.body(x))


@torch.no_grad()
def outputs(model, batch): return predict(model, batch)


def check(model, batch, coded, folder, back):
    "That the file is smaller, and that it holds the model that was coded, near the dense one."
    size, most = (folder/"model.safetensors").stat().st_size, SHARE*dense_bytes(model, torch.float16)
    assert size <= most and coded.model.fips_codes
    for k in coded.model.fips_codes:
        assert torch.equal(back.get_parameter(k), coded.model.get_parameter(k)), k
    dense, ours, theirs = (outputs(m, batch) for m in (model, coded.model, back))
    assert (theirs - ours).norm() < 2e-3*ours.norm() # what is not coded is stored in 16 bits
    assert 0 < (ours - dense).norm() < .1*dense.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_libraries(name, tmp_path):
    model, batches = CASES[name].make(), CASES[name].batches()
    nbytes = int(SHARE*dense_bytes(model, torch.float16))
    coded = code_model(model, batches, nbytes, 0)
    folder = save(coded, tmp_path/"small")
    check(model, batches[0], coded, folder, load(folder))


@pytest.mark.parametrize("make", [Net, CASES["TransformerEncoderLayer"].make],
                         ids=["own MLP", "nn.TransformerEncoder"])
def test_modules_of_ones_own(make, tmp_path):
    torch.manual_seed(0)
    model, fresh = make().eval(), make()
    for p in fresh.parameters(): p.data.normal_() # nothing of it may stay
    batches = list(torch.randn(4, 8, 32) if isinstance(model, Net) else torch.randn(4, 2, 12, 32))
    nbytes = int(SHARE*dense_bytes(model, torch.float16))
    coded = code_model(model, batches, nbytes, 0)
    folder = save(coded, tmp_path/"small")
    check(model, batches[0], coded, folder, load(folder, model=fresh))
