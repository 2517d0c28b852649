"""The configuration: every key and default in `default()`, every check in `parse()`.

A config file's `get_config()` starts from `default()` and changes what it wants; flags change the
rest. `parse` turns the result into frozen dataclasses; nothing after it reads a ConfigDict or
knows a default. This module imports no jax, so that a bad value is answered at once.
"""

import dataclasses
import pathlib
import typing

ASSETS = pathlib.Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, as in `gkdjax.models.lora`."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05
    # Kernel names, regular expressions of whole paths ("layers/[qkv]_proj"), or "all-linear".
    targets: tuple[str, ...] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    start_from: str = ""  # a PEFT adapter's directory or hub id; "": fresh ones, an identity


@dataclasses.dataclass(frozen=True)
class Student:
    """Who learns."""

    model: str = ""  # a Hugging Face directory or hub id
    dtype: str | None = None  # of a frozen base; None: the checkpoint's
    compute_dtype: str = "float32"  # of the matrix products: float32 or bfloat16
    adapter: str = "lora"  # "lora", or "none" to train every parameter
    lora: Lora = dataclasses.field(default_factory=Lora)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who is learnt from."""

    # The student's base with the adapter off; "flax", a model in this process; or a server: "vllm",
    # "sglang", or "openai", any that speaks OpenAI's API.
    backend: str = "local-toggle"
    model: str = ""  # flax: a Hugging Face directory or hub id
    # A directory or hub id; "": the flax model's own; of a server's model, the student's.
    tokenizer: str = ""
    adapter: str = ""  # a PEFT adapter's directory or hub id, on top of the teacher; "": none
    dtype: str | None = None  # flax: None: the checkpoint's
    prefix_bytes: int = 2**30  # most memory for prefixes that are read once for many rows
    # K: its best K and their rest; None: the whole vocabulary, exactly; of a server, 20.
    top_k: int | None = None
    # All that follows is for servers.
    api_base: str = ""  # its address, as http://127.0.0.1:8000/v1
    api_model: str = ""  # what it calls the model; "": the only one that it has
    api_key_env: str = ""  # the name of the environment variable with the key; "": no key
    concurrency: int = 16  # requests at a time
    timeout_s: float = 120.0  # of one attempt
    deadline_s: float = 900.0  # of a request with all its attempts
    max_retries: int = 1000  # attempts after the first; the deadline comes before so many
    # Of the responses bought, the share whose tokens' text may name no id; with more the run ends.
    max_unreadable: float = 0.05
    # The file of its answers, none of which is asked for twice; "": RUN/answers.sqlite; None: none.
    store: str | None = ""
    offline: bool = False  # answer from the store alone; no server is needed
    trust_env: bool = False  # proxies and certificates as the environment has them


@dataclasses.dataclass(frozen=True)
class Gkd:
    """What is minimised, and on whose text."""

    divergence: str = "mixed"
    jsd_beta: float = 0.0  # mixed: weight of the reverse KL; generalized_jsd: the paper's beta
    temperature: float = 1.0  # divides both sides' logits
    tail: str = "bucket"  # with teacher.top_k: "bucket" or "renormalize"
    reduction: str = "token"  # mean over the batch's target tokens; "example": of each row's mean
    chunk_size: int = 512  # memory of the head: as much as [chunk_size, V] float32 logits take
    on_policy_fraction: float = 0.0  # of the batches: the student writes the responses
    # "constant", or "linear": from 0 after the warm-up to that fraction at the last step.
    on_policy_schedule: str = "constant"
    # The student writes for so many steps at once: their text lags up to one less behind it.
    on_policy_buffer_steps: int = 1
    on_policy_warmup_steps: int = 0  # the first steps are off-policy whatever the fraction
    warmup_divergence: str = "forward_kl"  # their loss

    def of_loss(self) -> dict:
        """Arguments of `gkdjax.losses.objective.weighted_divergence` by name."""
        return {
            "beta": self.jsd_beta,
            "temperature": self.temperature,
            "tail": self.tail,
            "chunk_size": self.chunk_size,
        }


@dataclasses.dataclass(frozen=True)
class Context:
    """What the teacher reads and the student has to know without."""

    prefix_messages: tuple[dict, ...] = ()  # {"role": ..., "content": ...} each
    # Or, and only one of the four: a .json or .yaml list of such messages,
    prefix_file: str = ""
    system_prompt_file: str = ""  # plain text, for one system message,
    corpus: str = ""  # or documents (.txt, .json, .jsonl) that are put into the template.
    corpus_template: str = (
        "The texts below are what you know. Answer from them as from your own knowledge, without"
        " mentioning that you were given them.\n\n{corpus}"
    )
    history_as_prefix: bool = False  # without any of them: a conversation's own history is baked
    student_retained_turns: int = 0  # the student still sees the last n messages of the prefix
    target_roles: tuple[str, ...] = ("assistant",)
    # A regular expression: only messages in which it is found are trained (in written responses:
    # others are written again); "match": only the text that it matches, without the end of turn.
    target_content_pattern: str | None = None
    target_span: str = "message"  # or "match"


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A KL on other prompts that keeps the rest of the student as it was."""

    # A file, a dataset or rows; or several sets by name; None: no anchor.
    data: str | tuple[dict, ...] | dict[str, str | tuple[dict, ...]] | None = None
    weight: float | dict[str, float] = 1.0  # of the loss of each set; or by name, of all of them
    towards: str = "base"  # or "teacher"
    divergence: str = "forward_kl"
    tokens: str = "response"  # or "all": the messages of the prompt count too
    batch_size: int = 8  # of each set


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """How responses are written where the data bring none."""

    per_prompt: int = 4
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None  # of the k most probable tokens, before top_p; None: of all
    top_p: float = 0.9
    max_refills: int = 4  # how often a response that is refused is written again
    refresh_every_steps: int | None = None  # the teacher's text is written anew; None: only once
    # The trajectories_*.jsonl of another run: what it has for the same prompts is not written.
    reuse: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """Training rows."""

    # A .json, .jsonl or .parquet file, a dataset as "org/name:train[:500]", or the rows themselves.
    train: str | tuple[dict, ...] = ""
    # More such rows, whose loss is measured; or the share of data.train that is taken out for it.
    validation: float | str | tuple[dict, ...] | None = None
    max_length: int = 2048  # tokens of the longer view, response included
    # Or "truncate-right": the response loses its end; "truncate-left": the row its oldest messages;
    # "truncate-prefix": the teacher's prefix its oldest messages.
    too_long: str = "drop"
    # Of every source, rows that cannot be read or that the chat template cannot take: "refuse" ends
    # the run and tells all of them, "drop" leaves them out, counted and named.
    bad_rows: str = "refuse"
    bucket_lengths: tuple[int, ...] = ()  # allowed padded lengths; (): chosen from the data
    # Given to the chat templates beside the messages, as {"enable_thinking": False}.
    template_kwargs: dict[str, bool | int | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    schedule: str = "cosine"  # "cosine", "linear" (both to 0) or "constant"
    warmup_ratio: float = 0.03  # of all steps, from 0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how large, from which seed."""

    epochs: float | None = 1.0
    steps: int | None = None  # optimizer steps; set it and epochs to None, or the other way
    batch_size: int = 8  # rows of one optimizer step
    accumulation: int = 1  # parts that such a batch is computed in, one after the other
    remat: bool = False
    matmul_precision: str = "default"  # of float32 products: "default", "high" or "highest"
    seed: int = 0
    export: str = "merged"  # "merged", "adapter" or "both"


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is asked before, after, and on the way."""

    questions: str | tuple[dict, ...] | None = None  # rows with an answer
    heldout: str | tuple[dict, ...] | None = None  # more of them, asked before and after alone
    # What is right: "keywords", any of the answers in the lower-cased text; "exact"; or "regex".
    match: str = "keywords"
    prompts: str | tuple[dict, ...] | None = None  # for divergences; None: the questions
    retention: dict[str, str | tuple[dict, ...]] = dataclasses.field(default_factory=dict)
    # Unrelated prompts: how far the student moves on them; None: the prompts of the retention sets.
    side_effects: str | tuple[dict, ...] | None = None
    other_prefix: tuple[dict, ...] = ()  # messages: the trained student is asked under them, too
    max_new_tokens: int = 100
    batch_size: int = 64
    every_steps: int | None = None  # how often on the way; None: only before and after
    at_steps: tuple[int, ...] = ()  # and after these
    rows: int = 256  # prompts asked on the way


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Orbax."""

    every_steps: int = 100
    keep: int = 2
    keep_evaluated: bool = False  # states that were measured on the way are saved, and stay


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown and kept of each step."""

    tensorboard: bool = True
    progress_bar: bool = True


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices share a run; of the four sizes one may be -1, what the others leave."""

    data: int = -1  # rows
    fsdp: int = 1  # rows; and weights, of which each layer's are gathered while it computes
    tensor: int = 1  # heads, MLP width and vocabulary
    dcn_data: int = 1  # slices, or GPU hosts, that only a data-centre network joins: rows
    # {"leaves": a regular expression of whole paths, "axes": ["fsdp", None, ...]} each: how leaves
    # of the student, or of a teacher in this process, are cut other than by
    # `gkdjax.parallel.sharding_rules.RULES`.
    student_rules: tuple[dict, ...] = ()
    teacher_rules: tuple[dict, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it, checked."""

    student: Student = dataclasses.field(default_factory=Student)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)
    gkd: Gkd = dataclasses.field(default_factory=Gkd)
    context: Context = dataclasses.field(default_factory=Context)
    anchor: Anchor = dataclasses.field(default_factory=Anchor)
    trajectory: TrajectoryConfig = dataclasses.field(default_factory=TrajectoryConfig)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)


def rows_at_once(config: Config) -> dict[str, int]:
    """Key -> rows that one program computes; the devices share them, so each must divide."""
    parts = config.train.accumulation
    rows = {"train.batch_size": config.train.batch_size // parts}
    rows["eval.batch_size"] = config.eval.batch_size
    if config.anchor.data is not None:
        rows["anchor.batch_size"] = config.anchor.batch_size // parts
    return rows


class AnchorSet(typing.NamedTuple):
    """One of the anchor's sets of prompts."""

    name: str  # "anchor", or "anchor_NAME" of several
    key: str  # in the config
    data: str | tuple[dict, ...]
    weight: float


def anchor_sets(anchor: Anchor) -> list[AnchorSet]:
    """[] without an anchor."""
    if anchor.data is None:
        return []
    if not isinstance(anchor.data, dict):
        return [AnchorSet("anchor", "anchor.data", anchor.data, anchor.weight)]
    weights = anchor.weight
    if not isinstance(weights, dict):
        weights = dict.fromkeys(anchor.data, weights)
    return [
        AnchorSet(f"anchor_{name}", f"anchor.data.{name}", data, weights[name])
        for name, data in anchor.data.items()
    ]
