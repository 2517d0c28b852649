"""A feed of rows that bring their responses: nobody has to write one."""

from gkdjax.data.chat_template import Chat
from gkdjax.data.dataset import DistillDataset, RolloutFilter
from gkdjax.data.examples import read_examples
from gkdjax.data.loss_mask import TargetRules
from gkdjax.data.views import ViewRules


def feed_of(
    chat: Chat,
    rows: int = 10,
    prefix: str = "",
    too_long: str = "drop",
    responses: bool = True,
    **how,
) -> DistillDataset:
    """Of rows of different lengths, ready to give batches of 4.

    Args:
      responses: False: without any, and not ready.
      how: longest: the prompts have 1, 2, ... up to so many words; max_length: of a view;
        most_padding: as of `DistillDataset`.
    """
    how = {"longest": 4, "max_length": 64, "most_padding": 0.2} | how
    prompts = ["ask" * (1 + i % how["longest"]) for i in range(rows)]
    data = [{"prompt": text, "response": "b" * (1 + i % 3)} for i, text in enumerate(prompts)]
    if not responses:
        data = [{"prompt": text} for text in prompts]
    if prefix:
        shared = {"prefix_messages": [{"role": "system", "content": prefix}]}
        data = [row | shared for row in data]
    rules = ViewRules(
        student_chat=chat,
        teacher_chat=chat,
        retained=0,
        targets=TargetRules(("assistant",)),
        max_length=how["max_length"],
        too_long=too_long,
    )
    dataset = DistillDataset(
        "data.train",
        read_examples(tuple(data), "data.train"),
        rules,
        RolloutFilter(rules.targets, 0, 8),
        per_prompt=1,
        most_padding=how["most_padding"],
        batch_size=4,
        allowed_lengths=(),
        seed=0,
    )
    return dataset.with_rollouts({}) if responses else dataset
