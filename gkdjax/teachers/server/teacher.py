"""A teacher behind HTTP, as the rest of the project sees it."""

import base64
import threading
from collections.abc import Callable, Sequence

import numpy as np

from gkdjax.data import batching
from gkdjax.data.chat_template import Chat
from gkdjax.losses.objective import TopKTargets
from gkdjax.parallel import multihost
from gkdjax.teachers.base import Capabilities, TeacherHooks
from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer
from gkdjax.teachers.server.scheduler import Pool
from gkdjax.teachers.server.store import codec
from gkdjax.types import Batch, Completion, ContextLimit, Prompt, SamplingParams, TokenTopK


class ServerTeacher(TeacherHooks):
    """A `base.RemoteTeacher`; made by `connect.connect`, which has checked the server."""

    def __init__(
        self,
        pool: Pool,
        chat: Chat,
        description: str,
        capabilities: Capabilities,
        *,
        top_k: int,
        context: ContextLimit,
        template_kwargs: dict,
    ):
        """Keeps what it is given; the pool is its to close.

        Args:
          pool: asks the server.
          chat: renders the teacher's view.
          description: a few words for the log, without an address.
          capabilities: of the server, as they were found.
          top_k: K of what is asked for.
          context: how much the server reads.
          template_kwargs: for a server that renders the prompt itself.
        """
        self.pool, self.chat, self.description = pool, chat, description
        self.capabilities, self.context = capabilities, context
        self._top_k, self._template_kwargs = top_k, template_kwargs

    def ask(self, batch: Batch, names: Sequence[str]) -> Callable[[], TopKTargets]:
        """See `base.RemoteTeacher`; NumPy in and out, and no padding is sent."""
        rows = [self._score_request(batch, row, name) for row, name in enumerate(names)]
        asked = [request for request in rows if len(request.at)]
        wait = self.pool.scores(asked)

        def targets() -> TopKTargets:
            answers = iter(wait())
            nothing = self._no_targets()
            kept = [next(answers).kept() if len(request.at) else nothing for request in rows]
            return batching.pad_top_k(kept, batch.target_mask_BN.shape[1])

        return targets

    def targets(self, batch: Batch) -> TopKTargets:
        """See `base.Teacher`."""
        return self.ask(batch, [f"row {i}" for i in batch.row_id_B])()

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingParams
    ) -> list[Completion]:
        """See `base.Teacher`; of its text it keeps what it predicted there.

        A response of which a token is no id of ours comes back without any token. Of several
        processes each asks for its share, and all get all responses.
        """
        requests = [
            SampleRequest(
                prompt.name,
                prompt.ids,
                prompt.messages,
                sampling,
                int(seed),
                self.chat.stop_ids,
                self._top_k,
                self._template_kwargs,
                prompt.tools,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def ask(numbers: list[int]) -> list[TeacherAnswer]:
            return self.pool.samples([requests[number] for number in numbers])()

        answers = multihost.split_over_processes(ask, len(requests), _to_text, _from_text)
        return [_completion(answer) for answer in answers]

    def stop_on(self, event: threading.Event) -> None:
        """See `base.TeacherHooks`: an answer may be minutes away."""
        self.pool.stopped = event

    def report(self) -> dict[str, int]:
        """What was asked and bought by all processes, for results.json."""
        reports = multihost.exchange(self.pool.report())
        return {name: sum(report[name] for report in reports) for name in reports[0]}

    def close(self) -> None:
        """Waits for what is on its way."""
        self.pool.close()

    def _score_request(self, batch: Batch, row: int, name: str) -> ScoreRequest:
        ids = batch.teacher_tokens_BT[row][batch.teacher_mask_BT[row]]
        at = batch.teacher_at_BN[row][batch.target_mask_BN[row]]
        return ScoreRequest(name, ids, at, self._top_k)

    def _no_targets(self) -> TokenTopK:
        none = np.zeros(0, np.float32)
        no_rows = np.zeros((0, self._top_k), np.float32)
        return TeacherAnswer(
            none.astype(np.int32), none, no_rows.astype(np.int32), no_rows, none
        ).kept()


def _to_text(answer: TeacherAnswer) -> str:
    return base64.b64encode(codec.encode(answer)).decode()


def _from_text(text: str) -> TeacherAnswer:
    return codec.decode(base64.b64decode(text))


def _completion(answer: TeacherAnswer) -> Completion:
    return Completion(answer.target_ids, answer.finished, answer.kept())
