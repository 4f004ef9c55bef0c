"""Models whose parts were exchanged are refused by name, not read as what they were."""

import pytest
import torch
from torch import nn

from nsm_graph import mmsb


class Adapted(nn.Linear):
    """Computes something else than its weights say."""

    def forward(self, x):
        return 2 * super().forward(x)


class OtherEncoder(nn.TransformerEncoder):
    def forward(self, x):
        return -super().forward(x)


def encoder():
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False
    ).eval()


def exchange_linear(model):
    model.layers[1].linear1 = Adapted(8, 16)


def exchange_dropout(model):
    model.layers[0].dropout1 = nn.Identity()


def hook(model):
    model.layers[0].linear2.register_forward_hook(lambda module, args, out: 2 * out)


def sequential(model):
    model.layers[0].linear1 = nn.Sequential(nn.Linear(8, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange_linear, "linear1 is a .*Adapted, which may compute something else"),
        (exchange_dropout, "dropout1 of layer 0 must be a torch.nn.Dropout"),
        (hook, "linear2 has a forward hook"),
        (sequential, "linear1 of layer 0 must be a torch.nn.Linear"),
    ],
)
def test_parts_of_an_encoder(change, message):
    model = encoder()
    mmsb.Propagation.from_torch(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        mmsb.Propagation.from_torch(model)


def test_another_class_of_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(ValueError, match="but got OtherEncoder"):
        mmsb.Propagation.from_torch(OtherEncoder(layer, 1, enable_nested_tensor=False))


def test_an_activation_of_ones_own_is_read():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.PReLU()).eval()
    x = torch.randn(1, 5, 8).transpose(0, 1)
    stack = mmsb.Propagation.from_torch(layer)
    torch.testing.assert_close(stack(x[:, 0]), layer(x)[:, 0])


def test_parts_of_hugging_faces_models():
    transformers = pytest.importorskip("transformers", reason="compared with its models")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    bert = transformers.BertModel(config).eval()
    mmsb.from_hugging_face(bert)
    bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()
    with pytest.raises(ValueError, match="does not compute 'gelu'"):
        mmsb.from_hugging_face(bert)
    bert = transformers.BertModel(config).eval()
    bert.embeddings.position_ids += 1
    with pytest.raises(ValueError, match="position_ids must count from 0"):
        mmsb.from_hugging_face(bert)
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    gpt = transformers.GPT2Model(config).eval()
    mmsb.from_hugging_face(gpt)
    gpt.h[0].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="does not compute 'gelu_new'"):
        mmsb.from_hugging_face(gpt)
    gpt.h[0].mlp = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"h\.0\.mlp must be a GPT2MLP"):
        mmsb.from_hugging_face(gpt)
