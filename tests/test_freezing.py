"""Freezing: `requires_grad` follows the call, and counts, groups and optimizers follow it."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from helpers.models import MLP, stages
from helpers.peft import inject_lora, quantize_layers
from helpers.training import (
    count_parameters,
    freeze,
    freeze_to,
    freezing,
    param_groups,
    stored_bytes,
    unfreeze,
)
from tests.small import TinyTransformer


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def step(model, optimizer):
    model(torch.ones(3, 20)).sum().backward()
    optimizer.step()
    return optimizer


def test_freezing_drops_gradients_that_an_optimizer_would_still_apply():
    model = MLP()
    optimizer = SGD(model.parameters(), lr=1, weight_decay=0.1)
    model(torch.ones(3, 20)).sum().backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    freeze(model.backbone, model.head.bias)
    optimizer.step()
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert moved == trainable(model) == ["head.weight"]
    unfreeze(model.backbone[0], model.head.bias)
    assert trainable(model) == ["backbone.0.weight", "backbone.0.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("model", [MLP, TinyTransformer])
def test_freeze_to_counts_stages_from_either_end(model):
    parts = stages(model())
    size = len(parts)
    for n in range(-size, size + 1):
        freeze_to(parts, n)
        trained = [name for name, part in parts.items() if count_parameters(part).trainable]
        assert trained == list(parts)[n if n >= 0 else size + n :]
    for n in (size + 1, -size - 1):
        with pytest.raises(ValueError, match=f"cannot freeze to stage {n}: there are {size}"):
            freeze_to(parts, n)


def test_counts_print_as_published_and_hold_shared_parameters_once():
    model, tied = MLP(), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    freeze(model.backbone)
    assert str(count_parameters(model)) == "Trainable: 132 / 7,716  (1.7%)"
    freeze_to(stages(model), 1)
    assert str(count_parameters(model)) == "Trainable: 6,372 / 7,716  (82.6%)"
    tied[2].weight = tied[0].weight
    assert count_parameters(tied) == (15, 15)
    assert count_parameters(nn.ReLU()).fraction == 0


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1", "fc2"], ["project", "head"]])
def test_weights_in_four_bits_count_as_the_numbers_that_they_stand_for(targets, r):
    plain, coded = TinyTransformer(), TinyTransformer()
    freeze(plain, coded)
    size = stored_bytes(coded)
    quantize_layers(coded, targets[:1])
    assert stored_bytes(coded) < size
    for model in (plain, coded):
        if r:
            inject_lora(model, targets, r=r)
        unfreeze(model.head)
    assert count_parameters(coded) == count_parameters(plain)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_bitsandbytes_packed_weights_count_as_the_numbers_that_they_stand_for(storage):
    for odd in (64, 33):
        layer = bnb.nn.Linear4bit(64, odd, quant_storage=storage)
        layer.load_state_dict(nn.Linear(64, odd).state_dict())
        layer.to("cpu")
        assert layer.weight.numel() < 64 * odd  # it is packed
        assert count_parameters(layer) == (odd, 65 * odd)
    eight = bnb.nn.Linear8bitLt(64, 33, has_fp16_weights=False)
    assert count_parameters(eight).total == 65 * 33


NESTED = {"head": 1.0, "backbone.1": 2.0, "backbone": 3.0, "backbone.1.bias": 4.0}
SPECIAL = {"head.bias": 1.0, "backbone.1.weight": 2.0, "backbone.1.bias": 4.0}


@pytest.mark.parametrize("frozen", [[], ["backbone.2", "backbone.10"]])
@pytest.mark.parametrize(
    "rates, special, rest", [({"": 5.0}, {}, 5.0), ({"": 5.0} | NESTED, SPECIAL, 3.0)]
)
def test_param_groups_partition_trainables_and_the_longest_prefix_wins(
    rates, special, rest, frozen
):
    model = nn.Module()
    model.backbone = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))  # 1 begins 10's name
    model.head, model.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    model.head.weight = model.backbone[0].weight
    special = special | {"scale": 5.0}
    freeze(*map(model.get_submodule, frozen))
    names = {p: name for name, p in model.named_parameters()}
    groups = param_groups(model, rates)
    assert [group["lr"] for group in groups] == list(rates.values())
    given = [(names[p], group["lr"]) for group in groups for p in group["params"]]
    assert sorted(given) == sorted((name, special.get(name, rest)) for name in trainable(model))


@pytest.mark.parametrize(
    "rates, told",
    [
        ({"": 1.0, "haed": 1.0}, r"the rates for \['haed'\] cover nothing"),
        ({"": 1.0, "back": 1.0}, r"the rates for \['back'\] cover nothing"),
        ({"": 1.0, "backbone.0": 1.0}, r"the rates for \['backbone.0'\] cover nothing"),
        ({"backbone": 1.0}, r"no learning rate for 'head.weight': \['backbone'\] do not fit"),
    ],
)
def test_a_rate_without_parameter_and_a_parameter_without_rate_are_refused(rates, told):
    model = MLP()
    freeze(model.backbone[0])
    with pytest.raises(ValueError, match=told):
        param_groups(model, rates)


@pytest.mark.parametrize(
    "optimizer_of, then, told",
    [
        (lambda m: SGD(m.head.parameters()), lambda m: None, None),
        (lambda m: step(m, SGD(m.parameters())), lambda m: freeze(m.backbone[2]), None),
        (
            lambda m: SGD(m.head.parameters()),
            lambda m: unfreeze(m.backbone[4]),
            r"does not hold 'backbone.4.weight' \(2 trainable parameters",
        ),
        (
            lambda m: (unfreeze(m), step(m, Adam(m.parameters())))[1],
            lambda m: freeze(m.backbone[2]),
            "'backbone.2.weight' is frozen but the optimizer has momentum for it",
        ),
        (lambda m: SGD(m.parameters()), freeze, "nothing to train: every parameter of MLP is"),
    ],
)
def test_an_optimizer_built_for_other_parameters_is_refused(optimizer_of, then, told):
    model = MLP()
    freeze(model.backbone)
    optimizer = optimizer_of(model)
    then(model)
    if told is None:
        return freezing.check_optimizer(model, optimizer)
    with pytest.raises(ValueError, match=told):
        freezing.check_optimizer(model, optimizer)


def test_an_ending_wins_over_any_prefix():
    model = nn.Module()
    model.q = nn.ParameterDict({"lora_A": torch.ones(1), "lora_B": torch.ones(1)})
    model.lora_B = nn.Linear(1, 1)  # a module of that name is no ending of its parameters' names
    groups = param_groups(model, {"": 1.0, "q": 2.0, ".lora_B": 16.0})
    names = {p: name for name, p in model.named_parameters()}
    given = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert given == {"q.lora_A": 2, "q.lora_B": 16, "lora_B.weight": 1, "lora_B.bias": 1}
    with pytest.raises(ValueError, match=r"the rates for \['.lora_C'\] cover nothing"):
        param_groups(model, {"": 1.0, ".lora_C": 2.0})
