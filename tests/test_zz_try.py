import time, sys

sys.path.insert(0, "/work/main/tests")
import pytest
from fake_server import FakeServer
from fake_teacher import MODEL, FakeTeacher
from small_runs import small
from gkdjax import loop

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_it(student, tmp_path):
    rows = [{"prompt": f"ask {i}"} for i in range(4)] + [
        {"prompt": f"tell {i}", "response": "yes"} for i in range(4)
    ]
    f = FakeTeacher()
    with FakeServer(f) as server:
        c = small(
            student,
            teacher__backend="vllm",
            teacher__api_base=server.base,
            teacher__top_k=8,
            gkd__on_policy_fraction=0.5,
            data__train=rows,
            anchor__data=[{"prompt": "o", "response": "fine"}, {"prompt": "p"}],
            anchor__towards="teacher",
            anchor__batch_size=4,
            eval__held_out=[{"prompt": "held", "response": "abc"}, {"prompt": "held 2"}],
        )
        for k in range(2):
            t = time.time()
            found = loop.run(c, tmp_path / f"run{k}")
            print(time.time() - t, found["teacher"], f.answered, len(server.requests))
        import collections

        print(collections.Counter(r.path for r in server.requests))
        print(found["rows"], found.keys())
        print(sorted(p.name for p in (tmp_path / "run0").iterdir()))
