"""An independent reference of RMKV in plain NumPy loops and float64: one document and one query at a time."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def turn(vector, position, rope):
    """Rotary position: channel pairs (i, i + d/2) as complex numbers, turned by position * theta^(-2i/d).

    Scaled as in Llama 3.1, by wavelengths: short ones stay, long ones are `factor` times as long, others in between.
    """
    half = len(vector) // 2
    out = []
    for i in range(half):
        frequency = rope.theta ** (-i / half)
        wavelength, length = 2 * np.pi / frequency, rope.original_max_position_embeddings
        if wavelength > length / rope.low_freq_factor:
            frequency = frequency / rope.factor
        elif wavelength >= length / rope.high_freq_factor:
            kept = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            frequency = (1 - kept) * frequency / rope.factor + kept * frequency
        out.append((vector[i] + 1j * vector[half + i]) * np.exp(1j * position * frequency))
    return np.concatenate([np.real(out), np.imag(out)])


def recurrent_cell(w, prefix, kind, x, hidden, cell):
    D = len(x)
    if kind == "minimal":
        both = w[prefix + "linear.weight"] @ np.concatenate([hidden, x]) + w[prefix + "linear.bias"]
        keep = sigmoid(both[:D])
        return keep * hidden + (1 - keep) * silu(both[D:]), None
    a = w[prefix + "weight_ih"] @ x + w[prefix + "bias_ih"]
    b = w[prefix + "weight_hh"] @ hidden + w[prefix + "bias_hh"]
    if kind == "gru":
        r, z = sigmoid(a[:D] + b[:D]), sigmoid(a[D : 2 * D] + b[D : 2 * D])
        n = np.tanh(a[2 * D :] + r * b[2 * D :])
        return (1 - z) * n + z * hidden, None
    i, f, g, o = (a + b).reshape(4, D)
    c = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gated(n, w, prefix):
    hidden = silu(n @ w[prefix + "gate.weight"].T) * (n @ w[prefix + "up.weight"].T)
    return hidden @ w[prefix + "down.weight"].T


class Carried:
    """A layer's store, one matrix a head, read and written token by token."""

    def __init__(self, memory):
        self.stores = None  # before its first use: the learned start
        self.queries, self.keys = [], []  # of all tokens so far
        self.own_key, self.nu = memory.store_key == "own", memory.store_features

    def features(self, x):
        """The direction of a query or key, or with DPFP (Schlag et al., 2021) that of all r_i r_(i - j)."""
        if self.nu:
            r = [*np.maximum(x, 0), *np.maximum(-x, 0)]
            x = np.array([r[i] * r[i - j] for j in range(1, self.nu + 1) for i in range(len(r))])
        return x / np.linalg.norm(x)

    def convolved(self, taps, rows):
        return sum(tap * row for tap, row in zip(taps, rows[::-1], strict=False))

    def found(self, w, row, attended, query, key, value):
        """What a token finds, having written its value under the key before it; its gates see what it attended to."""
        if "store.start" not in w:
            return 0
        if self.stores is None:
            self.stores = w["store.start"].copy()
        (H, d), G = query.shape, len(key)
        gates = sigmoid(w["store.gates.weight"] @ np.concatenate([row, attended]) + w["store.gates.bias"])
        write, read = gates[:G], gates[G:]
        taps = w["store.taps"].reshape(4, H + G, d)
        if "store.maps" in w:
            query = np.stack([q @ turned for q, turned in zip(query, w["store.maps"][:H], strict=True)])
            key = np.stack([k @ turned for k, turned in zip(key, w["store.maps"][H:], strict=True)])
        self.queries.append(query)
        if self.own_key:
            self.keys.append(key)
        if self.keys:
            for W, b, k, v in zip(self.stores, write, self.convolved(taps[:, H:], self.keys), value, strict=True):
                k = self.features(k)
                W += b * np.outer(k, v - k @ W)
        if not self.own_key:
            self.keys.append(key)
        query = self.convolved(taps[:, :H], self.queries)
        out = np.stack([self.features(q) @ self.stores[h * G // H] for h, q in enumerate(query)])
        rms = np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6)
        return np.concatenate(out / rms * w["store.norm.weight"] * read[:, None])


class Reference:
    def __init__(self, model):
        self.config = model.config
        self.w = {name: x.detach().double().numpy() for name, x in model.state_dict().items()}

    def read(self, tokens, lengths):
        """Logits (len(tokens), V) of one document whose segments have the given lengths."""
        config, w = self.config, self.w
        L, m, D = config.num_hidden_layers, config.memory.slots, config.hidden_size
        layers_carry = config.memory.carry == "layers"
        memory = [w["memory"][0 if layers_carry else at].copy() for at in range(L)]
        cell = [np.zeros((m, D)) for _ in range(L)]
        before = [[] for _ in range(L)]  # the look-back: (key, value, place relative to the next segment's start)
        carried = [Carried(config.memory) for _ in range(L)]
        outputs, position = [], 0
        for number, length in enumerate(lengths):
            x = np.stack([self.embed(tokens[position + i], position + i) for i in range(length)])
            for at in range(L):
                x, after, after_cell, keys = self.layer(
                    at, x, memory[at], cell[at], before[at], carried[at], first=number == 0
                )
                before[at] = [(k, v, i - length) for k, v, i in keys if i >= length - config.lookback]
                target = (at + 1) % L if layers_carry else at
                memory[target], cell[target] = after, after_cell
            outputs.append(self.normed(x, w, "norm"))
            position += length
        head = w.get("unembedding.weight", w["embedding.weight"])
        return np.concatenate(outputs) @ head.T

    def normed(self, x, w, name):
        eps = self.config.norm_eps
        if self.config.norm == "rms":
            return rms_norm(x, w[f"{name}.weight"], eps)
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def embed(self, token, position):
        config, w = self.config, self.w
        x = w["embedding.weight"][token]
        if config.position == "learned":
            return x + w["position.weight"][position]
        if config.position == "sinusoidal":
            half = config.hidden_size // 2
            angles = position * 10000.0 ** (-np.arange(half) / half)
            return x * np.sqrt(config.hidden_size) + np.concatenate([np.sin(angles), np.cos(angles)])
        return x

    def experts(self, n, w):
        """Output of one token's experts."""
        scores = sigmoid(w["experts.router.weight"] @ n)
        chosen = np.argsort(scores + w["experts.balance"])[-self.config.experts_per_token :]
        return sum(scores[e] * gated(n, w, f"experts.feed_forwards.{e}.") for e in chosen)

    def layer(self, at, x, memory, cell, before, carried, *, first):
        config, p = self.config, f"blocks.{at}."
        w = {name.removeprefix(p): value for name, value in self.w.items() if name.startswith(p)}
        D, H = config.hidden_size, config.num_attention_heads
        G, d = config.num_key_value_heads or H, config.head_size or D // H
        rotary = config.position == "rotary"
        project_out = w["attention.out.weight"]

        def normed(row):
            return self.normed(row, w, "norm")

        def project(n):
            rows = w["attention.qkv.weight"] @ n + w.get("attention.qkv.bias", 0)
            q, k, v = np.split(rows.reshape(H + 2 * G, d), [H, H + G])
            if config.qk_norm:
                q = rms_norm(q, w["attention.query_norm.weight"], config.norm_eps)
                k = rms_norm(k, w["attention.key_norm.weight"], config.norm_eps)
            return q, k, v

        def attend(query, seen):
            out = []
            for h in range(H):
                g = h * G // H
                scores = np.array([query[h] @ k[g] / np.sqrt(d) for k, _ in seen])
                out.append(softmax(scores) @ np.stack([v[g] for _, v in seen]))
            return np.concatenate(out)

        def turned(rows, place):
            if not rotary:
                return rows
            return np.stack([turn(row, place, config.rope) for row in rows])

        slots = [project(normed(row)) for row in memory]
        read = [normed(row) for row in x]
        tokens = [project(row) for row in read]
        slot_pairs = [(k, v) for _, k, v in slots]
        token_pairs = [(turned(k, i), v) for i, (_, k, v) in enumerate(tokens)]
        old_pairs = [(turned(k, place), v) for k, v, place in before]
        y = []
        for i, (row, qkv) in enumerate(zip(read, tokens, strict=True)):
            visible = [] if first and config.memory.fresh == "hidden" else slot_pairs
            attended = attend(turned(qkv[0], i), visible + old_pairs + token_pairs[: i + 1])
            y.append(project_out @ (attended + carried.found(w, row, attended, *qkv)))
        y = np.stack(y)
        y_memory = [project_out @ attend(q, slot_pairs + token_pairs) for q, _, _ in slots]
        mixed = x + y
        pooled_from = y if config.memory.update == "published" else mixed
        new_memory, new_cell = [], []
        for j in range(config.memory.slots if config.memory.update != "none" else 0):
            weights = softmax(pooled_from @ w["pooling.queries"][j] / np.sqrt(D))
            pooled = weights @ pooled_from
            if config.memory.update == "published":
                h, c = recurrent_cell(w, "cell.cell.", config.memory.cell, pooled, y_memory[j], cell[j])
            else:
                h, c = recurrent_cell(w, "cell.cell.", config.memory.cell, pooled + y_memory[j], memory[j], cell[j])
            new_memory.append(h)
            new_cell.append(cell[j] if c is None else c)
        out = mixed
        if config.intermediate_size:
            out = out + gated(self.normed(mixed, w, "feed_forward_norm"), w, "feed_forward.")
        if config.experts:
            out = out + np.stack([self.experts(self.normed(row, w, "feed_forward_norm"), w) for row in mixed])
        keys = [(k, v, i) for i, (_, k, v) in enumerate(tokens)]
        if not new_memory:
            return out, memory, cell, keys
        return out, np.stack(new_memory), np.stack(new_cell), keys
