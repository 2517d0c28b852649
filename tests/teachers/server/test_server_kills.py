"""Killed, a run pays for no answer twice, and ends as an undisturbed one."""

import pytest
import server_kills

# (answers, seconds after them); without seconds, an answer is on its way.
MOMENTS = ((2, 0.0), (6, 0.01), (8, 0.0), (6, 0.02), (3, 0.0))


FIVE = pytest.param(MOMENTS, id="five times", marks=pytest.mark.slow(100))


@pytest.fixture(scope="module", params=[pytest.param(MOMENTS[2:3], id="once"), FIVE])
def runs(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("kills")
    made = server_kills.KilledRuns(base)
    with made.server:
        made.finish(base / "whole")
        kills = made.kill_many(base / "killed", request.param)
    assert len(kills) == len(request.param), kills
    return made, base, kills


def test_a_killed_run_is_equal_to_the_bit(runs):
    """What was stored and asked for again would have been told by `kill_many`."""
    _, base, kills = runs
    assert any(kill.stored < kill.asked for kill in kills), kills  # some were on their way
    if len(kills) > 1:
        assert any(kill.step > 0 for kill in kills) and kills[-1].stored > kills[0].stored, kills
    wanted, got = (server_kills.outcome(base / name) for name in ("whole", "killed"))
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if wanted[name] != got[name]] == []


def test_the_key_is_in_no_file_no_log_and_no_command_line(runs):
    made, base, _ = runs
    assert len(made.command_lines) >= 1
    key = server_kills.KEY.encode()
    sent = {request.headers["Authorization"] for request in made.server.requests}
    assert sent == {f"Bearer {server_kills.KEY}"}
    assert not any(key in line for line in made.command_lines)
    logs = [made.log(base / name) for name in ("whole", "killed")]
    files = [path for path in (*base.glob("*/**/*"), *logs) if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if key in path.read_bytes()] == []
