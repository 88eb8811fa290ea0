"""A model of forescale, for from_pretrained(DIR, trust_remote_code=True) of transformers.

`forescale export` writes this file beside the weights of a model that is no architecture of
transformers. It needs torch and transformers alone. config.json has the model in `forescale`, the
weights have the names of the run. Of functions: w, the weights of a block by name; m, the keys of
its mixer or MLP; c, the model; x (B, L, D) -> (B, L, D). context: places (B, S) of all tokens; keep
(B, L, 1), continues (B, S, 1): 0 where the token before isn't visible; bias (B, 1 or H, L, S) of
scores, -inf for what is not visible; first: the first layer's values; added: to values.
Recurrences go token by token.
"""

import math
from collections import defaultdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Keys = dict[str, Any]


class ForescaleConfig(PretrainedConfig):
    """config.json; forescale: the parts of the model and their keys."""

    model_type = "forescale"

    def __init__(self, forescale: Keys | None = None, **options: Any):
        self.forescale = forescale or {}
        super().__init__(**options)


class States(defaultdict[Any, Keys]):
    """What decoding keeps: of each layer tensors by name, each with a row for each text."""

    is_compileable = False

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens that were read."""
        return self["model"]["tokens"].shape[1] if self else 0

    def reorder_cache(self, rows: Any) -> None:
        """Keep these rows, as beams need it."""
        for memory in self.values():
            memory |= {name: x.index_select(0, rows.to(x.device)) for name, x in memory.items()}


def joined(memory: Keys, name: str, x: Any) -> Any:
    """Return what memory has and x behind it, (B, S, ...), and keep it."""
    memory[name] = torch.cat([memory[name], x], 1) if name in memory else x
    return memory[name]


def linear(w: Keys, name: str, x: Any) -> Any:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def normed(c: Keys, w: Keys, name: str, x: Any, kind: str = "rmsnorm") -> Any:
    """Return x normed in fp32."""
    by, shape = [w.get(f"{name}.{part}") for part in ("weight", "bias")], x.shape[-1:]
    gain, bias = (None if part is None else part.float() for part in by)
    if kind == "rmsnorm":
        return F.rms_norm(x.float(), shape, gain, c["norm"]["eps"]).to(x.dtype)
    return F.layer_norm(x.float(), shape, gain, bias, c["norm"]["eps"]).to(x.dtype)


def rotated(m: Keys, x: Any, places: Any) -> Any:
    """Rotate the first coordinates of each head, (B, L, H, K), by their positions (B, S >= L)."""
    by, length = m["rotation"]
    if not by:
        return x
    angles = places[:, -x.shape[1] :, None, None].float() * torch.tensor(by, device=x.device)
    cos, sin = angles.cos() * length, angles.sin() * length
    turning, still = x.tensor_split([2 * len(by)], -1)
    a, b = turning.float().chunk(2, -1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return torch.cat((turned, still), -1)


def attend(m: Keys, q: Any, k: Any, v: Any, context: Keys) -> Any:
    """Return the means of values, (B, L, H, K)."""
    bias, places = context["bias"], context["places"]
    if m["kind"] == "window":
        far = places[:, -q.shape[1] :, None] - places[:, None] >= m["window"]
        far = far & (places[:, None] >= m["global_tokens"])
        bias = bias.masked_fill(far[:, None], -torch.inf)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
    bias, q = bias.to(q.dtype), q.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=m["scale"]).transpose(1, 2)


def attention(c: Keys, m: Keys, w: Keys, memory: Keys, x: Any, context: Keys) -> Any:
    """Return the output of a mixer; memory: what the layer keeps for later tokens."""
    parts = []
    for name in ("query", "key", "value"):
        y = linear(w, name, x)
        if m["token_shift"]:
            before = torch.cat(
                [memory.get(f"{name}_before", torch.zeros_like(y[:, :1])), y[:, :-1]], 1
            )
            memory[f"{name}_before"] = y[:, -1:]
            y = y + w[f"{name}_shift.weight"] * (before * context["keep"])
        has_norm = f"{name}_norm.weight" in w
        if has_norm and m["qk_norm"] == "layer":
            y = normed(c, w, f"{name}_norm", y)
        y = y.unflatten(-1, (-1, c["head_dim"]))
        if has_norm and m["qk_norm"] == "head":
            y = normed(c, w, f"{name}_norm", y)
        parts.append(y)
    q, k, v = parts
    if context["added"] is not None:
        v = v + context["added"].unflatten(-1, v.shape[-2:])
    if m["value_residual"]:
        v = v if context["first"] is None else v.lerp(context["first"], m["value_residual"])
        context["first"] = v if context["first"] is None else context["first"]
    k, v = joined(memory, "key", rotated(m, k, context["places"])), joined(memory, "value", v)
    y = attend(m, rotated(m, q, context["places"]), k, v, context).flatten(-2)
    if m["gate"] != "none":
        gate = linear(w, "gate", x).sigmoid()
        y = (y.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2)
    return linear(w, "output", y)


def latent(c: Keys, m: Keys, w: Keys, memory: Keys, x: Any, context: Keys) -> Any:
    """Return the output of multi-head latent attention, which keeps latents (arXiv 2405.04434)."""
    has_latent, places = "query_latent.weight" in w, context["places"]
    read = normed(c, w, "query_norm", linear(w, "query_latent", x)) if has_latent else x
    q = rotated(m, linear(w, "query", read).unflatten(-1, (-1, c["head_dim"])), places)
    latents = joined(memory, "latent", normed(c, w, "latent_norm", linear(w, "latent", x)))
    k, v = (linear(w, name, latents).unflatten(-1, (q.shape[2], -1)) for name in ("key", "value"))
    if "rope_key.weight" in w:
        turned = rotated(m, linear(w, "rope_key", x)[:, :, None], places)
        turned = joined(memory, "rope_key", turned).expand(-1, -1, q.shape[2], -1)
        k = torch.cat((turned, k), -1)
    return linear(w, "output", attend(m, q, k, v, context).flatten(-2))


def mingru(c: Keys, m: Keys, w: Keys, memory: Keys, x: Any, context: Keys) -> Any:
    """Return the output of a gated linear recurrence (arXiv 2410.01201)."""
    z, v = (linear(w, "gate", x) - w["log_memory"]).float().sigmoid(), linear(w, "value", x)
    a, b, states = (1 - z) * context["keep"], z * v.float(), []
    state = memory.get("state", torch.zeros_like(b[:, 0]))
    for t in range(x.shape[1]):
        state = a[:, t] * state + b[:, t]
        states.append(state)
    memory["state"] = state
    return linear(w, "output", torch.stack(states, 1).to(v.dtype))


def lstm(c: Keys, m: Keys, w: Keys, memory: Keys, x: Any, context: Keys) -> Any:
    """Return the output of an LSTM."""
    of = {
        name: w[f"recurrence.{name}_l0"]
        for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    }
    read, states = F.linear(x, of["weight_ih"], of["bias_ih"]), []
    zero = torch.zeros_like(x[:, 0])
    h, cell = memory.get("hidden", zero), memory.get("cell", zero)
    for t in range(x.shape[1]):
        h, cell = h * context["keep"][:, t], cell * context["keep"][:, t]
        i, f, g, o = (read[:, t] + F.linear(h, of["weight_hh"], of["bias_hh"])).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        states.append(h)
    memory |= {"hidden": h, "cell": cell}
    return linear(w, "output", torch.stack(states, 1))


def gated_deltanet(c: Keys, m: Keys, w: Keys, memory: Keys, x: Any, context: Keys) -> Any:
    """Return the output of the gated delta rule behind a short convolution (arXiv 2412.06464)."""
    L, heads, kernel = x.shape[1], len(w["log_rate"]), w["convolution.weight"][:, 0].float()
    parts = [linear(w, name, x) for name in ("query", "key", "value")]
    mixed, lags = torch.cat(parts, -1), kernel.shape[1]
    before = memory.get("convolved", torch.zeros_like(mixed[:, :1]).expand(-1, lags - 1, -1))
    whole = torch.cat((before, mixed), 1)
    memory["convolved"] = whole[:, L:]
    keep = F.pad(context["continues"], (0, 0, lags - 1, 0))[:, -(L + lags - 1) :].float()
    y, visible = torch.zeros_like(mixed, dtype=torch.float32), torch.ones_like(keep[:, :L])
    for lag in range(lags):
        at = slice(lags - 1 - lag, lags - 1 - lag + L)
        y = y + kernel[:, -1 - lag] * whole[:, at].float() * visible
        visible = visible * keep[:, at]
    y = F.silu(y).to(x.dtype).split([part.shape[-1] for part in parts], -1)
    q, k, v = (part.unflatten(-1, (heads, -1)).float() for part in y)
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (q, k))
    step = F.softplus(linear(w, "decay", x).float() + w["decay_bias"].float())
    decay = (-w["log_rate"].float().exp() * step).exp() * context["keep"]
    beta, out = linear(w, "beta", x).float().sigmoid(), []
    state = memory.get("state", q.new_zeros(len(x), heads, k.shape[-1], v.shape[-1]))
    for t in range(L):
        state = decay[:, t, :, None, None] * state
        change = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * change[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * q.shape[-1] ** -0.5))
    memory["state"] = state
    y = normed(c, w, "output_norm", torch.stack(out, 1).to(x.dtype))
    gate = F.silu(linear(w, "gate", x).unflatten(-1, (heads, -1)))
    return linear(w, "output", (y * gate).flatten(-2))


MIXERS = {"attention": attention, "window": attention, "latent": latent, "mingru": mingru}
MIXERS |= {"lstm": lstm, "gated_deltanet": gated_deltanet}


def by_distance(p: Keys, w: Keys, distance: Any) -> Any:
    """Return what positions add to scores, (B, H, L, S), of distances (B, L, S); 0: nothing."""
    if p["kind"] == "alibi":
        return -torch.tensor(p["slopes"], device=distance.device)[:, None, None] * distance[:, None]
    if p["kind"] != "relative":
        return torch.zeros_like(distance[:, None], dtype=torch.float32)
    # Half of the table is for keys ahead, if they are seen.
    count = p["buckets"] if p["causal"] else p["buckets"] // 2
    single, table = count // 2, w["relative_position.weight"]
    back = distance.clamp(min=0) if p["causal"] else distance.abs()
    share = (back.clamp(min=1).float() / single).log() / math.log(p["distance"] / single)
    far = (single + (share * (count - single)).long()).clamp(max=count - 1)
    rows = torch.where(back < single, back, far)
    rows = rows if p["causal"] else rows + (distance < 0).long() * count
    return F.embedding(rows, table).permute(0, 3, 1, 2)


ACTIVATIONS: Any = {"swiglu": F.silu, "gelu_exact": F.gelu, "relu": F.relu}
ACTIVATIONS["relu2"] = lambda x: F.relu(x).square()
ACTIVATIONS |= dict.fromkeys(("geglu", "gelu"), lambda x: F.gelu(x, approximate="tanh"))


def mlp(c: Keys, m: Keys, w: Keys, x: Any, name: str = "") -> Any:
    """Return the output of a dense MLP; name: before those of its matrices."""
    up, activation = linear(w, f"{name}up", x), ACTIVATIONS[m["kind"]]
    if f"{name}gate.weight" in w:
        return linear(w, f"{name}down", activation(linear(w, f"{name}gate", x)) * up)
    return linear(w, f"{name}down", activation(up))


def moe(c: Keys, m: Keys, w: Keys, x: Any) -> Any:
    """Return the output of a mixture of experts."""
    logits = F.linear(x.float(), w["router.weight"].float())
    scores = logits.softmax(-1) if m["scores"] == "softmax" else logits.sigmoid()
    chosen = (scores + m["bias_speed"] * w.get("bias_steps", 0)).topk(m["top_k"], -1).indices
    by = scores.gather(-1, chosen)
    by = by / by.sum(-1, keepdim=True) if m["renormalise"] else by
    y = mlp(c, {"kind": "swiglu"}, w, x, "shared.") if m["shared"] else torch.zeros_like(x)
    for e in chosen.unique().tolist():
        up, gate, down = (w[f"{name}.weight"][e] for name in ("up", "gate", "down"))
        at = (by * (chosen == e)).sum(-1, keepdim=True).to(x.dtype)
        y = y + at * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return y


def block(c: Keys, layer: int, w: Keys, memory: Keys, x: Any, context: Keys) -> Any:
    """Return the stream after a block."""
    place, kind = c["norm"]["placement"], c["norm"]["kind"]
    m, n = c["mixers"][layer], c["mlps"][layer]
    of = {part: {k.removeprefix(f"{part}."): v for k, v in w.items()} for part in ("mixer", "mlp")}

    def before(name: str, x: Any) -> Any:
        return x if place in ("post", "residual") else normed(c, w, f"{name}_norm", x, kind)

    def add(x: Any, y: Any, name: str) -> Any:
        if place in ("post", "sandwich"):
            y = normed(c, w, name, y, kind)
        x = torch.add(x, y, alpha=c["scales"]["residual"])
        return normed(c, w, name, x, kind) if place == "residual" else x

    read = before("mixer", x)
    mixed = MIXERS[m["kind"]](c, m, of["mixer"], memory, read, context)
    out = add(x, mixed, "mixer_post_norm")
    if place != "shared":
        read = before("mlp", x if place == "parallel" else out)
    return add(out, (moe if n["kind"] == "moe" else mlp)(c, n, of["mlp"], read), "mlp_post_norm")


class ForescaleForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token."""

    config_class = ForescaleConfig

    def __init__(self, config: ForescaleConfig):
        super().__init__(config)
        for name, (shape, is_parameter) in config.forescale["tensors"].items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            if is_parameter:
                module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
            else:
                module.register_buffer(leaf, torch.zeros(shape, dtype=torch.int64))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Keys:
        """Return the tokens that the cache hasn't read."""
        states = kwargs.get("cache") or kwargs.get("past_key_values")
        new = input_ids if states is None else input_ids[:, states.get_seq_length() :]
        others = {key: kwargs.get(key) for key in ("attention_mask", "use_cache")}
        return {"input_ids": new, "cache": states, **others}

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, L, V). attention_mask (B, S): of the tokens of the cache too."""
        c, states = self.config.forescale, cache or past_key_values or States(dict)
        w = dict(self.named_parameters()) | dict(self.named_buffers())
        tokens = joined(states["model"], "tokens", input_ids)
        x, context = self._embedded(w, tokens, input_ids, attention_mask)
        for i in range(len(c["mixers"])):
            start, table = f"blocks.{i}.", w.get(f"value_embeddings.{i}.weight")
            of = {name.removeprefix(start): v for name, v in w.items() if name.startswith(start)}
            context["added"] = None if table is None else F.embedding(input_ids, table)
            x = block(c, i, of, states[i], x, context)
        if c["norm"]["placement"] != "residual":
            x = normed(c, w, "norm", x, c["norm"]["kind"])
        if "transform.dense.weight" in w:
            x = F.gelu(linear(w, "transform.dense", x))
            x = normed(c, w, "transform.norm", x, c["norm"]["kind"])
        head = "head" if "head.weight" in w else "embedding"
        logits = linear(w, head, x * c["scales"]["logits"])
        if cap := c["softcap"]:
            logits = cap * torch.tanh(logits / cap)
        loss, memory = None, None if not use_cache else cast(Any, states)
        if labels is not None:
            n = int(c["position"]["causal"])  # a causal model predicts the next token
            targets = labels[:, n:].flatten()
            loss = F.cross_entropy(logits[:, : logits.shape[1] - n].flatten(0, 1).float(), targets)
        return CausalLMOutputWithPast(loss, logits, memory)  # versions name the cache differently

    def _embedded(self, w: Keys, tokens: Any, new: Any, mask: Any) -> tuple[Any, Keys]:
        """Return the input of the first block and what all blocks read."""
        c, S, L = self.config.forescale, tokens.shape[1], new.shape[1]
        real = torch.ones_like(tokens) if mask is None else mask[:, :S].long()
        all_places = real.cumsum(-1) - real
        keep, places = F.pad(real[:, 1:] * real[:, :-1], (1, 0)), all_places[:, -L:]
        at = torch.arange(S, device=tokens.device)
        in_order = at <= at[S - L :, None] if c["position"]["causal"] else at >= 0
        visible = in_order & real[:, None].bool() | (at == at[S - L :, None])
        x = F.embedding(new, w["embedding.weight"])
        if "bigrams.weight" in w:
            last = F.pad(tokens[:, :-1], (1, 0)).masked_fill(keep == 0, -1)
            mixed = (tokens * 0x9E3779B1) ^ ((last + 1) * 0x85EBCA6B)
            rows = (mixed ^ (mixed >> 17)) % len(w["bigrams.weight"])
            x = x + F.embedding(rows[:, -L:], w["bigrams.weight"])
        x = x * c["scales"]["embedding"]
        if "position.weight" in w:
            x = x + F.embedding(places, w["position.weight"])
        if c["position"]["kind"] == "sinusoidal":
            even = torch.arange(0, x.shape[-1], 2, dtype=torch.float32, device=x.device)
            angles = places[..., None].float() * (1.0 / 10_000.0 ** (even / x.shape[-1]))
            x = x + torch.stack((angles.sin(), angles.cos()), -1).flatten(-2).to(x.dtype)
        if c["norm"]["embedding"]:
            x = normed(c, w, "embedding_norm", x, c["norm"]["kind"])
        bias = by_distance(c["position"], w, places[:, :, None] - all_places[:, None])
        bias = bias.masked_fill(~visible[:, None], -torch.inf)
        continues = keep[..., None].to(x.dtype)
        context = {"places": all_places, "continues": continues, "keep": continues[:, -L:]}
        return x, context | {"first": None, "bias": bias}


class ForescaleForMaskedLM(ForescaleForCausalLM):
    """Logits of the tokens themselves, from both sides."""

    @classmethod
    def can_generate(cls) -> bool:
        return False
