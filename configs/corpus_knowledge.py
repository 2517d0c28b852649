"""Documents into the weights: questions that a student answers without having them to read.

    python -m gkdjax.main --config=configs/corpus_knowledge.py

The teacher, Qwen 3 1.7B with its adapter off, reads twelve short documents about Veldhavn, a town
that does not exist (`corpus_knowledge/documents.jsonl`, put into `context.corpus_template`), and
answers 40 prompts about it, eight times each; the student is the same model without them. First the
student learns the teacher's text, then, for half of the steps, its own text as the teacher, which
reads the documents, would continue it. The evaluation asks 24 questions about facts that the
prompts touch, 16 held-out ones (only before and after the training), facts of the world that must
stay, and measures how far the student moves on 16 prompts about neighbouring things: puffins,
organs, other towns. The results show the cost of reading the documents at each request.

Meant for one GPU of 24 GB. Run time and result: unknown, this mode has not been run yet.

    python -m gkdjax.main --config=configs/corpus_knowledge.py:tiny

The same on a random model of 512 tokens, made on the spot in `runs/tiny_models`, with the first
document alone. Expected, on 2 CPU cores: 75 seconds, most of them compilation; the forward KL to
the model that reads the document falls from 0.034 to 0.008 nats a token on questions that were not
trained. The answers of such a model are noise, so none is right, before or after.
"""

import pathlib

from gkdjax import config
from gkdjax.tools import tiny_mode

HERE = pathlib.Path(__file__).parent
DATA = HERE / "corpus_knowledge"


def get_config(mode: str = ""):
    tiny = tiny_mode.is_asked(mode, __file__)
    c = config.default()
    c.student.model = "Qwen/Qwen3-1.7B"
    c.student.compute_dtype = "bfloat16"
    c.context.corpus = str(DATA / "documents.jsonl")
    c.context.corpus_template = (
        "You know Veldhavn well. Answer from the texts below as from your own knowledge, in one or"
        " two sentences, and do not mention the texts.\n\n{corpus}"
    )

    c.data.train = str(DATA / "prompts.jsonl")
    c.data.max_length = 2048
    c.data.template_kwargs = {"enable_thinking": False}
    c.rollout.per_prompt = 8
    c.rollout.max_new_tokens = 96
    c.rollout.temperature = 1.0  # variety: each fact in several wordings
    c.gkd.on_policy_fraction = 0.5
    c.gkd.on_policy_warmup_steps = 100
    c.gkd.warmup_divergence = "forward_kl"
    c.gkd.divergence = "reverse_kl"
    c.anchor.data = {
        "tasks": str(HERE / "general/tasks.jsonl"),
        "systems": str(HERE / "general/systems.jsonl"),
    }

    c.optim.learning_rate = 2e-4
    c.optim.warmup_ratio = 0.1
    c.train.epochs = 5.0  # 200 steps of 8 rows
    c.train.remat = True
    c.train.export = "both"
    c.eval.questions = str(DATA / "questions.jsonl")
    c.eval.heldout = str(DATA / "heldout.jsonl")
    c.eval.retention = {"facts": str(HERE / "general/facts.jsonl")}
    c.eval.side_effects = str(DATA / "unrelated.jsonl")
    c.eval.other_prefix = [
        {"role": "system", "content": "You are a travel guide. Answer in one or two sentences."}
    ]
    c.eval.every_steps = 50
    if tiny:
        c.context.corpus = tiny_mode.first_lines(c.context.corpus, 1)
        tiny_mode.shrink(c)
    return c
