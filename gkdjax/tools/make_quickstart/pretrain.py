"""A small Gemma 3 and its tokenizer, pre-trained from scratch on the quickstart's abilities."""

import functools
import json
import pathlib
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
import transformers
from flax import traverse_util
from tokenizers import decoders, models, pre_tokenizers, processors

from gkdjax.models import sampler
from gkdjax.models.decoder import Decoder
from gkdjax.models.decoder_config import DecoderConfig, param_shapes
from gkdjax.models.hf import export
from gkdjax.tools.make_quickstart import task
from gkdjax.utils.files import write_text

# One token a character, one a role name.
_ROLES = ("system", "user", "model")
_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *_ROLES),
    *("\n", " ", *string.digits, *string.ascii_letters, *string.punctuation),
)
VOCABULARY = {token: i for i, token in enumerate(_TOKENS)}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Recipe(NamedTuple):
    """A model's size and its training; a cosine takes the learning rate to 0."""

    width: int
    ffn_width: int
    layers: tuple[str, ...]  # "sliding_attention" or "full_attention"
    steps: int
    learning_rate: float  # the peak, after a warm-up
    batch_size: int = 64


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    # Each match is a piece of its own; a role name is one token, as in Gemma's vocabulary.
    pieces = tokenizers.Regex("|".join(_ROLES) + r"|[\s\S]")
    core.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def hf_config(recipe: Recipe) -> dict:
    """config.json of the model."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(VOCABULARY),
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
        "pad_token_id": VOCABULARY["<pad>"],
        "bos_token_id": VOCABULARY["<bos>"],
        "eos_token_id": VOCABULARY["<eos>"],
        "dtype": "float32",
    }


def save_model(
    directory: pathlib.Path, spec: DecoderConfig, params: dict, config: dict, tokenizer
) -> None:
    """Writes a model as transformers does; generation stops at the end of a turn."""
    directory.mkdir(parents=True)
    write_text(directory / "config.json", json.dumps(config))
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    # Names that transformers 4 reads too; 5 writes its own and reads both.
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    fields.pop("backend")
    write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    transformers.GenerationConfig(
        pad_token_id=VOCABULARY["<pad>"],
        bos_token_id=VOCABULARY["<bos>"],
        eos_token_id=[VOCABULARY["<eos>"], VOCABULARY["<end_of_turn>"]],
    ).save_pretrained(directory)
    export.save_pretrained(directory, spec, params, directory)


def encode(rows: list[task.Row], tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows -> (tokens_BT, is_target_BT), padded on the right.

    The targets are the answer and its <end_of_turn>.
    """
    prompts = [task.conversation(row) for row in rows]
    wholes = [
        [*prompt, {"role": "assistant", "content": row["answer"]}]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    starts = _token_ids(tokenizer, prompts, add_generation_prompt=True)
    tokens_BT = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    is_target_BT = np.zeros((len(rows), length), bool)
    for i, (start, ids) in enumerate(zip(starts, _token_ids(tokenizer, wholes), strict=True)):
        ids = ids[:-1]  # the newline that ends a turn is no one's answer
        tokens_BT[i, : len(ids)] = ids
        is_target_BT[i, len(start) : len(ids)] = True
    return tokens_BT, is_target_BT


def train(recipe: Recipe, decoder: Decoder, tokenizer, baked: task.Key, seed: int) -> dict:
    """Trains fresh parameters; the same for the same arguments, on the same machine."""
    init_rng, data_rng = np.random.default_rng(seed).spawn(2)
    params = jax.device_put(_init_params(init_rng, decoder.spec))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(100, recipe.steps // 10), recipe.steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    state = optimizer.init(params)
    step = jax.jit(functools.partial(_step, decoder, optimizer), donate_argnums=(0, 1))
    length = _longest_prompt(tokenizer) + task.MAX_LENGTH + 1
    bar = tqdm.tqdm(range(recipe.steps), desc=f"d{recipe.width}", unit="step", mininterval=1.0)
    loss = None
    for _ in bar:
        # Made while the device still computes.
        rows = [task.mixed_row(data_rng, baked) for _ in range(recipe.batch_size)]
        batch = encode(rows, tokenizer, length)
        if loss is not None:
            bar.set_postfix(loss=f"{float(loss):.4f}")
        params, state, loss = step(params, state, *batch)
    return params


def exact_match(decoder: Decoder, params: dict, tokenizer, rows: list[task.Row]) -> float:
    """Share of rows whose greedy answer is the right one, to the letter, and ends."""
    conversations = [task.conversation(row) for row in rows]
    prompts = _token_ids(tokenizer, conversations, add_generation_prompt=True)
    answers = sampler.sample(
        decoder,
        params,
        [np.asarray(ids, np.int32) for ids in prompts],
        seeds=[0] * len(prompts),
        sampling=sampler.SamplingParams(task.MAX_LENGTH + 2, temperature=0.0, top_p=1.0),
        stop_ids=[VOCABULARY["<end_of_turn>"]],
        batch_size=256,
        lengths=[_longest_prompt(tokenizer)],  # one for all abilities: one compilation
    )
    right = [
        answer.finished and tokenizer.decode(answer.ids[:-1]) == row["answer"]
        for answer, row in zip(answers, rows, strict=True)
    ]
    return sum(right) / len(right)


def _token_ids(tokenizer, conversations: list[list[dict]], **kwargs) -> list[list[int]]:
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, **kwargs)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _longest_prompt(tokenizer) -> int:
    """Tokens of the longest row without its answer."""
    key = dict.fromkeys(task.LETTERS, "a")
    longest = task.conversation(task.make_row("reverse", "a" * task.MAX_LENGTH, key))
    (ids,) = _token_ids(tokenizer, [longest], add_generation_prompt=True)
    return len(ids)


def _init_params(rng: np.random.Generator, spec: DecoderConfig) -> dict:
    """Fresh float32 weights of deviation 1/sqrt(fan in): linen's 0.02 is for wide models."""
    leaves = {}
    for path, shape in param_shapes(spec).items():
        if path.endswith("_norm"):
            leaves[path] = np.full(shape, 1.0 - spec.norm_offset, np.float32)
        else:
            fan_in = shape[-2] if path.startswith("layers/") else spec.width
            leaves[path] = rng.normal(0.0, fan_in**-0.5, shape).astype(np.float32)
    return traverse_util.unflatten_dict(leaves, sep="/")


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
