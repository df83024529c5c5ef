"""The formulas against torch's own counter, which sees every product that plain torch layers really do."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamug.telemetry.flops import TRAINING, attention_flops, layer_flops, linear_flops, mlp_flops


def counted(function) -> int:
    # torch's counter does not see inside the fused attention of the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int, context_width: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = torch.nn.Linear(width, width)
        self.key_value = torch.nn.Linear(context_width, 2 * width)
        self.output = torch.nn.Linear(width, width)

    def forward(self, x, context):
        def by_head(tensor):
            return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(context).chunk(2, dim=-1)
        attended = functional.scaled_dot_product_attention(
            by_head(self.query(x)), by_head(key), by_head(value), is_causal=self.causal
        )
        return self.output(attended.transpose(1, 2).flatten(2))


class Layer(torch.nn.Module):
    def __init__(self, width, heads, ffn_width, context_width=None, causal=False, gated=False):
        super().__init__()
        self.self_attention = Attention(width, heads, width, causal)
        self.cross_attention = Attention(width, heads, context_width, False) if context_width else None
        self.gated = gated
        self.fc1 = torch.nn.Linear(width, (2 if gated else 1) * ffn_width)
        self.fc2 = torch.nn.Linear(ffn_width, width)

    def forward(self, x, context=None):
        x = x + self.self_attention(x, x)
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, context)
        hidden = self.fc1(x)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * up
        else:
            hidden = functional.gelu(hidden)
        return x + self.fc2(hidden)


BATCH, TOKENS, WIDTH, HEADS, FFN, CONTEXT_TOKENS, CONTEXT_WIDTH = 3, 24, 32, 4, 80, 17, 48


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_layer(causal, gated, cross):
    layer = Layer(WIDTH, HEADS, FFN, CONTEXT_WIDTH if cross else None, causal, gated)
    x, context = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, CONTEXT_TOKENS, CONTEXT_WIDTH)
    expected = counted(lambda: layer(x, context))
    sizes = (CONTEXT_TOKENS, CONTEXT_WIDTH) if cross else (None, None)
    assert BATCH * layer_flops(TOKENS, WIDTH, FFN, *sizes, gated=gated) == expected > 0


def test_training_is_three_forwards():
    layer = Layer(WIDTH, HEADS, FFN)
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    expected = counted(lambda: layer(x).sum().backward())
    assert TRAINING * BATCH * layer_flops(TOKENS, WIDTH, FFN) == expected


def test_parts():
    linear = torch.nn.Linear(12, 20)
    assert linear_flops(5, 12, 20) == counted(lambda: linear(torch.randn(5, 12)))
    patches = torch.nn.Conv2d(3, 16, kernel_size=4, stride=4)
    assert linear_flops(4, 3 * 4 * 4, 16) == counted(lambda: patches(torch.randn(1, 3, 8, 8)))
    assert attention_flops(8, 16) + mlp_flops(8, 16, 64) == layer_flops(8, 16, 64)
    assert attention_flops(8, 16, context_tokens=8, context_width=16) == attention_flops(8, 16)
