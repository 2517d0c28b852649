"""Killed five times, a run pays for no answer twice, and ends as an undisturbed one."""

import pytest
import server_kills

# (answers, seconds after them); without seconds, an answer is on its way.
MOMENTS = ((2, 0.0), (6, 0.01), (8, 0.0), (6, 0.02), (3, 0.0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("kills")
    made = server_kills.KilledRuns(base)
    with made.server:
        made.finish(base / "whole")
        kills = made.kill_many(base / "killed", MOMENTS)
    return made, base, kills


def test_a_run_killed_five_times_is_equal_to_the_bit(runs):
    """What was stored and asked for again would have been told by `kill_many`."""
    _, base, kills = runs
    assert len(kills) == 5, kills
    assert any(kill.stored < kill.asked for kill in kills), kills  # some were on their way
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
