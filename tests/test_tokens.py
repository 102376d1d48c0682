"""Training on tokens: the same numbers whatever holds the rows; a frozen bottom is cached."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from helpers.models import MLP, Encoder, TextClassifier, bundled, with_fresh_head
from helpers.peft import inject_lora
from helpers.study import reproducible
from helpers.training import (
    cache_prefix,
    cross_entropy,
    evaluate,
    extract_features,
    freeze,
    predict,
    train,
    unfreeze,
)

LENGTHS = [4, 2, 9, 1, 5, 7, 3, 9, 6, 2]
N, LONGEST = len(LENGTHS), max(LENGTHS)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def classifier(**options):
    sizes = dict(vocab=40, d=12, n_layers=3, n_heads=2, d_ff=16, positions=12)
    return TextClassifier(Encoder(**sizes, **options), 3)


def tokens(width=LONGEST):
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(1, 40, mask.shape), mask, torch.arange(N) % 3


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def same_weights(model, reference, atol=1e-10):
    found, expected = model.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name], atol)


def optimizer(model):
    return SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


class Rows(Dataset):
    """Rows as a data set of texts has them, one dict or tuple each."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.long), 0


def dicts(ids, mask, y, make=lambda x: x):
    parts = zip(ids, mask, y, strict=True)
    return Rows([{"ids": make(i), "mask": make(m), "labels": make(k)} for i, m, k in parts])


def ragged(ids, mask, y):
    parts = zip(ids, mask, y, strict=True)
    return Rows([{"ids": i[: m.sum()], "mask": m[: m.sum()], "labels": k} for i, m, k in parts])


def padded(rows):
    pad = nn.utils.rnn.pad_sequence
    batch = {key: pad([row[key] for row in rows], batch_first=True) for key in ("ids", "mask")}
    return batch | {"labels": torch.stack([row["labels"] for row in rows])}


FORMS = {
    "dict": lambda i, m, y: ({"ids": i, "mask": m}, y),
    "tuple": lambda i, m, y: ((i, m), y),
    "arrays": lambda i, m, y: ({"ids": i.numpy(), "mask": m.numpy()}, y.numpy()),
    "lists": lambda i, m, y: ({"ids": i.tolist(), "mask": m.tolist()}, y.tolist()),
    "mask of bools": lambda i, m, y: ({"ids": i, "mask": m.bool()}, y),
    "dict with labels": lambda i, m, y: ({"ids": i, "mask": m, "labels": y}, None),
    "dict with a label": lambda i, m, y: ({"label": y, "ids": i, "mask": m}, None),
    "TensorDataset": lambda i, m, y: (TensorDataset(i, m, y), None),
    "Dataset of dicts": lambda i, m, y: (dicts(i, m, y), None),
    "Dataset of lists": lambda i, m, y: (dicts(i, m, y, make=lambda x: x.tolist()), None),
    "loader": lambda i, m, y: (DataLoader(TensorDataset(i, m, y), 4), None),
    "loader of dicts": lambda i, m, y: (DataLoader(dicts(i, m, y), 4), None),
    "loader that pads": lambda i, m, y: (
        DataLoader(ragged(i, m, y), 4, collate_fn=padded),
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_give_the_same_numbers_whatever_holds_them(form):
    model, (ids, mask, y) = classifier(), tokens()
    X, labels = FORMS[form](ids, mask, y)
    logits = model(ids, mask)
    close(predict(model, X), logits)
    score = evaluate(model, X, labels)
    assert score.correct == int((logits.argmax(1) == y).sum()) and score.n == N
    assert score.loss == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-12)
    freeze(model.encoder)
    close(extract_features(model, X), model.features(ids, mask))
    unfreeze(model.encoder)

    loader, reference, losses = isinstance(X, DataLoader), copy.deepcopy(model), []
    order = torch.arange(N) if loader else torch.randperm(N, generator=torch.manual_seed(3))
    steps = optimizer(reference)
    for rows in order.split(4):
        steps.zero_grad()
        loss = F.cross_entropy(reference(ids[rows], mask[rows]), y[rows])
        loss.backward()
        steps.step()
        losses.append(loss.item() * len(rows))
    own = {} if loader else {"batch_size": 4, "generator": torch.Generator().manual_seed(3)}
    validation = X if labels is None else (X, labels)
    history = train(
        model, X, labels, optimizer=optimizer(model), epochs=1, validation=validation, **own
    )
    same_weights(model, reference)
    assert history["loss"] == pytest.approx([sum(losses) / N], abs=1e-10)
    expected = F.cross_entropy(reference(ids, mask), y).item()
    assert history["validation_loss"] == pytest.approx([expected], abs=1e-10)


def test_rows_are_read_one_by_one_not_column_by_column():
    model, ids = classifier(), torch.randint(1, 40, (4, 4))  # as many rows as tokens
    rows = dicts(ids, torch.ones_like(ids), torch.arange(4) % 3, make=lambda x: x.tolist())
    close(predict(model, rows), model(ids))
    pairs = Rows([(row.tolist(), 0) for row in ids])
    close(predict(model, pairs), model(ids))


def bert(vocab=40):
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = hf.BertConfig(**sizes, vocab_size=vocab, num_labels=3)
    return hf.BertForSequenceClassification(config).double()


def test_a_tokenizers_output_trains_a_model_of_transformers():
    texts = ["one text", "another, longer text of more words", "the third", "and a fourth one"]
    X = hf.AutoTokenizer.from_pretrained(bundled())(texts, padding=True, return_tensors="pt")
    model, y = bert(30522), torch.tensor([0, 1, 2, 1])
    assert type(X) is hf.BatchEncoding and "token_type_ids" in X
    expected = model.eval()(**X).logits
    close(predict(model, X), expected)
    loss = evaluate(model, X, y).loss
    assert loss == pytest.approx(F.cross_entropy(expected, y).item(), abs=1e-12)
    freeze(model)
    inject_lora(model, ["query", "value"], r=2)
    unfreeze(model.classifier)
    train(model, X, y, optimizer=optimizer(model), epochs=5)
    assert evaluate(model, X, y).loss < loss


def vit():
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    return hf.ViTForImageClassification(config).double()


def embedding():
    return nn.Sequential(nn.Embedding(40, 8), nn.Flatten(), nn.Linear(8 * 9, 3))


@pytest.mark.parametrize("kind", ["ids, BERT", "ids, embedding", "pixels, ViT", "pixels, dict"])
@pytest.mark.parametrize("loader", [False, True], ids=["rows", "loader"])
def test_ids_alone_and_pixels_train(kind, loader):
    (ids, _, y), make = tokens(), {"ids, BERT": bert, "ids, embedding": embedding}.get(kind, vit)
    model = make().eval()
    x = torch.randn(N, 3, 8, 8) if make is vit else ids
    output = model(x)
    expected = getattr(output, "logits", output)
    X = {"pixel_values": x} if kind == "pixels, dict" else x
    rows = (X, y)
    if loader:
        pairs = zip(x, y, strict=True)
        named = Rows([{"pixel_values": a, "labels": b} for a, b in pairs])
        rows = (DataLoader(named if kind == "pixels, dict" else TensorDataset(x, y), 4), None)
    close(predict(model, rows[0]), expected)
    loss = evaluate(model, *rows).loss
    assert loss == pytest.approx(F.cross_entropy(expected, y).item(), abs=1e-12)
    train(model, *rows, optimizer=optimizer(model), epochs=3)
    assert evaluate(model, *rows).loss < loss


def watched(module, seen):
    return module.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))


def test_batches_are_cut_to_their_longest_row():
    (ids, mask, y), model, seen = tokens(width=12), classifier(), []
    X = {"ids": ids, "mask": mask}
    watched(model.encoder.embed, seen)
    predict(model, X, batch_size=3)
    assert seen == [(3, 9), (3, 6), (3, 3), (1, 1)]  # the longest first: 9 9 7, 6 5 4, 3 2 2, 1
    seen.clear()
    order = torch.randperm(N, generator=torch.manual_seed(5)).split(3)
    steps = {"batch_size": 3, "generator": torch.Generator().manual_seed(5)}
    train(model, X, y, optimizer=optimizer(model), epochs=1, **steps)
    assert seen[-4:] == [(len(rows), max(LENGTHS[i] for i in rows)) for rows in order]
    seen.clear()
    predict(model, (ids, mask), batch_size=5)  # nothing tells which of them is a mask
    assert seen == [(5, 12), (5, 12)]


def test_predictions_come_back_in_the_order_of_the_rows():
    (ids, mask, _), model = tokens(width=12), classifier()
    X = {"ids": ids, "mask": mask}
    alone = [model(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    for batch_size in (1, 3, 256, None):
        close(predict(model, X, batch_size=batch_size), torch.cat(alone))
    freeze(model.encoder)
    alone = [model.features(ids[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    close(extract_features(model, X, batch_size=3), torch.cat(alone))


def test_rows_padded_at_their_start_lose_no_token():
    (ids, mask, _), model = tokens(width=12), classifier()
    X = {"ids": ids.flip(1), "mask": mask.flip(1)}
    close(predict(model, X, batch_size=3), model(**X))


def top_lora(model):
    freeze(model)
    inject_lora(model.encoder.blocks[2], ["q_proj", "v_proj"], r=2)
    unfreeze(model.head)


def top_block(model):
    freeze(model)
    unfreeze(model.encoder.blocks[2], model.head)


def head_only(model):
    freeze(model.encoder)


FIRSTS = {top_lora: 2, top_block: 2, head_only: 3}
frozen_below = pytest.mark.parametrize("adapt", FIRSTS, ids=lambda f: f.__name__)


def prepared(adapt, width=LONGEST):
    model, (ids, mask, y) = classifier(), tokens(width)
    adapt(model)
    return model, {"ids": ids, "mask": mask}, y


@frozen_below
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("width", [9, 12])
def test_cached_rows_train_the_same_weights(adapt, batch_size, width):
    model, X, y = prepared(adapt, width)
    reference, start = copy.deepcopy(model), copy.deepcopy(model)
    rows = cache_prefix(model, X, batch_size=4)
    assert rows.first == FIRSTS[adapt]
    assert rows.keys() == {"hidden", "mask"} and rows["hidden"].shape == (N, 9, 12)

    cross_entropy(model, rows, y).backward()
    cross_entropy(reference, X, y).backward()
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, reference)]
    for found, expected in zip(*gradients, strict=True):
        close(found, expected, 1e-12)

    options = {"epochs": 3, "batch_size": batch_size}
    history = train(
        model, rows, y, optimizer=optimizer(model), validation=(rows, y), patience=3, **options
    )
    expected = train(
        reference, X, y, optimizer=optimizer(reference), validation=(X, y), patience=3, **options
    )
    same_weights(model, reference)
    for name in expected:
        assert history[name] == pytest.approx(expected[name], abs=1e-10)
    before = start.state_dict()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "k_proj.bias" not in name} <= moved <= trained
    close(predict(model, rows, batch_size=3), predict(reference, X))
    assert evaluate(model, rows, y).correct == evaluate(reference, X, y).correct


def test_rows_without_a_mask_are_cached():
    model, X, _ = prepared(top_block)
    rows = cache_prefix(model, {"ids": X["ids"]})
    assert rows.keys() == {"hidden"}
    close(predict(model, rows), model(X["ids"]))


def test_a_dataset_of_dicts_is_cached_without_its_labels():
    model, X, y = prepared(top_block)
    rows = cache_prefix(model, dicts(*X.values(), y))
    assert rows.keys() == {"hidden", "mask"}
    close(predict(model, rows), model(**X))


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_a_cache_may_go_on_at_any_block_with_a_frozen_bottom(first):
    model, X, y = prepared(head_only)
    rows = cache_prefix(model, X, first=first)
    close(predict(model, rows), model(**X))
    with pytest.raises(ValueError, match="first=-1 must be an integer, 0 or more"):
        cache_prefix(model, X, first=-1)
    unfreeze(*model.encoder.blocks[first:])
    close(predict(model, rows), model(**X))
    train(model, rows, y, optimizer=optimizer(model), epochs=1)
    if first < 3:
        with pytest.raises(ValueError, match=rf"'blocks.{first}[\w.]*' is trainable"):
            cache_prefix(model, X, first=first + 1)


def unfrozen(model):
    model.encoder.blocks[1].norm1.bias.requires_grad_(True)


def embedding_unfrozen(model):
    unfreeze(model.encoder.embed)


def changed(model):
    with torch.no_grad():
        model.encoder.blocks[0].feed_forward.fc1.weight[3, 4] += 1e-9


def changed_data(model):
    model.encoder.embed.token.weight.data[5] *= 1.5


def wrapped(model):
    inject_lora(model.encoder.blocks[1], ["k_proj"], r=2)


def wrapped_and_frozen(model):
    wrapped(model)
    freeze(model.encoder.blocks[1])


def cast(model):
    model.float()


def dropping(model):
    model.encoder.blocks[1].dropout.p = 0.1


def attention_dropping(model):
    model.encoder.blocks[0].attention.dropout = 0.1


STALE = {
    unfrozen: "'blocks.1.norm1[.a-z]*' is trainable",
    embedding_unfrozen: "'embed.token[.a-z]*' is trainable",
    changed: "'blocks.0.feed_forward.fc1.weight' is not what it was",
    changed_data: "'embed.token.weight' is not what it was",
    wrapped: "'blocks.1.attention.k_proj[._A-Za-z]*' is trainable",
    wrapped_and_frozen: "'blocks.1.attention.k_proj[._A-Za-z]*' is not what it was",
    cast: "'blocks.0.[.a-z_0-9]*|embed.[.a-z]*' is not what it was",
    dropping: "'blocks.1.dropout' drops out 0.1",
    attention_dropping: "'blocks.0.attention' drops out 0.1",
}


@pytest.mark.parametrize("change", STALE, ids=lambda f: f.__name__)
def test_stale_rows_are_refused_before_anything_moves(change):
    model, X, y = prepared(top_block)
    rows = cache_prefix(model, X)
    evaluate(model, rows, y)
    change(model)
    before, steps = copy.deepcopy(model.state_dict()), optimizer(model)
    for use in (
        lambda: train(model, rows, y, optimizer=steps, epochs=1),
        lambda: evaluate(model, rows, y),
        lambda: predict(model, rows),
        lambda: train(model, X, y, optimizer=steps, epochs=1, validation=(rows, y)),
    ):
        with pytest.raises(ValueError, match=STALE[change]) as refused:
            use()
        assert "cache_prefix" in str(refused.value) and "\n" not in str(refused.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    if change in (dropping, attention_dropping, embedding_unfrozen):  # no cache cures it
        with pytest.raises(ValueError, match=STALE[change]):
            cache_prefix(model, X)
    else:
        close(predict(model, cache_prefix(model, X)), predict(model, X))


def test_a_switched_off_adapter_in_the_bottom_makes_other_rows():
    model, X, y = prepared(top_block)
    wrapped_and_frozen(model)
    rows = cache_prefix(model, X)
    adapter = model.encoder.blocks[1].attention.k_proj
    adapter.enabled = False
    with pytest.raises(ValueError, match=r"'blocks.1.attention.k_proj' is not what it was"):
        evaluate(model, rows, y)
    adapter.enabled = True
    evaluate(model, rows, y)


def test_the_lowest_trainable_block_is_found_anew():
    model, X, _ = prepared(top_block)
    unfreeze(model.encoder.blocks[1].attention)
    rows = cache_prefix(model, X)
    assert rows.first == 1
    close(predict(model, rows), model(**X))
    unfreeze(model.encoder.embed)
    with pytest.raises(ValueError, match=r"'embed[.a-z]*' is trainable"):
        cache_prefix(model, X)


def test_no_cache_of_what_has_no_such_encoder_or_rows():
    with pytest.raises(ValueError, match=r"MLP has no helpers.models.Encoder to cache rows of"):
        cache_prefix(MLP(), torch.randn(3, 20))
    model, X, y = prepared(top_block)
    for other in (X["ids"], (X["ids"], X["mask"]), TensorDataset(*X.values(), y)):
        with pytest.raises(ValueError, match='expected a dict with "ids"'):
            cache_prefix(model, other)


def test_rows_of_one_model_serve_others_with_the_same_bottom():
    model, X, y = prepared(top_block)
    rows = cache_prefix(model, X)
    other = with_fresh_head(model, 5)
    close(predict(other, rows), other(**X))
    train(other, rows, y + 2, optimizer=optimizer(other), epochs=2)
    close(predict(other, rows), other(**X))
    torch.manual_seed(9)
    with pytest.raises(ValueError, match="is not what it was when these rows were cached"):
        predict(prepared(top_block)[0], rows)


def test_a_cached_bottom_is_not_called():
    model, X, y = prepared(top_lora)
    rows, calls = cache_prefix(model, X), {"embed": [], "blocks.0": [], "blocks.1": []}
    for name, seen in calls.items():
        watched(model.encoder.get_submodule(name), seen)
    top = []
    watched(model.encoder.blocks[2], top)
    options = {"epochs": 2, "batch_size": 5, "validation": (rows, y)}
    train(model, rows, y, optimizer=optimizer(model), **options)
    evaluate(model, rows, y)
    assert not any(calls.values()) and len(top) >= 2 * (2 + 1) + 1
    assert top[-1] == (int(X["mask"].sum()), 12)  # no padding
    evaluate(model, X, y)
    assert all(calls.values())


def test_cached_batches_are_cut_to_their_longest_row():
    model, X, _ = prepared(head_only, width=12)
    rows, seen = cache_prefix(model, X, first=1), []
    watched(model.encoder.blocks[1], seen)
    model.encoder.skips_padding = False  # else the block sees no rows
    predict(model, rows, batch_size=3)
    assert seen == [(3, 9, 12), (3, 6, 12), (3, 3, 12), (1, 1, 12)]


def later(ids, mask, y):
    y = y.clone()
    y[8] = 7
    return DataLoader(TensorDataset(ids, mask, y), 4), None


def without_tokens(ids, mask, y):
    mask = mask.clone()
    mask[6] = 0
    return {"ids": ids, "mask": mask}, y


both = (train, evaluate)
REFUSED = {
    "parts": (
        r"X has parts of {'ids': 10, 'mask': 9} rows: expected as many in each",
        lambda i, m, y: ({"ids": i, "mask": m[:-1]}, y),
        both,
    ),
    "parts of a tuple": (
        r"X has parts of {0: 10, 1: 9} rows: expected as many in each",
        lambda i, m, y: ((i, m[:-1]), y),
        both,
    ),
    "padding": ("X: row 6 is all padding: leave it out", without_tokens, both),
    "labels twice": (
        "labels come with X and as y, give one of them",
        lambda i, m, y: ({"ids": i, "mask": m, "labels": y}, y),
        both,
    ),
    "dataset's labels twice": (
        "labels come with X and as y, give one of them",
        lambda i, m, y: (TensorDataset(i, m, y), y),
        both,
    ),
    "no labels": (
        "the labels y are missing",
        lambda i, m, y: ({"ids": i, "mask": m}, None),
        both,
    ),
    "loader without labels": (
        "the labels y are missing",
        lambda i, m, y: (DataLoader([{"ids": a, "mask": b} for a, b in zip(i, m)], 4), None),  # noqa: B905
        both,
    ),
    "fewer labels": (
        r"y has shape \(9,\), expected \(10,\), one label per row",
        lambda i, m, y: ({"ids": i, "mask": m}, y[:-1]),
        both,
    ),
    "ragged": (
        "the rows of the Rows do not stack .*: give a DataLoader with a collate_fn that pads",
        lambda i, m, y: (ragged(i, m, y), None),
        both,
    ),
    "ragged lists": (
        "the rows of the Rows do not stack .*: give a DataLoader with a collate_fn that pads",
        lambda i, m, y: (
            Rows([{k: v.tolist() for k, v in row.items()} for row in ragged(i, m, y)]),
            None,
        ),
        both,
    ),
    "empty dataset": (
        "the Rows has no length or no rows: give a DataLoader, or rows",
        lambda i, m, y: (Rows([]), None),
        both,
    ),
    "endless dataset": (
        "the Endless has no length or no rows: give a DataLoader, or rows",
        lambda i, m, y: (Endless(), None),
        both,
    ),
    "loader and y": (
        "a DataLoader has labels.*: leave y",
        lambda i, m, y: (DataLoader(TensorDataset(i, m, y), 4), y),
        both,
    ),
    "loader without length": (
        "the DataLoader has no length: give its dataset one",
        lambda i, m, y: (DataLoader(Endless()), None),
        (train,),
    ),
    "label": (
        r"label 7 is out of range, expected 0..2 \(one model output per class\)",
        lambda i, m, y: ({"ids": i, "mask": m}, torch.full((N,), 7)),
        both,
    ),
}


@pytest.mark.parametrize("told, make, uses", REFUSED.values(), ids=REFUSED)
def test_rows_that_cannot_be_used_are_refused_before_anything_moves(told, make, uses):
    model, (X, y) = classifier(), make(*tokens())
    before, steps = copy.deepcopy(model.state_dict()), optimizer(model)
    for use in uses:
        options = {"optimizer": steps, "epochs": 1} if use is train else {}
        with pytest.raises(ValueError, match=told) as refused:
            use(model, X, y, **options)
        sentence = str(refused.value)
        assert "\n" not in sentence and len(sentence) < 250
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not steps.state and model.training


def test_a_loader_has_its_own_batch_size():
    model, (ids, mask, y) = classifier(), tokens()
    loader = DataLoader(TensorDataset(ids, mask, y), 4)
    with pytest.raises(ValueError, match=r"a DataLoader has .* a batch size: leave .*batch_size"):
        train(model, loader, optimizer=optimizer(model), epochs=1, batch_size=4)
    steps = optimizer(model)
    with pytest.raises(ValueError, match=r"validation DataLoader has labels .*: leave y out"):
        train(model, loader, optimizer=steps, epochs=1, validation=(loader, y))
    assert not steps.state
    with pytest.raises(ValueError, match="the DataLoader has no batches: expected one or more"):
        evaluate(model, DataLoader(TensorDataset(ids, mask, y), N + 1, drop_last=True))


def test_a_label_out_of_range_in_a_later_batch_is_refused_when_it_comes():
    model = classifier()
    X, y = later(*tokens())
    for use, options in ((train, {"optimizer": optimizer(model), "epochs": 1}), (evaluate, {})):
        with pytest.raises(ValueError, match=r"label 7 is out of range, expected 0..2"):
            use(model, X, y, **options)
    assert all(p.isfinite().all() and p.grad is None for p in model.parameters())


def test_integers_are_no_features_of_a_model_without_an_embedding():
    model, X, y = MLP(4, n_classes=2), torch.ones(6, 4).long(), torch.arange(6) % 2
    for use, options in ((train, {"optimizer": optimizer(model), "epochs": 1}), (evaluate, {})):
        with pytest.raises(ValueError, match=r"X is torch.int64, expected floating-point features"):
            use(model, X, y, **options)
    train(model, X.double(), y, optimizer=optimizer(model), epochs=1)
