"""Pre-trains a small Gemma 3 from scratch on the quickstart's mixture of abilities."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import DecoderConfig, param_shapes
from gkdjax.tools.make_quickstart import task, tokenizer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model's size and how it is trained.

    Attributes:
      width: hidden size; `ffn_width` the MLP's.
      layers: "sliding_attention" or "full_attention", one a layer.
      steps: of `batch_size` rows each.
      learning_rate: the peak, after `warmup_steps`; a cosine takes it to 0.
    """

    width: int
    ffn_width: int
    layers: tuple[str, ...]
    steps: int
    learning_rate: float
    batch_size: int = 64
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01


def hf_config(recipe: Recipe) -> dict:
    """config.json of the model."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(tokenizer.VOCABULARY),
        "hidden_size": recipe.width,
        "intermediate_size": recipe.ffn_width,
        "num_hidden_layers": len(recipe.layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "layer_types": list(recipe.layers),
        "sliding_window": 24,
        "rope_theta": 10_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.VOCABULARY["<pad>"],
        "bos_token_id": tokenizer.VOCABULARY["<bos>"],
        "eos_token_id": tokenizer.VOCABULARY["<eos>"],
        "dtype": "float32",
    }


def init_params(rng: np.random.Generator, spec: DecoderConfig) -> dict:
    """Fresh float32 weights of deviation 1/sqrt(fan in): linen's 0.02 is for wide models."""
    params: dict = {"layers": {}}
    for path, shape in param_shapes(spec).items():
        *above, name = path.split("/")
        node = params["layers"] if above else params
        if name.endswith("_norm"):
            node[name] = np.full(shape, 1.0 - spec.norm_offset, np.float32)
        else:
            fan_in = shape[-2] if above else spec.width
            node[name] = rng.normal(0.0, fan_in**-0.5, shape).astype(np.float32)
    return params


def encode(rows: list[task.Row], chat, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> (tokens_BT, is_target_BT), padded on the right.

    The text is what the chat template makes of the whole conversation, and the targets are the
    answer and its <end_of_turn>.
    """
    prompts = [task.conversation(row) for row in rows]
    wholes = [
        [*prompt, {"role": "assistant", "content": row["answer"]}]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    starts = token_ids(chat, prompts, add_generation_prompt=True)
    tokens_BT = np.full((len(rows), length), chat.pad_token_id, np.int32)
    is_target_BT = np.zeros((len(rows), length), bool)
    for i, (start, ids) in enumerate(zip(starts, token_ids(chat, wholes), strict=True)):
        ids = ids[:-1]  # the newline that ends a turn is no one's answer
        tokens_BT[i, : len(ids)] = ids
        is_target_BT[i, len(start) : len(ids)] = True
    return tokens_BT, is_target_BT


def token_ids(chat, conversations: list[list[dict]], **kwargs) -> list[list[int]]:
    texts = chat.apply_chat_template(conversations, tokenize=False, **kwargs)
    return chat(texts, add_special_tokens=False)["input_ids"]


def longest_prompt(chat) -> int:
    """Tokens of the longest row without its answer."""
    longest = task.reverse_row("a" * task.MAX_LENGTH, {letter: letter for letter in task.LETTERS})
    (ids,) = token_ids(chat, [task.conversation(longest)], add_generation_prompt=True)
    return len(ids)


def batches(rng: np.random.Generator, baked: task.Key, size: int, chat) -> Iterator[tuple]:
    """Endless batches of the pre-training mixture, all of one shape."""
    length = longest_prompt(chat) + task.MAX_LENGTH + 1
    while True:
        yield encode([task.mixed_row(rng, baked) for _ in range(size)], chat, length)


def train(recipe: Recipe, decoder: Decoder, chat, baked: task.Key, seed: int) -> dict:
    """-> trained parameters; the same for the same arguments, on the same machine."""
    init_rng, data_rng = np.random.default_rng(seed).spawn(2)
    params = jax.device_put(init_params(init_rng, decoder.spec))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(recipe.warmup_steps, recipe.steps // 10), recipe.steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(recipe.max_grad_norm),
        optax.adamw(schedule, b2=0.98, weight_decay=recipe.weight_decay),
    )
    state = optimizer.init(params)
    step = jax.jit(functools.partial(_step, decoder, optimizer), donate_argnums=(0, 1))
    source = batches(data_rng, baked, recipe.batch_size, chat)
    bar = tqdm.tqdm(range(recipe.steps), desc=f"d{recipe.width}", unit="step", mininterval=1.0)
    loss = None
    for _ in bar:
        tokens_BT, is_target_BT = next(source)  # made while the device still computes
        if loss is not None:
            bar.set_postfix(loss=f"{float(loss):.4f}")
        params, state, loss = step(params, state, tokens_BT, is_target_BT)
    return params


def _step(decoder, optimizer, params, state, tokens_BT, is_target_BT):
    def loss_of(params):
        # Padding stands on the right, where no target looks: it needs no mask.
        hidden_BTD = decoder.apply({"params": params}, tokens_BT, jnp.ones_like(is_target_BT))
        logits_BTV = decoder.apply({"params": params}, hidden_BTD[:, :-1], method="unembed")
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
        return jnp.mean(losses_BT, where=is_target_BT[:, 1:])

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss
