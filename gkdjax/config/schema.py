"""The configuration: every key and default in `default()`, every check in `parse()`.

A config file's `get_config()` starts from `default()` and changes what it wants; flags change the
rest. `parse` turns the result into frozen dataclasses; nothing after it reads a ConfigDict or
knows a default. This module imports no jax, so that a bad value is answered at once.
"""

import dataclasses
import pathlib
import typing

ASSETS = pathlib.Path(__file__).parent / "assets"
SERVERS = ("vllm", "sglang", "openai")  # the teacher.backend of each that is reached by HTTP


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, as in `gkdjax.models.lora`."""

    rank: int = 64  # columns of A and rows of B
    alpha: float = 128.0  # their product is scaled by alpha / rank
    dropout: float = 0.05  # of what goes into A, in training
    # Kernel names, regular expressions of whole paths ("layers/[qkv]_proj"), or "all-linear"; all
    # seven kernels unless it is set.
    targets: tuple[str, ...] | str = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # A PEFT adapter's directory or hub id, to go on from; rank, alpha and targets have to be its
    # own; "": fresh adapters, an identity.
    init_from: str = ""


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

    # "local-toggle": the student's base with the adapter off; "flax": a model in this process; or a
    # server: "vllm", "sglang", or "openai", any that speaks OpenAI's API.
    backend: str = "local-toggle"
    model: str = ""  # flax: a Hugging Face directory or hub id
    # A directory or hub id, where it is not the flax model's own, or, of a server, not the
    # student's; "": it is.
    tokenizer: str = ""
    adapter: str = ""  # a PEFT adapter's directory or hub id, on top of the teacher; "": none
    dtype: str | None = None  # flax: None: the checkpoint's
    # Most memory, in bytes, for what the teacher has read of prefixes: each is read once, not once
    # per row and step.
    prefix_bytes: int = 2**30
    # K: its best K and their rest; None: the whole vocabulary, exactly; of a server, 20.
    top_k: int | None = None
    # server: its address, as http://127.0.0.1:8000/v1
    api_base: str = ""
    api_model: str = ""  # server: what it calls the model; "": the only one that it has
    # server: the *name* of the environment variable with the key; "": no key
    api_key_env: str = ""
    concurrency: int = 16  # server: requests at a time
    timeout_s: float = 120.0  # server: seconds of one attempt
    deadline_s: float = 900.0  # server: seconds of a request with all its attempts
    # server: attempts after the first; the deadline comes before so many
    max_retries: int = 1000
    # server: of the responses bought, the share that may be lost because a token's text names no id
    # (five of them at least); with more the run ends
    max_unreadable: float = 0.05
    # server: the file of its answers, which runs may share, none of which is asked for twice;
    # "": RUN/answers.sqlite; None: none
    store: str | None = ""
    offline: bool = False  # server: answer from the store alone; no server is needed
    # server: proxies and certificates as the environment has them
    trust_env: bool = False

    @property
    def is_server(self) -> bool:
        """It is reached by HTTP."""
        return self.backend in SERVERS

    @property
    def is_base(self) -> bool:
        """It is the student's own base."""
        return self.backend == "local-toggle"

    @property
    def is_model(self) -> bool:
        """It is a model of its own in this process."""
        return self.backend == "flax"


@dataclasses.dataclass(frozen=True)
class Gkd:
    """What is minimised, and on whose text."""

    # "forward_kl", "reverse_kl", "mixed" or "generalized_jsd"; see the losses' README.
    divergence: str = "mixed"
    jsd_beta: float = 0.0  # mixed: weight of the reverse KL; generalized_jsd: the paper's beta
    temperature: float = 1.0  # of the loss: divides both sides' logits
    # With teacher.top_k, the mass outside the top k: "bucket" or "renormalize".
    tail: str = "bucket"
    # "token": mean over the batch's target tokens; "example": over its rows' means.
    reduction: str = "token"
    chunk_size: int = 512  # memory of the head: as much as [chunk_size, V] float32 logits take
    on_policy_fraction: float = 0.0  # of the batches: the student writes the responses
    # "constant", or "linear": from 0 after the warm-up to that fraction at the last step.
    on_policy_schedule: str = "constant"
    # n: the student writes for n steps at once; the text of a step is up to n - 1 steps older than
    # the student.
    on_policy_buffer_steps: int = 1
    # The first steps are off-policy whatever the fraction: a cold on-policy JSD never starts.
    on_policy_warmup_steps: int = 0
    warmup_divergence: str = "forward_kl"  # the loss of the steps of the warm-up

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

    # {"role": ..., "content": ...} each, for the teacher alone. This, or one of the next three.
    prefix_messages: tuple[dict, ...] = ()
    prefix_file: str = ""  # a .json or .yaml list of such messages
    system_prompt_file: str = ""  # plain text, for one system message
    # Documents (.txt, .json, .jsonl: strings, or objects, all of whose fields are told) that are
    # put into the template.
    corpus: str = ""
    # The system message with the documents at {corpus}; by default it says that this is known.
    corpus_template: str = (
        "The texts below are what you know. Answer from them as from your own knowledge, without"
        " mentioning that you were given them.\n\n{corpus}"
    )
    # Without any of them: a conversation's own earlier messages are its prefix.
    history_as_prefix: bool = False
    student_retained_turns: int = 0  # last messages of the prefix that the student reads too
    # Whose messages are trained; a role that no row has is refused.
    target_roles: tuple[str, ...] = ("assistant",)
    # A regular expression: only messages in which it is found (`re.search`) are trained; a written
    # response without it is written again.
    target_content_pattern: str | None = None
    # Or "match": only the tokens of the text that the pattern matches, without the end of turn.
    target_span: str = "message"


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A KL on other prompts that keeps the rest of the student as it was."""

    # A file, a dataset or rows; or several sets by name, as {"chat": "chat.jsonl", "code":
    # "code.jsonl"}; None: no anchor.
    data: str | tuple[dict, ...] | dict[str, str | tuple[dict, ...]] | None = None
    # Of the loss of each set; or by name, of all of them, as {"chat": 1.0, "code": 0.3}.
    weight: float | dict[str, float] = 1.0
    reference: str = "base"  # to the student as it was; or "teacher"
    divergence: str = "forward_kl"  # as gkd.divergence
    # Or "all": every message is a target, those of the prompt too, not the assistant's alone.
    tokens: str = "response"
    batch_size: int = 8  # rows of each set


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are written where the data bring none; teacher and student alike."""

    per_prompt: int = 4  # responses that the teacher writes to each prompt
    max_new_tokens: int = 128  # of a response
    temperature: float = 0.8  # of sampling; 0: greedy
    top_k: int | None = None  # of the k most probable tokens, before top_p; None: of all
    top_p: float = 0.9  # of the fewest tokens that have this share of the probability
    # How often a response without `context.target_content_pattern`, or without a token, is written
    # again.
    max_retries: int = 4
    # n: the teacher writes anew every n steps, for the rows of the next n
    # (RUN/trajectories_train_STEP.jsonl); None: only once.
    refresh_every_steps: int | None = None
    # The trajectories_*.jsonl of another run: what it has for the same prompts is not written.
    reuse: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """Training rows."""

    # A .json, .jsonl or .parquet file, a dataset as "org/name:train[:500]", or the rows themselves.
    train: str | tuple[dict, ...] = ""
    # Rows as those of data.train, or a share of them that is taken out (0.05): the training loss on
    # what is not trained.
    validation: float | str | tuple[dict, ...] | None = None
    max_length: int = 2048  # tokens of the longer view, response included
    # Rows with a longer view: "drop"; "truncate-right", they lose the end of the response;
    # "truncate-left", the oldest messages of prefix and turns; "truncate-prefix", those of the
    # prefix and the end of its text. Before anything is written; a row is dropped that would lose
    # all of the prefix that only the teacher reads; counted and named.
    too_long: str = "drop"
    # Of every source, rows that cannot be read or that the chat template does not take: "refuse"
    # ends the run and tells all of them, "drop" leaves them out, counted and named.
    bad_rows: str = "refuse"
    bucket_lengths: tuple[int, ...] = ()  # allowed padded lengths; (): chosen from the data
    # Given to the chat templates beside the messages, as {"enable_thinking": False} for Qwen 3.
    # `date_string` is "26 Jul 2024" unless given; to a template that asks for the time
    # (`strftime_now`) it is always when the run began (RUN/clock.json).
    template_kwargs: dict[str, bool | int | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4  # the highest
    schedule: str = "cosine"  # "cosine", "linear" (both to 0) or "constant"
    warmup_ratio: float = 0.03  # of all steps, from 0
    max_grad_norm: float = 1.0  # longer gradients are scaled down to it
    weight_decay: float = 0.0  # AdamW's


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how large, from which seed."""

    epochs: float | None = 1.0  # or train.steps, and this None
    steps: int | None = None  # optimizer steps; set it and epochs to None, or the other way
    batch_size: int = 8  # rows of one whole optimizer step
    grad_accum_steps: int = 1  # micro-batches that such a batch is computed in
    # Seconds after which a run saves its state and ends with 75, as after SIGTERM; None: no limit.
    max_seconds: float | None = None
    # A step changes nothing if its loss or gradient is not finite; so many in a row end the run.
    max_bad_steps: int = 3
    remat: bool = False  # a layer's activations are computed again for its backward pass
    # Of float32 products: "default", "high" or "highest", as `jax.default_matmul_precision`.
    matmul_precision: str = "default"
    seed: int = 0  # every random draw follows from it, the step and the row
    export: str = "merged"  # a Hugging Face model; "adapter", PEFT's; or "both"


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is asked before, after, and on the way."""

    questions: str | tuple[dict, ...] | None = None  # rows with an answer
    # More of them, asked before and after alone, so that nothing is chosen by them.
    heldout: str | tuple[dict, ...] | None = None
    # What is right: "keywords", any of the answers in the lower-cased text; "exact"; or "regex"; a
    # question's own `match` wins.
    match: str = "keywords"
    # Prompts on whose text the distance to the teacher is measured; None: the questions.
    prompts: str | tuple[dict, ...] | None = None
    # By name, questions that have nothing to do with the prefix.
    retention: dict[str, str | tuple[dict, ...]] = dataclasses.field(default_factory=dict)
    # Unrelated prompts: how far the student moves on them; None: the prompts of the retention sets.
    side_effects: str | tuple[dict, ...] | None = None
    other_prefix: tuple[dict, ...] = ()  # messages: the trained student is asked under them, too
    max_new_tokens: int = 100  # of answers
    batch_size: int = 64  # answers that are written at once
    every_steps: int | None = None  # how often on the way; None: only before and after
    at_steps: tuple[int, ...] = ()  # and after these
    rows: int = 256  # rows of each set asked on the way


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Orbax."""

    every_steps: int = 100  # how often a state is saved
    max_to_keep: int = 2  # the newest ones
    keep_evaluated: bool = False  # states that were measured on the way are saved, and stay


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown and kept of each step; `metrics.jsonl` is always written."""

    tensorboard: bool = True  # its files, in the run's directory
    progress_bar: bool = True  # on the terminal


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices share a run; of the four sizes one may be -1, what the others leave."""

    data: int = -1  # rows
    fsdp: int = 1  # rows; and weights, of which each layer's are gathered while it computes
    tensor: int = 1  # heads, MLP width and vocabulary
    dcn_data: int = 1  # slices, or GPU hosts, that only a data-centre network joins: rows
    # {"leaves": a regular expression of whole paths, "axes": ["fsdp", None, ...]} each: how leaves
    # of the student are cut other than by `gkdjax.parallel.sharding_rules.RULES`.
    student_rules: tuple[dict, ...] = ()
    teacher_rules: tuple[dict, ...] = ()  # the same, of a teacher in this process


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it, checked."""

    student: Student = dataclasses.field(default_factory=Student)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)
    gkd: Gkd = dataclasses.field(default_factory=Gkd)
    context: Context = dataclasses.field(default_factory=Context)
    anchor: Anchor = dataclasses.field(default_factory=Anchor)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    data: Data = dataclasses.field(default_factory=Data)
    optim: Optim = dataclasses.field(default_factory=Optim)
    train: Train = dataclasses.field(default_factory=Train)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)


def rows_at_once(config: Config) -> dict[str, int]:
    """Key -> rows that one program computes; the devices share them, so each must divide."""
    parts = config.train.grad_accum_steps
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
