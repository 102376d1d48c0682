"""A pre-trained BERT-family text encoder on a page, and a classifier on top of it."""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.models.checkpoint import check_state, read_bert


class Attention(nn.Module):
    """softmax(Q K' / sqrt(d_head)) V, with the four projections as plain linear layers.

    `torch.nn.MultiheadAttention` reads its projections' ``.weight`` directly, so a layer that
    replaces a projection would be bypassed in silence; here each projection is called.

    Parameters
    ----------
    d : int
        Width of the model, a multiple of `n_heads`.
    n_heads : int
    dropout : float, default=0.0
        Of the attention weights, in train mode.

    References
    ----------
    Vaswani et al. (2017), section 3.2, arXiv:1706.03762.
    """

    def __init__(self, d, n_heads, dropout=0.0):
        super().__init__()
        if d % n_heads:
            raise ValueError(f"d={d} is not a multiple of n_heads={n_heads}")
        self.n_heads, self.d_head, self.dropout = n_heads, d // n_heads, dropout
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x, prefix=None, mask=None):
        q, k, v = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        if skipped := x.dim() == 2:  # (N, d), the tokens alone: they attend within their rows
            q, k, v = (put_padding(t, mask) for t in (q, k, v))  # (B, T, d)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if prefix is not None:  # prefix tuning's keys and values, each (1, H, P, d/H)
            pk, pv = (p.expand(len(k), -1, -1, -1) for p in prefix)
            k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)  # (B, H, P+T, d/H)
        seen = None
        if mask is not None:
            seen = F.pad(mask, (k.shape[2] - mask.shape[1], 0), value=1)  # (B, P+T)
            seen = seen[:, None, None].bool()  # (B, 1, 1, P+T)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, seen, dropout)  # (B, H, T, d/H)
        y = y.transpose(1, 2).flatten(2)  # (B, T, d)
        return self.out_proj(skip_padding(y, mask) if skipped else y)


def skip_padding(x, mask):
    """Return the vectors of the tokens alone, where `mask` is not 0.

    Parameters
    ----------
    x : Tensor of shape (B, T, d)
    mask : Tensor of shape (B, T)

    Returns
    -------
    Tensor of shape (N, d)
    """
    return x.flatten(0, 1).index_select(0, mask.flatten().nonzero()[:, 0])


def put_padding(x, mask):
    """Return the tokens' vectors in their rows, zeros where `mask` is 0: undoes `skip_padding`.

    Parameters
    ----------
    x : Tensor of shape (N, d)
    mask : Tensor of shape (B, T)

    Returns
    -------
    Tensor of shape (B, T, d)
    """
    y = x.new_zeros(mask.numel(), x.shape[-1]).index_copy(0, mask.flatten().nonzero()[:, 0], x)
    return y.view(*mask.shape, -1)


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))).

    Parameters
    ----------
    d, d_ff : int
        Width of the model and of the hidden layer.
    """

    def __init__(self, d, d_ff):
        super().__init__()
        self.fc1 = nn.Linear(d, d_ff)
        self.fc2 = nn.Linear(d_ff, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # (B, T, d) -> (B, T, d_ff) -> (B, T, d)


class EncoderBlock(nn.Module):
    """x = norm1(x + attention(x)), then norm2(x + feed_forward(x)) (post-norm).

    Parameters
    ----------
    d, n_heads, d_ff : int
        As in `Attention` and `FeedForward`.
    eps : float
        Added to the variance in each norm.
    dropout : float, default=0.0
    """

    def __init__(self, d, n_heads, d_ff, eps, dropout=0.0):
        super().__init__()
        self.attention = Attention(d, n_heads, dropout)
        self.norm1 = nn.LayerNorm(d, eps=eps)
        self.feed_forward = FeedForward(d, d_ff)
        self.norm2 = nn.LayerNorm(d, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        x = self.norm1(x + self.dropout(self.attention(x, mask=mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class TokenEmbedding(nn.Module):
    """norm(token + position + segment), of segment 0: each row is one text.

    Parameters
    ----------
    vocab, positions, segments, d : int
        Rows of the three tables, and their width.
    eps : float
        Added to the variance in the norm.
    dropout : float, default=0.0
    """

    def __init__(self, vocab, positions, segments, d, eps, dropout=0.0):
        super().__init__()
        self.embedding_dim = d
        self.token = nn.Embedding(vocab, d)
        self.position = nn.Embedding(positions, d)
        self.segment = nn.Embedding(segments, d)
        self.norm = nn.LayerNorm(d, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        T, most = ids.shape[1], self.position.num_embeddings
        if most < T:
            raise ValueError(f"rows of {T} tokens, at most {most} have a position: cut them")
        try:
            token = self.token(ids)  # (B, T, d)
        except IndexError:
            n = self.token.num_embeddings
            told = f"token {int(ids[(ids < 0) | (ids >= n)][0])} of {n}"
            raise ValueError(f"{told}: another model's tokenizer made these ids") from None
        return self.dropout(self.norm(token + self.position.weight[:T] + self.segment.weight[0]))


class Encoder(nn.Module):
    """Token ids to vectors, one for each token: embedding, then post-norm blocks (BERT).

    ``encoder(ids, mask)`` takes int64 ids and a mask of ones and, for padding, zeros, both of shape
    (B, T), and returns (B, T, d), 0 at padding: with a mask, layers see the N tokens alone, (N, d).
    Tokens that a prompt puts before a row are attended to and left out of what comes back.
    ``encoder(mask=mask, hidden=h, first=k)`` goes on at block k from h, what that block reads.

    Parameters
    ----------
    vocab, d, n_layers, n_heads, d_ff : int
        Size of the vocabulary, width, number of blocks, heads, width of the feed-forward layers.
    positions, segments : int
        Rows of the tables of positions and of segments.
    eps : float, default=1e-12
        Added to the variance in each norm.
    dropout : float, default=0.0
        In train mode, after the embedding and in each block. BERT was trained with 0.1; the
        series fine-tunes without, for few steps.

    Attributes
    ----------
    skips_padding : bool
        True. Where it is False, layers see (B, T, d), as those that tell rows apart must.

    References
    ----------
    Devlin et al. (2019), section 3, arXiv:1810.04805.
    """

    skips_padding = True

    def __init__(
        self,
        *,
        vocab,
        d,
        n_layers,
        n_heads,
        d_ff,
        positions=512,
        segments=2,
        eps=1e-12,
        dropout=0.0,
    ):
        super().__init__()
        self.d = d
        self.embed = TokenEmbedding(vocab, positions, segments, d, eps, dropout)
        sizes = (d, n_heads, d_ff, eps, dropout)
        self.blocks = nn.ModuleList(EncoderBlock(*sizes) for _ in range(n_layers))

    def forward(self, ids=None, mask=None, *, hidden=None, first=0):
        h = self.embed(ids) if hidden is None else hidden  # (B, T, d), more tokens with a prompt
        T = h.shape[1] if ids is None else ids.shape[1]
        if mask is not None and h.shape[1] > mask.shape[1]:
            mask = F.pad(mask, (h.shape[1] - mask.shape[1], 0), value=1)  # (B, P+T)
        skips = self.skips_padding and mask is not None
        h = skip_padding(h, mask) if skips else h  # (N, d)
        for block in self.blocks[first:]:
            h = block(h, mask)
        h = put_padding(h, mask) if skips else h
        return h[:, -T:]  # (B, T, d)

    @classmethod
    def from_pretrained(cls, folder, *, dropout=0.0):
        """Load a checkpoint of the BERT family (MiniLM, BGE, E5, GTE, ...) in its folder's format.

        A pooler and heads of pre-training, which an encoder does not use, are left out. Weights
        are cast to torch's default dtype.

        Parameters
        ----------
        folder : str or Path
            Holds ``config.json`` and ``model.safetensors``.
        dropout : float, default=0.0
            As in `Encoder`.

        Returns
        -------
        Encoder
            In eval mode.

        Raises
        ------
        ValueError
            If a file is missing, the configuration is not one that this module computes, or a
            tensor is missing, unexpected, of another shape or not finite; it is named.
        """
        sizes, state = read_bert(folder)
        with torch.device("meta"):  # compared before any memory is taken
            check_state(state, cls(**sizes).state_dict(), folder)
        encoder = cls(**sizes, dropout=dropout)
        encoder.load_state_dict(state)
        return encoder.eval()


class TextClassifier(nn.Module):
    """logits = head(mean of the encoder's vectors over a row's tokens).

    Parameters
    ----------
    encoder : nn.Module
        An `Encoder`, or any encoder of transformers.
    n_classes : int
        Outputs of the head, which is drawn from torch's global stream.

    References
    ----------
    Mean pooling: Reimers & Gurevych (2019), section 3, arXiv:1908.10084.
    """

    def __init__(self, encoder, n_classes):
        super().__init__()
        self.encoder = encoder
        weight = next(encoder.parameters())
        d = encoder.d if isinstance(encoder, Encoder) else encoder.config.hidden_size
        self.head = nn.Linear(d, n_classes, dtype=weight.dtype, device=weight.device)

    def forward(self, ids=None, mask=None, **prefix):
        return self.head(self.features(ids, mask, **prefix))  # (B, d) -> (B, n_classes)

    def features(self, ids=None, mask=None, **prefix):
        """Return what the head reads.

        Parameters
        ----------
        ids, mask : int64 Tensor of shape (B, T)
        **prefix : object
            Of `Encoder`: ``hidden`` and ``first`` in place of ``ids``.

        Returns
        -------
        Tensor of shape (B, d)
        """
        if isinstance(self.encoder, Encoder):
            h = self.encoder(ids, mask, **prefix)
        else:
            h = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            h = h[:, -ids.shape[1] :]  # a prompt's tokens come before
        if mask is None:
            return h.mean(1)
        weight = mask.to(h.dtype)[..., None]  # (B, T, 1)
        return (h * weight).sum(1) / weight.sum(1)  # (B, d)
