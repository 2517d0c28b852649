"""Killed, a run pays for no answer twice, and ends as an undisturbed one."""

import pytest
import server_kills

# (answers, seconds after them); without seconds, an answer is on its way.
MOMENTS = ((2, 0.0), (6, 0.01), (8, 0.0), (6, 0.02), (3, 0.0))


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(MOMENTS[2:3], id="once"),
        pytest.param(MOMENTS, id="five times", marks=pytest.mark.slow(100)),
    ],
)
def test_a_killed_run_is_equal_to_the_bit_and_its_key_is_nowhere(moments, tmp_path):
    """What was stored and asked for again would have been told by `kill_many`.

    Only processes can be killed, and only they have command lines.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = server_kills.KilledRuns(tmp_path)
    with runs.server:
        runs.whole(whole)
        kills = runs.kill_many(killed, moments)
    assert len(kills) == len(moments), kills
    assert any(kill.stored < kill.asked for kill in kills), kills  # some were on their way
    if len(kills) > 1:
        assert any(kill.step > 0 for kill in kills) and kills[-1].stored > kills[0].stored, kills
    wanted, got = server_kills.outcome(whole), server_kills.outcome(killed)
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if wanted[name] != got[name]] == []
    key = server_kills.KEY.encode()
    sent = {request.headers["Authorization"] for request in runs.server.requests}
    assert sent == {f"Bearer {server_kills.KEY}"}
    assert runs.command_lines and not any(key in line for line in runs.command_lines)
    logs = [runs.log(whole), runs.log(killed)]
    files = [path for path in (*tmp_path.glob("*/**/*"), *logs) if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if key in path.read_bytes()] == []
