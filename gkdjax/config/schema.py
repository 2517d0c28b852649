"""Every key of the config: its type, the values that it takes, its default, and what it is.

An option is a field here and the line that reads it: `parse` checks its type, its `Literal` choices
and its `Range`, and `gkdjax.tools.options_table` writes it into the README. Checks of several keys
together are in `checks`. Nothing here imports jax, so that a bad value is answered at once.
"""

import dataclasses
import math
import pathlib
import typing
from typing import Annotated, Literal

ASSETS = pathlib.Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field takes; an end in a round bracket is not one of them."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if '(' in self.ends else 'at least'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


Count = Annotated[int, Range(1)]
Tokens = Annotated[int, Range(1, 2**20)]  # of one text: the sampler takes memory for all of them
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Divergence = Literal["forward_kl", "reverse_kl", "mixed", "generalized_jsd"]
Dtype = Literal["float32", "bfloat16", "float16"]
Match = Literal["keywords", "exact", "regex"]
MeshAxis = Literal["data", "fsdp", "tensor"]
Rows = str | tuple[dict, ...]  # a file, a dataset as "org/name:split", or the rows themselves

MATCHES = typing.get_args(Match)
MESH_AXES = typing.get_args(MeshAxis)
SERVERS = ("vllm", "sglang", "openai")  # each teacher.backend that is reached by HTTP
# Keys of a server that change nothing in what it answers.
REACH_KEYS = ("api_base", "api_key_env", "concurrency", "timeout_s", "deadline_s", "max_retries")
REACH_KEYS += ("max_unreadable", "store", "offline", "trust_env")
PREFIX_KEYS = ("prefix_messages", "prefix_file", "system_prompt_file", "corpus")


class Message(typing.TypedDict):
    role: str
    content: str


class ShardingRule(typing.TypedDict):
    leaves: str  # a regular expression of whole paths
    axes: tuple[MeshAxis | None, ...]  # of each dimension


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, as in `gkdjax.models.lora`."""

    rank: Count = 64  # columns of A and rows of B
    alpha: Positive = 128.0  # their product is scaled by alpha / rank
    dropout: Annotated[float, Range(0, 1, "[)")] = 0.05  # on the input of A, in training
    # Names of kernels, regular expressions of whole paths ("layers/[qkv]_proj"), or "all-linear".
    targets: tuple[str, ...] | Literal["all-linear"] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # Directory or hub id of a PEFT adapter to start from, whose rank, alpha and targets have to be
    # these; "": new adapters, an identity.
    init_from: str = ""


@dataclasses.dataclass(frozen=True)
class Student:
    """The model that learns."""

    model: str = ""  # a Hugging Face directory or hub id
    dtype: Dtype | None = None  # of a frozen base; None: the checkpoint's
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products
    adapter: Literal["lora", "none"] = "lora"  # "none": every parameter is trained
    lora: Lora = Lora()


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The model that the student learns from."""

    # "local-toggle": the student's base with the adapter off; "flax": a model in this process; or a
    # server: "vllm", "sglang", or "openai" for any that speaks OpenAI's API.
    backend: Literal["local-toggle", "flax", "vllm", "sglang", "openai"] = "local-toggle"
    model: str = ""  # flax: a Hugging Face directory or hub id
    # Directory or hub id of the tokenizer; "": the flax model's own, or for a server the student's.
    tokenizer: str = ""
    adapter: str = ""  # a PEFT adapter's directory or hub id, on top of the teacher; "": none
    dtype: Dtype | None = None  # flax; None: the checkpoint's
    # Most bytes of memory for the prefixes' keys and values, which are computed once per prefix and
    # not once per row and step.
    prefix_bytes: Natural = 2**30
    # K: targets are its K best tokens and the mass of the others; None: the whole vocabulary,
    # exactly, or 20 for a server.
    top_k: Count | None = None
    api_base: str = ""  # server: its address, as http://127.0.0.1:8000/v1
    api_model: str = ""  # server: its name for the model; "": the only model that it has
    # server: the *name* of the environment variable that holds the key; "": no key
    api_key_env: str = ""
    concurrency: Count = 16  # server: requests at a time
    timeout_s: Positive = 120.0  # server: seconds of one attempt
    deadline_s: Positive = 900.0  # server: seconds of a request with all its attempts
    max_retries: Natural = 1000  # server: attempts after the first, within the deadline
    # server: share of the responses that may be lost because the text of a token names no id, at
    # least five; with more the run ends
    max_unreadable: Share = 0.05
    # server: the file of its answers, none of which is requested twice; runs may share it; "":
    # RUN/answers.sqlite; None: none
    store: str | None = ""
    offline: bool = False  # server: answer from the store alone, without a server
    trust_env: bool = False  # server: use the environment's proxies and certificates

    @property
    def is_server(self) -> bool:
        return self.backend in SERVERS

    @property
    def is_base(self) -> bool:
        """Whether it is the student's own base."""
        return self.backend == "local-toggle"

    @property
    def is_model(self) -> bool:
        """Whether it is a model of its own in this process."""
        return self.backend == "flax"


@dataclasses.dataclass(frozen=True)
class Gkd:
    """The loss, and whose text it is taken on."""

    divergence: Divergence = "mixed"  # see the losses' README
    jsd_beta: Share = 0.0  # mixed: weight of the reverse KL; generalized_jsd: the paper's beta
    temperature: Positive = 1.0  # of the loss: divides both sides' logits
    # The mass outside the top k, with teacher.top_k.
    tail: Literal["bucket", "renormalize"] = "bucket"
    # "token": mean over the batch's target tokens; "example": over its rows' means.
    reduction: Literal["token", "example"] = "token"
    chunk_size: Count = 512  # memory of the head: that of float32 logits [chunk_size, V]
    on_policy_fraction: Share = 0.0  # share of the batches whose responses the student writes
    # "linear": from 0 after the warm-up to on_policy_fraction at the last step.
    on_policy_schedule: Literal["constant", "linear"] = "constant"
    # n: the student writes for n steps at once, so the text of a step is up to n - 1 steps old.
    on_policy_buffer_steps: Count = 1
    # First steps, which are off-policy whatever the fraction: a cold on-policy JSD never starts.
    on_policy_warmup_steps: Natural = 0
    warmup_divergence: Divergence = "forward_kl"  # the loss of the warm-up's steps

    def of_loss(self) -> dict:
        """-> arguments of `gkdjax.losses.objective.weighted_divergence` by name."""
        return {
            "beta": self.jsd_beta,
            "temperature": self.temperature,
            "tail": self.tail,
            "chunk_size": self.chunk_size,
        }


@dataclasses.dataclass(frozen=True)
class Context:
    """What only the teacher reads, and which messages are trained."""

    # The prefix: {"role": ..., "content": ...} each. This key, or one of the next three.
    prefix_messages: tuple[Message, ...] = ()
    prefix_file: str = ""  # a .json or .yaml list of such messages
    system_prompt_file: str = ""  # plain text, for one system message
    # Documents for one system message: .txt, or .json and .jsonl of strings or objects, of which
    # every field is used.
    corpus: str = ""
    # That system message, with the documents at {corpus}.
    corpus_template: str = (
        "The texts below are what you know. Answer from them as from your own knowledge, without"
        " mentioning that you were given them.\n\n{corpus}"
    )
    # Without any of them: a conversation's own earlier messages are its prefix.
    history_as_prefix: bool = False
    student_retained_turns: Natural = 0  # last messages of the prefix that the student reads too
    # Roles whose messages are trained; one that no row has is refused.
    target_roles: tuple[str, ...] = ("assistant",)
    # A regular expression: only messages in which it is found (`re.search`) are trained; a written
    # response without it is written again.
    target_content_pattern: str | None = None
    # "match": only the tokens of the text that the pattern matches, without the end of turn.
    target_span: Literal["message", "match"] = "message"


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A KL on other prompts that keeps the rest of the student as it was."""

    # A file, a dataset or rows; or several sets by name, as {"chat": "chat.jsonl", "code":
    # "code.jsonl"}; None: no anchor.
    data: Rows | dict[str, Rows] | None = None
    # Weight of the loss of each set; or by name, of all sets, as {"chat": 1.0, "code": 0.3}.
    weight: Positive | dict[str, Positive] = 1.0
    reference: Literal["base", "teacher"] = "base"  # "base": the student as it was
    divergence: Divergence = "forward_kl"  # as gkd.divergence
    # "all": every message is a target, those of the prompt too, and not the assistant's alone.
    tokens: Literal["response", "all"] = "response"
    batch_size: Count = 8  # rows of each set


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How teacher and student write responses to rows that have none."""

    # Responses that the teacher writes to each prompt.
    per_prompt: Annotated[int, Range(1, 10_000)] = 4
    max_new_tokens: Tokens = 128  # of a response
    temperature: NotNegative = 0.8  # of sampling; 0: greedy
    top_k: Count | None = None  # sample from the k most probable tokens, before top_p; None: all
    # Sample from the fewest tokens whose probabilities add up to it.
    top_p: Annotated[float, Range(0, 1, "(]")] = 0.9
    # How often a response without `context.target_content_pattern`, or without a token, is written
    # again.
    max_retries: Natural = 4
    # n: the teacher writes anew every n steps, for the rows of the next n
    # (RUN/trajectories_train_STEP.jsonl); None: only once.
    refresh_every_steps: Count | None = None
    # The trajectories_*.jsonl of another run, whose responses to the same prompts are used.
    reuse: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """Training rows."""

    # A .json, .jsonl or .parquet file, a dataset as "org/name:train[:500]", or the rows themselves.
    train: Rows = ""
    # Rows like those of data.train, or a share of them that is taken out (0.05), on which the loss
    # is measured and not trained.
    validation: Annotated[float, Range(0, 1, "()")] | Rows | None = None
    max_length: Annotated[int, Range(2)] = 2048  # tokens of the longer view, response included
    # Rows with a longer view: "truncate-right" cuts the end of the response; "truncate-left" the
    # oldest messages of prefix and turns; "truncate-prefix" the oldest of the prefix and the end of
    # its text. All before anything is written; a row that would lose all of its prefix is dropped.
    # Such rows are counted and named.
    too_long: Literal["drop", "truncate-right", "truncate-left", "truncate-prefix"] = "drop"
    # Rows of any source that cannot be read or that the chat template does not take: "refuse" ends
    # the run and names all of them, "drop" leaves them out, counted and named.
    bad_rows: Literal["refuse", "drop"] = "refuse"
    bucket_lengths: tuple[Count, ...] = ()  # allowed padded lengths; (): chosen from the data
    # Arguments of the chat templates beside the messages, as {"enable_thinking": False} for Qwen 3.
    # `date_string` is "26 Jul 2024" unless given; a template that asks for the time
    # (`strftime_now`) always gets that of the run's beginning (RUN/clock.json).
    template_kwargs: dict[str, bool | int | str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule."""

    learning_rate: Positive = 2e-4  # the highest
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # the first two end at 0
    warmup_ratio: Annotated[float, Range(0, 1, "[)")] = 0.03  # share of all steps, from 0
    max_grad_norm: Positive = 1.0  # longer gradients are scaled down to it
    weight_decay: NotNegative = 0.0  # AdamW's


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how large, from which seed."""

    epochs: Positive | None = 1.0  # None: train.steps is given
    steps: Count | None = None  # optimizer steps; None: train.epochs is given
    batch_size: Count = 8  # rows of one whole optimizer step
    grad_accum_steps: Count = 1  # micro-batches that such a batch is computed in
    # Seconds after which a run saves its state and ends with 75, as after SIGTERM; None: no limit.
    max_seconds: Annotated[float, Range(1)] | None = None
    # Seconds of a step, with its save, after which a process is taken to hang, and ends with 75 (or
    # five times the median of the steps before); None: it may take any time.
    watchdog_s: Annotated[float, Range(1)] | None = 300.0
    # A step changes nothing if its loss or gradient is not finite; so many in a row end the run.
    max_bad_steps: Count = 3
    remat: bool = False  # compute a layer's activations again for its backward pass
    # Of float32 products, as `jax.default_matmul_precision`.
    matmul_precision: Literal["default", "high", "highest"] = "default"
    # Every random draw follows from it, the step and the row; jax reads 32 bits of it.
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    # "merged": a Hugging Face model; "adapter": PEFT's.
    export: Literal["merged", "adapter", "both"] = "merged"


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured before, after, and on the way."""

    questions: Rows | None = None  # rows with an answer
    # More of them, answered before and after alone, so that nothing is chosen by them.
    heldout: Rows | None = None
    # What is right: "keywords", any of the answers in the lower-cased text; "exact", the text; or
    # "regex"; a question's own `match` comes first.
    match: Match = "keywords"
    # Prompts on whose text the distance to the teacher is measured; None: the questions.
    prompts: Rows | None = None
    # By name, questions that have nothing to do with the prefix.
    retention: dict[str, Rows] = dataclasses.field(default_factory=dict)
    # Unrelated prompts: how far the student moves on them; None: the prompts of the retention sets.
    side_effects: Rows | None = None
    # Messages: the trained student answers the questions under them, too.
    other_prefix: tuple[Message, ...] = ()
    max_new_tokens: Tokens = 100  # of answers
    batch_size: Count = 64  # answers that are written at once
    every_steps: Count | None = None  # how often on the way; None: only before and after
    at_steps: tuple[Natural, ...] = ()  # and after these
    rows: Count = 256  # rows of each set on the way


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Orbax."""

    every_steps: Count = 100  # how often a state is saved
    max_to_keep: Count = 2  # the newest ones
    keep_evaluated: bool = False  # save each state that is measured on the way, and keep it


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown and written of each step; `metrics.jsonl` is always written."""

    tensorboard: bool = True  # its files, in the run's directory
    progress_bar: bool = True  # on the terminal


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices share a run; one of the four sizes may be -1: what the others leave."""

    data: int = -1  # rows
    fsdp: int = 1  # rows; and weights, each layer's of which are gathered while it computes
    tensor: int = 1  # heads, MLP width and vocabulary
    dcn_data: int = 1  # slices, or GPU hosts, that only a data-centre network joins: rows
    # {"leaves": a regular expression of whole paths, "axes": ["fsdp", None, ...]} each: how leaves
    # of the student are sharded, before `gkdjax.parallel.sharding_rules.RULES`.
    student_rules: tuple[ShardingRule, ...] = ()
    teacher_rules: tuple[ShardingRule, ...] = ()  # the same, of a teacher in this process


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections, checked."""

    student: Student = Student()
    teacher: Teacher = Teacher()
    gkd: Gkd = Gkd()
    context: Context = Context()
    anchor: Anchor = Anchor()
    rollout: RolloutConfig = RolloutConfig()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    mesh: Mesh = Mesh()


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
    data: Rows
    weight: float


def anchor_sets(anchor: Anchor) -> list[AnchorSet]:
    """-> [] without an anchor."""
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
