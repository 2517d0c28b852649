"""A dataset of small rows."""

from gkdjax.config import Config, Data, RolloutConfig, Train
from gkdjax.data.chat_template import Chat
from gkdjax.data.dataset import DistillDataset
from gkdjax.data.examples import BadRows, read_examples
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules


def feed_of(
    chat: Chat,
    rows: int = 10,
    prefix: str = "",
    too_long: str = "drop",
    responses: bool = True,
    longest: int = 4,
    max_length: int = 64,
) -> DistillDataset:
    """Rows with prompts of 1, 2, ... up to `longest` words, ready to give batches of 4.

    Without responses it is not ready: somebody has to write them.
    """
    data = [
        {"prompt": "ask" * (1 + i % longest), "response": "b" * (1 + i % 3)} for i in range(rows)
    ]
    if not responses:
        data = [{"prompt": row["prompt"]} for row in data]
    if prefix:
        shared = {"prefix_messages": [{"role": "system", "content": prefix}]}
        data = [row | shared for row in data]
    config = Config(data=Data(), train=Train(), rollout=RolloutConfig(max_new_tokens=8))
    rules = ViewRules(chat, chat, 0, TargetRules(("assistant",)), max_length, too_long)
    examples = read_examples(tuple(data), "data.train")
    dataset = DistillDataset(config, "data.train", examples, rules, 4, BadRows(), per_prompt=1)
    return dataset.with_rollouts({}) if responses else dataset
