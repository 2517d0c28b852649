"""A teacher behind HTTP, as the rest of the project sees it."""

import base64
import dataclasses
import threading
from collections.abc import Callable, Sequence

from gkdjax.data import batching
from gkdjax.data.chat_template import Chat
from gkdjax.losses.objective import TopKTargets
from gkdjax.losses.topk import TokenTopK
from gkdjax.parallel import multihost
from gkdjax.teachers.base import Capabilities, TeacherHooks
from gkdjax.teachers.server.answers import SampleRequest, ScoreRequest, TeacherAnswer, lost_sample
from gkdjax.teachers.server.scheduler import Pool
from gkdjax.teachers.server.store import codec
from gkdjax.types import Batch, Completion, ContextLimit, Prompt, SamplingParams


@dataclasses.dataclass(kw_only=True)
class ServerTeacher(TeacherHooks):
    """A `base.RemoteTeacher`; made by `connect.connect`, which has checked the server."""

    pool: Pool  # closed by `close`
    chat: Chat  # renders the teacher's view
    description: str  # for the log, without an address
    capabilities: Capabilities
    top_k: int
    context: ContextLimit
    template_kwargs: dict  # for a server that renders the prompt itself

    def ask(self, batch: Batch, names: Sequence[str]) -> Callable[[], TopKTargets]:
        """See `base.RemoteTeacher`; NumPy in and out, and no padding is sent."""
        requests = [
            ScoreRequest(
                name,
                batch.teacher_tokens_BT[row][batch.teacher_mask_BT[row]],
                batch.teacher_at_BN[row][batch.target_mask_BN[row]],
                self.top_k,
            )
            for row, name in enumerate(names)
        ]
        wait = self.pool.scores([request for request in requests if len(request.at)])

        def targets() -> TopKTargets:
            answers, nothing = iter(wait()), lost_sample(self.top_k)
            rows = [next(answers) if len(request.at) else nothing for request in requests]
            return batching.pad_top_k(rows, batch.target_mask_BN.shape[1])

        return targets

    def targets(self, batch: Batch) -> TopKTargets:
        """See `base.Teacher`."""
        return self.ask(batch, [f"row {i}" for i in batch.row_id_B])()

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingParams
    ) -> list[Completion]:
        """See `base.Teacher`; completions hold the logprobs with which they were sampled.

        A response with a token that is no id of ours comes back without any token. Each process
        asks for a share, and all get all responses.
        """
        requests = [
            SampleRequest(
                *(prompt.name, prompt.ids, prompt.messages, sampling, int(seed)),
                *(self.chat.stop_ids, self.top_k, self.template_kwargs, prompt.tools),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def ask(numbers: list[int]) -> list[TeacherAnswer]:
            return self.pool.samples([requests[number] for number in numbers])()

        answers = multihost.split_over_processes(
            ask,
            len(requests),
            lambda answer: base64.b64encode(codec.encode(answer)).decode(),
            lambda text: codec.decode(base64.b64decode(text)),
        )
        return [
            Completion(a.target_ids, a.finished, TokenTopK(a.topk, a.target_logprob))
            for a in answers
        ]

    def stop_on(self, event: threading.Event) -> None:
        """See `base.TeacherHooks`: an answer may be minutes away."""
        self.pool.stopped = event

    def report(self) -> dict[str, int]:
        """The pool's counts, summed over all processes."""
        reports = multihost.exchange(self.pool.report())
        return {name: sum(report[name] for report in reports) for name in reports[0]}

    def close(self) -> None:
        """Waits for requests under way."""
        self.pool.close()
