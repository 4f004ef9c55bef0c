"""A stack of passes as dense formulas: no edges, no layers, nothing of the library but weights."""

import torch


def allowed_pairs(edge_index, num_pages):
    """``[P, P]``: how many edges run from column j to row i."""
    count = torch.zeros(num_pages, num_pages, dtype=torch.double)
    for source, target in edge_index.T.tolist():
        count[target, source] += 1
    return count


def norm(x, layer):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    x = (x - mean) / (variance + layer.eps).sqrt() * layer.weight
    return x if layer.bias is None else x + layer.bias


def linear(x, layer):
    x = x @ layer.weight.T
    return x if layer.bias is None else x + layer.bias


def attention(x, router, count, bias):
    """A page without any source receives nothing but the output bias."""
    query, key, value = linear(x, router.lin_qkv).chunk(3, dim=1)
    width, parts = query.size(1) // router.heads, []
    for head in range(router.heads):
        columns = slice(head * width, (head + 1) * width)
        score = query[:, columns] @ key[:, columns].T / width**0.5
        if bias is not None:
            score = score + bias[min(head, bias.size(0) - 1)]
        share = count * (score - score.amax(1, keepdim=True)).exp()
        share = share / share.sum(1, keepdim=True).clamp(min=1e-300)
        parts.append(share @ value[:, columns])
    return linear(torch.cat(parts, 1), router.lin_out)


FUNCTIONS = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
}


def one_pass(x, refine, count, bias=None):
    def update(x):
        return linear(FUNCTIONS[refine.activation](linear(x, refine.lin_in)), refine.lin_out)

    if refine.norm_first:
        x = x + attention(norm(x, refine.norm_route), refine.router, count, bias)
        return x + update(norm(x, refine.norm_update))
    x = norm(x + attention(x, refine.router, count, bias), refine.norm_route)
    return norm(x + update(x), refine.norm_update)


def propagate(stack, x, edges, bias=None):
    """Snapshots and the final state; ``edges`` are an edge_index, or one for each pass."""
    edges = [edges] * len(stack.passes) if isinstance(edges, torch.Tensor) else edges
    snapshots = [x]
    for refine, edge_index in zip(stack.passes, edges, strict=True):
        x = one_pass(x, refine, allowed_pairs(edge_index, x.size(0)), bias)
        snapshots.append(x)
    return x if stack.final_norm is None else norm(x, stack.final_norm), snapshots


def scramble(module):
    """Every parameter at random: zero biases and unit scales would hide mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1.0 if "norm" in name else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return module
