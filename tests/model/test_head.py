"""The head's two numbers under bf16: fp32 logits of bf16 operands, exact gradients of them."""

import pytest
import torch

from bd3lm_scale.model.head import linear_fp32
from tests.model.test_fast_decoder import MASK, VOCAB, build

ROWS = 256


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def case(request):
    """(head, what enters it, targets, the projection's operand and its product in float64)."""
    head = build(precision=request.param).head
    draw = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(ROWS, 64, generator=draw)
    conditioning_RC = torch.randn(ROWS, 32, generator=draw).to(head.output.weight.dtype)
    target_R = torch.randint(0, MASK, (ROWS,), generator=draw)
    operands = []
    hook = head.output.register_forward_pre_hook(lambda _, inputs: operands.append(inputs[0].detach().double()))
    head(hidden_RD, conditioning_RC, target_R, None)
    hook.remove()
    (normed,) = operands
    logits_RV = normed @ head.output.weight.detach().double().t() + head.output.bias.detach().double()
    return head, hidden_RD, conditioning_RC, target_R, normed, logits_RV


def test_logits_of_bf16_operands_are_not_rounded(case):
    """Target logit and log-sum-exp equal float64's to fp32 rounding; bf16 logits would be hundreds of times further."""
    head, hidden_RD, conditioning_RC, target_R, _, logits_RV = case
    target_logit_R, logsumexp_R = head(hidden_RD, conditioning_RC, target_R, None).detach()
    exact_R = logits_RV.gather(1, target_R[:, None])[:, 0]
    exact_lse_R = logits_RV[:, :MASK].logsumexp(1)
    assert (target_logit_R - exact_R).abs().max() < 2e-6 * logits_RV.abs().max()
    assert (logsumexp_R - exact_lse_R).abs().max() < 2e-6 * logits_RV.abs().max()
    rounded = logits_RV.bfloat16().double()
    assert (rounded.gather(1, target_R[:, None])[:, 0] - exact_R).abs().max() > 2e-4 * logits_RV.abs().max()


def test_gradients_of_weights_and_bias_are_those_of_the_loss(case):
    """Of lse - z, summed over rows, to the precision of the weights' dtype."""
    head, hidden_RD, conditioning_RC, target_R, normed, logits_RV = case
    is_bf16 = head.output.weight.dtype == torch.bfloat16
    head.zero_grad()
    target_logit_R, logsumexp_R = head(hidden_RD, conditioning_RC, target_R, None)
    (logsumexp_R - target_logit_R).sum().backward()
    logits_RV = logits_RV[:, :VOCAB].clone()
    logits_RV[:, MASK] = -torch.inf
    grad_RV = logits_RV.softmax(1) - torch.nn.functional.one_hot(target_R, VOCAB)
    tolerance = dict(rtol=2e-2, atol=5e-2) if is_bf16 else dict(rtol=1e-4, atol=1e-4)
    weight, bias = head.output.weight.grad, head.output.bias.grad
    torch.testing.assert_close(weight[:VOCAB].double(), grad_RV.t() @ normed, **tolerance)
    torch.testing.assert_close(bias[:VOCAB].double(), grad_RV.sum(0), **tolerance)
    assert (weight[VOCAB:] == 0).all()
    assert bias[MASK] == 0


@pytest.mark.parametrize("tail", [0, 1])
def test_tiles_of_rows_equal_all_rows_at_once(case, monkeypatch, tail):
    """Scores and every gradient, under weights of either sign and none; no buffer holds the logits of all rows."""
    head, *_ = case
    rows, tiles = 1024 + tail, 8
    draw = torch.Generator().manual_seed(1)
    hidden_RD = torch.randn(rows, 64, generator=draw)
    conditioning_RC = torch.randn(rows, 32, generator=draw).to(head.output.weight.dtype)
    target_R = torch.randint(0, MASK, (rows,), generator=draw)
    weight_2R = torch.randn(2, rows, generator=draw)
    weight_2R[:, ::5] = 0
    found = []
    for tile_bytes in (2**28, rows // tiles * 4 * len(head.output.weight)):
        monkeypatch.setattr("bd3lm_scale.model.head.TILE_BYTES", tile_bytes)
        head.zero_grad()
        inputs = [t.clone().requires_grad_() for t in (hidden_RD, conditioning_RC)]
        products = []

        def recorded(x, weight, bias, products=products):
            products.append(linear_fp32(x, weight, bias))
            return products[-1]

        monkeypatch.setattr("bd3lm_scale.model.head.linear_fp32", recorded)
        out = head(*inputs, target_R, None)
        (out * weight_2R).sum().backward()
        found.append([out.detach(), *(t.grad for t in inputs), *(p.grad for p in head.parameters())])
        of_logits = [len(product) for product in products if product.shape[1] == len(head.output.weight)]
        assert max(of_logits) == (rows if tile_bytes == 2**28 else rows // tiles)
        assert sum(of_logits) == (rows if tile_bytes == 2**28 else 2 * rows), "what is not kept is made again"
    is_bf16 = head.output.weight.dtype == torch.bfloat16
    for tiled, whole in zip(*found, strict=True):
        tolerance = 2**-7 if is_bf16 and tiled.dtype == torch.bfloat16 else 1e-5  # a sum may round to a neighbour
        torch.testing.assert_close(tiled, whole, rtol=tolerance, atol=1e-4 if is_bf16 else 1e-5)


def test_linear_fp32_takes_operands_of_two_dtypes():
    """Decoding on the CPU widens the weights once."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw).bfloat16() for shape in ((5, 8), (7, 8), (7,)))
    wide = linear_fp32(x, weight.float(), bias)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, linear_fp32(x, weight, bias))
    torch.testing.assert_close(wide.double(), x.double() @ weight.double().t() + bias.double(), rtol=1e-6, atol=1e-6)
