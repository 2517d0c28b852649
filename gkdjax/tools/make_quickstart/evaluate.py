"""Exact match by greedy decoding."""

import numpy as np

from gkdjax.models import sampler
from gkdjax.models.decoder import Decoder
from gkdjax.tools.make_quickstart import pretrain, task

_BATCH_SIZE = 256


def exact_match(decoder: Decoder, params: dict, chat, rows: list[task.Row]) -> float:
    """Share of rows whose greedy answer is the right one, to the letter, and ends."""
    conversations = [task.conversation(row) for row in rows]
    prompts = pretrain.token_ids(chat, conversations, add_generation_prompt=True)
    end = chat.convert_tokens_to_ids("<end_of_turn>")
    answers = sampler.sample(
        decoder,
        params,
        [np.asarray(ids, np.int32) for ids in prompts],
        seeds=[0] * len(prompts),
        sampling=sampler.SamplingParams(task.MAX_LENGTH + 2, temperature=0.0, top_p=1.0),
        stop_ids=[end],
        batch_size=_BATCH_SIZE,
        lengths=[pretrain.longest_prompt(chat)],  # one for all abilities: one compilation
    )
    right = [
        answer.finished and chat.decode(answer.ids[:-1]) == row["answer"]
        for answer, row in zip(answers, rows, strict=True)
    ]
    return sum(right) / len(right)
