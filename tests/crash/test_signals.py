"""Ctrl-C and SIGTERM at random moments: one line, exit code 130 or 143, and the restart ends in the same bytes."""

import random
import signal

import pytest

STAGES = ("fisher", "fit-nuq", "allocate kl", "build again")
CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "SIGTERM")}


@pytest.mark.parametrize("number", CODES, ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize("stage", STAGES)
def test_asked_to_end(road, stage, number):
    draw, quiet = random.Random(stage), road.ended[stage]
    code, said = CODES[number]
    met, longest = 0, quiet.seconds
    for attempt in range(40):
        road.put(f"before {stage}")
        start = quiet.operations[0][0] if attempt % 2 else 0.0
        ended = road.run(stage, after=draw.uniform(min(start, longest), longest), signal=number)
        if ended.code == 0:
            longest = min(longest, ended.seconds)  # this time it was faster: the machine has less to do than before
            continue
        if ended.code == 143 and not ended.err:
            continue  # the command had not begun
        assert ended.code == code, f"exit code {ended.code}: {ended.err}"
        assert len(ended.messages) == 1, ended.err
        assert said in ended.messages[0], ended.err
        assert "Traceback" not in ended.err
        road.restart(stage, f"asked to end after {ended.done} operations")
        met += 1
        if met == 3:
            break
    assert met >= 2
