"""A change planted in W: each technique leaves of it what its closed form says, and no more.

The hidden units that the adapted layer reads are the rows of the identity, so that the summed
squared error of the outputs is ||W' - target||_F^2, W' being the layer's weight as adapted.
"""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from helpers.peft import inject_dora, inject_ia3, inject_lora, inject_oft, merge
from helpers.study import reproducible
from helpers.training import count_parameters, freeze, train

D_IN, D_OUT, LAYER = 16, 24, "2"
PLANTED = torch.tensor([4.0, 3.0, 2.0, 1.0])  # singular values: a change of rank 4
LEFT = {1: 9 + 4 + 1, 2: 4 + 1, 3: 1, 4: 0, 5: 0}  # by rank; Eckart & Young: the squared tail


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def orthonormal(n, k):
    """Return k orthonormal columns of length n."""
    return torch.linalg.qr(torch.randn(n, k)).Q


def small_mlp(bias=True):
    """Return a model whose last layer is to be adapted (and so frozen), its inputs, and W."""
    turn = nn.Linear(D_IN, D_IN, bias=False)
    turn.weight.data = orthonormal(D_IN, D_IN)
    model = nn.Sequential(turn, nn.ReLU(), nn.Linear(D_IN, D_OUT, bias=bias))
    freeze(turn)
    X, W = turn.weight.detach().clone(), model[2].weight.detach().clone()
    return model, X, W  # turned, X is the identity


def fit(model, X, Y, lr=0.04):
    """Train on the squared error and return what is left of it.

    `train` takes integer labels: row numbers of Y.
    """

    def squared_error(model, x, y):
        return (model(x) - Y[y]).square().sum()

    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.85)
    rows = torch.arange(len(X))
    train(model, X, rows, optimizer=optimizer, epochs=400, loss=squared_error)
    return squared_error(model, X, rows).item()


def nearest(M, r):
    """Return the matrix of rank r that is nearest to M, and its squared distance."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r], S[r:].square().sum().item()


@pytest.mark.parametrize("r", LEFT)
@pytest.mark.parametrize("per_rank, rslora", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    "init, where", [("lora", "anywhere"), ("pissa", "leading"), ("pissa", "anywhere")]
)
def test_lora_reaches_the_best_approximation_of_its_rank(r, per_rank, rslora, init, where):
    model, X, W = small_mlp()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    if where == "anywhere":
        U, Vh = orthonormal(D_OUT, 4), orthonormal(D_IN, 4).T
    change = U[:, :4] * PLANTED @ Vh[:4]
    Y = model(X).detach() + change.T
    inject_lora(model, [LAYER], r=r, lora_alpha=per_rank * r, rslora=rslora, init=init)
    scaling = per_rank * math.sqrt(r) if rslora else per_rank
    left = fit(model, X, Y, lr=0.04 / scaling)  # the loss's curvature grows with it

    # PiSSA's B A starts as the leading part of W, so it has r ranks for that part and the change:
    # enough where the change turns no leading direction, too few where it lies anywhere
    start = nearest(W, r)[0] if init == "pissa" else 0 * W
    expected, tail = nearest(change + start, r)
    assert left == pytest.approx(tail, rel=1e-9, abs=1e-18)
    if (init, where) == ("pissa", "anywhere"):
        assert left > LEFT[r] + 1
    else:
        assert left == pytest.approx(LEFT[r], rel=1e-9, abs=1e-18)

    product = scaling * model[2].lora_B @ model[2].lora_A
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-7)
    merge(model)
    torch.testing.assert_close(model[2].weight, W + product - start, rtol=0, atol=1e-12)


def turned(W):
    """Rotate the inputs of W in blocks of four."""
    skew = torch.block_diag(*(0.1 * torch.randn(4, 4) for _ in range(4)))
    return W @ torch.matrix_exp(skew - skew.T)


CHANGES = {
    "rank one": lambda W: W + orthonormal(D_OUT, 1) @ orthonormal(D_IN, 1).T,
    "rows rescaled": lambda W: W * torch.linspace(0.5, 1.5, D_OUT)[:, None],
    "columns rescaled": lambda W: W * torch.linspace(0.5, 1.5, D_IN),
    "inputs turned": turned,
}


def dora_magnitude(model):
    inject_dora(model, [LAYER], r=1)
    freeze(model[2].lora_A, model[2].lora_B)


def ia3_inputs(model):
    inject_ia3(model, ["0"], feedforward=[LAYER])
    freeze(model[0])


def rescaling(dim):
    """Return what the best factors for the rows (dim 1) or columns (dim 0) of W leave."""

    def _left(W, target):
        factors = (W * target).sum(dim, keepdim=True) / W.square().sum(dim, keepdim=True)
        return (factors * W - target).square().sum().item()

    return _left


def turning(W, target):
    """Return what the best rotations of the inputs in blocks of four leave (Procrustes)."""
    left = 0
    for w, t in zip(W.split(4, 1), target.split(4, 1), strict=True):
        U, _, Vh = torch.linalg.svd(w.T @ t)
        assert torch.linalg.det(U @ Vh) > 0  # a rotation, as OFT's blocks are, not a reflection
        left += (w @ U @ Vh - t).square().sum().item()
    return left


# how it is put in, the numbers that it trains, what it leaves, the change that it can make
TECHNIQUES = {
    "LoRA": (
        lambda model: inject_lora(model, [LAYER], r=1, lora_alpha=1),
        D_IN + D_OUT,
        lambda W, target: nearest(target - W, 1)[1],
        "rank one",
    ),
    "(IA)3": (
        lambda model: inject_ia3(model, [LAYER]),
        D_OUT,
        rescaling(1),
        "rows rescaled",
    ),
    "(IA)3 on inputs": (ia3_inputs, D_IN, rescaling(0), "columns rescaled"),
    "magnitude of DoRA": (dora_magnitude, D_OUT, rescaling(1), "rows rescaled"),
    "OFT": (
        lambda model: inject_oft(model, [LAYER], block_size=4),
        4 * 6,
        turning,
        "inputs turned",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_makes_its_own_kind_of_change_and_no_other(technique, change):
    inject, trained, closed_form, own = TECHNIQUES[technique]
    model, X, W = small_mlp(bias=False)
    target = CHANGES[change](W)
    inject(model)
    assert count_parameters(model).trainable == trained
    left = fit(model, X, target.T)
    assert left == pytest.approx(closed_form(W, target), rel=1e-6, abs=1e-18)
    assert (left < 1e-18) if change == own else (left > 0.1)
    merge(model)
    adapted = model[2].weight
    assert (adapted - target).square().sum().item() == pytest.approx(left, rel=1e-9, abs=1e-18)
    if technique == "OFT":
        torch.testing.assert_close(adapted.norm(dim=1), W.norm(dim=1), rtol=1e-12, atol=0)
