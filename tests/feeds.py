"""A feed of rows that bring their responses: nobody has to write one."""

from gkdjax.data.chat import Chat
from gkdjax.data.sources import read_examples
from gkdjax.data.targets import TargetRules
from gkdjax.data.view_rules import ViewRules
from gkdjax.feed import Feed
from gkdjax.trajectories.rules import ResponseRules


def feed_of(chat: Chat, rows: int = 10, batch_size: int = 4) -> Feed:
    """Of rows of different lengths, ready to give batches."""
    data = [{"prompt": "ask" * (1 + i % 4), "response": "b" * (1 + i % 3)} for i in range(rows)]
    rules = ViewRules(
        student_chat=chat,
        teacher_chat=chat,
        retained=0,
        targets=TargetRules(("assistant",)),
        max_length=64,
        too_long="drop",
    )
    feed = Feed(
        "data.train",
        read_examples(tuple(data), "data.train"),
        rules,
        ResponseRules(None, 0, 8),
        per_prompt=1,
        batch_size=batch_size,
        allowed_lengths=(),
        seed=0,
    )
    feed.prepare("never read", None, source=None, chunk=4, show=False)
    return feed
